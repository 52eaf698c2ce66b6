"""The variants of a training step, each on its own copy of the model with the same weights.

Every variant trains: forward, feedback or gradient, SGD with momentum. The learning rate is tiny so
that the weights, and with them the work, stay the same over thousands of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.fused import FusedStep
from lfp_kernels.nested import NestedReference

from . import floor
from .specs import Workload

LR, MOMENTUM, EPS = 1e-6, 0.9, 1e-6


@dataclass
class Step:
    """One variant, ready to run; ``close`` gives back what it attached."""

    run: Callable[[], object]
    model: nn.Module | None = None
    close: Callable[[], None] = lambda: None

    def drop_transients(self) -> None:
        """Free what a step leaves behind and the next one replaces (memory is measured without)."""
        for parameter in self.model.parameters() if self.model is not None else ():
            parameter.grad = None
            if getattr(parameter, "feedback", None) is not None:
                parameter.feedback = None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Problem:
    """What a variant is built from."""

    workload: Workload
    device: str
    model: nn.Module
    x: Tensor
    y: Tensor

    def torch_sgd(self, **options: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM, **options)


def _fuse(problem: Problem) -> FusedStep:
    return lfp_kernels.fuse(
        problem.model,
        lfp_kernels.composites.Epsilon(eps=EPS),
        reward="softmax",
        optimizer=lfp_kernels.optim.SGD(lr=LR, momentum=MOMENTUM),
        feedback_dtype=problem.workload.feedback_dtype,
    )


def fused(problem: Problem) -> Step:
    """lfp_kernels.fuse."""
    step = _fuse(problem)
    return Step(lambda: step(problem.x, problem.y), problem.model)


def dropin(problem: Problem) -> Step:
    """The composite's context, lfp_kernels.backward, torch.optim.SGD."""
    model, x, y = problem.model, problem.x, problem.y
    optimizer = problem.torch_sgd()
    composite = lfp_kernels.composites.Epsilon(eps=EPS)
    stack = ExitStack()
    stack.enter_context(composite.context(model))

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        out = model(x)
        lfp_kernels.backward(out, lfp_kernels.rewards.softmax(out, y))
        optimizer.step()

    return Step(run, model, stack.close)


def sgd(problem: Problem, **options: bool) -> Step:
    """Gradient descent by autograd on the cross entropy, torch.optim.SGD."""
    model, x, y = problem.model, problem.x, problem.y
    optimizer = problem.torch_sgd(**options)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return Step(run, model)


def sgd_fused_optimizer(problem: Problem) -> Step:
    """As sgd, with torch.optim.SGD(fused=True)."""
    return sgd(problem, fused=True)


def sgd_compiled(problem: Problem) -> Step:
    """As sgd, model, loss and optimizer step through torch.compile."""
    model, x, y = problem.model, problem.x, problem.y
    optimizer = problem.torch_sgd()
    loss = torch.compile(lambda a, b: F.cross_entropy(model(a), b))
    update = torch.compile(optimizer.step)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(x, y).backward()
        update()

    return Step(run, model)


def reference(problem: Problem, compiled: bool = False) -> Step:
    """The official package's algorithm: nested autograd calls, torch.optim.SGD."""
    nested = NestedReference(problem.model, eps=EPS)
    optimizer = problem.torch_sgd()
    stack = ExitStack()
    stack.enter_context(nested.context())
    step = torch.compile(nested.step) if compiled else nested.step
    return Step(lambda: step(problem.x, problem.y, optimizer), problem.model, stack.close)


def reference_compiled(problem: Problem) -> Step:
    """As reference, through torch.compile (it breaks the graph at every layer's backward)."""
    return reference(problem, compiled=True)


def floor_own(problem: Problem, aten: bool = False) -> Step:
    """The bare products as the fused step issues them."""
    found = floor.layers(problem.model, problem.x)
    layout = _fuse(problem)._plan.channels_last
    products = floor.calls(found, problem.workload.feedback_dtype, aten=aten, channels_last=layout)
    return Step(lambda: floor.run_all(products))


def floor_aten(problem: Problem) -> Step:
    """The bare products as ATen picks them."""
    return floor_own(problem, aten=True)


VARIANTS: dict[str, Callable[[Problem], Step]] = {
    "fused": fused,
    "dropin": dropin,
    "sgd": sgd,
    "sgd_fused_optimizer": sgd_fused_optimizer,
    "sgd_compiled": sgd_compiled,
    "reference": reference,
    "reference_compiled": reference_compiled,
    "floor": floor_own,
    "floor_aten": floor_aten,
}


def build(workload: Workload, variant: str, device: str) -> Step:
    """``variant`` of ``workload``; "fused_fp32" is the fused step of the float32 model."""
    if variant == "fused_fp32":
        workload = replace(workload, dtype=torch.float32, feedback_dtype=None)
        variant = "fused"
    problem = Problem(workload, device, workload.model(device), *workload.data(device))
    return VARIANTS[variant](problem)


def work(workload: Workload) -> tuple[int, int]:
    """(FLOPs, bytes) of one step: its products, and the least memory traffic they need."""
    found = floor.layers(workload.model("cpu"), workload.data("cpu")[0])
    return sum(k.products * k.flops for k in found), sum(k.bytes for k in found)
