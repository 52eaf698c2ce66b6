"""Floating-point instructions, scalar and packed, against numpy and exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from .harness import Batch, Case, each, from_bf16, halves, parametrize, to_bf16

pytestmark = pytest.mark.gpusim

SIGNED_ZEROS = {"a": [0.0, -0.0, 0.0, -0.0], "b": [0.0, 0.0, -0.0, -0.0]}
FLAG = "selp.b32 d, 1, 0, p;"


def rounded(exact: Fraction, ty: type, mode: str) -> float:
    """An exact value in float32 or float64, rounded up, down or towards zero."""
    info = np.finfo(ty)
    if abs(exact) > Fraction(float(info.max)):
        outward = mode == ("rp" if exact > 0 else "rm")
        return (1 if exact > 0 else -1) * (math.inf if outward else float(info.max))
    nearest = ty(float(exact))
    value = Fraction(float(nearest))
    up = mode == "rp" or (mode == "rz" and exact < 0)
    if value < exact and up:
        nearest = np.nextafter(nearest, ty(np.inf))
    elif value > exact and not up:
        nearest = np.nextafter(nearest, ty(-np.inf))
    return float(nearest)


def exact_operation(name: str, ty: type, mode: str):
    def compute(*values: float) -> float:
        if not all(math.isfinite(v) for v in values):
            return nonfinite(name, *values)
        a, b, c = (*map(Fraction, values), Fraction(0), Fraction(0))[:3]
        if name == "div" and b == 0:
            return nonfinite(name, *values)
        exact = {"add": a + b, "sub": a - b, "mul": a * b, "fma": a * b + c}.get(name)
        exact = a / b if name == "div" else exact
        if exact == 0:
            return zero_result(name, mode, *values)
        return rounded(exact, ty, mode)

    return each(compute)


def nonfinite(name: str, *v: float) -> float:
    with np.errstate(all="ignore"):
        a = np.array(v)
        if name == "fma":
            return float(a[0] * a[1] + a[2])
        return float(
            {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name](*a)
        )


def zero_result(name: str, mode: str, *v: float) -> float:
    """Sign of an exact zero: that of the product; of a sum of opposite terms by the mode."""
    sign = math.copysign(1, v[0]) * math.copysign(1, v[1])
    if name in ("mul", "div"):
        return math.copysign(0.0, sign)
    terms = {
        "add": v[:2],
        "sub": (v[0], -v[1]),
        "fma": (math.copysign(1, sign) * abs(v[0] * v[1]), v[-1]),
    }[name]
    signs = {math.copysign(1, t) for t in terms}
    if len(signs) == 1:
        return math.copysign(0.0, signs.pop())
    return -0.0 if mode == "rm" else 0.0


def scalar() -> list[Case]:
    numpy_function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
    cases = []
    for ty, real in (("f32", np.float32), ("f64", np.float64)):
        two, three = f"{ty} {ty} -> {ty}", f"{ty} {ty} {ty} -> {ty}"
        for name, function in numpy_function.items():
            cases.append(Case(f"{name}.rn.{ty} d, a, b", two, function))
            for mode in ("rz", "rm", "rp"):
                oracle = exact_operation(name, real, mode)
                cases.append(Case(f"{name}.{mode}.{ty} d, a, b", two, oracle))
        for mode in ("rz", "rm", "rp"):
            oracle = exact_operation("fma", real, mode)
            cases.append(Case(f"fma.{mode}.{ty} d, a, b, c", three, oracle))
        cases += [
            Case(f"sqrt.rn.{ty} d, a", f"{ty} -> {ty}", np.sqrt),
            Case(f"rcp.rn.{ty} d, a", f"{ty} -> {ty}", lambda a: 1 / a),
            Case(f"neg.{ty} d, a", f"{ty} -> {ty}", np.negative),
            Case(f"abs.{ty} d, a", f"{ty} -> {ty}", np.abs),
            Case(f"copysign.{ty} d, a, b", two, lambda a, b: np.copysign(b, a)),
            Case(f"min.{ty} d, a, b", two, smallest),
            Case(f"max.{ty} d, a, b", two, lambda a, b: -smallest(-a, -b)),
            Case(f"min.{ty} d, a, b;", two, smallest, values=SIGNED_ZEROS),
            Case(f"max.{ty} d, a, b;", two, lambda a, b: -smallest(-a, -b), values=SIGNED_ZEROS),
        ]
    three = "f32 f32 f32 -> f32"
    one = "f32 -> f32"
    cases += [
        Case("add.f32 d, a, b", "f32 f32 -> f32", np.add),
        Case("fma.rn.f32 d, a, b, c", three, each(fused32)),
        Case("mad.rn.f32 d, a, b, c", three, each(fused32)),
        Case("div.full.f32 d, a, b", "f32 f32 -> f32", np.divide, ulps=2),
        Case("div.approx.ftz.f32 d, a, b", "f32 f32 -> f32", flushed(np.divide), ulps=2),
        Case("add.ftz.f32 d, a, b", "f32 f32 -> f32", flushed(np.add)),
        Case("add.sat.f32 d, a, b", "f32 f32 -> f32", lambda a, b: saturated(a + b)),
        Case("min.NaN.f32 d, a, b", "f32 f32 -> f32", lambda a, b: nan_aware(a, b, smallest)),
        Case("max.ftz.f32 d, a, b", "f32 f32 -> f32", flushed(lambda a, b: -smallest(-a, -b))),
        Case("max.f32 d, a, b, c", three, lambda a, b, c: -smallest(smallest(-a, -b), -c)),
        Case("neg.ftz.f32 d, a", one, flushed(np.negative)),
        Case("rcp.approx.ftz.f32 d, a", one, flushed(lambda a: 1 / a), ulps=1),
        Case("rcp.approx.ftz.f64 d, a", "f64 -> f64", lambda a: 1 / a, ulps=2**33),
        Case("sqrt.approx.ftz.f32 d, a", one, flushed(np.sqrt), ulps=1),
        Case("sqrt.rz.f32 d, a", one, truncated_root),
    ]
    for name, function in {
        "rsqrt": lambda a: 1 / np.sqrt(a),
        "sin": np.sin,
        "cos": np.cos,
        "lg2": np.log2,
        "ex2": np.exp2,
        "tanh": np.tanh,
    }.items():
        oracle = lambda a, f=function: f(a.astype(np.float64)).astype(np.float32)  # noqa: E731
        cases.append(Case(f"{name}.approx.f32 d, a", one, oracle, ulps=2))
    cases.append(
        Case("rsqrt.approx.ftz.f64 d, a", "f64 -> f64", lambda a: 1 / np.sqrt(a), ulps=2**33)
    )
    return cases


def fused32(a: float, b: float, c: float) -> float:
    if all(map(math.isfinite, (a, b, c))):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if exact:
            # The nearest of the two neighbours that the directed roundings give; ties to even.
            low, high = (rounded(exact, np.float32, m) for m in ("rm", "rp"))
            if math.isinf(low) or math.isinf(high):
                limit = Fraction(float(np.finfo(np.float32).max)) * (1 + Fraction(1, 2**25))
                finite = high if math.isinf(low) else low
                return finite if abs(exact) < limit else (math.inf if exact > 0 else -math.inf)
            gap = (exact - Fraction(low)) - (Fraction(high) - exact)
            even = low if np.float32(low).view(np.uint32) % 2 == 0 else high
            return low if gap < 0 else high if gap > 0 else even
        return zero_result("fma", "rn", a, b, c)
    return nonfinite("fma", a, b, c)


def truncated_root(a: np.ndarray) -> np.ndarray:
    root = np.sqrt(a.astype(np.float64))
    nearest = root.astype(np.float32)
    return np.where(
        nearest.astype(np.float64) > root, np.nextafter(nearest, np.float32(0)), nearest
    )


def smallest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number wins over NaN, and -0 is below +0."""
    less = np.where((a == b) & np.signbit(a), a, np.where(a < b, a, b))
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, less))


def nan_aware(a: np.ndarray, b: np.ndarray, function) -> np.ndarray:
    return np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), function(a, b))


def saturated(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, np.minimum(x, 1), 0)


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def flushed(function):
    return lambda *columns: flush(function(*(flush(c) for c in columns)))


def narrow() -> list[Case]:
    """f16 natively in numpy, bf16 through float32: exact for one operation on 8-bit mantissas."""
    cases = []
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    for name, function in functions.items():
        cases += [
            Case(f"{name}.f16 d, a, b", "f16 f16 -> f16", function),
            Case(f"{name}.rn.bf16 d, a, b", "bf16 bf16 -> bf16", on_bf16(function)),
            Case(f"{name}.rn.f16x2 d, a, b", "f16x2 f16x2 -> f16x2", on_pairs(on_f16(function))),
            Case(f"{name}.bf16x2 d, a, b", "bf16x2 bf16x2 -> bf16x2", on_pairs(on_bf16(function))),
        ]
    fma = lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float16)  # noqa: E731
    fma_bf16 = lambda a, b, c: a.astype(np.float64) * b + c  # noqa: E731
    minimum = lambda a, b: smallest(a, b)  # noqa: E731
    small = {n: to_bf16(np.linspace(-7, 9, 64) // 0.25 * 0.25) for n in "abc"}
    pairs = {n: v.astype(np.uint32) << 16 | v[::-1] for n, v in small.items()}
    cases += [
        Case("fma.rn.f16 d, a, b, c", "f16 f16 f16 -> f16", fma),
        Case("fma.rn.relu.f16 d, a, b, c", "f16 f16 f16 -> f16", lambda *x: relu(fma(*x))),
        Case("fma.rn.bf16 d, a, b, c", "bf16 bf16 bf16 -> bf16", on_bf16(fma_bf16), values=small),
        Case("fma.rn.f16x2 d, a, b, c", "f16x2 f16x2 f16x2 -> f16x2", on_pairs(on_f16(fma))),
        Case(
            "fma.rn.bf16x2 d, a, b, c",
            "bf16x2 bf16x2 bf16x2 -> bf16x2",
            on_pairs(on_bf16(fma_bf16)),
            values=pairs,
        ),
        Case("add.sat.f16 d, a, b", "f16 f16 -> f16", lambda a, b: saturated(a + b)),
        Case("min.f16 d, a, b", "f16 f16 -> f16", minimum),
        Case("max.NaN.bf16 d, a, b", "bf16 bf16 -> bf16", on_bf16(lambda a, b: np.maximum(a, b))),
        Case("min.NaN.f16x2 d, a, b", "f16x2 f16x2 -> f16x2", on_pairs(on_f16(np.minimum))),
        Case("max.NaN.bf16x2 d, a, b", "bf16x2 bf16x2 -> bf16x2", on_pairs(on_bf16(np.maximum))),
        Case("min.bf16x2 d, a, b", "bf16x2 bf16x2 -> bf16x2", on_pairs(on_bf16(smallest))),
        Case("ex2.approx.f16x2 d, a", "f16x2 -> f16x2", on_pairs(on_f16(exp2))),
        Case("ex2.approx.ftz.bf16 d, a", "bf16 -> bf16", on_bf16(exp2)),
        Case("ex2.approx.ftz.bf16x2 d, a", "bf16x2 -> bf16x2", on_pairs(on_bf16(exp2))),
        Case("neg.f16 d, a", "f16 -> f16", np.negative),
        Case("abs.bf16 d, a", "bf16 -> bf16", lambda a: a & 0x7FFF),
        Case("neg.bf16x2 d, a", "bf16x2 -> bf16x2", lambda a: a ^ 0x80008000),
        Case("abs.f16x2 d, a", "f16x2 -> f16x2", lambda a: a & 0x7FFF7FFF),
        Case("ex2.approx.f16 d, a", "f16 -> f16", lambda a: np.exp2(a.astype(np.float64)), ulps=1),
        Case(
            "tanh.approx.bf16 d, a",
            "bf16 -> bf16",
            on_bf16(lambda a: np.tanh(a.astype(np.float64))),
        ),
        Case(
            "tanh.approx.f16x2 d, a",
            "f16x2 -> f16x2",
            on_pairs(on_f16(lambda a: np.tanh(a.astype(np.float64)))),
        ),
        Case("add.f32.f16 d, a, b", "f16 f32 -> f32", lambda a, b: a.astype(np.float32) + b),
        Case(
            "fma.rn.f32.bf16 d, a, b, c",
            "bf16 bf16 f32 -> f32",
            lambda a, b, c: from_bf16(a) * from_bf16(b) + c,
            ulps=1,
        ),
        Case("add.rn.f32x2 d, a, b", "f32x2 f32x2 -> f32x2", on_floats(np.add)),
        Case("mul.rz.f32x2 d, a, b", "f32x2 f32x2 -> f32x2", on_floats(toward_zero_product)),
        Case("fma.rn.f32x2 d, a, b, c", "f32x2 f32x2 f32x2 -> f32x2", on_floats(each(fused32))),
    ]
    return cases


def exp2(a: np.ndarray) -> np.ndarray:
    return np.exp2(a.astype(np.float64))


def toward_zero_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return exact_operation("mul", np.float32, "rz")(a, b).astype(np.float32)


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), x, np.where(x > 0, x, 0))


def on_f16(function):
    def oracle(*columns):
        result = np.asarray(function(*(c.view(np.float16) for c in columns)), np.float16)
        return result.view(np.uint16)

    return oracle


def on_bf16(function):
    def oracle(*columns):
        return to_bf16(function(*(from_bf16(c) for c in columns)))

    return oracle


def on_pairs(function):
    def oracle(*columns):
        low, high = zip(*(halves(c) for c in columns), strict=True)
        return function(*high).astype(np.uint32) << 16 | function(*low)

    return oracle


def on_floats(function):
    def oracle(*columns):
        parts = []
        for shift in (0, 32):
            floats = [(c >> np.uint64(shift)).astype(np.uint32).view(np.float32) for c in columns]
            result = np.asarray(function(*floats)).astype(np.float32).view(np.uint32)
            parts.append(result.astype(np.uint64))
        return parts[1] << np.uint64(32) | parts[0]

    return oracle


def comparisons() -> list[Case]:
    ordered = {
        "eq": np.equal,
        "ne": lambda a, b: (a < b) | (a > b),
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    cases = []
    for name, function in ordered.items():
        cases.append(Case(f"setp.{name}.f32 p, a, b; {FLAG}", "f32 f32 -> u32", function))
        unordered = lambda a, b, f=function: f(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
        cases.append(Case(f"setp.{name}u.f32 p, a, b; {FLAG}", "f32 f32 -> u32", unordered))
    nan = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    cases += [
        Case(f"setp.nan.f64 p, a, b; {FLAG}", "f64 f64 -> u32", nan),
        Case(f"setp.num.f32 p, a, b; {FLAG}", "f32 f32 -> u32", lambda a, b: ~nan(a, b)),
        Case(f"setp.lt.f16 p, a, b; {FLAG}", "f16 f16 -> u32", np.less),
        Case(
            f"setp.gt.bf16 p, a, b; {FLAG}",
            "bf16 bf16 -> u32",
            lambda a, b: from_bf16(a) > from_bf16(b),
        ),
        Case(f"setp.eq.ftz.f32 p, a, 0f00000000; {FLAG}", "f32 -> u32", lambda a: flush(a) == 0),
        Case("set.lt.f32.f32 d, a, b;", "f32 f32 -> f32", lambda a, b: (a < b).astype(float)),
        Case("set.geu.u32.f64 d, a, b;", "f64 f64 -> u32", lambda a, b: np.where(a < b, 0, -1)),
        Case(
            "setp.lt.f16x2 p|q, a, b; selp.b32 d, 1, 0, p; @q or.b32 d, d, 2;",
            "f16x2 f16x2 -> u32",
            lambda a, b: pair_compare(a, b, lambda x: x.view(np.float16)),
        ),
        Case(
            "setp.lt.bf16x2 p|q, a, b; selp.b32 d, 1, 0, p; @q or.b32 d, d, 2;",
            "bf16x2 bf16x2 -> u32",
            lambda a, b: pair_compare(a, b, from_bf16),
        ),
    ]
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
    }
    for name, function in tests.items():
        cases.append(Case(f"testp.{name}.f32 p, a; {FLAG}", "f32 -> u32", function))
    return cases


def pair_compare(a: np.ndarray, b: np.ndarray, view) -> np.ndarray:
    (al, ah), (bl, bh) = halves(a), halves(b)
    return (view(al) < view(bl)) + 2 * (view(ah) < view(bh))


BATCHES = [Batch(f()) for f in (scalar, narrow, comparisons)]
PROGRAMS = [batch.ptx for batch in BATCHES]


@parametrize(BATCHES)
def test_instruction(batch: Batch, case: Case) -> None:
    batch.check(case)
