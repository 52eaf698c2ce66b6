"""Learning rates and counts of steps on the device: what a captured CUDA graph can follow."""

from __future__ import annotations

import copy

import pytest
import torch
from optim_cases import assert_same, each_backend, parameters, set_grads
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels import composites, optim, use_backend
from lfp_kernels import functional as F
from lfp_kernels.optim import BoundOptimizer

RATES = (0.1, 0.02, 0.3, 0.04)


def rate(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(RATES[0], dtype=dtype)


def pairs(name: str) -> tuple:
    """The description that reads the device, and the one that the host knows."""
    return {
        "sgd": (optim.SGD(rate()), optim.SGD(0.1)),
        "momentum": (optim.SGD(rate(), 0.9, 0.01, True), optim.SGD(0.1, 0.9, 0.01, True)),
        "adamw": (optim.AdamW(rate(), capturable=True), optim.AdamW(0.1)),
        "adamw, count alone": (optim.AdamW(0.1, capturable=True), optim.AdamW(0.1)),
        "adamw, rate alone": (optim.AdamW(rate()), optim.AdamW(0.1)),
    }[name]


each_pair = pytest.mark.parametrize(
    "name", ["sgd", "momentum", "adamw", "adamw, count alone", "adamw, rate alone"]
)


@each_backend
@each_pair
def test_a_replay_follows_rate_and_count(name, backend):
    """The same call again, as a graph replays it: only values on the device have changed."""
    spec, plain = pairs(name)
    ours, theirs = parameters(), parameters()
    mine, twin = BoundOptimizer(spec, ours), BoundOptimizer(plain, theirs)
    group = mine.param_groups[0]
    feedback = [torch.empty_like(p) for p in ours]
    with use_backend(backend), torch.no_grad():
        updates = [mine.update_of(p, group) for p in ours]  # once: what capture would keep
        for k, lr in enumerate(RATES):
            set_grads(theirs, k)
            for fb, param in zip(feedback, theirs):
                fb.copy_(-param.grad)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
                twin.param_groups[0]["lr"] = lr
            if name == "adamw, rate alone":  # its corrections are the host's
                updates = [mine.update_of(p, group) for p in ours]
            F.optimizer_update([p.data for p in ours], feedback, updates)
            mine.count_step(ours)
            twin.step()
            assert_same(ours, theirs)
    for p, q in zip(ours, theirs):
        assert_same([mine.state[p][key] for key in twin.state[q]], twin.state[q].values())


@each_backend
@each_pair
def test_groups_with_own_rates(name, backend):
    """Two rates on the device, of two types."""
    for rates in ((0.1, 0.5), (0.1, 0.1)):
        results = []
        for spec, on_device in zip(pairs(name), (True, False)):
            params = parameters()
            bound = BoundOptimizer(spec, [{"params": params[:3]}, {"params": params[3:]}])
            for group, lr, dtype in zip(bound.param_groups, rates, (torch.float64, torch.float32)):
                known = torch.tensor(lr, dtype=dtype)
                group["lr"] = known if on_device and "count" not in name else float(known)
            for k in range(2):
                set_grads(params, k)
                with use_backend(backend):
                    bound.step()
            results.append(params)
        assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_late_corrections_are_exact_in_float32(dtype):
    """1 - 0.999^n for small and large n, from what float32 keeps of 1 - 0.999."""
    for count in (0, 1, 9, 1000, 100_000):
        ours, theirs = parameters(dtype, ((300,),)), parameters(dtype, ((300,),))
        specs = (optim.AdamW(0.1, capturable=True), optim.AdamW(0.1))
        for params, spec in zip((ours, theirs), specs):
            bound = BoundOptimizer(spec, params)
            set_grads(params, 1)
            bound.step()
            bound.state[params[0]]["step"].fill_(count)
            bound.step()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=eps)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@each_backend
@each_pair
def test_fused_steps_and_schedulers(name, backend):
    models = [m.double() for m in (mlp(), mlp())]
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 3
    steps, schedulers = [], []
    for model, spec in zip(models, pairs(name)):
        step = lfp_kernels.fuse(model, composites.Epsilon(0.1), optimizer=spec)
        steps.append(step)
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(step.optimizer, 0.5))
    tensor = steps[0].optimizer.param_groups[0]["lr"]
    with use_backend(backend):
        for _ in range(3):
            for step, scheduler in zip(steps, schedulers):
                step(x, y)
                scheduler.step()
            assert_same(models[0].parameters(), models[1].parameters())
    now = steps[0].optimizer.param_groups[0]["lr"]
    assert now is tensor or not isinstance(tensor, Tensor)  # filled, not replaced
    assert float(now) == pytest.approx(0.1 / 8)


@pytest.mark.host  # torch copies a state dict into memory that the checker does not know
def test_state_survives_a_round_trip():
    spec = optim.AdamW(rate(), capturable=True)
    params = parameters()
    bound = BoundOptimizer(spec, params)
    set_grads(params, 0)
    bound.step()
    others = copy.deepcopy(params)
    second = BoundOptimizer(optim.AdamW(0.5, capturable=True), others)
    second.load_state_dict(copy.deepcopy(bound.state_dict()))
    for optimizer, tensors in ((bound, params), (second, others)):
        set_grads(tensors, 1)
        optimizer.step()
    assert_same(others, params)
    step = second.state[others[0]]["step"]
    assert step.dtype == torch.float32 and step == 2


def test_what_reads_the_device_is_refused_elsewhere():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    for spec in (optim.SGD(rate()), optim.AdamW(0.1, capturable=True)):
        bound = BoundOptimizer(spec, [weight])
        update = bound.update_of(weight, bound.param_groups[0])
        x, z = torch.randn(2, 3), torch.randn(2, 4)
        with pytest.raises(ValueError, match="weight_update: expected an update known to the host"):
            F.linear_redistribute_update(x, weight.data, None, z, z, update)
    fb = [torch.ones(4, 3)]
    for live, text in (
        (optim.Live(torch.ones(2), None), r"live.lr: expected a 0-dim float32 or float64"),
        (optim.Live(None, torch.ones((), dtype=torch.float64)), r"live.step: expected a 0-dim flo"),
        (optim.Live(torch.ones((), device="meta"), None), "live.lr: expected device cpu"),
    ):
        with pytest.raises(ValueError, match=text):
            F.optimizer_update([weight.data], fb, [update._replace(live=live)])
    for bad in (torch.ones(2), torch.tensor(1), torch.tensor(-0.1), torch.tensor(float("nan"))):
        for make in (optim.SGD, optim.AdamW):
            with pytest.raises(ValueError, match="lr: expected a"):
                make(bad)
