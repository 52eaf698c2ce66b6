"""From calls of our operators to launches: a dispatch mode that hears every call and models it.

The tensors may be on the meta device: nothing but shapes, strides and dtypes is looked at. So any
size of batch costs milliseconds, and the same formulas serve the table of operators, whole training
steps, and the test that holds them against the counted bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lfp_kernels import backends
from lfp_kernels.ops import _cuda
from lfp_kernels.ops.spiking.codes import Reset

from . import attention, convolution, memory_bound, norms, pools, products, spiking
from .devices import A100, Gpu
from .launch import Launch

Model = Callable[..., list[Launch]]
MODELS: dict[str, Model] = {
    f.__name__: f
    for f in (
        products.linear_forward, products.linear_forward_tf32, products.linear_redistribute,
        products.linear_redistribute_update,
        memory_bound.step, memory_bound.sum_redistribute, memory_bound.dropout_redistribute,
        memory_bound.optimizer_update, memory_bound.optimizer_update_live,
        memory_bound.global_norm, memory_bound.reward,
        memory_bound.reward_spike_rate, norms.batch_norm_forward, norms.batch_norm_redistribute,
        spiking.lif_forward, spiking.lif_feedback, spiking.spikes_unpack, spiking.add_noise,
        attention.attention_forward, attention.attention_redistribute,
    )
}  # fmt: skip
# These also look at the results: their sizes and layouts.
WITH_RESULTS: dict[str, Model] = {
    f.__name__: f
    for f in (
        pools.max_pool_forward, pools.max_pool_redistribute, pools.avg_pool_redistribute,
        pools.adaptive_avg_pool_redistribute, convolution.conv_forward,
        convolution.conv_forward_tf32,
        convolution.conv_redistribute, convolution.conv_redistribute_update,
    )
}  # fmt: skip


@dataclass
class Call:
    """One call of an operator.

    once: bytes if every operand were read once and every result written once, what changes in place
        counted twice.
    minimum: the same, and the second read that batch statistics cost any kernel.
    """

    op: str
    once: int
    minimum: int
    launches: list[Launch] = field(default_factory=list)

    @property
    def requested(self) -> int:
        return sum(launch.requested for launch in self.launches)

    @property
    def distinct(self) -> int:
        return sum(launch.distinct for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_of(item)]
    return []


def bound(func: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the schema, defaults included."""
    schema = func._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    found.update(zip((a.name for a in schema), args))
    return {**found, **kwargs}


def written_in_place(func: Any, a: dict[str, Any]) -> list[Tensor]:
    names = [x.name for x in func._schema.arguments if x.alias_info and x.alias_info.is_write]
    return [t for name in names for t in tensors_of(a.get(name))]


def _not_read(op: str, a: dict[str, Any]) -> set[int]:
    """Operands that a call does not need: z of who is handed its signal; the spikes of neurons
    whose membrane shows them, the threshold without a reset."""
    if op == "lif_feedback":
        bits = set() if a["reset"] == Reset.SUBTRACT_AT_ONCE else {id(a["bits"])}
        return bits | ({id(a["threshold"])} if a["reset"] == Reset.NONE else set())
    return {id(a["z"])} - {id(a.get("reward"))} if a.get("chain", 0) & 1 and "z" in a else set()


def call_of(func: Any, args: tuple, kwargs: dict[str, Any], result: Any, gpu: Gpu) -> Call:
    """The model of a call of lfp_kernels::``func`` that returned ``result``."""
    op, a = func._schema.name.split("::")[1], bound(func, args, kwargs)
    left_out = _not_read(op, a)
    read = {id(t): t for v in a.values() for t in tensors_of(v) if id(t) not in left_out}
    moved = [*read.values(), *tensors_of(result), *written_in_place(func, a)]
    once = sum(t.nbytes for t in moved)
    again = norms.second_read(op, a) if op.startswith("batch_norm") else 0
    call = Call(op, once, once + again)
    if op in WITH_RESULTS:
        call.launches = WITH_RESULTS[op](a, gpu, result)
    else:
        call.launches = MODELS[op](a, gpu)
    return call


class Recorder(TorchDispatchMode):
    """Inside the block every call of our operators leaves a :class:`Call`."""

    def __init__(self, gpu: Gpu = A100) -> None:
        super().__init__()
        self.gpu = gpu
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "lfp_kernels":
            self.calls.append(call_of(func, args, kwargs, result, self.gpu))
        return result


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Tensors of any device, meta included, take the route of CUDA tensors with our library."""
    tables = backends._implementations
    before = {op: dict(table) for op, table in tables.items()}
    for table in tables.values():
        if "native" in table:
            table["native"] = replace(table["native"], devices=None, needs=None)
    is_gpu, _cuda.is_gpu = _cuda.is_gpu, lambda x: True
    try:
        yield
    finally:
        _cuda.is_gpu = is_gpu
        for op, table in before.items():
            tables[op].clear()
            tables[op].update(table)


def model(run: Callable[[], Any], gpu: Gpu = A100) -> list[Call]:
    """The calls that ``run`` makes, modelled."""
    with as_on_cuda(), Recorder(gpu) as recorder, torch.no_grad():
        run()
    return recorder.calls
