"""Conversions and moves against numpy and exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from .harness import Batch, Case, each, from_bf16, halves, parametrize, to_bf16

pytestmark = pytest.mark.gpusim

INTS = ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64")


def limits(ty: str) -> tuple[int, int]:
    n = int(ty[1:])
    return (-(1 << n - 1), (1 << n - 1) - 1) if ty[0] == "s" else (0, (1 << n) - 1)


def clamp(value: int, ty: str) -> int:
    low, high = limits(ty)
    return min(max(value, low), high)


def wrap(value: int, ty: str) -> int:
    low, high = limits(ty)
    return (value - low) % (high - low + 1) + low


def int_to_int() -> list[Case]:
    cases = []
    for source in INTS:
        for dest in INTS:
            wide = dest[0] + str(max(int(dest[1:]), 16))  # registers are 16 bits at least
            cases.append(
                Case(
                    f"cvt.{dest}.{source} d, a",
                    f"{source} -> {wide}",
                    each(lambda a, t=dest: wrap(a, t)),
                )
            )
    for dest, source in (
        ("u8", "s32"),
        ("s8", "s32"),
        ("s16", "s64"),
        ("u32", "s64"),
        ("s32", "u32"),
    ):
        wide = dest[0] + str(max(int(dest[1:]), 16))
        oracle = each(lambda a, t=dest: clamp(a, t))
        cases.append(Case(f"cvt.sat.{dest}.{source} d, a", f"{source} -> {wide}", oracle))
    return cases


# What each format can hold: precision in bits and smallest exponent of the last place.
FORMATS = {"f16": (11, -24), "bf16": (8, -133), "f32": (24, -149), "f64": (53, -1074)}
LARGEST = {"f16": 65504, "bf16": (2 - 2**-7) * 2.0**127, "f32": (2 - 2**-23) * 2.0**127}


def fit(exact: Fraction, ty: str, mode: str) -> float:
    """An exact value rounded to a format."""
    if exact == 0:
        return 0.0
    precision, lowest = FORMATS[ty]
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - precision + 1, lowest)
    scaled = exact / unit
    steps = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}[mode](scaled)
    result = steps * unit
    largest = Fraction(LARGEST.get(ty, float(np.finfo(np.float64).max)))
    if abs(result) > largest:
        stays = mode == "rz" or mode == ("rm" if exact > 0 else "rp")
        return (1 if exact > 0 else -1) * (float(largest) if stays else math.inf)
    return math.copysign(float(result), exact)


def encode(values: np.ndarray, ty: str) -> np.ndarray:
    return to_bf16(values.astype(np.float64).astype(np.float32)) if ty == "bf16" else values


def int_to_float() -> list[Case]:
    cases = []
    for dest in FORMATS:
        for source in ("u8", "s16", "s32", "u32", "s64", "u64"):
            for mode in ("rn", "rz", "rm", "rp"):
                if (dest, source) == ("bf16", "u8"):
                    continue  # not in PTX
                oracle = lambda a, t=dest, m=mode: encode(  # noqa: E731
                    each(lambda v: fit(Fraction(v), t, m))(a), t
                )
                cases.append(
                    Case(f"cvt.{mode}.{dest}.{source} d, a", f"{source} -> {dest}", oracle)
                )
    return cases


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(value: float, mode: str, dest: str, source: str) -> int:
    if math.isnan(value):
        high_bit = wrap(1 << int(dest[1:]) - 1, dest)
        return high_bit if source == "f64" or dest[1:] == "64" else 0
    low, high = limits(dest)
    if math.isinf(value):
        return high if value > 0 else low
    return clamp(int(ROUNDINGS[mode](value)), dest)


def float_to_int() -> list[Case]:
    cases = []
    for source in FORMATS:
        for dest in INTS:
            for mode in ROUNDINGS:
                if source == "bf16" and dest[1:] == "8":
                    continue  # not in PTX
                wide = dest[0] + str(max(int(dest[1:]), 16))
                decode = from_bf16 if source == "bf16" else (lambda a: a)
                oracle = lambda a, m=mode, d=dest, s=source, f=decode: each(  # noqa: E731
                    lambda v: to_integer(v, m, d, s)
                )(f(a))
                cases.append(
                    Case(f"cvt.{mode}.{dest}.{source} d, a", f"{source} -> {wide}", oracle)
                )
    return cases


def decoded(a: np.ndarray, ty: str) -> np.ndarray:
    return from_bf16(a) if ty == "bf16" else a


def narrowing(source: str, dest: str, mode: str):
    def one(value: float) -> float:
        if not math.isfinite(value):
            return value
        return fit(Fraction(value), dest, mode) if value else value

    def oracle(a: np.ndarray) -> np.ndarray:
        result = each(one)(decoded(a, source)).astype(np.float64)
        if dest == "bf16":
            return to_bf16(result.astype(np.float32))
        return result

    return oracle


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), x, np.where(x > 0, x, 0))


def float_to_float() -> list[Case]:
    cases = [
        Case("cvt.f32.f16 d, a", "f16 -> f32", lambda a: a.astype(np.float32)),
        Case("cvt.f32.bf16 d, a", "bf16 -> f32", from_bf16),
        Case("cvt.f64.f32 d, a", "f32 -> f64", lambda a: a.astype(np.float64)),
        Case("cvt.f64.f16 d, a", "f16 -> f64", lambda a: a.astype(np.float64)),
        Case("cvt.rn.bf16.f16 d, a", "f16 -> bf16", narrowing("f16", "bf16", "rn")),
        Case("cvt.rn.f16.bf16 d, a", "bf16 -> f16", narrowing("bf16", "f16", "rn")),
        Case("cvt.rz.bf16.f64 d, a", "f64 -> bf16", narrowing("f64", "bf16", "rz")),
        Case("cvt.rni.bf16.bf16 d, a", "bf16 -> bf16", lambda a: to_bf16(np.rint(from_bf16(a)))),
        Case("cvt.sat.f64.f64 d, a", "f64 -> f64", lambda a: np.where(a > 0, np.minimum(a, 1), 0)),
        Case("cvt.sat.f16.f16 d, a", "f16 -> f16", lambda a: np.where(a > 0, np.minimum(a, 1), 0)),
        Case("cvt.sat.f32.f32 d, a", "f32 -> f32", lambda a: np.where(a > 0, np.minimum(a, 1), 0)),
        Case("cvt.rpi.f64.f64 d, a", "f64 -> f64", np.ceil),
        Case("cvt.rzi.f16.f16 d, a", "f16 -> f16", np.trunc),
        Case("cvt.rn.relu.f16.f32 d, a", "f32 -> f16", lambda a: relu(a).astype(np.float16)),
    ]
    for mode, function in ROUNDINGS.items():
        cases.append(Case(f"cvt.{mode}.f32.f32 d, a", "f32 -> f32", function))
    for source, dest in (("f64", "f32"), ("f32", "f16"), ("f64", "f16"), ("f32", "bf16")):
        for mode in ("rn", "rz", "rm", "rp"):
            cases.append(
                Case(
                    f"cvt.{mode}.{dest}.{source} d, a",
                    f"{source} -> {dest}",
                    narrowing(source, dest, mode),
                )
            )
    return cases


def pair(dest: str, mode: str):
    def oracle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        bits = []
        for column in (a, b):
            values = narrowing("f32", dest, mode)(column)
            values = values.astype(np.float16).view(np.uint16) if dest == "f16" else values
            bits.append(values.astype(np.uint32))
        return bits[0] << 16 | bits[1]

    return oracle


def tf32(a: np.ndarray, mode: str) -> np.ndarray:
    bits = a.view(np.uint32).astype(np.uint64)
    add = {"rna": 0x1000, "rz": 0, "rn": 0xFFF + (bits >> np.uint64(13) & np.uint64(1))}[mode]
    result = bits + np.uint64(add) if isinstance(add, int) else bits + add
    special = ~np.isfinite(a)
    result = np.where(special, bits, result) & np.uint64(0xFFFFE000)
    return np.where(np.isnan(a), 0x7FFFE000, result)


def packed() -> list[Case]:
    cases = []
    for dest in ("f16", "bf16"):
        for mode in ("rn", "rz"):
            cases.append(
                Case(f"cvt.{mode}.{dest}x2.f32 d, a, b", f"f32 f32 -> {dest}x2", pair(dest, mode))
            )
    cases.append(
        Case(
            "cvt.rn.relu.bf16x2.f32 d, a, b",
            "f32 f32 -> bf16x2",
            lambda a, b: pair("bf16", "rn")(relu(a), relu(b)),
        )
    )
    for mode in ("rna", "rn", "rz"):
        cases.append(Case(f"cvt.{mode}.tf32.f32 d, a", "f32 -> u32", lambda a, m=mode: tf32(a, m)))
    return cases


def moves() -> list[Case]:
    return [
        Case("mov.b32 d, a", "b32 -> b32", lambda a: a),
        Case("mov.u64 d, a", "u64 -> u64", lambda a: a),
        Case("mov.b64 d, {a, b}", "b32 b32 -> b64", each(lambda a, b: b << 32 | a)),
        Case("mov.b32 d, {a, b}", "b16 b16 -> b32", each(lambda a, b: b << 16 | a)),
        Case(".reg .b16 t; mov.b32 {t, d}, a;", "b32 -> b16", lambda a: halves(a)[1]),
        Case(
            ".reg .b32 s, t; mov.b64 {s, t}, a; xor.b32 d, s, t;",
            "b64 -> b32",
            each(lambda a: (a ^ a >> 32) & 0xFFFFFFFF),
        ),
        Case("mov.f32 d, 0f40490FDB", "-> f32", lambda: np.full(64, np.pi, np.float32)),
        Case("mov.f64 d, 0d400921FB54442D18", "-> f64", lambda: np.full(64, np.pi)),
        Case("mov.b32 d, 0xFFFFFFFF", "-> b32", lambda: np.full(64, 0xFFFFFFFF)),
        Case("mov.pred p, 1; selp.b32 d, 7, 0, p;", "-> b32", lambda: np.full(64, 7)),
        Case(
            ".reg .b128 t; .reg .b64 s; mov.b128 t, {a, b}; mov.b128 {s, d}, t;",
            "b64 b64 -> b64",
            lambda a, b: b,
        ),
    ]


BATCHES = [
    Batch(f()) for f in (int_to_int, int_to_float, float_to_int, float_to_float, packed, moves)
]
PROGRAMS = [batch.ptx for batch in BATCHES]


@parametrize(BATCHES)
def test_instruction(batch: Batch, case: Case) -> None:
    batch.check(case)
