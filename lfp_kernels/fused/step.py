"""``fuse``: a model, a composite, a reward and an optimizer become one function of (x, y)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import rewards
from ..composites import Composite, check_finite
from ..optim import SGD, AdamW, BoundOptimizer
from .plan import Plan
from .reduce import Buckets, check_group
from .stages import Run
from .trace import trace
from .tracer import further_arguments
from .updates import Updates


class StepResult(NamedTuple):
    """``out``: the model's output [N, C] before the update; ``reward``: the reward at it."""

    out: Tensor
    reward: Tensor


class FusedStep:
    """A training step without autograd; made by :func:`fuse`.

    Attributes:
        model: the model; its parameters and buffers are updated in place.
        optimizer: a ``torch.optim.Optimizer``: schedulers drive it, and its ``state_dict()`` is
            that of the torch optimizer of the same name.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite,
        reward: str | Callable[..., Tensor],
        optimizer: SGD | AdamW | BoundOptimizer,
        group: Any = None,
    ) -> None:
        self.model = model
        self._group = check_group(group)
        self.composite = composite
        self.reward = rewards.get(reward)
        composite.check(model)
        composite.prepare(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("fuse: model: expected a trainable parameter, got none")
        self._further = further_arguments(model)
        self._plans: dict[frozenset[str], Plan] = {}
        self._parameters: list[nn.Parameter] = []
        self._modules: list[nn.Module] = []
        self._settings: list[bool] | None = None
        self._plan = self._plan_of({name for name, needed in self._further.items() if needed})
        if isinstance(optimizer, BoundOptimizer):
            self.optimizer = optimizer
        else:
            self.optimizer = BoundOptimizer(optimizer, parameters)

    def _plan_of(self, given: Collection[str]) -> Plan:
        """The plan of steps that give these arguments beside the first."""
        if self._settings != self._settings_now():
            self._plans = {}
            self._parameters = list(self.model.parameters())
            self._modules = list(self.model.modules())
            self._settings = self._settings_now()
        names = frozenset(given)
        if names not in self._plans:
            self._plans[names] = Plan(*trace(self.model, self.composite, names))
        return self._plans[names]

    def _settings_now(self) -> list[bool]:
        """What traced plans depend on: parameters that train, modules in training mode."""
        trainable = [p.requires_grad for p in self._parameters]
        return trainable + [m.training for m in self._modules]

    def __repr__(self) -> str:
        rows = [f"  {s.label:<24} {s.describe()}" for s in self._plan.stages]
        phases = "two phases: feedback, then norm and update" if self._clips else "one phase"
        return "\n".join([f"FusedStep({self.optimizer.spec}; {phases})", *rows])

    @property
    def _clips(self) -> bool:
        return self.optimizer.param_groups[0]["clip_norm"] is not None

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Any, /, **given: Tensor) -> StepResult:
        """One training step on a batch.

        Args:
            x: model input [N, ...], dtype and device of the parameters.
            y: what the reward takes beside the output (labels [N], int64).
            given: further tensors of the model's forward by their names there (masks). Those that
                are left out have their defaults.

        Raises:
            TypeError, ValueError: bad x, y, given or reward (NaN included). Parameters, buffers
                and optimizer state are as before then.
        """
        self._check_inputs(("x", x), *given.items())
        self._check_names(given)
        plan = self._plan = self._plan_of(given)
        buckets = None if self._group is None else Buckets(self._group)
        updates = Updates(self.optimizer, plan.shared, buckets)
        run = Run(plan.slots, len(plan.stages), updates, given)
        out = plan.forward(run, F.channels_last(x) if plan.channels_last and x.dim() == 4 else x)
        reward = self.reward(out, y)
        if reward.shape != out.shape:
            raise ValueError(
                f"fuse: reward: expected shape {tuple(out.shape)} like the output, "
                f"got {tuple(reward.shape)}"
            )
        check_finite("fuse", reward)
        run.commit_statistics()
        self.composite.begin(out, y, reward)
        plan.redistribute(run, reward)
        updates.finish()
        return StepResult(out, reward)

    def _check_inputs(self, *given: tuple[str, Any]) -> None:
        like = self.optimizer.param_groups[0]["params"][0]
        for name, x in given:
            if not isinstance(x, Tensor):
                raise TypeError(f"fuse: {name}: expected a torch.Tensor, got {type(x).__name__}")
            if x.is_floating_point() and x.dtype != like.dtype:
                raise TypeError(
                    f"fuse: {name}: expected {like.dtype} like the parameters, got {x.dtype}; "
                    f"convert it with .to({like.dtype})"
                )
            if x.device != like.device:
                raise ValueError(
                    f"fuse: {name}: expected device {like.device} like the parameters, "
                    f"got {x.device}"
                )

    def _check_names(self, given: dict[str, Any]) -> None:
        known = ", ".join(self._further) or "none"
        for name in given.keys() - self._further.keys():
            raise TypeError(
                f"fuse: {name}: expected an argument of the model's forward after its first "
                f"({known})"
            )
        for name, needed in self._further.items():
            if needed and name not in given:
                raise TypeError(
                    f"fuse: {name}: the model's forward has no default for it; give it to the "
                    f"step: step(x, y, {name}=...)"
                )

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; the model's is its own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def fuse(
    model: nn.Module,
    composite: Composite,
    *,
    reward: str | Callable[..., Tensor] = "softmax",
    optimizer: SGD | AdamW | BoundOptimizer,
    feedback_dtype: torch.dtype | None = None,
    process_group: Any = None,
) -> FusedStep:
    """Compile ``model`` into a training step that never runs autograd.

    The model is traced once. Forward keeps only what the rule needs (behind a ReLU the activation
    alone); feedback walks the layers backwards, updates each weight in the pass that produced its
    feedback, and frees as it goes. The parameters live in the model as before: state_dict, eval and
    the drop-in way go on working, and both ways give the same numbers. With ``clip_norm`` the
    update must wait for the global norm: the step then runs in two phases and holds all feedback.

    Args:
        model: takes a tensor, and others by name if it likes (masks); returns one tensor.
        composite: the rules, e.g. ``composites.Epsilon(eps=1e-6)``.
        reward: a name of ``rewards.REGISTRY`` or a function ``(out, y) -> reward`` of out's shape.
        optimizer: ``optim.SGD(...)`` or ``optim.AdamW(...)``.
        feedback_dtype: torch.bfloat16 runs the feedback products of a float32 model in bfloat16.
        process_group: a torch.distributed group (True: the default one): every process brings its
            part of the batch and all make the step of the whole: feedback is summed over the
            processes, bucket by bucket while the walk back goes on, and applied at the end. Start
            from equal parameters. Running statistics of batch norms stay each process's own.

    Returns:
        ``step(x, y) -> StepResult(out, reward)``; ``step(x, y, mask=m)`` for a forward that takes a
        ``mask``.

    Raises:
        ValueError: a layer has no rule, or the model cannot be traced (the line is named).
    """
    if not isinstance(composite, Composite):
        raise TypeError(
            "fuse: composite: expected e.g. lfp_kernels.composites.Epsilon(), "
            f"got {type(composite).__name__}"
        )
    if feedback_dtype is not None:
        composite = composite.with_feedback_dtype(feedback_dtype)
    return FusedStep(model, composite, reward, optimizer, process_group)
