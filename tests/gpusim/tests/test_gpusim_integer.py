"""Integer, bit and comparison instructions against Python integers."""

from __future__ import annotations

import numpy as np
import pytest

from .harness import Batch, Case, each, integers, parametrize

pytestmark = pytest.mark.gpusim

INTS = ("u16", "u32", "u64", "s16", "s32", "s64")


def bits(ty: str) -> int:
    return int(ty[1:])


def bound(value: int, ty: str) -> int:
    low = -(1 << bits(ty) - 1) if ty[0] == "s" else 0
    high = (1 << bits(ty) - (ty[0] == "s")) - 1
    return min(max(value, low), high)


def truncated_division(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def arithmetic() -> list[Case]:
    cases = []
    for ty in INTS:
        two, three = f"{ty} {ty} -> {ty}", f"{ty} {ty} {ty} -> {ty}"
        n = bits(ty)
        cases += [
            Case(f"add.{ty} d, a, b", two, lambda a, b: integers(a) + integers(b)),
            Case(f"sub.{ty} d, a, b", two, lambda a, b: integers(a) - integers(b)),
            Case(f"mul.lo.{ty} d, a, b", two, lambda a, b: integers(a) * integers(b)),
            Case(f"mul.hi.{ty} d, a, b", two, lambda a, b, n=n: integers(a) * integers(b) >> n),
            Case(f"mad.lo.{ty} d, a, b, c", three, each(lambda a, b, c: a * b + c)),
            Case(f"mad.hi.{ty} d, a, b, c", three, each(lambda a, b, c, n=n: (a * b >> n) + c)),
            Case(f"min.{ty} d, a, b", two, np.minimum),
            Case(f"max.{ty} d, a, b", two, np.maximum),
            Case(f"sad.{ty} d, a, b, c", three, each(lambda a, b, c: c + abs(a - b))),
        ]
        nonzero = {"b": [1, 2, 3, 7, 100, 255]}
        cases += [
            Case(f"div.{ty} d, a, b", two, each(truncated_division), values=nonzero),
            Case(
                f"rem.{ty} d, a, b",
                two,
                each(lambda a, b: a - b * truncated_division(a, b)),
                values=nonzero,
            ),
        ]
    for ty in ("s16", "s32", "s64"):
        cases.append(Case(f"neg.{ty} d, a", f"{ty} -> {ty}", lambda a: -integers(a)))
        cases.append(Case(f"abs.{ty} d, a", f"{ty} -> {ty}", lambda a: np.abs(integers(a))))
    for ty in ("u16", "s16", "u32", "s32"):
        double = ty[0] + str(2 * bits(ty))
        cases.append(
            Case(f"mul.wide.{ty} d, a, b", f"{ty} {ty} -> {double}", each(lambda a, b: a * b))
        )
        cases.append(
            Case(
                f"mad.wide.{ty} d, a, b, c",
                f"{ty} {ty} {double} -> {double}",
                each(lambda a, b, c: a * b + c),
            )
        )
    saturating = "s32 s32 -> s32"
    cases += [
        Case("add.sat.s32 d, a, b", saturating, each(lambda a, b: bound(a + b, "s32"))),
        Case("sub.sat.s32 d, a, b", saturating, each(lambda a, b: bound(a - b, "s32"))),
        Case(
            "mad.hi.sat.s32 d, a, b, c",
            "s32 s32 s32 -> s32",
            each(lambda a, b, c: bound((a * b >> 32) + c, "s32")),
        ),
        Case("div.s32 d, a, -1", "s32 -> s32", lambda a: -integers(a)),
    ]
    return cases


def narrow24(value: int, ty: str) -> int:
    value &= 0xFFFFFF
    return value - (1 << 24) if ty[0] == "s" and value >> 23 else value


def dp4a(a: int, b: int, c: int, ta: str, tb: str) -> int:
    def byte(x: int, i: int, ty: str) -> int:
        value = x >> 8 * i & 255
        return value - 256 if ty[0] == "s" and value > 127 else value

    return c + sum(byte(a, i, ta) * byte(b, i, tb) for i in range(4))


def carries() -> list[Case]:
    """A carry shows in a second instruction that only adds it."""
    cases = []
    for ty in ("u32", "u64", "s32", "s64"):
        n, u = bits(ty), f"u{bits(ty)}"
        two = f"{u} {u} -> {u}"
        cases += [
            Case(
                f".reg .b{n} t; add.cc.{ty} t, a, b; addc.{ty} d, a, 0;",
                two,
                each(lambda a, b, n=n: a + (a + b >> n)),
            ),
            Case(
                f".reg .b{n} t; sub.cc.{ty} t, a, b; subc.{ty} d, a, 0;",
                two,
                each(lambda a, b: a - (b > a)),
            ),
            Case(
                f".reg .b{n} t; add.cc.{ty} t, a, b; addc.cc.{ty} t, t, -1; addc.{ty} d, 0, 0;",
                two,
                each(lambda a, b, n=n: (a + b) % 2**n + 2**n - 1 + (a + b >> n) >> n),
            ),
        ]
    for ty in ("u32", "u64"):
        n = bits(ty)
        for part in ("lo", "hi"):
            product = lambda a, b, p=part, n=n: (a * b >> n) if p == "hi" else a * b % 2**n  # noqa: E731
            cases.append(
                Case(
                    f".reg .b{n} t; mad.{part}.cc.{ty} t, a, b, c; madc.{part}.{ty} d, a, b, t;",
                    f"{ty} {ty} {ty} -> {ty}",
                    each(
                        lambda a, b, c, n=n, f=product: (
                            f(a, b) + (f(a, b) + c) % 2**n + (f(a, b) + c >> n)
                        )
                    ),
                )
            )
    for ty in ("u32", "s32"):
        for part, shift in (("lo", 0), ("hi", 16)):
            cases.append(
                Case(
                    f"mad24.{part}.{ty} d, a, b, c",
                    f"{ty} {ty} {ty} -> {ty}",
                    each(lambda a, b, c, t=ty, s=shift: (narrow24(a, t) * narrow24(b, t) >> s) + c),
                )
            )
        cases.append(
            Case(
                f"mul24.lo.{ty} d, a, b",
                f"{ty} {ty} -> {ty}",
                each(lambda a, b, t=ty: narrow24(a, t) * narrow24(b, t)),
            )
        )
    for ta in ("u32", "s32"):
        for tb in ("u32", "s32"):
            cases.append(
                Case(
                    f"dp4a.{ta}.{tb} d, a, b, c",
                    "u32 u32 u32 -> u32",
                    each(lambda a, b, c, t=ta, s=tb: dp4a(a, b, c, t, s)),
                )
            )
    return cases


def field(a: int, position: int, length: int, ty: str) -> int:
    """bfe, bit by bit as the manual words it."""
    n = bits(ty)
    a %= 1 << n
    position, length = position & 255, length & 255
    top = min(position + length - 1, n - 1)
    sign = 0 if ty[0] == "u" or length == 0 else a >> top & 1
    return sum(
        (a >> position + i & 1 if i < length and position + i < n else sign) << i for i in range(n)
    )


def insert(a: int, b: int, position: int, length: int, n: int) -> int:
    for i in range(length & 255):
        at = (position & 255) + i
        if at < n:
            b = b & ~(1 << at) | (a >> i & 1) << at
    return b


def leading(value: int, ty: str, amount: bool) -> int:
    value = ~value if value < 0 else value
    if value == 0:
        return 0xFFFFFFFF
    return bits(ty) - value.bit_length() if amount else value.bit_length() - 1


def shifted(a: int, n: int, ty: str, left: bool) -> int:
    width = bits(ty)
    if left:
        return a << n if n < width else 0
    return a >> min(n, width) if n < width or a < 0 else 0


def bitwise() -> list[Case]:
    cases = []
    for n in (16, 32, 64):
        b = f"b{n}"
        two = f"{b} {b} -> {b}"
        cases += [
            Case(f"and.{b} d, a, b", two, np.bitwise_and),
            Case(f"or.{b} d, a, b", two, np.bitwise_or),
            Case(f"xor.{b} d, a, b", two, np.bitwise_xor),
            Case(f"not.{b} d, a", f"{b} -> {b}", np.invert),
            Case(f"cnot.{b} d, a", f"{b} -> {b}", lambda a: a == 0),
        ]
        amounts = {"b": [0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 100, 2**31]}
        cases.append(
            Case(
                f"shl.{b} d, a, b",
                f"{b} u32 -> {b}",
                each(lambda a, n, t=b: shifted(a, n, t, True)),
                values=amounts,
            )
        )
        for kind in "bus":
            ty = f"{kind}{n}"
            cases.append(
                Case(
                    f"shr.{ty} d, a, b",
                    f"{ty} u32 -> {ty}",
                    each(lambda a, n, t=ty: shifted(a, n, t, False)),
                    values=amounts,
                )
            )
    positions = {"b": [0, 1, 5, 31, 32, 40, 63, 64, 255, 256], "c": [0, 1, 4, 16, 32, 63, 64, 255]}
    for ty in ("u32", "s32", "u64", "s64"):
        cases += [
            Case(
                f"bfe.{ty} d, a, b, c",
                f"{ty} u32 u32 -> {ty}",
                each(lambda a, p, n, t=ty: field(a, p, n, t)),
                values=positions,
            ),
            Case(f"bfind.{ty} d, a", f"{ty} -> u32", each(lambda a, t=ty: leading(a, t, False))),
            Case(
                f"bfind.shiftamt.{ty} d, a",
                f"{ty} -> u32",
                each(lambda a, t=ty: leading(a, t, True)),
            ),
        ]
    for n in (32, 64):
        b = f"b{n}"
        cases += [
            Case(f"popc.{b} d, a", f"{b} -> u32", each(lambda a: a.bit_count())),
            Case(f"clz.{b} d, a", f"{b} -> u32", each(lambda a, n=n: n - a.bit_length())),
            Case(f"brev.{b} d, a", f"{b} -> {b}", each(lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2))),
            Case(
                f"bfi.{b} d, a, b, c, 9",
                f"{b} {b} u32 -> {b}",
                each(lambda a, x, p, n=n: insert(a, x, p, 9, n)),
                values={"c": positions["b"]},
            ),
        ]
    return cases


def permuted(a: int, b: int, choices: list[int]) -> int:
    both = b << 32 | a
    return sum((both >> 8 * (c % 8) & 255) << 8 * i for i, c in enumerate(choices))


def prmt(a: int, b: int, selector: int) -> int:
    result = 0
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = (b << 32 | a) >> 8 * (choice & 7) & 255
        result |= ((255 if byte & 128 else 0) if choice & 8 else byte) << 8 * i
    return result


def lop3(a: int, b: int, c: int, table: int) -> int:
    return sum(
        (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32)
    )


def words() -> list[Case]:
    three = "u32 u32 u32 -> u32"
    modes = {
        "f4e": lambda n: [n, n + 1, n + 2, n + 3],
        "b4e": lambda n: [n, n - 1, n - 2, n - 3],
        "rc8": lambda n: [n] * 4,
        "ecl": lambda n: [max(n, i) for i in range(4)],
        "ecr": lambda n: [min(n, i) for i in range(4)],
        "rc16": lambda n: [n % 2 * 2, n % 2 * 2 + 1] * 2,
    }
    cases = [Case("prmt.b32 d, a, b, c", three, each(prmt))]
    for mode, choose in modes.items():
        cases.append(
            Case(
                f"prmt.b32.{mode} d, a, b, c",
                three,
                each(lambda a, b, n, f=choose: permuted(a, b, f(n & 3))),
            )
        )
    for table in (0x96, 0xE8, 0x1B, 0xF8):
        cases.append(
            Case(
                f"lop3.b32 d, a, b, c, {table}",
                three,
                each(lambda a, b, c, t=table: lop3(a, b, c, t)),
            )
        )
    for side in "lr":
        for mode in ("wrap", "clamp"):

            def funnel(a, b, n, side=side, mode=mode):
                n = n & 31 if mode == "wrap" else min(n, 32)
                both = b << 32 | a
                return (both << n >> 32 if side == "l" else both >> n) & 0xFFFFFFFF

            cases.append(Case(f"shf.{side}.{mode}.b32 d, a, b, c", three, each(funnel)))
    for mode in ("clamp", "wrap"):

        def mask(a, b, mode=mode):
            if mode == "wrap":
                a, b = a & 31, b & 31
            return (1 << min(b, 32)) - 1 << min(a, 32)

        cases.append(Case(f"bmsk.{mode}.b32 d, a, b", "u32 u32 -> u32", each(mask)))
    return cases


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
FLAG = "selp.b32 d, 1, 0, p;"


def comparisons() -> list[Case]:
    cases = []
    for ty in ("s16", "u32", "s32", "u64", "s64"):
        for name, function in COMPARISONS.items():
            cases.append(Case(f"setp.{name}.{ty} p, a, b; {FLAG}", f"{ty} {ty} -> u32", function))
            cases.append(
                Case(
                    f"set.{name}.u32.{ty} d, a, b;",
                    f"{ty} {ty} -> u32",
                    lambda a, b, f=function: np.where(f(a, b), 0xFFFFFFFF, 0),
                )
            )
    unsigned = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    for name, function in unsigned.items():
        cases.append(Case(f"setp.{name}.u32 p, a, b; {FLAG}", "u32 u32 -> u32", function))
    cases += [
        Case(f"setp.eq.b64 p, a, b; {FLAG}", "b64 b64 -> u32", np.equal),
        Case("set.eq.u32.b32 d, a, b;", "b32 b32 -> u32", each(lambda a, b: -(a == b))),
        Case(f"setp.lt.s32 q|p, a, b; {FLAG}", "s32 s32 -> u32", np.greater_equal),
        Case("selp.b64 d, a, b, q;", "b64 b64 -> b64", lambda a, b: b),
        Case(
            "slct.b32.s32 d, a, b, c",
            "b32 b32 s32 -> b32",
            each(lambda a, b, c: a if c >= 0 else b),
        ),
        Case(
            "slct.u64.f32 d, a, b, c",
            "u64 u64 f32 -> u64",
            each(lambda a, b, c: a if c >= 0 else b),
        ),
    ]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    for name, function in combine.items():
        code = f"setp.gt.s32 q, c, 0; setp.lt.{name}.s32 p, a, b, q; {FLAG}"
        oracle = lambda a, b, c, f=function: f(a < b, c > 0)  # noqa: E731
        cases.append(Case(code, "s32 s32 s32 -> u32", oracle))
        code = f"setp.gt.s32 p, a, 0; setp.gt.s32 q, b, 0; {name}.pred p, p, q; {FLAG}"
        oracle = lambda a, b, f=function: f(a > 0, b > 0)  # noqa: E731
        cases.append(Case(code, "s32 s32 -> u32", oracle))
    cases.append(
        Case(f"setp.gt.s32 q, a, 0; not.pred p, q; {FLAG}", "s32 -> u32", lambda a: a <= 0)
    )
    return cases


BATCHES = [Batch(f()) for f in (arithmetic, carries, bitwise, words, comparisons)]
PROGRAMS = [batch.ptx for batch in BATCHES]


@parametrize(BATCHES)
def test_instruction(batch: Batch, case: Case) -> None:
    batch.check(case)


def test_division_by_zero_does_not_trap() -> None:
    """PTX leaves the value open; the host processor would raise a signal."""
    batch = Batch(
        [Case("div.s32 d, a, 0", "s32 -> s32", None), Case("rem.u64 d, a, 0", "u64 -> u64", None)]
    )
    for case in batch.cases:
        batch.result(case)
