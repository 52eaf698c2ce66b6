"""Learning rules as data: four small functions around the two products of a layer.

    s        = prologue(r, z)                  signal
    r_in     = input_epilogue(s . M, x)        input reward
    feedback = weight_epilogue(s^T . x, W)     weight feedback; bias feedback from sum_n s

Each rule is a frozen dataclass: parameters, the code under which ``csrc/rules.h`` holds the same
functions, and the functions themselves in plain PyTorch (the oracle). A new rule is added here and
in ``csrc/rules.h``; tests and benchmarks walk ``REGISTRY``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


def stabilize(z: Tensor, eps: float) -> Tensor:
    """``z + eps * sgn(z)`` with ``sgn = +1`` at both zeros; NaN and inf stay what they are."""
    return z + eps * torch.where(z < 0, -1.0, 1.0).to(z.dtype)


@dataclass(frozen=True)
class Rule:
    """Base of all rules; the identity functions make it the plain gradient."""

    name: ClassVar[str]
    code: ClassVar[int]
    # The prologue is r / stab(z), so the layer above may hand over the finished signal.
    chains: ClassVar[bool] = False
    # Where this layer's activation is 0 the rule may read z = 0: its reward is 0 there.
    relu_output_is_enough: ClassVar[bool] = False

    @property
    def stabilizer(self) -> float:
        """The eps that the prologue adds to z; 1 for rules that do not divide."""
        return 1.0

    def prologue(self, reward: Tensor, z: Tensor) -> Tensor:
        return reward

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def input_epilogue(self, g: Tensor, x: Tensor) -> Tensor:
        return g

    def weight_epilogue(self, f: Tensor, weight: Tensor) -> Tensor:
        return f


@dataclass(frozen=True)
class Epsilon(Rule):
    """LFP-epsilon (arXiv 2308.12053): ``s = r / stab(z)``, ``r_in = x * (s W)``,
    ``feedback = |W| * (s^T x)``, ``bias feedback = |b| * sum_n s``.

    Args:
        eps: stabilizer, > 0, in units of z; relative to nothing.
    """

    eps: float = 1e-6

    name = "epsilon"
    code = 0
    chains = True
    relu_output_is_enough = True

    def __post_init__(self) -> None:
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)):
            raise TypeError(f"Epsilon: eps: expected a number, got {type(self.eps).__name__}")
        if not 0 < self.eps < float("inf"):
            raise ValueError(
                f"Epsilon: eps: expected a finite number > 0, got {self.eps}; "
                "a zero denominator needs it (the default is 1e-6)"
            )

    @property
    def stabilizer(self) -> float:
        return float(self.eps)

    def prologue(self, reward: Tensor, z: Tensor) -> Tensor:
        return reward / stabilize(z, self.eps)

    def input_epilogue(self, g: Tensor, x: Tensor) -> Tensor:
        return g * x

    def weight_epilogue(self, f: Tensor, weight: Tensor) -> Tensor:
        return f * weight.abs()


@dataclass(frozen=True)
class Gradient(Rule):
    """The plain gradient through the same two products: every function is the identity."""

    name = "gradient"
    code = 1


REGISTRY: dict[str, type[Rule]] = {rule.name: rule for rule in (Epsilon, Gradient)}


def run_params(rule: Rule, below: Rule | None = None) -> list[float]:
    """Run-time parameters for the kernels: [eps, eps of the layer below]."""
    return [rule.stabilizer, 1.0 if below is None else below.stabilizer]


# Chain bits of csrc/rules.h: the reward that arrives is already this layer's signal / hand the
# layer below its signal x / stab(x) * g instead of its reward x * g.
SIGNAL_IN = 1
SIGNAL_OUT = 2


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic dtype inside an op: 16-bit inputs are computed in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def finish_input(rule: Rule, below: Rule | None, g: Tensor, x: Tensor) -> Tensor:
    """Input epilogue, followed by the prologue of the layer below when that one is given."""
    if below is None:
        return rule.input_epilogue(g, x)
    return g * x / stabilize(x, below.stabilizer)
