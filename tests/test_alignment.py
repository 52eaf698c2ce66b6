"""The feedback-alignment family on whole models: against autograd, drop-in against fused."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import lfp_kernels as lfp
from lfp_kernels import composites as C
from lfp_kernels import functional as F
from lfp_kernels import optim, rules
from lfp_kernels.rules import uniform
from tests.alignment_cases import COMPOSITES, MODELS, batch, mlp, oracle_gradients

BACKENDS = ("native", "reference")


def gradients(composite, model, x, y):
    """Drop-in: .grad of every parameter for the cross-entropy."""
    model.zero_grad()
    with composite.context(model):
        out = model(x)
        if hasattr(composite, "target"):
            composite.target(y)
        nn.functional.cross_entropy(out, y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def matrices_of(name, composite, model):
    """What each linear layer multiplies the signal by, by definition."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    found = []
    for k, layer in enumerate(layers):
        w, fan = layer.weight.detach(), layer.weight.shape[1]
        held = getattr(layer, "feedback_weight", None)
        if name == "usf":
            found.append(w.sign() / math.sqrt(3 * fan))
        elif name == "frsf":
            found.append(held.abs() * w.sign())
        elif name == "brsf":
            seed = (composite.seed << 32 | k + 1) % 2**53
            found.append(uniform(w, seed) * w.sign() / math.sqrt(fan))
        elif name == "nfa" and held is not None:
            seed = (composite.seed << 32 | 1) % 2**53
            found.append(held + 0.1 * (uniform(w, seed) - 0.5))
        else:
            found.append(held)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("name", ["fa", "fa-last", "usf", "frsf", "brsf", "kp", "wm", "nfa"])
def test_one_step_is_backpropagation_with_another_matrix(name, activation, backend):
    model, composite = mlp(activation), COMPOSITES[name]()
    x, y = batch((11,))
    composite.prepare(model)
    with lfp.use_backend(backend):
        got = gradients(composite, model, x, y)
    want = oracle_gradients(model, matrices_of(name, composite, model), x, y)
    names = [n for n, p in model.named_parameters()]
    for n, w in zip(names, want):
        if "feedback" not in n:
            torch.testing.assert_close(got[n], w, rtol=1e-10, atol=1e-12, msg=n)
    if name == "kp":
        assert torch.equal(got["2.feedback_weight"], got["2.weight"])


@pytest.mark.parametrize("name", ["fa", "frsf", "dfa", "tf", "nf", "nfa"])
def test_the_matrix_is_used_and_the_weight_is_not(name):
    """Other weights above, the same signal below; another matrix, another signal."""
    x, y = batch((11,))
    model = mlp()
    composite = COMPOSITES[name]()
    composite.prepare(model)
    with torch.no_grad():  # the output stays the same: only the path back could differ
        model[4].bias.copy_(model(x)[0])
        model[4].weight.zero_()
    first = gradients(COMPOSITES[name](), copy.deepcopy(model), x, y)["2.weight"]
    if name == "frsf":
        assert torch.count_nonzero(first) == 0  # sign(0) = 0
    else:
        assert torch.count_nonzero(first) > 0  # backpropagation would find zero
    other = copy.deepcopy(model)
    for module in other:
        for key, value in module.named_buffers():
            if "feedback" in key:
                value.mul_(-2)
    second = gradients(COMPOSITES[name](), other, x, y)["2.weight"]
    if name == "nf":  # tanh is odd and F2 doubles: not linear in F1
        assert not torch.allclose(second, first)
    elif name != "frsf":
        noise = 1e-1 if name == "nfa" else 1e-12
        torch.testing.assert_close(second, -2 * first, rtol=noise, atol=noise)


@pytest.mark.parametrize("name, model_name", list(itertools.product(COMPOSITES, MODELS)))
def test_fused_takes_the_steps_of_drop_in(name, model_name):
    model, shape = MODELS[model_name]()
    x, y = batch(shape)
    composite = COMPOSITES[name]()
    composite.prepare(model, x)
    other, twin = copy.deepcopy(model), COMPOSITES[name]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    spec = optim.SGD(0.1, momentum=0.9, weight_decay=0.01)

    step = lfp.fuse(other, twin, reward="cross_entropy", optimizer=spec)
    twin._draws = composite._draws
    for _ in range(3):
        # A fused step draws from the top layer down: one layer at a time has the same order.
        if name == "brsf":
            twin._draws = composite._draws = 0
        gradients(composite, model, x, y)
        optimizer.step()
        step(x, y)
        if name == "brsf":
            break
    if name == "brsf":  # other keys, the same law: compare what does not depend on them
        torch.testing.assert_close(_last(model).weight, _last(other).weight)
        return
    for (n, a), b in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=f"{n}")


def _last(model):
    return [m for m in model if isinstance(m, nn.Linear)][-1]


def test_gradient_composites_equal_autograd():
    """LinBP that begins above the last activation is backpropagation."""
    model, _ = MODELS["relu"]()
    x, y = batch((11,))
    got = gradients(C.LinBP("4"), model, x, y)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(got[n], p.grad)


def test_linbp_passes_activations_from_its_start():
    x, y = batch((11,))
    model, _ = MODELS["relu"]()
    linear = nn.Sequential(*(m for m in copy.deepcopy(model) if isinstance(m, nn.Linear)))
    got = gradients(C.LinBP(), model, x, y)
    values = [x]
    for module in model:
        values.append(module(values[-1]).detach())
    delta = (values[-1].softmax(-1) - nn.functional.one_hot(y, 5)) / len(x)
    for k, at in ((2, 4), (1, 2), (0, 0)):
        torch.testing.assert_close(got[f"{at}.weight"], delta.t() @ values[at])
        delta = delta @ linear[k].weight.detach()


@pytest.mark.parametrize("name", ["fa", "frsf", "dfa", "kp", "nf"])
def test_matrices_are_saved_with_the_model(name):
    x, y = batch((11,))
    model = mlp()
    composite = COMPOSITES[name]()
    composite.prepare(model)
    state = copy.deepcopy(model.state_dict())
    assert any("feedback_weight" in key for key in state)
    other = mlp(seed=9)
    again = type(composite)(seed=99)
    if name == "nf":
        again = C.NonlinearFeedback(7, seed=99)
    again.prepare(other)
    other.load_state_dict(state)
    first, second = gradients(composite, model, x, y), gradients(again, other, x, y)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    again.remove(other)
    assert not any("feedback_weight" in key for key in other.state_dict())


def test_batch_dimensions():
    """[A, B, I] is [A * B, I]."""
    x, _ = batch((11,), n=12)
    model, composite = mlp(), COMPOSITES["fa"]()
    with composite.context(model):
        model(x.view(3, 4, 11)).pow(2).sum().backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x).pow(2).sum().backward()
    for a, b in zip(got, model.parameters()):
        torch.testing.assert_close(a, b.grad)


def test_weight_mirror_turns_towards_the_weights():
    model = mlp()
    composite = C.WeightMirror(seed=0)
    composite.prepare(model)

    def angle():
        w, b = model[2].weight.detach().flatten(), model[2].feedback_weight.flatten()
        return float(torch.nn.functional.cosine_similarity(w, b, 0).arccos().rad2deg())

    before = angle()
    for _ in range(200):
        composite.mirror(model, lr=0.1, decay=0.1)
    assert before > 60 and angle() < 15


def test_kolen_pollack_becomes_the_transpose():
    model, composite = mlp(), C.KolenPollack(seed=0)
    x, y = batch((11,), n=64)
    spec = optim.SGD(0.5, weight_decay=0.02)
    step = lfp.fuse(model, composite, reward="cross_entropy", optimizer=spec)

    def distance():
        return float((model[4].weight - model[4].feedback_weight).detach().norm())

    far = distance()
    for _ in range(300):
        step(x, y)
    assert distance() < 0.1 * far


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_direct_feedback_runs_no_input_product(activation, monkeypatch):
    """Linear layers make their delta from the error, a tile at a time: nothing is handed down."""
    model, composite = mlp(activation), C.DirectFeedbackAlignment()
    step = lfp.fuse(model, composite, reward="cross_entropy", optimizer=optim.SGD(0.1))
    assert repr(step).count("hears the error itself") == 2
    products = []
    update = F.linear_redistribute_update
    monkeypatch.setattr(
        F, "linear_redistribute_update",
        lambda *args, **options: products.append(options["need_input"]) or update(*args, **options),
    )  # fmt: skip
    before = [p.clone() for p in model.parameters()]
    step(*batch((11,)))
    assert products == [False]  # the last layer's; the others go through direct_update
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_functional_calls_compile_without_graph_break():
    x, weight, r = torch.randn(4, 6), torch.randn(5, 6), torch.randn(4, 5)
    matrix = torch.randn(5, 6)

    def run(x, r, rule, matrix):
        return F.linear_redistribute(x, weight, None, r, r, rule, matrix=matrix).input

    for rule, given in (
        (rules.FixedFeedback(), matrix),
        (rules.RandomSignFeedback(0.5, 7), None),
        (rules.ZPlus(), None),
    ):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, r, rule, given), run(x, r, rule, given))


# ---- bad input


def test_unknown_scope_variant_and_start():
    with pytest.raises(ValueError, match=r"scope: expected one of .*got 'first'"):
        C.FeedbackAlignment(scope="first")
    with pytest.raises(ValueError, match=r"variant: expected one of .*got 'fa'"):
        C.DirectFeedbackAlignment("fa")
    with pytest.raises(ValueError, match=r"conv: expected one of .*got 'space'"):
        C.DirectFeedbackAlignment(conv="space")
    with pytest.raises(ValueError, match=r"LinBP: start: expected the name of a layer, got 'x'"):
        C.LinBP("x").prepare(mlp())


def test_nf_refuses_convolutions():
    model, _ = MODELS["cnn"]()
    with pytest.raises(ValueError, match=r"layer '0': expected an nn.Linear, got Conv2d"):
        C.NonlinearFeedback(scope="all").prepare(model)


def test_dfa_on_convolutions_wants_an_input():
    model, shape = MODELS["cnn"]()
    composite = C.DirectFeedbackAlignment()
    with pytest.raises(ValueError, match=r"layer '0' .*call composite.prepare\(model, x\)"):
        composite.prepare(model)
    composite.prepare(model, batch(shape)[0])
    assert model[0].feedback_weight.shape == (5, 2 * 8 * 8)


def test_broadcast_direct_feedback_is_the_transposed_convolution():
    """What a convolution with weights D [C, C_in, kernel] would send down from e everywhere."""
    model, shape = MODELS["cnn"]()
    x, y = batch(shape)
    composite = C.DirectFeedbackAlignment(conv="broadcast", seed=1)
    composite.prepare(model)
    matrix = model[3].feedback_weight
    assert matrix.shape == (5, 4, 3, 3)
    got = gradients(composite, model, x, y)["0.weight"]
    pooled = model[:3](x).detach()
    error = (model(x).softmax(1) - nn.functional.one_hot(y, 5)).detach() / len(x)
    everywhere = error[..., None, None].expand(-1, -1, 2, 2)
    delta = nn.functional.conv_transpose2d(everywhere, matrix)
    assert delta.shape == pooled.shape
    first = copy.deepcopy(model[:3])
    want = torch.autograd.grad(first(x), first[0].weight, delta)[0]
    torch.testing.assert_close(got, want)


def test_labels_are_asked_for():
    model, composite = mlp(), C.DirectFeedbackAlignment("drtp")
    x, y = batch((11,))
    with composite.context(model), pytest.raises(ValueError, match=r"call composite.target\(y\)"):
        nn.functional.cross_entropy(model(x), y).backward()
