"""Warp exchanges, barriers, branches and fences."""

from __future__ import annotations

import numpy as np
import pytest

from .. import DeviceArray, load, shuffled
from .harness import kernel

pytestmark = pytest.mark.gpusim

STORE = "mul.wide.u32 %q8, tid, 4; add.u64 %q9, y, %q8; st.global.u32 [%q9], %r9;"
VALUE = "mad.lo.u32 %r1, tid, 7, 3; "  # what each lane brings
ALL = "0xffffffff"


def run(body: str, threads: int = 64, shared: str = "") -> np.ndarray:
    out = DeviceArray(np.zeros(threads, np.uint32))
    load(program(body, shared)).launch(1, threads, [out])
    return out.array


def program(body: str, shared: str = "") -> str:
    target = "sm_100a" if "redux.sync.max.abs" in body else "sm_90a"
    return kernel(VALUE + body + STORE, "y", shared=shared, target=target)


LANES = np.arange(64)
VALUES = LANES * 7 + 3


def by_lane(function) -> np.ndarray:
    """Applies a function of (lane, values of its warp)."""
    return np.array([function(i % 32, VALUES[i // 32 * 32 :][:32]) for i in LANES])


SHUFFLES = {
    f"shfl.sync.bfly.b32 %r9, %r1, 5, 31, {ALL};": lambda i, v: v[i ^ 5],
    f"shfl.sync.down.b32 %r9, %r1, 3, 31, {ALL};": lambda i, v: v[i + 3] if i < 29 else v[i],
    f"shfl.sync.up.b32 %r9, %r1, 3, 0, {ALL};": lambda i, v: v[i - 3] if i >= 3 else v[i],
    f"shfl.sync.idx.b32 %r9, %r1, 9, 31, {ALL};": lambda i, v: v[9],
    f"shfl.sync.up.b32 %r9, %r1, 3, 0x1800, {ALL};": lambda i, v: v[i - 3] if i % 8 >= 3 else v[i],
    # Segments of 8 lanes: the clamp operand carries the segment mask in bits 8 to 12.
    f"shfl.sync.idx.b32 %r9, %r1, 2, 0x181f, {ALL};": lambda i, v: v[i // 8 * 8 + 2],
    f"shfl.sync.down.b32 %r9|%p1, %r1, 1, 0x181f, {ALL}; selp.b32 %r9, %r9, 0, %p1;": (
        lambda i, v: v[i + 1] if i % 8 < 7 else 0
    ),
}
VOTES = {
    f"and.b32 %r2, tid, 4; setp.ne.u32 %p1, %r2, 0; vote.sync.ballot.b32 %r9, %p1, {ALL};": (
        lambda i, v: 0xF0F0F0F0
    ),
    f"setp.eq.u32 %p1, lane, 5; vote.sync.any.pred %p2, %p1, {ALL}; selp.b32 %r9, 1, 0, %p2;": (
        lambda i, v: 1
    ),
    f"setp.ne.u32 %p1, lane, 5; vote.sync.all.pred %p2, %p1, {ALL}; selp.b32 %r9, 1, 0, %p2;": (
        lambda i, v: 0
    ),
    f"setp.lt.u32 %p1, lane, 32; vote.sync.uni.pred %p2, !%p1, {ALL}; selp.b32 %r9, 1, 0, %p2;": (
        lambda i, v: 1
    ),
    "activemask.b32 %r9;": lambda i, v: 0xFFFFFFFF,
    f"elect.sync %r2|%p1, {ALL}; selp.b32 %r9, 9, %r2, %p1;": lambda i, v: 9 if i == 0 else 0,
}
REDUCTIONS = {
    f"redux.sync.add.u32 %r9, %r1, {ALL};": lambda i, v: v.sum(),
    f"sub.u32 %r1, %r1, 40; redux.sync.min.s32 %r9, %r1, {ALL};": (
        lambda i, v: (v.min() - 40) % 2**32
    ),
    f"redux.sync.max.u32 %r9, %r1, {ALL};": lambda i, v: v.max(),
    f"redux.sync.xor.b32 %r9, %r1, {ALL};": lambda i, v: np.bitwise_xor.reduce(v),
    f"redux.sync.and.b32 %r9, %r1, {ALL};": lambda i, v: np.bitwise_and.reduce(v),
    f"redux.sync.or.b32 %r9, %r1, {ALL};": lambda i, v: np.bitwise_or.reduce(v),
    f"and.b32 %r2, lane, 3; match.any.sync.b32 %r9, %r2, {ALL};": (
        lambda i, v: 0x11111111 << i % 4
    ),
    f"shr.u32 %r2, tid, 6; match.all.sync.b32 %r9|%p1, %r2, {ALL};": lambda i, v: 0xFFFFFFFF,
}
REDUX_FLOAT = (
    "cvt.rn.f32.u32 %f1, %r1; neg.f32 %f1, %f1; "
    f"redux.sync.max.abs.NaN.f32 %f2, %f1, {ALL}; cvt.rni.u32.f32 %r9, %f2;"
)
CASES = SHUFFLES | VOTES | REDUCTIONS | {REDUX_FLOAT: lambda i, v: v.max()}


@pytest.mark.parametrize("body", CASES, ids=lambda b: b.replace(" ", "_")[:50])
def test_exchange(body: str) -> None:
    assert (run(body) == by_lane(CASES[body])).all()


# Half of the warp takes part, in a branch of its own.
DIVERGENT = """
mov.u32 %r9, 1; setp.ge.u32 %p1, lane, 16; @%p1 bra SKIP;
shfl.sync.bfly.b32 %r9, %r1, 1, 31, 0xffff; bar.warp.sync 0xffff;
SKIP:
"""

# activemask in a branch sees the lanes of the branch.
ACTIVE_BRANCH = """
mov.u32 %r9, 1; setp.ge.u32 %p1, lane, 20; @%p1 bra SKIP; activemask.b32 %r9;
SKIP: bar.warp.sync 0xffffffff;
"""


def test_active_mask_of_a_branch() -> None:
    assert (run(ACTIVE_BRANCH) == by_lane(lambda i, v: 0xFFFFF if i < 20 else 1)).all()


def test_partial_mask() -> None:
    assert (run(DIVERGENT) == by_lane(lambda i, v: v[i ^ 1] if i < 16 else 1)).all()


REVERSE = """
mul.lo.u32 %r2, tid, 4; mov.u32 %r3, tile; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r1;
barrier.sync 0;
sub.u32 %r5, 252, %r2; add.u32 %r5, %r5, %r3; ld.shared.u32 %r9, [%r5];
"""
TILE = ".shared .align 4 .b8 tile[256];"


@pytest.mark.parametrize("order", [0, 1, 2])
def test_barrier(order: int) -> None:
    """Also with threads in shuffled order."""
    with shuffled(order):
        assert (run(REVERSE, shared=TILE) == VALUES[::-1]).all()


# Warp 0 produces for warp 1 through a named barrier that it does not wait at.
NAMED = """
mul.lo.u32 %r2, lane, 4; mov.u32 %r3, tile; add.u32 %r4, %r3, %r2;
mov.u32 %r9, 0; setp.ge.u32 %p1, tid, 32; @%p1 bra CONSUMER;
st.shared.u32 [%r4], %r1; barrier.arrive.aligned 3, 64; bar.arrive 4, 64; bra DONE;
CONSUMER: bar.sync 3, 64; bar.sync 4, 64;
xor.b32 %r2, %r2, 4; add.u32 %r4, %r3, %r2; ld.shared.u32 %r9, [%r4];
DONE:
"""


def test_named_barrier() -> None:
    expected = np.where(LANES < 32, 0, VALUES[LANES % 32 ^ 1])
    assert (run(NAMED, shared=TILE) == expected).all()


BARRIER_REDUCTIONS = {
    "bar.red.popc.u32 %r9, 0, %p1;": 10,
    "bar.red.and.pred %p2, 0, %p1; selp.b32 %r9, 1, 0, %p2;": 0,
    "bar.red.or.pred %p2, 0, 64, %p1; selp.b32 %r9, 1, 0, %p2;": 1,
    "barrier.red.aligned.popc.u32 %r9, 0, %p1;": 10,
    "barrier.red.or.pred %p2, 0, %p1; selp.b32 %r9, 1, 0, %p2;": 1,
}


@pytest.mark.parametrize("body", BARRIER_REDUCTIONS)
def test_barrier_reduction(body: str) -> None:
    assert (run("setp.lt.u32 %p1, tid, 10; " + body) == BARRIER_REDUCTIONS[body]).all()


SWITCH = """
ts: .branchtargets ZERO, ONE, TWO;
rem.u32 %r2, tid, 3; brx.idx %r2, ts;
ZERO: mov.u32 %r9, 100; bra.uni DONE;
ONE: mov.u32 %r9, 200; bra DONE;
TWO: mov.u32 %r9, 300; { .reg .b32 %r1; mov.u32 %r1, 5; add.u32 %r9, %r9, %r1; }
DONE: add.u32 %r9, %r9, %r1;
"""


def test_branch_table_and_scopes() -> None:
    expected = np.array([100, 200, 305])[LANES % 3] + VALUES
    assert (run(SWITCH) == expected).all()


LOOP = """
mov.u32 %r2, 0; mov.u32 %r9, 0;
AGAIN: add.u32 %r9, %r9, %r1; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 10; @%p1 bra AGAIN;
"""


def test_loop() -> None:
    assert (run(LOOP) == VALUES * 10).all()


# A thread spins on shared memory until another one, which runs later, sets the flag.
SPIN = """
setp.eq.u32 %p1, tid, 0; @%p1 st.shared.u32 [flag], 0; bar.sync 0;
setp.eq.u32 %p2, tid, 63; @!%p2 bra WAIT; st.volatile.shared.u32 [flag], 77;
WAIT: ld.volatile.shared.u32 %r9, [flag]; setp.eq.u32 %p3, %r9, 0; @%p3 bra WAIT;
nanosleep.u32 20;
"""


def test_spinning_thread_lets_others_run() -> None:
    assert (run(SPIN, shared=".shared .align 4 .u32 flag;") == 77).all()


NO_EFFECT = """
membar.gl; fence.acq_rel.cta; fence.acquire.cluster; fence.proxy.alias;
fence.proxy.async.shared::cta; fence.mbarrier_init.release.cluster;
griddepcontrol.wait; griddepcontrol.launch_dependents; setmaxnreg.dec.sync.aligned.u32 40;
mov.u32 %r9, %lanemask_lt; mov.u32 %r2, %nwarpid; mov.u32 %r3, %clock;
popc.b32 %r9, %r9; add.u32 %r9, %r9, %r2;
"""


def test_special_registers_and_hints() -> None:
    assert (run(NO_EFFECT) == LANES % 32 + 2).all()


PROGRAMS = [
    program(body)
    for body in [*CASES, DIVERGENT, ACTIVE_BRANCH, *BARRIER_REDUCTIONS, SWITCH, LOOP, NO_EFFECT]
]
PROGRAMS += [program("setp.lt.u32 %p1, tid, 10; " + body) for body in BARRIER_REDUCTIONS]
PROGRAMS += [program(REVERSE, TILE), program(NAMED, TILE)]
PROGRAMS += [program(SPIN, ".shared .align 4 .u32 flag;")]
