"""ldmatrix, stmatrix, mma, wmma and wgmma against numpy products."""

from __future__ import annotations

import numpy as np
import pytest

from .. import DeviceArray, load
from .harness import from_bf16, kernel, to_bf16

pytestmark = pytest.mark.gpusim

LANE = np.arange(32)


def run(ptx: str, out: np.ndarray, *arrays: np.ndarray, block: int = 32) -> np.ndarray:
    dest = DeviceArray(out)
    load(ptx).launch(1, block, [*(DeviceArray(a) for a in arrays), dest])
    return dest.array


# ---- ldmatrix and stmatrix: the matrices go through shared memory


def matrix_program(count: int, transposed: bool) -> str:
    trans = ".trans" if transposed else ""
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    stores = " ".join(f"st.global.b32 [%q4+{128 * i}], %r{10 + i};" for i in range(count))
    return kernel(
        f"""
mov.u32 %r1, tile; mul.lo.u32 %r2, lane, 16; add.u32 %r3, %r1, %r2; cvt.u64.u32 %q1, %r2;
add.u64 %q2, x, %q1; ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%q2];
st.shared.v4.u32 [%r3], {{%r4, %r5, %r6, %r7}}; bar.warp.sync 0xffffffff;
ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r3];
mul.wide.u32 %q3, lane, 4; add.u64 %q4, y, %q3; {stores}
stmatrix.sync.aligned.m8n8.x{count}{trans}.shared::cta.b16 [%r3+512], {registers};
bar.warp.sync 0xffffffff; ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r3+512];
add.u64 %q5, y, %q1; st.global.v4.u32 [%q5+512], {{%r4, %r5, %r6, %r7}};
""",
        shared=".shared .align 16 .b8 tile[1024];",
    )


MATRIX_PROGRAMS = {(c, t): matrix_program(c, t) for c in (1, 2, 4) for t in (False, True)}


@pytest.mark.parametrize(("count", "transposed"), MATRIX_PROGRAMS)
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    ptx = MATRIX_PROGRAMS[count, transposed]
    if count < 4:  # unused shared memory must hold something to be stored back
        ptx = ptx.replace("stmatrix", "st.shared.v4.u32 [%r3+512], {%r4, %r5, %r6, %r7}; stmatrix")
    out = run(ptx, np.zeros(4 * 32 + 128, np.uint32), matrices)
    fragments = out[: 32 * count].reshape(count, 32)
    for matrix, fragment in zip(matrices, fragments, strict=False):
        m = matrix.T if transposed else matrix
        low = m[LANE // 4, LANE % 4 * 2]
        high = m[LANE // 4, LANE % 4 * 2 + 1]
        assert (fragment == (high.astype(np.uint32) << 16 | low)).all()
    back = out[128:].view(np.uint16).reshape(4, 8, 8)
    assert (back[:count] == matrices[:count]).all()


# ---- mma: each lane loads its fragment by the manual's layout


def encode(values: np.ndarray, element: str) -> np.ndarray:
    if element == "tf32":
        return values.astype(np.float32).view(np.uint32)
    return to_bf16(values) if element == "bf16" else values.astype(np.float16).view(np.uint16)


def decode(bits: np.ndarray, element: str) -> np.ndarray:
    if element == "tf32":
        return bits.view(np.float32)
    return from_bf16(bits) if element == "bf16" else bits.view(np.float16).astype(np.float32)


def fragments(a: np.ndarray, b: np.ndarray, element: str) -> tuple[np.ndarray, np.ndarray]:
    """Registers of A (16 x K) and B (K x 8), one row per lane."""
    group, member = LANE // 4, LANE % 4
    depth = a.shape[1]
    per, step = (1, 4) if element == "tf32" else (2, 8)
    a_registers, b_registers = [], []
    for i in range(depth // step * 2):
        parts = [a[group + i % 2 * 8, member * per + e + i // 2 * step] for e in range(per)]
        a_registers.append(join(parts))
    for i in range(depth // step):
        parts = [b[member * per + e + i * step, group] for e in range(per)]
        b_registers.append(join(parts))
    return np.stack(a_registers, 1), np.stack(b_registers, 1)


def join(parts: list[np.ndarray]) -> np.ndarray:
    return sum(p.astype(np.uint32) << (16 * i) for i, p in enumerate(parts)).astype(np.uint32)


def mma_program(opcode: str, na: int, nb: int, nc: int) -> str:
    def registers(first: int, count: int) -> str:
        return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"

    def loads(pointer: str, first: int, count: int) -> str:
        address = f"mul.wide.u32 %q1, lane, {4 * count}; add.u64 %q2, {pointer}, %q1;"
        return address + "".join(
            f" ld.global.b32 %r{first + i}, [%q2+{4 * i}];" for i in range(count)
        )

    stores = "".join(f"st.global.b32 [%q4+{4 * i}], %r{40 + i}; " for i in range(nc))
    return kernel(
        f"{loads('a', 1, na)} {loads('b', 10, nb)} {loads('c', 20, nc)} "
        f"{opcode} {registers(40, nc)}, {registers(1, na)}, "
        f"{registers(10, nb)}, {registers(20, nc)};"
        f" mul.wide.u32 %q3, lane, {4 * nc}; add.u64 %q4, y, %q3; {stores}",
        "a b c y",
    )


MMA = {
    f"mma.sync.aligned.m16n8k{k}.row.col.{acc}.{t}.{t}.{acc}": (t, k, acc)
    for t, k, acc in (
        ("f16", 16, "f32"),
        ("bf16", 16, "f32"),
        ("f16", 8, "f32"),
        ("bf16", 8, "f32"),
        ("tf32", 8, "f32"),
        ("tf32", 4, "f32"),
        ("f16", 16, "f16"),
    )
}


def mma_shape(opcode: str) -> tuple[int, int, int]:
    element, depth, accumulator = MMA[opcode]
    step = 4 if element == "tf32" else 8
    return depth // step * 2, depth // step, 2 if accumulator == "f16" else 4


MMA_PROGRAMS = {opcode: mma_program(opcode, *mma_shape(opcode)) for opcode in MMA}


@pytest.mark.parametrize("opcode", MMA)
def test_mma(opcode: str) -> None:
    element, depth, accumulator = MMA[opcode]
    random = np.random.default_rng(1)
    a, b = (encode(random.integers(-8, 8, s), element) for s in ((16, depth), (depth, 8)))
    c = random.integers(-8, 8, (16, 8)).astype(np.float32)
    group, member = LANE[:, None] // 4, LANE[:, None] % 4
    i = np.arange(4)
    rows, columns = group + i // 2 * 8, member * 2 + i % 2
    lanes_c = c[rows, columns]
    if accumulator == "f16":
        lanes_c = lanes_c.astype(np.float16)
    out = run(
        MMA_PROGRAMS[opcode],
        np.zeros((32, mma_shape(opcode)[2]), np.uint32),
        *fragments(a, b, element),
        np.ascontiguousarray(lanes_c).view(np.uint32),
    )
    expected = decode(a, element) @ decode(b, element) + c
    result = out.view(np.float16 if accumulator == "f16" else np.float32)
    assert (result == expected[rows, columns]).all()


def test_tf32_ignores_low_bits() -> None:
    opcode = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    a = np.full((32, 4), 0x3F800FFF, np.uint32)  # 1 + a little, below the precision of tf32
    b = np.full((32, 2), 0x3F800000, np.uint32)
    out = run(
        MMA_PROGRAMS[opcode], np.zeros((32, 4), np.uint32), a, b, np.zeros((32, 4), np.uint32)
    )
    assert (out.view(np.float32) == 8).all()


# ---- wmma, whose fragments are opaque


def wmma_program(shape: str, element: str, layout_a: str, layout_b: str, stores: str) -> str:
    m, n, k = (int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())
    count_a, count_b = (8, 8) if element == "f16" else (m * k // 64, k * n // 64)
    count_b = max(count_b, 2)

    def registers(first: int, count: int) -> str:
        return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"

    floats = "{" + ", ".join(f"%f{i}" for i in range(8)) + "}"
    result = "{" + ", ".join(f"%f{i}" for i in range(8, 16)) + "}"
    stride_a = k if layout_a == "row" else m
    stride_b = n if layout_b == "row" else k
    stride_d = n if stores == "row" else m
    types = ".f32.f32" if element == "f16" else ".f32.bf16.bf16.f32"
    prefix = "sync.aligned"
    return kernel(
        f"""
wmma.load.a.{prefix}.{layout_a}.{shape}.global.{element} {registers(1, count_a)}, [a], {stride_a};
wmma.load.b.{prefix}.{layout_b}.{shape}.global.{element} {registers(20, count_b)}, [b], {stride_b};
wmma.load.c.{prefix}.row.{shape}.global.f32 {floats}, [c], {n};
wmma.mma.{prefix}.{layout_a}.{layout_b}.{shape}{types}
  {result}, {registers(1, count_a)}, {registers(20, count_b)}, {floats};
wmma.store.d.{prefix}.{stores}.{shape}.global.f32 [y], {result}, {stride_d};
""",
        "a b c y",
    )


WMMA = [
    ("m16n16k16", "f16", "row", "row", "row"),
    ("m16n16k16", "bf16", "row", "col", "col"),
    ("m32n8k16", "bf16", "col", "row", "row"),
    ("m8n32k16", "f16", "row", "col", "row"),
]
WMMA_PROGRAMS = {case: wmma_program(*case) for case in WMMA}


@pytest.mark.parametrize("case", WMMA, ids=lambda c: "-".join(c))
def test_wmma(case: tuple) -> None:
    shape, element, layout_a, layout_b, stores = case
    m, n, k = (int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())
    random = np.random.default_rng(2)
    a, b = (encode(random.integers(-8, 8, s), element) for s in ((m, k), (k, n)))
    c = random.integers(-8, 8, (m, n)).astype(np.float32)
    arrays = [
        np.asfortranarray(x).T if order == "col" else x
        for x, order in ((a, layout_a), (b, layout_b))
    ]
    shape_out = (m, n) if stores == "row" else (n, m)
    out = run(
        WMMA_PROGRAMS[case], np.zeros(shape_out, np.float32), *map(np.ascontiguousarray, arrays), c
    )
    result = out if stores == "row" else out.T
    assert (result == decode(a, element) @ decode(b, element) + c).all()


# ---- wgmma: 64 x N x K from shared memory without swizzle


def wgmma_program(element: str, columns: int, from_registers: bool) -> str:
    size = 4 if element == "tf32" else 2
    depth = 32 // size
    count = columns // 2
    result = "{" + ", ".join(f"%f{i}" for i in range(count)) + "}"
    # 8 x 16-byte core matrices one after another along K, then along M or N.
    leading, stride = 128, 256
    flags = "1, 1, 1" + ("" if element == "tf32" else ", 0" if from_registers else ", 0, 0")
    a_operand = "{%r30, %r31, %r32, %r33}" if from_registers else "%q10"
    stores = "".join(f"st.global.f32 [%q8+{4 * i}], %f{i}; " for i in range(count))
    constant = stride // 16 << 32 | leading // 16 << 16
    return kernel(
        f"""
mov.u32 %r1, tile; mul.lo.u32 %r2, tid, 16;
cvt.u64.u32 %q1, %r2; add.u64 %q2, a, %q1; add.u32 %r3, %r1, %r2;
ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%q2]; st.shared.v4.u32 [%r3], {{%r4, %r5, %r6, %r7}};
setp.ge.u32 %p1, tid, {columns * 2}; @%p1 bra READY;
add.u64 %q3, b, %q1; ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%q3];
st.shared.v4.u32 [%r3+2048], {{%r4, %r5, %r6, %r7}};
READY: bar.sync 0;
add.u64 %q4, c, %q1; ld.global.v4.u32 {{%r30, %r31, %r32, %r33}}, [%q4];
shr.u32 %r8, %r1, 4; cvt.u64.u32 %q9, %r8; or.b64 %q10, %q9, {constant}; add.u64 %q11, %q10, 128;
{" ".join(f"mov.f32 %f{i}, 0f3F800000;" for i in range(count))}
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{element}.{element}
  {result}, {a_operand}, %q11, {flags};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
mul.wide.u32 %q7, tid, {4 * count}; add.u64 %q8, y, %q7; {stores}
""",
        "a b c y",
        shared=".shared .align 128 .b8 tile[4096];",
    )


WGMMA = [("f16", 16, False), ("bf16", 8, True), ("tf32", 16, False), ("tf32", 8, True)]
WGMMA_PROGRAMS = {case: wgmma_program(*case) for case in WGMMA}


def core_matrices(tile: np.ndarray) -> np.ndarray:
    """Rows (M or N) by K to 8 x 16-byte core matrices, K fastest."""
    rows, depth = tile.shape
    per = 16 // tile.itemsize
    return tile.reshape(rows // 8, 8, depth // per, per).transpose(0, 2, 1, 3).copy()


@pytest.mark.parametrize("case", WGMMA, ids=str)
def test_wgmma(case: tuple) -> None:
    element, columns, _ = case
    depth = 8 if element == "tf32" else 16
    random = np.random.default_rng(3)
    a = encode(random.integers(-8, 8, (64, depth)), element)
    b = encode(random.integers(-8, 8, (depth, columns)), element)
    lanes = np.concatenate([fragments(a[16 * w :][:16], b, element)[0] for w in range(4)])
    out = run(
        WGMMA_PROGRAMS[case],
        np.zeros((128, columns // 2), np.float32),
        core_matrices(a),
        core_matrices(np.ascontiguousarray(b.T)),
        lanes,
        block=128,
    )
    expected = decode(a, element) @ decode(b, element) + 1
    thread, i = np.arange(128)[:, None], np.arange(columns // 2)
    rows = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    assert (out == expected[rows, i // 4 * 8 + thread % 4 * 2 + i % 2]).all()


PROGRAMS = [
    *MATRIX_PROGRAMS.values(),
    *MMA_PROGRAMS.values(),
    *WMMA_PROGRAMS.values(),
    *WGMMA_PROGRAMS.values(),
]
