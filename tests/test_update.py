"""The multi-tensor update and the global norm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from optim_cases import (
    DTYPES,
    SPECS,
    assert_same,
    each_backend,
    each_spec,
    parameters,
    plan,
    set_grads,
    torch_twin,
)

from lfp_kernels import functional as F
from lfp_kernels import optim, use_backend
from lfp_kernels.optim import BoundOptimizer, Update
from lfp_kernels.testing import poisoned_empty

# ---- the multi-tensor call


@each_backend
def test_feedback_points_uphill(backend):
    param, feedback = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
    with use_backend(backend):
        F.optimizer_update([param], [feedback], plan(optim.SGD(0.5), [param]))
    assert param.tolist() == [0.5, -1.0, 0.0]


@each_backend
def test_mixed_codes_in_one_call(backend):
    """Each tensor keeps its own optimizer code, hyper-parameters and states."""
    params = parameters(shapes=((20001,), (3,), (17000,), (0,), (5, 5)))
    specs = [SPECS[k] for k in ("adamw", "sgd", "nesterov", "momentum", "momentum")]
    updates = [plan(spec, [p])[0] for spec, p in zip(specs, params)]
    theirs = parameters(shapes=((20001,), (3,), (17000,), (0,), (5, 5)))
    feedback = [torch.cos(p.detach()) for p in params]
    with use_backend(backend):
        F.optimizer_update(params, feedback, updates)
    for spec, param, fb in zip(specs, theirs, feedback):
        param.grad = -fb
        torch_twin(spec, [param]).step()
    assert_same(params, theirs)


@each_backend
def test_non_contiguous(backend):
    spec = SPECS["momentum-decay"]
    base = parameters(shapes=((4, 6),))[0].detach()
    feedback = torch.sin(base)
    want = base.clone()
    F.optimizer_update([want], [feedback], plan(spec, [want]))
    wide = torch.zeros(4, 12, dtype=base.dtype)
    views = [base.t().contiguous().t(), wide[:, ::2]]
    for view in views:
        view.copy_(base)
        for fb in (feedback, feedback.t().contiguous().t()):
            view.copy_(base)
            with use_backend(backend):
                F.optimizer_update([view], [fb], plan(spec, [view]))
            torch.testing.assert_close(view, want, rtol=1e-14, atol=0)
    assert not wide[:, 1::2].any()


@each_spec
def test_same_bits_twice_for_any_number_of_threads(spec):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            params = parameters(torch.float32)
            set_grads(params, 0)
            with poisoned_empty():
                BoundOptimizer(spec, params).step()
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for params in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(params, results[0]))


@each_backend
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_spec
def test_scale_on_the_device_is_a_factor_on_the_feedback(spec, dtype, scale_dtype, backend):
    got, want = parameters(dtype), parameters(dtype)
    feedback = [torch.ones_like(p) for p in got]
    with use_backend(backend):
        F.optimizer_update(
            got, feedback, plan(spec, got), scale=torch.tensor(0.5, dtype=scale_dtype)
        )
        F.optimizer_update(want, [0.5 * fb for fb in feedback], plan(spec, want))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)
    for bad in (torch.ones(1), torch.tensor(1), torch.tensor(1.0, dtype=torch.float16)):
        with pytest.raises((TypeError, ValueError), match="optimizer_update: scale: expected"):
            F.optimizer_update(got, feedback, plan(spec, got), scale=bad)


def update_errors():
    param, feedback = torch.ones(3), torch.ones(3)
    good = plan(optim.SGD(0.1, momentum=0.9), [param])[0]
    short = Update(good.code, good.hyper, [torch.zeros(2)])
    yield "params\\[1\\]", TypeError, [param, [1.0]], [feedback, feedback], [good, good]
    yield "params\\[1\\]", TypeError, [param, torch.ones(3).int()], [feedback] * 2, [good] * 2
    yield "params\\[1\\]", ValueError, [param, torch.ones(3, device="meta")], [
        feedback, torch.ones(3, device="meta")], [good, good]  # fmt: skip
    yield "feedback\\[0\\]", ValueError, [param], [torch.ones(2)], [good]
    yield "feedback\\[0\\]", TypeError, [param], [torch.ones(3).double()], [good]
    yield "feedback\\[0\\]", TypeError, [param], [torch.ones(3).to_sparse()], [good]
    yield "feedback\\[0\\]", TypeError, [param], [None], [good]
    yield "updates\\[0\\]", TypeError, [param], [feedback], [(0, [], [])]
    yield "updates\\[0\\]", ValueError, [param], [feedback], [good._replace(states=[])]
    yield "updates\\[0\\]", ValueError, [param], [feedback], [good._replace(code=7)]
    yield "updates\\[0\\].states\\[0\\]", ValueError, [param], [feedback], [short]
    yield "expected one feedback", ValueError, [param], [], [good]
    yield (
        "params: expected every parameter once",
        ValueError,
        [param] * 2,
        [feedback] * 2,
        [good] * 2,
    )
    yield "params\\[0\\]: its elements share memory", ValueError, [torch.ones(1).expand(3)], [
        feedback], [good]  # fmt: skip


@pytest.mark.parametrize("text, kind, params, feedback, updates", list(update_errors()))
def test_update_errors_change_nothing(text, kind, params, feedback, updates):
    with pytest.raises(kind, match=f"optimizer_update: {text}"):
        F.optimizer_update(params, feedback, updates)
    for tensor in params:
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            assert (tensor == 1).all()


def test_empty_lists():
    F.optimizer_update([], [], [])
    assert float(F.global_norm([])) == 0.0


@pytest.mark.operators
def test_opcheck():
    ops = torch.ops.lfp_kernels
    params = [torch.randn(4, 3), torch.randn(5)]
    updates = plan(SPECS["adamw"], params)
    call = (
        params, [torch.ones_like(p) for p in params], [s for u in updates for s in u.states],
        [u.code for u in updates], [h for u in updates for h in u.hyper], torch.tensor(0.5),
    )  # fmt: skip
    torch.library.opcheck(ops.optimizer_update.default, call)
    torch.library.opcheck(ops.global_norm.default, (params,))
    torch.library.opcheck(ops.global_norm.default, ([params[0].double(), params[1]],))


# ---- the norm


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_global_norm(backend, dtype):
    tensors = [p.detach() for p in parameters(dtype)]
    want = torch.cat([t.double().flatten() for t in tensors]).norm()
    with use_backend(backend):
        got = F.global_norm(tensors)
    wide = dtype == torch.float64
    assert got.dtype == (torch.float64 if wide else torch.float32) and got.shape == ()
    torch.testing.assert_close(got.double(), want, rtol=1e-13 if wide else 6e-8, atol=0)


@each_backend
def test_global_norm_of_strided_mixed_and_special_tensors(backend):
    with use_backend(backend):
        one = torch.full((4, 6), 2.0)
        assert float(F.global_norm([one[:, ::2], torch.ones(1).double().expand(52)])) == 10.0
        assert F.global_norm([one, one.double()]).dtype == torch.float64
        # Accumulated in float64: the small ones are not lost beside the large one.
        many = [torch.tensor([4096.0]), torch.ones(2**20)]
        assert float(F.global_norm(many)) == pytest.approx(math.sqrt(2**24 + 2**20), rel=1e-7)
        assert float(F.global_norm([torch.full((3,), 1e30)])) == pytest.approx(3**0.5 * 1e30)
        assert float(F.global_norm([torch.zeros(0)])) == 0.0
        assert F.global_norm([torch.tensor([1.0, math.nan])]).isnan()
        assert F.global_norm([torch.tensor([1.0, -math.inf])]).isinf()


def test_global_norm_has_the_same_bits_for_any_number_of_threads():
    threads, tensors = torch.get_num_threads(), [p.detach() for p in parameters(torch.float32)]
    try:
        values = []
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            values.append(F.global_norm(tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


@pytest.mark.host  # 2^31 elements take a simulated GPU too long
def test_global_norm_beyond_32_bit_offsets():
    """2^31 + 7 elements; the zeros are pages of the system that no memory stands behind."""
    zeros = torch.from_numpy(np.zeros(2**31 + 7, dtype=np.int16)).view(torch.bfloat16)
    zeros[-1], zeros[2**31 - 1] = 3.0, 4.0
    assert float(F.global_norm([zeros])) == 5.0


def test_global_norm_errors():
    with pytest.raises(TypeError, match=r"global_norm: tensors\[1\]: .*int64"):
        F.global_norm([torch.ones(2), torch.ones(2).long()])
    with pytest.raises(ValueError, match=r"global_norm: tensors\[1\]: expected device cpu"):
        F.global_norm([torch.ones(2), torch.ones(2, device="meta")])
