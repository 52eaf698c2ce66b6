"""Optimizers for the fused step, with the arithmetic of ``torch.optim``.

``SGD`` and ``AdamW`` are descriptions; ``fuse`` binds one to a model's parameters as a
``BoundOptimizer``, which is a ``torch.optim.Optimizer``: learning-rate schedulers drive it and its
state dict is the one of the torch optimizer of the same name, in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ._no_grad import no_grad


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
        lr: learning rate, >= 0. A 0-dim tensor on the device of the parameters is read by the
            update kernel when it runs: a captured CUDA graph then follows a scheduler, which fills
            it. Updates wait for the end of the fused step then.
        clip_norm: global L2 norm to which the feedback of all parameters is clipped, or None.
            The update must then wait for the norm: the fused step runs in two phases.
    """

    lr: float | Tensor
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    clip_norm: float | None = None

    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __post_init__(self) -> None:
        inf = math.inf
        _require_lr("SGD", self.lr)
        _require("SGD", "momentum", self.momentum, 0, 1, "a number in [0, 1)")
        _require("SGD", "weight_decay", self.weight_decay, 0, inf, "a finite number >= 0")
        _require_clip("SGD", self.clip_norm)
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD: nesterov: expected momentum > 0 with it, got momentum=0")


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, as torch.optim.AdamW (eps outside the square root).

    Args:
        lr: see :class:`SGD`.
        betas: decay rates of the two moments, each in [0, 1).
        clip_norm: see :class:`SGD`.
        capturable: the count of steps lies on the device, as torch.optim.AdamW has it: a captured
            CUDA graph corrects the moments by the step that it replays. With a tensor for ``lr``
            if that changes, too. Updates wait for the end of the fused step.
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    clip_norm: float | None = None
    capturable: bool = False

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __post_init__(self) -> None:
        inf = math.inf
        _require_lr("AdamW", self.lr)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"AdamW: betas: expected two numbers, got {self.betas!r}")
        for beta in self.betas:
            _require("AdamW", "betas", beta, 0, 1, "numbers in [0, 1)")
        _require("AdamW", "eps", self.eps, 0, inf, "a finite number >= 0")
        _require("AdamW", "weight_decay", self.weight_decay, 0, inf, "a finite number >= 0")
        _require_clip("AdamW", self.clip_norm)


def _require_lr(owner: str, lr: Any) -> None:
    if isinstance(lr, Tensor):
        if lr.dim() != 0 or lr.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{owner}: lr: expected a number or a 0-dim float32 or float64 tensor, got "
                f"{lr.dtype} of shape {tuple(lr.shape)}"
            )
        lr = float(lr)
    _require(owner, "lr", lr, 0, math.inf, "a finite number >= 0")


def _require_clip(owner: str, value: float | None) -> None:
    if value is None:
        return
    _require(owner, "clip_norm", value, 0, math.inf, "a finite number > 0 or None")
    if value == 0:
        raise ValueError(f"{owner}: clip_norm: expected a finite number > 0 or None, got 0")


class Live(NamedTuple):
    """What the update reads from the device when it runs, in place of its ``hyper``: the learning
    rate, and the steps that AdamW has taken; 0-dim, or None where the host knows."""

    lr: Tensor | None
    step: Tensor | None


class Update(NamedTuple):
    """One parameter's update as the kernels take it: code, hyper-parameters, states.

    ``hyper`` = [lr, weight_decay, scale, momentum, nesterov, beta1, beta2, eps, correction1,
    correction2, 1 - beta1, 1 - beta2], as csrc/rules.h reads it.
    """

    code: int
    hyper: list[float]
    states: list[Tensor]
    live: Live | None = None


def clip_factor(norm: Tensor, clip: float) -> Tensor:
    """min(1, clip / (norm + 1e-6)), the rule of torch.nn.utils.clip_grad_norm_; 1 where the norm is
    not finite. 0-dim on the device of ``norm``, never read by the host."""
    factor = (clip / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), factor, torch.ones_like(factor))


SGD_PLAIN, SGD_MOMENTUM, ADAMW = 0, 1, 2
FROZEN = -1  # a parameter that the rule reads and nothing updates
STATES = {SGD_PLAIN: 0, SGD_MOMENTUM: 1, ADAMW: 2}  # states per parameter

_TORCH = {SGD: torch.optim.SGD, AdamW: torch.optim.AdamW}
# Options of the torch optimizers that these do not have: a state dict must hold them switched off.
_OFF = {"dampening": 0, "maximize": False, "amsgrad": False, "decoupled_weight_decay": True}


class BoundOptimizer(torch.optim.Optimizer):
    """A description bound to parameters. The fused step asks :meth:`update_of` per parameter and
    writes in place; :meth:`step` serves the drop-in way from ``.grad`` (= -feedback).

    ``param_groups`` may differ in every value but ``clip_norm``, which is global and read from the
    first group.
    """

    def __init__(self, spec: SGD | AdamW, params: Iterable[Any]) -> None:
        if not isinstance(spec, (SGD, AdamW)):
            raise TypeError(
                "optimizer: expected lfp_kernels.optim.SGD(...) or AdamW(...), "
                f"got {type(spec).__name__}"
            )
        self.spec = spec
        # The keys of the torch optimizer too, so that it loads this one's state dict.
        defaults = _TORCH[type(spec)]([torch.zeros(1)], lr=1.0).defaults
        own = {field.name: getattr(spec, field.name) for field in fields(spec)}
        super().__init__(list(params), {**defaults, **own})

    def is_live(self, group: dict[str, Any]) -> bool:
        """Whether its updates read the device: :func:`functional.optimizer_update` alone can."""
        return isinstance(group["lr"], Tensor) or bool(group.get("capturable"))

    def update_of(self, param: Tensor, group: dict[str, Any], scale: float = 1.0) -> Update:
        """The update that the next step gives ``param``; allocates its states when missing.

        Args:
            group: the entry of ``param_groups`` that holds ``param``.
            scale: factor on the feedback, such as :meth:`clip_scale`.
        """
        rate, decay = group["lr"], float(group["weight_decay"])
        live_lr = rate if isinstance(rate, Tensor) else None
        lr = 0.0 if live_lr is not None else float(rate)
        live = None if live_lr is None else Live(live_lr, None)
        if isinstance(self.spec, SGD):
            momentum = float(group["momentum"])
            nesterov = float(group["nesterov"])
            hyper = [lr, decay, scale, momentum, nesterov, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
            if momentum == 0:
                return Update(SGD_PLAIN, hyper, [], live)
            return Update(SGD_MOMENTUM, hyper, self._states(param), live)
        beta1, beta2 = group["betas"]
        count = 1
        if group["capturable"]:
            live = Live(live_lr, self._count(param, param.device))
        else:
            count += int(self.state[param].get("step", 0))
        rest1, rest2 = 1 - beta1, 1 - beta2
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        hyper = [lr, decay, scale, 0.0, 0.0, beta1, beta2, float(group["eps"])]
        hyper += [correction1, correction2, rest1, rest2]
        return Update(ADAMW, hyper, self._states(param), live)

    def _count(self, param: Tensor, device: torch.device) -> Tensor:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return state["step"]

    def _states(self, param: Tensor) -> list[Tensor]:
        state = self.state[param]
        for name in self.spec.state_names:
            if state.get(name) is None:
                state[name] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        return [state[name] for name in self.spec.state_names]

    def count_step(self, params: Iterable[Tensor]) -> None:
        """Record that ``params`` were updated, for bias correction and schedulers' order check."""
        self._opt_called = True
        if isinstance(self.spec, AdamW):
            counts = [self._count(param, torch.device("cpu")) for param in params]
            if counts:
                torch._foreach_add_(counts, 1)

    def clip_scale(self, norm: float | Tensor) -> float:
        """Factor that brings feedback of the global norm ``norm`` down to ``clip_norm``, at most 1;
        the rule of torch.nn.utils.clip_grad_norm_.

        Raises:
            ValueError: the norm is not finite; the step must not be taken.
        """
        clip, norm = self.param_groups[0]["clip_norm"], float(norm)
        if not math.isfinite(norm):
            raise ValueError(
                f"optimizer: the global norm of the feedback is {norm}, expected a finite number; "
                "nothing was updated. Look for NaN or inf in the input, the reward or the weights, "
                "or lower the learning rate"
            )
        if clip is None:
            return 1.0
        return float(clip_factor(torch.tensor(norm, dtype=torch.float64), clip))

    @no_grad
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update every parameter from its ``.grad``, clipped to the global norm where asked.

        Raises:
            ValueError: with ``clip_norm``, the norm is not finite; nothing has been changed then.
                On a GPU, which is not waited for, such feedback is left as it is.
        """
        from . import functional

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: list[Tensor] = []
        grads: list[Tensor] = []
        groups = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    params.append(param)
                    grads.append(param.grad)
                    groups.append(group)
        scale, factor = 1.0, None
        clip = self.param_groups[0]["clip_norm"]
        if params and clip is not None:
            norm = functional.global_norm(grads)
            if norm.is_cuda:
                factor = clip_factor(norm, clip)
            else:
                scale = self.clip_scale(norm)
        # .grad is -feedback
        updates = [self.update_of(param, group, -scale) for param, group in zip(params, groups)]
        functional.optimizer_update(params, grads, updates, scale=factor)
        self.count_step(params)
        return loss

    @no_grad
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class or of the torch optimizer of the same name.

        Raises:
            ValueError: the state is another optimizer's, or uses an option this one does not have;
                nothing has been changed then.
        """
        name = type(self.spec).__name__
        groups = []
        for k, group in enumerate(state_dict["param_groups"]):
            missing = [key for key in asdict(self.spec) if key not in group and key != "clip_norm"]
            if missing:
                raise ValueError(
                    f"optimizer: state_dict: expected the state of {name}; "
                    f"param_groups[{k}] has no {', '.join(map(repr, missing))}"
                )
            for key, off in _OFF.items():
                if group.get(key, off) != off:
                    raise ValueError(
                        f"optimizer: state_dict: param_groups[{k}]: {name} expects {key}={off!r}, "
                        f"got {group[key]!r}"
                    )
            groups.append({"clip_norm": self.spec.clip_norm, **group})
        super().load_state_dict({**state_dict, "param_groups": groups})
        for state in self.state.values():  # the kernels walk parameter and states side by side
            for key in self.spec.state_names:
                if state.get(key) is not None:
                    state[key] = state[key].contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "spec": self.spec}
