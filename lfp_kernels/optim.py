"""Optimizers for the fused step, with the arithmetic of ``torch.optim``.

``SGD`` and ``AdamW`` are descriptions; ``fuse`` binds one to a model's parameters as a
``BoundOptimizer``, which is a ``torch.optim.Optimizer``: learning-rate schedulers drive it and its
state dict is the one of the torch optimizer of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


def _require(owner: str, name: str, value: float, low: float, high: float, text: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name}: expected a number, got {type(value).__name__}")
    if not (low <= value < high) or math.isnan(value):
        raise ValueError(f"{owner}: {name}: expected {text}, got {value}")


@dataclass(frozen=True)
class SGD:
    """``d = -feedback + weight_decay * w``; ``m = momentum * m + d``; ``w -= lr * m`` (Nesterov:
    ``w -= lr * (d + momentum * m)``). As torch.optim.SGD with dampening 0.

    Args:
        lr: learning rate, >= 0.
        clip_norm: global L2 norm to which the feedback of all parameters is clipped, or None.
            The update must then wait for the norm: the fused step runs in two phases.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    clip_norm: float | None = None

    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __post_init__(self) -> None:
        inf = math.inf
        _require("SGD", "lr", self.lr, 0, inf, "a finite number >= 0")
        _require("SGD", "momentum", self.momentum, 0, 1, "a number in [0, 1)")
        _require("SGD", "weight_decay", self.weight_decay, 0, inf, "a finite number >= 0")
        _require_clip("SGD", self.clip_norm)
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD: nesterov: expected momentum > 0 with it, got momentum=0")


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, as torch.optim.AdamW (eps outside the square root).

    Args:
        lr: learning rate, >= 0.
        betas: decay rates of the two moments, each in [0, 1).
        clip_norm: see :class:`SGD`.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    clip_norm: float | None = None

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __post_init__(self) -> None:
        inf = math.inf
        _require("AdamW", "lr", self.lr, 0, inf, "a finite number >= 0")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"AdamW: betas: expected two numbers, got {self.betas!r}")
        for beta in self.betas:
            _require("AdamW", "betas", beta, 0, 1, "numbers in [0, 1)")
        _require("AdamW", "eps", self.eps, 0, inf, "a finite number >= 0")
        _require("AdamW", "weight_decay", self.weight_decay, 0, inf, "a finite number >= 0")
        _require_clip("AdamW", self.clip_norm)


def _require_clip(owner: str, value: float | None) -> None:
    if value is None:
        return
    _require(owner, "clip_norm", value, 0, math.inf, "a finite number > 0 or None")
    if value == 0:
        raise ValueError(f"{owner}: clip_norm: expected a finite number > 0 or None, got 0")


@dataclass(frozen=True)
class Update:
    """One parameter's update as the kernels take it: code, hyper-parameters, states.

    ``hyper`` = [lr, weight_decay, scale, momentum, nesterov, beta1, beta2, eps, correction1,
    correction2, 1 - beta1, 1 - beta2], as csrc/rules.h reads it.
    """

    code: int
    hyper: list[float]
    states: list[Tensor]


SGD_PLAIN, SGD_MOMENTUM, ADAMW = 0, 1, 2


class BoundOptimizer(torch.optim.Optimizer):
    """A description bound to parameters. The fused step asks :meth:`update_of` per parameter and
    writes in place; :meth:`step` serves the drop-in way from ``.grad`` (= -feedback).
    """

    def __init__(self, spec: SGD | AdamW, params: Iterable[Tensor]) -> None:
        if not isinstance(spec, (SGD, AdamW)):
            raise TypeError(
                "optimizer: expected lfp_kernels.optim.SGD(...) or AdamW(...), "
                f"got {type(spec).__name__}"
            )
        self.spec = spec
        super().__init__(list(params), asdict(spec))

    def update_of(self, param: Tensor, group: dict[str, Any], scale: float = 1.0) -> Update:
        """The update that the next step gives ``param``; allocates its states when missing."""
        state = self.state[param]
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if isinstance(self.spec, SGD):
            momentum = float(group["momentum"])
            hyper = [lr, decay, scale, momentum, float(group["nesterov"])]
            hyper += [0, 0, 0, 1, 1, 1, 1]
            if momentum == 0:
                return Update(SGD_PLAIN, hyper, [])
            return Update(SGD_MOMENTUM, hyper, self._states(param, state))
        beta1, beta2 = group["betas"]
        count = int(state.get("step", 0)) + 1
        corrections = [1 - beta1**count, 1 - beta2**count]
        hyper = [lr, decay, scale, 0, 0, beta1, beta2, float(group["eps"]), *corrections]
        hyper += [1 - beta1, 1 - beta2]
        return Update(ADAMW, hyper, self._states(param, state))

    def _states(self, param: Tensor, state: dict[str, Any]) -> list[Tensor]:
        for name in self.spec.state_names:
            if state.get(name) is None:
                state[name] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        return [state[name] for name in self.spec.state_names]

    def count_step(self, params: Iterable[Tensor]) -> None:
        """Record that ``params`` were updated (AdamW's bias correction, schedulers' order check)."""
        self._opt_called = True
        if isinstance(self.spec, AdamW):
            for param in params:
                step = self.state[param].get("step")
                self.state[param]["step"] = torch.tensor(1.0) if step is None else step + 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update every parameter from its ``.grad``, clipped to the global norm where asked."""
        from . import functional

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [
            (param, param.grad, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        clip = self.param_groups[0]["clip_norm"]
        scale = 1.0
        if clip is not None and pairs:
            norm = functional.global_norm([grad for _, grad, _ in pairs])
            scale = min(1.0, float(clip) / (float(norm) + 1e-6))
        for param, grad, group in pairs:
            functional.optimizer_update([param], [grad], [self.update_of(param, group, -scale)])
        self.count_step(param for param, _, _ in pairs)
        return loss
