"""The linear layer's one-pass update, and the errors of both forms: nothing is half updated."""

from __future__ import annotations

import pytest
import torch
from linear_cases import BACKENDS, DTYPES, SPECS, case, oracle, updates

from lfp_kernels import functional as F
from lfp_kernels import optim, rules, use_backend
from lfp_kernels.optim import BoundOptimizer
from lfp_kernels.testing import assert_within_budget, linear_oracle

# ---- the one-pass update


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{type(s).__name__}-{s.state_names[0]}")
@pytest.mark.parametrize("bias", [True, False])
def test_update_equals_redistribute_then_optimizer(dtype, spec, bias):
    """Three steps of the fused form; the oracle is torch.optim in float64 on the message oracle."""
    x, weight, b, z, reward = case((6,), 9, 4, dtype, bias, seed=5)
    eps = rules.Epsilon(0.1)

    def three_steps(backend):
        w, c = weight.clone(), None if b is None else b.clone()
        bound, _, _ = updates(spec, w, c)
        for _ in range(3):
            group = bound.param_groups[0]
            steps = [bound.update_of(t, group) for t in group["params"]]
            with use_backend(backend):
                r_in = F.linear_redistribute_update(
                    x, w, c, z, reward, steps[0], steps[1] if bias else None, eps
                )
            bound.count_step(group["params"])
        return r_in, w, c, [s for t in group["params"] for s in bound.state[t].values()]

    w64 = torch.nn.Parameter(weight.double())
    c64 = None if b is None else torch.nn.Parameter(b.double())
    kinds = {optim.SGD: torch.optim.SGD, optim.AdamW: torch.optim.AdamW}
    options = {k: v for k, v in vars(spec).items() if k != "clip_norm"}
    exact = kinds[type(spec)]([w64] if c64 is None else [w64, c64], **options)
    for _ in range(3):
        r_in, w64.grad, b_fb = linear_oracle(x, w64, c64, z, reward, 0.1)
        w64.grad.neg_()
        if c64 is not None:
            c64.grad = -b_fb
        exact.step()

    got, same = three_steps("native"), three_steps("reference")
    assert_within_budget(got[0], same[0], r_in, "input reward of the old weight")
    assert_within_budget(got[1], same[1], w64.detach(), "weight")
    if bias:
        assert_within_budget(got[2], same[2], c64.detach(), "bias")
    for a, s in zip(got[3], same[3]):
        scale = s.double().abs().max()
        limit = 16 * torch.finfo(dtype).eps * scale
        assert float((a.double() - s.double()).abs().max()) <= float(limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_and_bias_keep_their_own_settings(backend):
    """A bias without weight decay, in a parameter group of its own, with another optimizer code."""
    x, weight, bias, z, reward = args = case((6,), 9, 4)
    bound = BoundOptimizer(
        optim.SGD(0.1, momentum=0.9, weight_decay=0.5),
        [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0, "momentum": 0.0, "lr": 2.0}],
    )
    steps = [bound.update_of(g["params"][0], g) for g in bound.param_groups]
    _, w_fb, b_fb = oracle(*args)
    want_w, want_b = weight - 0.1 * (0.5 * weight - w_fb), bias + 2.0 * b_fb
    with use_backend(backend):
        F.linear_redistribute_update(x, weight, bias, z, reward, *steps)
    torch.testing.assert_close(weight, want_w)
    torch.testing.assert_close(bias, want_b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_without_bias_update_or_input(backend):
    x, weight, bias, z, reward = case((6,), 9, 4)
    before, w = bias.clone(), weight.clone()
    _, step, _ = updates(SPECS[1], w, bias)
    with use_backend(backend):
        assert F.linear_redistribute_update(x, w, bias, z, reward, step, need_input=False) is None
    assert torch.equal(bias, before) and not torch.equal(w, weight)


# ---- errors


def error_cases():
    x, weight, bias, z, reward = case((4,), 6, 3, torch.float32)
    good = dict(x=x, weight=weight, bias=bias, z=z, reward=reward)
    yield "x", TypeError, "numpy|Tensor", {**good, "x": [1.0]}
    yield "x", TypeError, "int64", {**good, "x": x.long()}
    yield "x", ValueError, r"\[\.\.\., 6\].*\(4, 5\)", {**good, "x": x[:, :5]}
    yield "weight", TypeError, "float64", {**good, "weight": weight.double()}
    yield "weight", ValueError, r"\[O, I\]", {**good, "weight": weight[0]}
    yield "bias", ValueError, r"\(3,\).*\(2,\)", {**good, "bias": bias[:2]}
    yield "z", ValueError, r"\(4, 3\)", {**good, "z": z[:3]}
    yield "reward", ValueError, r"\(4, 3\)", {**good, "reward": reward[:, :2]}
    yield "reward", TypeError, "bfloat16", {**good, "reward": reward.bfloat16()}
    yield "reward", ValueError, "meta", {**good, "reward": reward.to("meta")}
    yield "rule", TypeError, "Epsilon", {**good, "rule": 1e-6}
    yield "product_dtype", ValueError, "float16", {**good, "product_dtype": torch.float16}


@pytest.mark.parametrize("name, kind, text, arguments", list(error_cases()))
@pytest.mark.parametrize("update", [False, True])
def test_errors_name_the_argument_and_change_nothing(name, kind, text, arguments, update):
    arguments = dict(arguments)
    function = F.linear_redistribute
    _, step_w, step_b = updates(SPECS[1], *case((4,), 6, 3, torch.float32)[1:3])
    if update:
        function = F.linear_redistribute_update
        arguments |= {"weight_update": step_w, "bias_update": step_b}
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    tensors = [t for t in [*tensors, *step_w.states, *step_b.states] if not t.is_meta]
    before = [t.clone() for t in tensors]
    with pytest.raises(kind, match=f"{function.__name__}: {name}: .*(?:{text})"):
        function(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_update_errors_change_nothing():
    x, weight, bias, z, reward = case((4,), 6, 3)
    _, good_w, good_b = updates(SPECS[1], weight, bias)
    bad = [
        ("weight_update", TypeError, {"weight_update": None}),
        ("weight_update", ValueError, {"weight_update": good_w._replace(code=9)}),
        ("weight_update", ValueError, {"weight_update": good_w._replace(states=[])}),
        ("weight_update", ValueError, {"weight_update": good_b}),
        ("weight_update", TypeError,
         {"weight_update": good_w._replace(states=[good_w.states[0].float()])}),
        ("weight_update", ValueError,
         {"weight_update": good_w._replace(states=[torch.zeros(6, 3).double().t()])}),
        ("bias_update", ValueError, {"bias_update": good_w}),
        ("bias_update", ValueError, {"bias": None}),
    ]  # fmt: skip
    before = weight.clone(), bias.clone()
    for name, kind, change in bad:
        call = dict(x=x, weight=weight, bias=bias, z=z, reward=reward)
        call |= {"weight_update": good_w, "bias_update": good_b} | change
        with pytest.raises(kind, match=f"linear_redistribute_update: {name}"):
            F.linear_redistribute_update(**call)
        assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])
        assert not good_w.states[0].any() and not good_b.states[0].any()
