"""cp.async, mbarriers, bulk copies and TMA."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from .. import DeviceArray, SimError, load
from .harness import kernel

pytestmark = pytest.mark.gpusim

N = 64


def run(ptx: str, source: np.ndarray, out: np.ndarray, *extra, block: int = N) -> np.ndarray:
    dest = DeviceArray(out)
    load(ptx).launch(1, block, [DeviceArray(source), dest, *extra])
    return dest.array


# Two groups in flight; thread t reads what its neighbour copied. The second copy is cut short and
# the third not read at all: the rest is zero.
CP_ASYNC = kernel(
    """
mul.wide.u32 %q1, tid, 16; add.u64 %q2, x, %q1; mul.lo.u32 %r1, tid, 16;
mov.u32 %r2, tile; add.u32 %r3, %r2, %r1;
cp.async.cg.shared.global.L2::128B [%r3], [%q2], 16; cp.async.commit_group;
cp.async.ca.shared::cta.global [%r3+1024], [%q2], 16, 4;
setp.eq.u32 %p1, 0, 0; cp.async.ca.shared.global [%r3+2048], [%q2], 8, %p1; cp.async.commit_group;
cp.async.wait_group 1; bar.sync 0;
xor.b32 %r4, %r1, 16; add.u32 %r5, %r2, %r4; ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r5];
cp.async.wait_all; bar.sync 0;
ld.shared.v2.u32 {%r14, %r15}, [%r5+1024]; ld.shared.u32 %r16, [%r5+2048];
mul.wide.u32 %q3, tid, 32; add.u64 %q4, y, %q3;
st.global.v4.u32 [%q4], {%r10, %r11, %r12, %r13}; st.global.v2.u32 [%q4+16], {%r14, %r15};
st.global.u32 [%q4+24], %r16;
""",
    shared=".shared .align 16 .b8 tile[3072];",
)


def test_cp_async() -> None:
    words = np.arange(1, N * 4 + 1, dtype=np.uint32).reshape(N, 4)
    out = run(CP_ASYNC, words, np.full((N, 8), 7, np.uint32))
    neighbour = words[np.arange(N) ^ 1]
    assert (out[:, :4] == neighbour).all()
    assert (out[:, 4] == neighbour[:, 0]).all() and not out[:, 5:7].any()


WAIT = "WAIT{0}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [{1}], {2}; @!%p1 bra WAIT{0};"

# One thread copies in bulk; all wait on the mbarrier, change the tile and one copies it back.
BULK = kernel(
    f"""
setp.ne.u32 %p2, tid, 0; @%p2 bra READY;
mbarrier.init.shared::cta.b64 [full], 1; fence.mbarrier_init.release.cluster;
READY: bar.sync 0;
@%p2 bra WAIT0;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [tile], [x], 256, [full];
{WAIT.format(0, "full", 0)}
mul.lo.u32 %r1, tid, 4; mov.u32 %r2, tile; add.u32 %r3, %r2, %r1;
ld.shared.u32 %r4, [%r3]; add.u32 %r4, %r4, 1; st.shared.u32 [%r3], %r4;
fence.proxy.async.shared::cta; bar.sync 0;
@%p2 bra DONE;
cp.async.bulk.global.shared::cta.bulk_group [y], [tile], 256;
cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
mbarrier.inval.shared::cta.b64 [full];
DONE:
""",
    shared=".shared .align 128 .b8 tile[256]; .shared .align 8 .b64 full;",
)


def test_bulk_copies() -> None:
    words = np.arange(N, dtype=np.uint32)
    assert (run(BULK, words, np.zeros_like(words)) == words + 1).all()


# Every thread arrives and waits for the others, twice: the parity alternates.
MBARRIER = kernel(
    f"""
setp.eq.u32 %p2, tid, 0; mov.u32 %r2, tile; mul.lo.u32 %r1, tid, 4; add.u32 %r3, %r2, %r1;
@%p2 mbarrier.init.shared.b64 [full], {N};
bar.sync 0;
st.shared.u32 [%r3], tid;
mbarrier.arrive.release.cta.shared::cta.b64 %q1, [full];
AGAIN: mbarrier.test_wait.acquire.cta.shared::cta.b64 %p1, [full], %q1; @!%p1 bra AGAIN;
xor.b32 %r4, %r1, 4; add.u32 %r5, %r2, %r4; ld.shared.u32 %r6, [%r5];
mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [full], 0;
mbarrier.arrive.shared.b64 _, [full], 1;
{WAIT.format(1, "full", 1)}
st.shared.u32 [%r3], %r6; bar.sync 0; ld.shared.u32 %r7, [%r5];
mul.lo.u32 %r7, %r7, 100; add.u32 %r7, %r7, %r6;
mul.wide.u32 %q2, tid, 4; add.u64 %q3, y, %q2; st.global.u32 [%q3], %r7;
""",
    shared=".shared .align 16 .b8 tile[256]; .shared .align 8 .b64 full;",
)


def test_mbarrier_orders_and_alternates() -> None:
    tids = np.arange(N)
    out = run(MBARRIER, np.zeros(1), np.zeros(N, np.uint32))
    assert (out == tids * 100 + (tids ^ 1)).all()


def tensor_map(array: DeviceArray, box: tuple[int, int], swizzle: int = 0) -> bytes:
    rows, columns = array.array.shape
    size = array.array.itemsize
    fields = (columns, rows, 1, 1, 1, columns * size, 0, 0, 0, box[1], box[0], 1, 1, 1)
    head = (0x70616D74, array.data_ptr(), 2, size, swizzle, 0)
    return struct.pack("<QQIIII5Q4Q5I4x", *head, *fields).ljust(128, b"\0")


# A tile whose corner lies outside the tensor comes in, and goes out one column further.
TMA = kernel(
    f"""
setp.ne.u32 %p2, tid, 0; @!%p2 mbarrier.init.shared::cta.b64 [full], 1; bar.sync 0;
mov.u64 %q5, source_param; cvta.param.u64 %q6, %q5;
mov.u64 %q7, dest_param; cvta.param.u64 %q8, %q7;
@%p2 bra WAIT0;
prefetch.tensormap [%q6];
mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 512;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
  [tile], [%q6, {{%r20, %r21}}], [full];
{WAIT.format(0, "full", 0)}
@%p2 bra DONE;
mov.u32 %r22, 1;
cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%q8, {{%r22, %r23}}], [tile];
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
DONE:
""",
    params="source:u64 dest:u64 c0:u32 c1:u32",
    shared=".shared .align 128 .b8 tile[512]; .shared .align 8 .b64 full;",
)
# The maps are 128-byte parameters, not addresses.
for _name in ("source", "dest"):
    TMA = TMA.replace(f".param .u64 {_name}_param", f".param .align 64 .b8 {_name}_param[128]")
    TMA = TMA.replace(f"ld.param.u64 {_name}, [{_name}_param];", "")
TMA = TMA.replace(
    "prefetch.tensormap", "mov.u32 %r20, c0; mov.u32 %r21, c1; mov.u32 %r23, 0;\nprefetch.tensormap"
)


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("corner", [(0, 0), (4, 2), (-4, -3)])
def test_tensor_tiles(corner: tuple[int, int], swizzle: int) -> None:
    """8 rows of 16 floats; whatever the swizzle does to the tile, the way out undoes it."""
    source = DeviceArray(np.arange(10 * 20, dtype=np.float32).reshape(10, 20) + 1)
    dest = DeviceArray(np.zeros((12, 24), np.float32))
    box = (8, 8) if swizzle == 1 else (8, 16)
    ptx = TMA.replace("[full], 512", f"[full], {box[0] * box[1] * 4}")
    maps = [tensor_map(a, box, swizzle) for a in (source, dest)]
    column, row = corner
    load(ptx).launch(1, N, [*maps, column, row])
    padded = np.zeros((40, 60), np.float32)
    padded[10:20, 10:30] = source.array
    expected = np.zeros((12, 24), np.float32)
    expected[: box[0], 1 : 1 + box[1]] = padded[10 + row :, 10 + column :][: box[0], : box[1]]
    assert (dest.array == expected).all()


def test_swizzle_layout() -> None:
    """The 128-byte swizzle moves 16-byte chunks by the row: seen from plain shared loads."""
    ptx = (
        TMA[: TMA.index("@%p2 bra DONE;")]
        .replace("[full], 512", "[full], 1024")
        .replace("tile[512]", "tile[1024]")
    )
    ptx += """
mov.u32 %r1, tile; mul.lo.u32 %r2, tid, 16; add.u32 %r3, %r1, %r2; ld.shared.u32 %r4, [%r3];
mul.wide.u32 %q1, tid, 4; ld.param.u64 %q2, [y_param]; add.u64 %q3, %q2, %q1;
st.global.u32 [%q3], %r4;
ret; }
"""
    ptx = ptx.replace(".param .u32 c1_param", ".param .u32 c1_param, .param .u64 y_param")
    source = DeviceArray(np.arange(8 * 32, dtype=np.uint32).reshape(8, 32))
    out = DeviceArray(np.zeros(N, np.uint32))
    box_map = tensor_map(source, (8, 32), 3)
    load(ptx).launch(1, N, [box_map, box_map, 0, 0, out])
    rows, chunks = np.divmod(np.arange(N), 8)
    assert (out.array == rows * 32 + (chunks ^ rows) * 4).all()


def test_bad_tensor_map_is_named() -> None:
    with pytest.raises(SimError, match="invalid tensor map"):
        load(TMA).launch(1, N, [bytes(128), bytes(128), 0, 0])


PROGRAMS = [CP_ASYNC, BULK, MBARRIER, TMA]
