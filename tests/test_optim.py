"""Optimizers: step for step the numbers of torch.optim, and interchangeable with it."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from optim_cases import (
    BACKENDS,
    DTYPES,
    SPECS,
    assert_same,
    each_backend,
    each_spec,
    parameters,
    set_grads,
    torch_twin,
)
from torch.optim import lr_scheduler

from lfp_kernels import optim, use_backend
from lfp_kernels.optim import BoundOptimizer
from lfp_kernels.testing import assert_within_budget

# ---- against torch.optim


@each_backend
@each_spec
def test_steps_like_torch(backend, spec):
    ours, theirs = parameters(), parameters()
    mine, twin = BoundOptimizer(spec, ours), torch_twin(spec, theirs)
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        with use_backend(backend):
            mine.step()
        twin.step()
        assert_same(ours, theirs)


@each_spec
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_is_within_the_error_budget(spec, dtype):
    """One step from the same state; the oracle is torch.optim in float64."""
    runs = {}
    for backend in BACKENDS:
        params = parameters(dtype)
        set_grads(params, 0)
        with use_backend(backend):
            BoundOptimizer(spec, params).step()
        runs[backend] = params
    exact = [torch.nn.Parameter(p.detach().double()) for p in parameters(dtype)]
    source = parameters(dtype)
    set_grads(source, 0)
    for param, low in zip(exact, source):
        param.grad = low.grad.double()
    torch_twin(spec, exact).step()
    for a, b, c in zip(runs["native"], runs["reference"], exact):
        assert_within_budget(a.detach(), b.detach(), c.detach())


@each_backend
@pytest.mark.parametrize("clip", [1e-3, 5.0, 1e6])
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_clips_like_torch(backend, clip, kind):
    spec = kind(0.1, clip_norm=clip)
    ours, theirs = parameters(), parameters()
    mine, twin = BoundOptimizer(spec, ours), torch_twin(spec, theirs)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        torch.nn.utils.clip_grad_norm_(theirs, clip)
        before = [p.grad.clone() for p in ours]
        with use_backend(backend):
            mine.step()
        twin.step()
        assert_same(ours, theirs)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before)), ".grad is only read"


SCHEDULES = {
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=12),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", ["momentum-decay", "nesterov", "adamw"])
def test_schedulers_drive_it(name, schedule, recwarn):
    spec = SPECS[name]
    ours, theirs = parameters(), parameters()
    mine, twin = BoundOptimizer(spec, ours), torch_twin(spec, theirs)
    plans = schedule(mine), schedule(twin)
    for step in range(10):
        set_grads(ours, step)
        set_grads(theirs, step)
        mine.step()
        twin.step()
        assert_same(ours, theirs)
        for plan in plans:
            plan.step()
        assert mine.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_one_cycle_turns_the_momentum():
    params = parameters(shapes=((3,),))
    mine = BoundOptimizer(optim.SGD(0.1, momentum=0.9), params)
    plan = lr_scheduler.OneCycleLR(mine, 0.3, total_steps=10, base_momentum=0.8, max_momentum=0.95)
    seen = set()
    for step in range(9):
        seen.add(mine.update_of(params[0], mine.param_groups[0]).hyper[3])
        set_grads(params, step)
        mine.step()
        plan.step()
    assert len(seen) > 5 and min(seen) < 0.85 and max(seen) == pytest.approx(0.95)


def test_count_step_satisfies_the_schedulers_order_check(recwarn):
    """The fused step never calls .step(); it says so through count_step."""
    params = parameters(shapes=((3,),))
    mine = BoundOptimizer(optim.SGD(0.1), params)
    plan = lr_scheduler.StepLR(mine, 1)
    mine.count_step(params)
    plan.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@each_backend
def test_param_groups(backend):
    spec = optim.SGD(0.1, momentum=0.9, weight_decay=0.1)

    def groups(params):
        return [
            {"params": params[:2]},
            {"params": params[2:4], "weight_decay": 0.0, "lr": 0.5},
            {"params": params[4:], "momentum": 0.0, "nesterov": False},
        ]

    ours, theirs = parameters(), parameters()
    mine, twin = BoundOptimizer(spec, groups(ours)), torch_twin(spec, groups(theirs))
    extra, extra_twin = parameters(shapes=((6,),)), parameters(shapes=((6,),))
    mine.add_param_group({"params": extra, "lr": 0.01})
    twin.add_param_group({"params": extra_twin, "lr": 0.01})
    for step in range(3):
        for params in (ours, theirs, extra, extra_twin):
            set_grads(params, step)
        with use_backend(backend):
            mine.step()
        twin.step()
    assert_same([*ours, *extra], [*theirs, *extra_twin])


def test_parameters_without_grad_are_left_alone():
    for spec in SPECS.values():
        ours, theirs = parameters(), parameters()
        mine, twin = BoundOptimizer(spec, ours), torch_twin(spec, theirs)
        for step in range(3):
            set_grads(ours, step)
            set_grads(theirs, step)
            ours[1].grad = theirs[1].grad = None
            if step == 0:  # this one starts a step later: it counts its own steps
                ours[0].grad = theirs[0].grad = None
            mine.step()
            twin.step()
        assert_same(ours, theirs)
        assert torch.equal(ours[1], parameters()[1])


def test_mixed_dtypes_in_one_call():
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 50).to(k)) for k in kinds]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    spec = optim.SGD(0.5, momentum=0.5)
    set_grads(params, 1)
    set_grads(alone, 1)
    BoundOptimizer(spec, params).step()
    for param in alone:
        param.grad = params[[id(p) for p in alone].index(id(param))].grad
        BoundOptimizer(spec, [param]).step()
    for a, b in zip(params, alone):
        assert torch.equal(a, b)


# ---- state


@each_spec
@pytest.mark.parametrize("direction", ["from torch", "to torch", "own"])
def test_state_dict_interchange(spec, direction):
    """Two steps in one optimizer, state handed over, two steps in the other = four steps."""
    whole, parts = parameters(), parameters()
    twin = torch_twin(spec, whole)

    def ours(params):
        return BoundOptimizer(spec, params)

    def theirs(params):
        return torch_twin(spec, params)

    first, second = {
        "from torch": (theirs, ours),
        "to torch": (ours, theirs),
        "own": (ours, ours),
    }[direction]
    before, after = first(parts), second(parts)
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save(before.state_dict(), file)
            file.seek(0)
            after.load_state_dict(torch.load(file))
        set_grads(whole, step)
        set_grads(parts, step)
        twin.step()
        (before if step < 2 else after).step()
        assert_same(parts, whole)
    assert set(after.state_dict()["param_groups"][0]) >= set(twin.state_dict()["param_groups"][0])


def test_state_dict_keys_are_those_of_torch():
    for spec in SPECS.values():
        ours, theirs = parameters(), parameters()
        mine, twin = BoundOptimizer(spec, ours), torch_twin(spec, theirs)
        for optimizer, params in ((mine, ours), (twin, theirs)):
            set_grads(params, 0)
            optimizer.step()
        got, want = mine.state_dict(), twin.state_dict()
        assert set(got["param_groups"][0]) == {*want["param_groups"][0], "clip_norm"}
        for k, state in want["state"].items():
            present = {key for key, value in state.items() if value is not None}
            assert present == set(got["state"].get(k, {}))


def test_load_keeps_the_saved_clip_norm_or_its_own():
    params = parameters()
    mine = BoundOptimizer(optim.SGD(0.1, clip_norm=2.0), params)
    mine.load_state_dict(torch.optim.SGD(params, lr=0.3).state_dict())
    assert mine.param_groups[0]["clip_norm"] == 2.0 and mine.param_groups[0]["lr"] == 0.3
    mine.load_state_dict(BoundOptimizer(optim.SGD(0.1, clip_norm=7.0), params).state_dict())
    assert mine.param_groups[0]["clip_norm"] == 7.0


def test_load_refuses_other_optimizers():
    params = parameters()
    sgd = BoundOptimizer(optim.SGD(0.1, momentum=0.9), params)
    adamw = BoundOptimizer(optim.AdamW(0.1), params)
    bad = [
        (sgd, torch.optim.AdamW(params), "expected the state of SGD; .* has no 'momentum'"),
        (adamw, torch.optim.SGD(params, lr=1), "expected the state of AdamW; .* has no 'betas'"),
        (sgd, torch.optim.SGD(params, lr=1, momentum=0.9, dampening=0.5), "dampening=0, got 0.5"),
        (sgd, torch.optim.SGD(params, lr=1, maximize=True), "maximize=False, got True"),
        (adamw, torch.optim.AdamW(params, amsgrad=True), "amsgrad=False, got True"),
        (adamw, torch.optim.Adam(params), "decoupled_weight_decay=True, got False"),
    ]
    for mine, other, text in bad:
        lr = mine.param_groups[0]["lr"]
        with pytest.raises(ValueError, match=f"optimizer: state_dict: .*{text}"):
            mine.load_state_dict(other.state_dict())
        assert mine.param_groups[0]["lr"] == lr


def test_channels_last_states_from_torch():
    """torch keeps a state in the layout of its parameter; the numbers must not be permuted."""
    whole, parts = (
        [torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last))]
        for p in [parameters(shapes=((2, 3, 4, 5),))[0]] * 2
    )
    spec = optim.SGD(0.1, momentum=0.9)
    twin, before, after = torch_twin(spec, whole), torch_twin(spec, parts), None
    for step in range(4):
        for params in (whole, parts):
            set_grads(params, step)
            params[0].grad = params[0].grad.to(memory_format=torch.channels_last)
        twin.step()
        if step == 2:
            assert not before.state[parts[0]]["momentum_buffer"].is_contiguous()
            after = BoundOptimizer(spec, parts)
            after.load_state_dict(before.state_dict())
        (after or before).step()
        assert_same(parts, whole)


def test_copies_and_pickles():
    params = parameters(shapes=((3,),))
    mine = BoundOptimizer(optim.AdamW(0.1, clip_norm=3.0), params)
    set_grads(params, 0)
    mine.step()
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert twin.spec == mine.spec
        param = twin.param_groups[0]["params"][0]
        step = twin.update_of(param, twin.param_groups[0])
        assert step.hyper == mine.update_of(params[0], mine.param_groups[0]).hyper
        assert torch.equal(step.states[0], mine.state[params[0]]["exp_avg"])


def test_closure_and_empty_step():
    params = parameters(shapes=((3,),))
    mine = BoundOptimizer(optim.SGD(0.1), params)
    assert mine.step() is None  # no grads: nothing to do

    def closure():
        assert torch.is_grad_enabled()
        mine.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    before = params[0].detach().clone()
    assert mine.step(closure).item() == pytest.approx(float(before.square().sum()))
    torch.testing.assert_close(params[0].detach(), before * 0.8)


def test_non_finite_norm_takes_no_step():
    for value in (math.nan, math.inf):
        params = parameters()
        mine = BoundOptimizer(optim.SGD(0.1, momentum=0.9, clip_norm=1.0), params)
        set_grads(params, 0)
        params[3].grad[0] = value
        with pytest.raises(ValueError, match=f"global norm of the feedback is {value}"):
            mine.step()
        assert all(torch.equal(a, b) for a, b in zip(params, parameters()))


def test_clip_scale():
    params = parameters(shapes=((3,),))
    free = BoundOptimizer(optim.SGD(0.1), params)
    tight = BoundOptimizer(optim.SGD(0.1, clip_norm=2.0), params)
    assert free.clip_scale(1e9) == 1.0 and tight.clip_scale(1.5) == 1.0
    assert tight.clip_scale(torch.tensor(8.0)) == pytest.approx(0.25, rel=1e-6)


# ---- descriptions


@pytest.mark.parametrize(
    "make, kind, text",
    [
        (lambda: optim.SGD(-0.1), ValueError, "SGD: lr: expected a finite number >= 0, got -0.1"),
        (lambda: optim.SGD(math.nan), ValueError, "SGD: lr"),
        (lambda: optim.SGD("0.1"), TypeError, "SGD: lr: expected a number, got str"),
        (lambda: optim.SGD(0.1, momentum=1.0), ValueError, "SGD: momentum"),
        (lambda: optim.SGD(0.1, weight_decay=-1), ValueError, "SGD: weight_decay"),
        (lambda: optim.SGD(0.1, clip_norm=0), ValueError, "SGD: clip_norm"),
        (lambda: optim.SGD(0.1, nesterov=True), ValueError, "SGD: nesterov: .*momentum > 0"),
        (lambda: optim.AdamW(betas=0.9), TypeError, "AdamW: betas: expected two numbers"),
        (lambda: optim.AdamW(betas=(0.9, 1.0)), ValueError, "AdamW: betas"),
        (lambda: optim.AdamW(eps=-1e-8), ValueError, "AdamW: eps"),
        (lambda: optim.AdamW(weight_decay=math.inf), ValueError, "AdamW: weight_decay"),
        (lambda: optim.AdamW(clip_norm=-1.0), ValueError, "AdamW: clip_norm"),
        (lambda: BoundOptimizer("sgd", []), TypeError, "expected lfp_kernels.optim.SGD"),
    ],
)
def test_descriptions_refuse_nonsense(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
