"""Loads, stores, atomics, address spaces and module variables."""

from __future__ import annotations

import numpy as np
import pytest

from .. import DeviceArray, load, shuffled
from .harness import kernel, to_bf16

pytestmark = pytest.mark.gpusim

N = 64


def run(ptx: str, source: np.ndarray, out: np.ndarray, *, grid=1, block=N, shared=0) -> np.ndarray:
    dest = DeviceArray(out)
    load(ptx).launch(grid, block, [DeviceArray(source), dest], shared)
    return dest.array


AT = "mul.wide.u32 %q1, tid, {0}; add.u64 %q2, x, %q1; add.u64 %q3, y, %q1; "

VECTORS = kernel(
    AT.format(32)
    + """
ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%q2];
ld.global.nc.L1::no_allocate.L2::128B.v2.f64 {%g1, %g2}, [%q2+16];
st.global.v4.b32 [%q3+16], {%r4, %r3, %r2, %r1};
st.global.cs.v2.f64 [%q3], {%g2, %g1};
prefetch.global.L2 [%q2]; createpolicy.fractional.L2::evict_last.b64 %q9, 0f3F800000;
"""
)


def test_vectors() -> None:
    words = np.arange(N * 8, dtype=np.uint32).reshape(N, 8)
    out = run(VECTORS, words, np.zeros_like(words))
    assert (out == words[:, [6, 7, 4, 5, 3, 2, 1, 0]]).all()


WIDE_VECTOR = kernel(
    AT.format(32)
    + """
ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%q2];
st.global.v8.b32 [%q3], {%r8, %r7, %r6, %r5, %r4, %r3, %r2, %r1};
""",
    target="sm_100a",
)


def test_256_bit_vectors() -> None:
    words = np.arange(N * 8, dtype=np.uint32).reshape(N, 8)
    assert (run(WIDE_VECTOR, words, np.zeros_like(words)) == words[:, ::-1]).all()


EXTENSION = kernel(
    AT.format(1)
    + """
ld.global.s8 %r1, [%q2]; ld.global.u8 %r2, [%q2]; ld.s8 %h1, [%q2];
mul.wide.u32 %q4, tid, 12; add.u64 %q5, y, %q4;
st.global.u32 [%q5], %r1; st.global.u32 [%q5+4], %r2; cvt.s32.s16 %r3, %h1; st.u32 [%q5+8], %r3;
"""
)


def test_small_loads_extend() -> None:
    values = np.arange(-32, 32, dtype=np.int8)
    out = run(EXTENSION, values, np.zeros((N, 3), np.int32))
    assert (out[:, 0] == values).all() and (out[:, 2] == values).all()
    assert (out[:, 1] == values.view(np.uint8)).all()


SPACES = kernel(
    AT.format(4)
    + """
ld.global.b32 %r1, [%q2];
mul.lo.u32 %r2, tid, 4; mov.u32 %r3, tile; add.u32 %r4, %r3, %r2;
st.shared.b32 [%r4], %r1;
bar.sync 0;
xor.b32 %r5, %r2, 4; add.u32 %r5, %r5, %r3; cvt.u64.u32 %q4, %r5;
cvta.shared.u64 %q5, %q4; isspacep.shared %p1, %q5; isspacep.global %p2, %q5;
ld.b32 %r6, [%q5];
mov.u64 %q6, stack; st.local.b32 [%q6+8], %r6; cvta.local.u64 %q7, %q6; ld.b32 %r7, [%q7+8];
mov.u64 %q8, factor; ld.const.u32 %r8, [%q8+4]; mul.lo.u32 %r7, %r7, %r8;
cvta.to.shared.u64 %q9, %q5; ld.shared.u32 %r9, [%q9]; add.u32 %r7, %r7, %r9;
@%p1 add.u32 %r7, %r7, 1000; @%p2 add.u32 %r7, %r7, 5000;
mov.u64 %q10, x_param; ld.param::entry.u64 %q11, [%q10];
cvta.param.u64 %q12, %q10; ld.u64 %q13, [%q12];
setp.eq.u64 %p3, %q11, %q13; @!%p3 trap;
mov.u32 %r10, %dynamic_smem_size; add.u32 %r7, %r7, %r10;
st.global.b32 [%q3], %r7;
""",
    shared=".shared .align 4 .b8 tile[256]; .local .align 8 .b8 stack[16];",
).replace(".visible .entry", ".const .align 4 .u32 factor[2] = {9, 3};\n.visible .entry")


def test_address_spaces() -> None:
    values = np.arange(N, dtype=np.uint32)
    neighbour = values ^ 1
    assert (run(SPACES, values, np.zeros(N, np.uint32)) == neighbour * 4 + 1000).all()


DYNAMIC = kernel(
    AT.format(4)
    + """
mul.lo.u32 %r2, tid, 4; mov.u32 %r3, buffer; add.u32 %r4, %r3, %r2;
ld.global.b32 %r1, [%q2]; st.shared.b32 [%r4], %r1; bar.sync 0;
sub.u32 %r5, 252, %r2; add.u32 %r5, %r5, %r3; ld.shared.b32 %r6, [%r5]; st.global.b32 [%q3], %r6;
"""
).replace(".visible .entry", ".extern .shared .align 16 .b8 buffer[];\n.visible .entry")


def test_dynamic_shared_memory() -> None:
    values = np.arange(N, dtype=np.uint32)
    assert (run(DYNAMIC, values, np.zeros(N, np.uint32), shared=256) == values[::-1]).all()


def test_all_names_of_dynamic_shared_memory_are_one_block() -> None:
    """A module may declare it once for each of its kernels."""
    other = ".extern .shared .align 4 .b8 other[];\n.visible .entry"
    ptx = DYNAMIC.replace(".visible .entry", other, 1)
    values = np.arange(N, dtype=np.uint32)
    assert (run(ptx, values, np.zeros(N, np.uint32), shared=256) == values[::-1]).all()


COUNTER = kernel(
    """
mov.u64 %q1, counter; setp.eq.u32 %p1, tid, 0;
@%p1 atom.global.add.u32 %r1, [%q1], 1;
@%p1 st.global.u32 [y], %r1;
"""
).replace(".visible .entry", ".global .align 4 .u32 counter = 41;\n.visible .entry")


def test_module_variables_live_between_launches() -> None:
    out = [int(run(COUNTER, np.zeros(1), np.zeros(1, np.uint32))[0]) for _ in range(2)]
    assert out == [41, 42]


# ---- atomics: every thread applies its value to cell tid%4; the order must not matter

ATOMICS = {
    "atom.global.add.u32": (np.uint32, np.add),
    "red.global.add.u64": (np.uint64, np.add),
    "atom.global.add.f32": (np.float32, np.add),
    "atom.add.f64": (np.float64, np.add),
    "atom.relaxed.gpu.global.min.s32": (np.int32, np.minimum),
    "red.relaxed.gpu.global.max.u32": (np.uint32, np.maximum),
    "atom.global.max.s64": (np.int64, np.maximum),
    "atom.global.and.b32": (np.uint32, np.bitwise_and),
    "red.global.or.b64": (np.uint64, np.bitwise_or),
    "atom.global.gpu.acq_rel.xor.b32": (np.uint32, np.bitwise_xor),
    "atom.global.add.noftz.f16": (np.float16, np.add),
    "red.global.add.noftz.bf16": (np.uint16, None),
    "red.global.gpu.relaxed.add.f32": (np.float32, np.add),
    "red.global.sys.release.and.b32": (np.uint32, np.bitwise_and),
}
SUFFIX = {2: "h", 4: "r", 8: "q"}


def atomic_program(opcode: str, dtype: type) -> str:
    width = np.dtype(dtype).itemsize
    register = f"%{SUFFIX[width]}30"
    operands = (
        f"[%q4], {register}"
        if opcode.startswith("red")
        else f"%{SUFFIX[width]}31, [%q4], {register}"
    )
    return kernel(
        f"mul.wide.u32 %q1, tid, {width}; add.u64 %q2, x, %q1; "
        f"and.b32 %r3, tid, 3; mul.wide.u32 %q3, %r3, {width}; add.u64 %q4, y, %q3; "
        f"ld.global.b{8 * width} {register}, [%q2]; {opcode} {operands};"
    )


ATOMIC_PROGRAMS = {name: atomic_program(name, dtype) for name, (dtype, _) in ATOMICS.items()}


@pytest.mark.parametrize("opcode", ATOMICS)
def test_atomics(opcode: str) -> None:
    dtype, function = ATOMICS[opcode]
    values = (np.arange(N) * 7 % 23).astype(dtype)
    start = np.full(4, 3, dtype)
    if function is None:  # bf16: small integers, exact
        values, start = to_bf16(np.arange(N) % 3), to_bf16(np.full(4, 3.0))
        expected = to_bf16([3 + sum((np.arange(N) % 3)[i::4]) for i in range(4)])
    else:
        expected = np.array([function.reduce(values[i::4], initial=start[i]) for i in range(4)])
    assert (run(ATOMIC_PROGRAMS[opcode], values, start) == expected).all()


OTHER_ATOMICS = kernel(
    """
mul.wide.u32 %q1, tid, 4; add.u64 %q2, x, %q1; ld.global.b32 %r1, [%q2];
atom.global.inc.u32 %r2, [y], 9; atom.global.dec.u32 %r3, [y+4], 9;
atom.global.exch.b32 %r4, [y+8], %r1;
atom.global.cas.b32 %r5, [y+12], 0, %r1; atom.global.gpu.relaxed.cas.b64 %q5, [y+16], 0, %q2;
mov.b32 %r6, 0x3C003C00; red.global.add.noftz.f16x2 [y+24], %r6;
red.global.inc.u32 [y+56], 99;
red.global.add.v2.f32 [y+32], {0f3F800000, 0f40000000};
atom.global.v2.f32.add {%f1, %f2}, [y+40], {0f3F800000, 0f40000000};
atom.acq_rel.gpu.global.exch.b64 %q6, [y+48], %q2;
"""
)


def test_other_atomics() -> None:
    values = np.arange(1, N + 1, dtype=np.uint32)
    with shuffled(0):  # what is exchanged last depends on the order
        out = run(OTHER_ATOMICS, values, np.zeros(16, np.uint32))
    assert out[0] == N % 10 and out[1] == 6  # wraps at 9; 0 goes to 9: 64 steps down
    assert out[14] == N
    assert out[2] == N and out[3] == 1  # the last one exchanged, the first one compared
    assert (out[6:7].view(np.float16) == 64).all()
    assert (out[8:10].view(np.float32) == [64, 128]).all()
    assert (out[10:12].view(np.float32) == [64, 128]).all()


SHARED_ATOMICS = kernel(
    """
setp.eq.u32 %p1, tid, 0; @%p1 st.shared.u32 [sum], 0; bar.sync 0;
atom.shared.add.u32 %r1, [sum], tid; red.shared.cta.relaxed.add.u32 [sum], 1; bar.sync 0;
ld.shared.u32 %r2, [sum]; mul.wide.u32 %q1, tid, 4; add.u64 %q2, y, %q1; st.global.u32 [%q2], %r2;
""",
    shared=".shared .align 4 .u32 sum;",
)


def test_shared_atomics() -> None:
    out = run(SHARED_ATOMICS, np.zeros(1), np.zeros(N, np.uint32))
    assert (out == N * (N - 1) // 2 + N).all()


# A flag handed from block to block with release and acquire: no race, and the value arrives.
STRONG = kernel(
    """
setp.ne.u32 %p1, tid, 0; @%p1 exit;
setp.ne.u32 %p2, block, 0; @%p2 bra READER;
st.global.u32 [y+4], 123; st.release.gpu.global.u32 [y], 1; bra DONE;
READER: ld.acquire.gpu.global.u32 %r1, [y]; setp.eq.u32 %p3, %r1, 0; @%p3 bra DONE;
ld.global.u32 %r2, [y+4]; st.global.u32 [y+8], %r2; ld.volatile.global.u32 %r3, [y];
st.volatile.global.u32 [y+12], %r3;
DONE:
"""
)


def test_release_and_acquire() -> None:
    with shuffled(0):  # block 0 first: it writes
        out = run(STRONG, np.zeros(1), np.zeros(4, np.uint32), grid=2)
    assert out.tolist() == [1, 123, 123, 1]


PROGRAMS = [
    VECTORS,
    WIDE_VECTOR,
    EXTENSION,
    SPACES,
    DYNAMIC,
    COUNTER,
    OTHER_ATOMICS,
    SHARED_ATOMICS,
    STRONG,
    *ATOMIC_PROGRAMS.values(),
]
