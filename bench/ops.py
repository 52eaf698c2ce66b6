"""Operators one by one: native against reference against a floor, at a few shapes each.

The floor of an operator with products is those products alone (bench/floor.py); of any other one a
copy that moves as many bytes as the operator must (each operand read, each result written, once).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfp_kernels import functional as F
from lfp_kernels import optim, rewards, use_backend
from lfp_kernels.rules import REGISTRY, Rule

from . import floor

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """One operator on ready operands."""

    run: Callable[[], Any]
    flops: int
    bytes: int
    floor: Callable[[], Any]


@dataclass(frozen=True)
class Spec:
    """An operator at one shape; ``make(shape, rule, device)`` builds its case."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[tuple[int, ...], Rule | None, str], Case]
    rule: Rule | None = None

    @property
    def label(self) -> str:
        rule = "" if self.rule is None else f"[{self.rule.name}]"
        return f"{self.name}{rule} {'x'.join(map(str, self.shape))}"

    def case(self, device: str) -> Case:
        torch.manual_seed(0)
        return self.make(self.shape, self.rule, device)


def variants(case: Case) -> dict[str, Callable[[], Any]]:
    """The runs that are timed against each other."""

    def on(backend: str) -> Callable[[], Any]:
        def run() -> Any:
            with use_backend(backend):
                return case.run()

        return run

    return {"native": on("native"), "reference": on("reference"), "floor": case.floor}


def _copy(moved: int, device: str) -> Callable[[], Any]:
    """A copy that reads and writes ``moved`` bytes in all."""
    source = torch.ones(max(moved // 8, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _moving(run: Callable[[], Any], operands: list[Tensor], device: str) -> Case:
    """An operator without products: ``operands`` are what it must read and write."""
    moved = sum(t.nbytes for t in operands)
    return Case(run, 0, moved, _copy(moved, device))


def _products(run: Callable[[], Any], module: nn.Module, x: Tensor, z: Tensor, n: int) -> Case:
    """An operator around the input and weight products of a layer (``n`` = 2), or one (1)."""
    layer = floor.Layer(module, x, z, first=False)
    calls = floor.calls([layer], None, aten=False)
    calls = calls[1:] if n == 2 else calls[:1]
    one = x.nbytes + z.nbytes + layer.weight.nbytes
    return Case(run, n * layer.flops, n * one, lambda: floor.run_all(calls))


def _update(parameters: list[Tensor]) -> list[optim.Update]:
    bound = optim.BoundOptimizer(optim.SGD(lr=1e-6, momentum=0.9), parameters)
    return [bound.update_of(p, bound.param_groups[0]) for p in parameters]


def _linear_setup(shape: tuple[int, ...], device: str) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    n, i, o = shape
    layer = nn.Linear(i, o, device=device).requires_grad_(False)
    x = torch.randn(n, i, device=device)
    z = layer(x)
    return layer, x, z, torch.randn_like(z)


def linear_forward(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    layer, x, z, _ = _linear_setup(shape, device)
    return _products(lambda: F.linear(x, layer.weight, layer.bias, relu=True), layer, x, z, 1)


def linear_redistribute(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    layer, x, z, r = _linear_setup(shape, device)
    w, b = layer.weight, layer.bias
    more = _of_rule(rule, w)
    return _products(lambda: F.linear_redistribute(x, w, b, z, r, rule, **more), layer, x, z, 2)


def linear_redistribute_update(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    layer, x, z, r = _linear_setup(shape, device)
    w, b = layer.weight, layer.bias
    first, second = _update([w, b])
    more = _of_rule(rule, w, update=True)
    return _products(
        lambda: F.linear_redistribute_update(x, w, b, z, r, first, second, rule, **more),
        layer, x, z, 2,
    )  # fmt: skip


def _of_rule(rule: Rule, weight: Tensor, *, update: bool = False) -> dict[str, Any]:
    """The arguments that a rule needs besides the layer's."""
    more: dict[str, Any] = {"matrix": torch.randn_like(weight)} if rule.takes_matrix else {}
    if not rule.has_input:
        more |= {"need_input": False} if update else {"need": (False, True, True)}
    return more


def _conv_setup(shape: tuple[int, ...], device: str) -> tuple[Any, ...]:
    n, c, o, size = shape
    layer = nn.Conv2d(c, o, 3, padding=1, device=device).requires_grad_(False)
    x = torch.randn(n, c, size, size, device=device)
    z = layer(x)
    geometry = F.ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    return layer, x, z, torch.randn_like(z), geometry


def conv_forward(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    layer, x, z, _, geometry = _conv_setup(shape, device)
    return _products(
        lambda: F.conv(x, layer.weight, layer.bias, geometry, relu=True), layer, x, z, 1
    )


def conv_redistribute(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    layer, x, z, r, geometry = _conv_setup(shape, device)
    w, b = layer.weight, layer.bias
    more = _of_rule(rule, w)
    return _products(
        lambda: F.conv_redistribute(x, w, b, z, r, geometry, rule, **more), layer, x, z, 2
    )


def conv_redistribute_update(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    layer, x, z, r, geometry = _conv_setup(shape, device)
    w, b = layer.weight, layer.bias
    first, second = _update([w, b])
    more = _of_rule(rule, w, update=True)
    return _products(
        lambda: F.conv_redistribute_update(x, w, b, z, r, geometry, first, second, rule, **more),
        layer, x, z, 2,
    )  # fmt: skip


def _maps(shape: tuple[int, ...], device: str) -> Tensor:
    n, c, size = shape
    return torch.randn(n, c, size, size, device=device)


def batch_norm(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    x = _maps(shape, device)
    norm = nn.BatchNorm2d(shape[1], device=device).requires_grad_(False)
    state = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return _moving(lambda: F.batch_norm(x, *state, True, 0.1, 1e-5), [x, x, x], device)


def batch_norm_redistribute(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    x = _maps(shape, device)
    norm = nn.BatchNorm2d(shape[1], device=device).requires_grad_(False)
    w, b = norm.weight, norm.bias
    z, mean, invstd = F.batch_norm(x, w, b, norm.running_mean, norm.running_var, True, 0.1, 1e-5)
    r = torch.randn_like(z)
    return _moving(
        lambda: F.batch_norm_redistribute(x, w, b, z, r, mean, invstd, True, rule),
        [x, z, r, x, r, x],  # the sums need one pass before the pass that writes
        device,
    )


def avg_pool_redistribute(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    x = _maps(shape, device)
    settings = ((2, 2), (2, 2), (0, 0), False, True, None)
    z = F.avg_pool(x, *settings)
    r = torch.randn_like(z)
    return _moving(lambda: F.avg_pool_redistribute(x, z, r, *settings, rule), [x, z, r, x], device)


def max_pool(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    x = _maps(shape, device)
    settings = ((2, 2), (2, 2), (0, 0), (1, 1), False)
    z, indices = F.max_pool(x, *settings)
    return _moving(lambda: F.max_pool(x, *settings), [x, z, indices], device)


def max_pool_redistribute(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    x = _maps(shape, device)
    z, indices = F.max_pool(x, (2, 2), (2, 2), (0, 0), (1, 1), False)
    r = torch.randn_like(z)
    return _moving(lambda: F.max_pool_redistribute(r, indices, x.shape), [r, indices, x], device)


def sum_redistribute(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    a, b, r = _maps(shape, device), _maps(shape, device), _maps(shape, device)
    return _moving(lambda: F.sum_redistribute(a, b, r, rule), [a, b, r, a, b], device)


def softmax_reward(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    out = torch.randn(shape, device=device)
    y = torch.randint(shape[1], shape[:1], device=device)
    return _moving(lambda: rewards.softmax(out, y), [out, y, out], device)


def optimizer_update(shape: tuple[int, ...], rule: Any, device: str) -> Case:
    w, feedback = torch.randn(shape, device=device), torch.randn(shape, device=device)
    updates = _update([w])
    return _moving(
        lambda: F.optimizer_update([w], [feedback], updates), [w, w, feedback, w, w], device
    )


# (operator, what follows a rule, shapes, quick shape)
LINEAR = ((128, 784, 1000), (128, 4096, 4096))  # N, I, O
CONV = ((64, 64, 64, 32), (64, 128, 256, 8))  # N, C, O, height = width
MAPS = ((64, 64, 32), (64, 256, 8))  # N, C, height = width
_TABLE: tuple[tuple[Any, bool, tuple[tuple[int, ...], ...], tuple[int, ...]], ...] = (
    (linear_forward, False, LINEAR, (8, 24, 32)),
    (linear_redistribute, True, LINEAR, (8, 24, 32)),
    (linear_redistribute_update, True, LINEAR, (8, 24, 32)),
    (conv_forward, False, CONV, (4, 3, 8, 8)),
    (conv_redistribute, True, CONV, (4, 3, 8, 8)),
    (conv_redistribute_update, True, CONV, (4, 3, 8, 8)),
    (batch_norm, False, MAPS, (4, 8, 8)),
    (batch_norm_redistribute, True, MAPS, (4, 8, 8)),
    (avg_pool_redistribute, True, MAPS, (4, 8, 8)),
    (max_pool, False, MAPS, (4, 8, 8)),
    (max_pool_redistribute, False, MAPS, (4, 8, 8)),
    (sum_redistribute, True, MAPS, (4, 8, 8)),
    (softmax_reward, False, ((128, CLASSES), (512, 1000)), (8, CLASSES)),
    (optimizer_update, False, ((1000, 784), (4096, 4096)), (24, 32)),
)


def specs(quick: bool) -> Iterator[Spec]:
    """Every operator at every shape, the rule-carrying ones under every rule of the registry."""
    for make, carries_rule, shapes, quick_shape in _TABLE:
        rules: list[Rule | None] = [r() for r in REGISTRY.values()] if carries_rule else [None]
        if carries_rule and not make.__name__.startswith(("linear", "conv")):
            rules = [r for r in rules if r is not None and r.has_plain_form]
        for rule in rules:
            for shape in (quick_shape,) if quick else shapes:
                yield Spec(make.__name__, shape, make, rule)
