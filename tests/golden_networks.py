"""Networks of tests/golden (results of lfprop 1.0.0, float64; see tests/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.nn import Step, Sum

FOLDER = Path(__file__).parent / "golden"
NETWORKS = ("mlp", "mlp_nobias_step", "lenet", "vgg_bn", "residual", "conv_variants")


class Residual(nn.Module):
    """body(x) + x through the sum rule."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.body = sequential(layers)
        self.sum = Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.body(x), x)


def sequential(layers: list[Any]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for name, positional, *keywords in layers:
        if name == "Step":
            modules.append(Step())
        elif name == "Residual":
            modules.append(Residual(positional))
        else:
            modules.append(getattr(nn, name)(*positional, **(keywords[0] if keywords else {})))
    return nn.Sequential(*modules)


@dataclass
class Golden:
    """One stored run: the network before its forward pass, and what lfprop made of it."""

    model: nn.Module
    eps: float
    x: Tensor
    y: Tensor
    out: Tensor
    reward: Tensor
    input_reward: Tensor
    feedback: dict[str, Tensor]
    buffers_after: dict[str, Tensor]

    @property
    def composite(self) -> lfp_kernels.composites.Composite:
        return lfp_kernels.composites.Epsilon(eps=self.eps)


def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    spec = json.loads(str(arrays["spec"]))
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items() if k != "spec"}

    def group(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    model = sequential(spec["layers"]).double()
    model.train(spec["train"])
    model.load_state_dict({**group("p/"), **group("b/")})
    return Golden(
        model, spec["eps"], tensors["x"], tensors["y"], tensors["out"], tensors["reward"],
        tensors["input_reward"], group("f/"), group("b1/"),
    )  # fmt: skip
