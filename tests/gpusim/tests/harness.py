"""Small PTX programs for the tests, and batches of one-instruction cases with their oracles."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest

from .. import DeviceArray, load

THREADS = 64

_REGISTERS = {"pred": "p", "b16": "h", "b32": "r", "b64": "q", "f32": "f", "f64": "g"}


def kernel(body: str, params: str = "x y", *, shared: str = "", target: str = "sm_90a") -> str:
    """A PTX module with one kernel.

    params: names of 64-bit parameters, or name:type; each is loaded into a register of its name.
    The body may use the registers %p %h %r %q %f %g (by type, 64 of each), tid, lane and block.
    """
    loads, declared, registers = [], [], []
    for item in params.split():
        name, _, ty = item.partition(":")
        ty = ty or "u64"
        declared.append(f".param .{ty} {name}_param")
        registers.append(f".reg .{ty} {name};")
        loads.append(f"ld.param.{ty} {name}, [{name}_param];")
    files = " ".join(f".reg .{ty} %{letter}<64>;" for ty, letter in _REGISTERS.items())
    return f""".version 8.8
.target {target}
.address_size 64
.visible .entry test({", ".join(declared)})
{{
.reg .b32 tid, lane, block; {files}
{shared}
{chr(10).join(registers)}
{chr(10).join(loads)}
mov.u32 tid, %tid.x; mov.u32 lane, %laneid; mov.u32 block, %ctaid.x;
{body}
ret;
}}
"""


# ---- one-instruction cases

_NUMPY = {
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "f32x2": np.uint64,
}


def numpy_type(ptx_type: str) -> type:
    """The numpy type that holds a PTX type; bf16 and pairs are raw bits."""
    if ptx_type in _NUMPY:
        return _NUMPY[ptx_type]
    return np.dtype(f"{'int' if ptx_type[0] == 's' else 'uint'}{ptx_type[1:]}").type


def width(ptx_type: str) -> int:
    return np.dtype(numpy_type(ptx_type)).itemsize


@dataclass
class Case:
    """One instruction: its operands are d (result) and a, b, c of the named types."""

    code: str
    types: str  # "s32 s32 -> u32"
    oracle: Callable
    ulps: float = 0  # allowed difference from the oracle
    values: dict[str, Iterable] = field(default_factory=dict)  # operand: test values

    @property
    def inputs(self) -> list[str]:
        return self.types.split("->")[0].split()

    @property
    def output(self) -> str:
        return self.types.split("->")[1].strip()


def parametrize(batches: list[Batch]):
    """Decorator: a test per case of some batches."""
    pairs = [
        pytest.param(batch, case, id=re.sub(r"[^\w.|]+", "-", case.code).strip("-"))
        for batch in batches
        for case in batch.cases
    ]
    return pytest.mark.parametrize(("batch", "case"), pairs)


class Batch:
    """Cases that run in one kernel: thread i computes element i of every case."""

    def __init__(self, cases: list[Case], target: str = "sm_100a"):
        self.cases = cases
        self.data = [self._operands(i, case) for i, case in enumerate(cases)]
        self.ptx = self._program(target)
        self._results: dict[int, np.ndarray] | None = None

    @staticmethod
    def _operands(seed: int, case: Case) -> list[np.ndarray]:
        random = np.random.default_rng(seed)
        return [
            np.resize(np.array(list(case.values[n]), numpy_type(t)), THREADS)
            if n in case.values
            else samples(t, random)
            for n, t in zip("abc", case.inputs, strict=False)
        ]

    def _program(self, target: str) -> str:
        lines = [f"mul.wide.u32 %q{w}, tid, {w};" for w in (1, 2, 4, 8)]
        lines += [f"add.u64 %q1{w}, x, %q{w}; add.u64 %q2{w}, y, %q{w};" for w in (1, 2, 4, 8)]
        source = dest = 0
        for case in self.cases:
            registers, body = [], []
            for name, ty in zip("abc", case.inputs, strict=False):
                registers.append(f".reg .b{max(8 * width(ty), 16)} {name};")
                body.append(f"ld.global.b{8 * width(ty)} {name}, [%q1{width(ty)}+{source}];")
                source += 8 * THREADS
            size = width(case.output)
            registers.append(f".reg .b{max(8 * size, 16)} d; .reg .pred p, q;")
            code = case.code if case.code.rstrip().endswith(";") else case.code + ";"
            body.append(f"mov.b{max(8 * size, 16)} d, 0; {code}")
            body.append(f"st.global.b{8 * size} [%q2{size}+{dest}], d;")
            dest += 8 * THREADS
            lines.append("{ " + " ".join(registers + body) + " }")
        return kernel("\n".join(lines), target=target)

    def result(self, case: Case) -> np.ndarray:
        if self._results is None:
            self._run()
        return self._results[id(case)]

    def _run(self) -> None:
        operands = [column for columns in self.data for column in columns]
        source = np.zeros((len(operands), 8 * THREADS), np.uint8)
        for row, column in zip(source, operands, strict=True):
            row[: column.nbytes] = column.view(np.uint8)
        dest = DeviceArray(np.zeros((len(self.cases), 8 * THREADS), np.uint8))
        load(self.ptx).launch(1, THREADS, [DeviceArray(source), dest])
        self._results = {}
        for case, row in zip(self.cases, dest.array, strict=True):
            ty = numpy_type(case.output)
            self._results[id(case)] = row[: width(case.output) * THREADS].view(ty).copy()

    def check(self, case: Case) -> None:
        columns = self.data[self.cases.index(case)]
        with np.errstate(all="ignore"):
            expected = case.oracle(*columns)
        actual, expected = self.result(case), np.asarray(expected)
        if case.output in _VIEWS:  # compared as numbers: all NaN are alike
            expected = expected.astype(actual.dtype)
            actual, expected = (_VIEWS[case.output](x) for x in (actual, expected))
            columns = [np.repeat(c, len(actual) // THREADS) for c in columns]
        assert_equal(actual, expected, columns, case)


def assert_equal(actual: np.ndarray, expected: np.ndarray, columns: list, case: Case) -> None:
    ty = actual.dtype
    if ty.kind == "f":
        with np.errstate(over="ignore"):
            expected = expected.astype(ty)
        both_nan = np.isnan(actual) & np.isnan(expected)
        same_sign = np.signbit(actual) == np.signbit(expected)
        good = both_nan | ((actual == expected) & same_sign)
        if case.ulps:
            with np.errstate(all="ignore"):
                spacing = np.spacing(np.maximum(np.abs(expected), np.finfo(ty).tiny))
                good |= np.abs(actual - expected) <= case.ulps * spacing
    else:
        bits = 8 * ty.itemsize
        masked = [int(v) % (1 << bits) for v in expected.ravel().tolist()]
        good = np.array([int(v) % (1 << bits) == m for v, m in zip(actual, masked, strict=True)])
    if not good.all():
        i = int(np.argmin(good))
        inputs = [column[i] for column in columns]
        wanted = expected.ravel()[i]
        raise AssertionError(f"{case.code}: {inputs} gave {actual[i]!r}, expected {wanted!r}")


def samples(ptx_type: str, random: np.random.Generator) -> np.ndarray:
    """Edge values and random ones, in random order."""
    ty = numpy_type(ptx_type)
    if ptx_type in ("f16", "f32", "f64"):
        return _shuffled(_floats(ty, random), random)
    if ptx_type == "bf16":
        return to_bf16(_shuffled(_floats(np.float32, random), random))
    if ptx_type in ("f16x2", "bf16x2"):
        half = ptx_type[:-2]
        low, high = (samples(half, random).view(np.uint16).astype(np.uint32) for _ in "ab")
        return high << 16 | low
    if ptx_type == "f32x2":
        low, high = (samples("f32", random).view(np.uint32).astype(np.uint64) for _ in "ab")
        return high << np.uint64(32) | low
    info = np.iinfo(ty)
    edges = [0, 1, 2, 31, 32, 33, info.max, info.min, info.max - 1, info.max // 2]
    edges += [-1, -2] if info.min < 0 else [255]
    edges = [e for e in edges if info.min <= e <= info.max]
    numbers = random.integers(info.min, info.max, THREADS - len(edges), dtype=ty, endpoint=True)
    numbers[::3] >>= ty(min(20, 4 * ty().itemsize))  # small numbers too
    return _shuffled(np.concatenate([np.array(edges, ty), numbers]), random)


def _floats(ty: type, random: np.random.Generator) -> np.ndarray:
    info = np.finfo(ty)
    tiny = info.tiny / 8
    edges = [0.0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, np.inf, -np.inf, np.nan, tiny, -tiny]
    edges += [info.max, -info.max, info.tiny, 3.25, 100.125]
    # Halfway between two neighbours in bf16, f16 and f32: ties go to even.
    edges += [1 + i * 2.0**-n for n in (8, 11, 24) for i in (1, 3)]
    numbers = random.standard_normal(THREADS - len(edges)) * 4
    with np.errstate(over="ignore"):
        return np.concatenate([np.array(edges), numbers]).astype(ty)


def _shuffled(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return random.permutation(values[:THREADS])


# ---- oracle helpers


def integers(array: np.ndarray) -> np.ndarray:
    """Python integers, which do not overflow."""
    return np.array([int(v) for v in array], dtype=object)


def each(function: Callable) -> Callable:
    """An oracle from a function of Python scalars."""
    return lambda *columns: np.array(
        [function(*(v.item() for v in row)) for row in zip(*columns, strict=True)], dtype=object
    )


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds to nearest even; raw bits."""
    import torch

    bits = torch.tensor(np.asarray(values, np.float32)).to(torch.bfloat16).view(torch.int16)
    return bits.numpy().view(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


_VIEWS = {
    "bf16": from_bf16,
    "bf16x2": lambda x: from_bf16(x.view(np.uint16)),
    "f16x2": lambda x: x.view(np.float16),
    "f32x2": lambda x: x.view(np.float32),
}


def halves(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high 16 bits."""
    return (pairs & 0xFFFF).astype(np.uint16), (pairs >> 16).astype(np.uint16)


def opcodes_of(programs: Iterable[str]) -> set[str]:
    from ..ptx import opcodes

    return set().union(*(opcodes(program) for program in programs))


def has_opcode(programs: Iterable[str], pattern: str) -> bool:
    return any(re.search(pattern, program) for program in programs)
