"""Batch normalization: native and reference against torch's autograd in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend
from lfp_kernels.rules import stabilize
from lfp_kernels.testing import assert_within_budget, poisoned_empty

OPS = torch.ops.lfp_kernels
BACKENDS = ("native", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
# 2-d, tiny planes (parts of rows), one channel, odd planes, planes of several blocks, 3-d volumes,
# many channels, many rows
SHAPES = [
    (7, 5), (4, 3, 2), (3, 1, 5), (2, 5, 7, 9), (3, 4, 1, 1), (2, 3, 6, 6), (2, 2, 3, 4, 5),
    (40, 300), (3, 20, 8, 8), (2, 2, 150, 150), (1, 2, 3), (1100, 3), (5, 3, 40, 33),
]  # fmt: skip


def case(
    shape: tuple[int, ...], dtype=torch.float64, affine: bool = True, training: bool = True, seed=0
) -> tuple:
    """x, weight, bias, running_mean, running_var"""
    g = torch.Generator().manual_seed(seed)
    count = shape[1]
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 1
    weight, bias, mean = (torch.randn(count, generator=g, dtype=torch.float64) for _ in range(3))
    var = torch.rand(count, generator=g, dtype=torch.float64) + 0.5
    made = [t.to(dtype) for t in (x, weight, bias, mean, var)]
    return made[0], *((made[1], made[2]) if affine else (None, None)), made[3], made[4]


def reward_for(x: Tensor, seed: int = 9) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double() for t in tensors]


def torch_forward(x, weight, bias, mean, var, training, momentum=0.1):
    """torch's own batch norm in float64, on copies: out, running_mean, running_var."""
    x, weight, bias = wide(x, weight, bias)
    mean, var = (None if t is None else t.double().clone() for t in (mean, var))
    return TF.batch_norm(x, mean, var, weight, bias, training, momentum, EPS), mean, var


def oracle(x, weight, bias, z, reward, mean, var, training, eps=1e-6, below=None, signal_in=False):
    """Autograd of torch's batch norm in float64, fed with s."""
    x, weight, bias, z, reward, mean, var = wide(x, weight, bias, z, reward, mean, var)
    s = reward if signal_in else reward / stabilize(z, eps)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    out = TF.batch_norm(x, mean, var, weight, bias, training, 0.1, EPS)
    dx, *rest = torch.autograd.grad(out, leaves, s)
    factor = x if below is None else x / stabilize(x, below)
    feedback = [g * p.abs() for g, p in zip(rest, leaves[1:])] or [None, None]
    return (dx * factor).detach(), *(None if f is None else f.detach() for f in feedback)


def forward(backend, *args, training=True, momentum=0.1, relu=False):
    with use_backend(backend):
        return F.batch_norm(*args, training, momentum, EPS, relu=relu)


def run(backend, x, weight, bias, z, reward, mean, invstd, training, *rule, **options):
    with use_backend(backend):
        return F.batch_norm_redistribute(
            x, weight, bias, z, reward, mean, invstd, training, *rule, **options
        )


def close(got, want, scale=1e-12):
    torch.testing.assert_close(
        got, want, rtol=scale, atol=scale * (float(want.abs().max()) if want.numel() else 0)
    )


# ---- forward


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_forward_matches_torch(backend, shape, training, affine):
    x, weight, bias, mean, var = case(shape, affine=affine)
    want, want_mean, want_var = torch_forward(x, weight, bias, mean, var, training, 0.3)
    out, used_mean, invstd = forward(
        backend, x, weight, bias, mean, var, training=training, momentum=0.3
    )
    close(out, want)
    close(mean, want_mean)
    close(var, want_var)
    axes = [d for d in range(x.dim()) if d != 1]
    close(used_mean, x.mean(axes) if training else mean)
    true_var = x.var(axes, unbiased=False) if training else var
    close(invstd, 1 / (true_var + EPS).sqrt())
    relu = forward(backend, x, weight, bias, mean.clone(), var.clone(), training=training, relu=True)
    if training:
        assert torch.equal(relu.out, out.relu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5, 6), (2, 3, 40, 40), (64, 40, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_forward_within_the_error_budget(dtype, shape, training):
    args = case(shape, dtype)
    results = []
    for backend in BACKENDS:
        stats = [t.clone() for t in args[3:]]
        results.append((*forward(backend, *args[:3], *stats, training=training), *stats))
    out, mean, var = torch_forward(*args, training)
    for k, truth in ((0, out), (3, mean), (4, var)):
        assert_within_budget(results[0][k], results[1][k], truth)
    assert results[0][1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layout", ["plain", "last"])
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_statistics_do_not_cancel(layout, offset):
    """A mean far above the deviation: E[x^2] - E[x]^2 would leave no digit of the variance."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(6, 5, 24, 24, generator=g) + offset).float()
    x[0] = 0  # the first sample is no guide to the mean of the others
    if layout == "last":
        x = x.contiguous(memory_format=torch.channels_last)
    got = forward("native", x, None, None, None, None)
    x64 = x.double()
    close(got.mean.double(), x64.mean((0, 2, 3)), 2e-7)
    close(got.invstd.double(), 1 / (x64.var((0, 2, 3), unbiased=False) + EPS).sqrt(), 1e-6)
    assert float((got.out - torch_forward(x, None, None, None, None, True)[0]).abs().max()) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_running_statistics_means_batch_statistics(backend):
    x, weight, bias, _, _ = case((4, 3, 5))
    eval_mode = forward(backend, x, weight, bias, None, None, training=False)
    train_mode = forward(backend, x, weight, bias, None, None, training=True)
    for a, b in zip(eval_mode, train_mode):
        assert torch.equal(a, b)
    close(eval_mode.out, torch_forward(x, weight, bias, None, None, True)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_move_once_in_place_and_not_in_eval(backend):
    x, weight, bias, mean, var = case((6, 3, 4, 4))
    store = torch.zeros(3, 2, dtype=torch.float64)
    strided = store[:, 0]  # buffers need not be contiguous
    strided.copy_(mean)
    before = var.clone()
    forward(backend, x, weight, bias, strided, var, training=False)
    assert torch.equal(strided, mean) and torch.equal(var, before)
    for _ in range(2):
        forward(backend, x, weight, bias, strided, var, momentum=0.25)
    batch = x.mean((0, 2, 3))
    close(strided, 0.75 * (0.75 * mean + 0.25 * batch) + 0.25 * batch)
    assert not store[:, 1].any()
    zero = case((6, 3, 4, 4))[3]
    forward(backend, x, weight, bias, zero, var, momentum=0.0)
    assert torch.equal(zero, mean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_sixteen_bit_activations_with_float32_parameters(backend, training):
    x, *rest = case((4, 3, 6, 6), torch.bfloat16)
    weight, bias, mean, var = (t.float() for t in rest)
    want, want_mean, _ = torch_forward(x, weight, bias, mean, var, training)
    got = forward(backend, x, weight, bias, mean, var, training=training)
    assert got.out.dtype == torch.bfloat16 and mean.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), want, rtol=2**-8, atol=2**-8)
    close(mean.double(), want_mean, 1e-6)
    r = reward_for(x)
    fed = run(backend, x, weight, bias, got.out, r, *got[1:], training)
    assert fed.weight.dtype == fed.bias.dtype == torch.float32


# ---- redistribute


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_redistribute_matches_autograd(backend, shape, training, affine):
    x, weight, bias, mean, var = case(shape, affine=affine, seed=1)
    truth_stats = mean.clone(), var.clone()
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    r = reward_for(x) * z  # as in a network: reward in proportion to the activation
    got = run(backend, x, weight, bias, z, r, *stats, training)
    truth = oracle(x, weight, bias, z, r, *truth_stats, training)
    for name, a, b in zip(("input", "weight", "bias"), got, truth):
        assert (a is None) == (b is None), name
        if a is not None:
            close(a, b, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # float64: the test above
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5, 6), (2, 3, 40, 40), (64, 40, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_redistribute_within_the_error_budget(dtype, shape, training):
    x, weight, bias, mean, var = case(shape, dtype, seed=2)
    stats_in = mean.clone(), var.clone()
    z, *stats = forward("reference", x, weight, bias, mean, var, training=training)
    z = torch.where(z.abs() < 0.25, 0.25, z)  # 1/eps at a zero would drown everything else
    args = x, weight, bias, z, reward_for(x), *stats, training
    truth = oracle(*args[:5], *stats_in, training)
    for name, a, b, c in zip(
        ("input", "weight", "bias"), run("native", *args), run("reference", *args), truth
    ):
        assert_within_budget(a, b, c, name)


@pytest.mark.parametrize("rule", [cls() for cls in rules.REGISTRY.values()], ids=lambda r: r.name)
@pytest.mark.parametrize("training", [True, False])
def test_every_rule_is_the_same_on_both_backends(rule, training):
    x, weight, bias, mean, var = case((4, 5, 3, 3))
    z, *stats = forward("native", x, weight, bias, mean, var, training=training)
    args = x, weight, bias, z, reward_for(x), *stats, training, rule
    for got, want in zip(run("native", *args), run("reference", *args)):
        close(got, want, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_relu_output_serves_as_z(backend, training):
    x, weight, bias, mean, var = case((4, 3, 6, 6))
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    r = reward_for(x) * (z > 0)  # no reward reaches what the ReLU cut off
    full = run(backend, x, weight, bias, z, r, *stats, training)
    for got, want in zip(run(backend, x, weight, bias, z.relu(), r, *stats, training), full):
        close(got, want, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 7, 7)], ids=str)
def test_chain_forms(backend, training, shape):
    x, weight, bias, mean, var = case(shape)
    stats_in = mean.clone(), var.clone()
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    r = reward_for(x)
    s = r / stabilize(z, 1e-2)
    plain = run(backend, x, weight, bias, z, r, *stats, training, rules.Epsilon(1e-2))
    z = torch.full_like(z, math.nan)  # not looked at
    signal = run(backend, x, weight, bias, z, s, *stats, training, signal_in=True)
    for got, want in zip(signal, plain):
        close(got, want)
    options = {"below": rules.Epsilon(1e-3), "signal_in": True}
    got = run(backend, x, weight, bias, z, s, *stats, training, **options).input
    truth = oracle(
        x, weight, bias, z, s, *stats_in, training, below=1e-3, signal_in=True
    )[0]  # fmt: skip
    close(got, truth, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need", list(itertools.product([True, False], repeat=3)))
def test_masks(backend, training, need):
    x, weight, bias, mean, var = case((4, 3, 6, 6))
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    args = x, weight, bias, z, reward_for(x), *stats, training
    full, got = run(backend, *args), run(backend, *args, need=need)
    for want, have, wanted in zip(full, got, need):
        assert (have is not None) == wanted
        assert not wanted or torch.equal(have, want)
    only_weight = run(backend, x, weight, None, *args[3:])
    assert only_weight.bias is None and torch.equal(only_weight.weight, full.weight)
    only_bias = run(backend, x, None, bias, *args[3:])
    assert only_bias.weight is None and torch.equal(only_bias.bias, full.bias)


@pytest.mark.parametrize("training", [True, False])
def test_nan_stays_in_its_channel(training):
    x, weight, bias, mean, var = case((3, 4, 5, 5), torch.float32)
    x[1, 2, 0, 0] = math.nan
    z, *stats = forward("native", x, weight, bias, mean, var, training=training, relu=True)
    assert z[1, 2, 0, 0].isnan() and not z[:, [0, 1, 3]].isnan().any()
    got = run("native", x, weight, bias, z, reward_for(x), *stats, training)
    assert got.weight.isnan().tolist() == [False, False, True, False]
    assert got.input[1, 2, 0, 0].isnan() and not got.input[:, [0, 1, 3]].isnan().any()


# ---- memory


def layouts(x: Tensor) -> list[Tensor]:
    """x in other places of memory."""
    padded = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    reversed_axes = x.permute(*reversed(range(x.dim()))).contiguous()
    found = [padded, turned, reversed_axes.permute(*reversed(range(x.dim())))]
    if x.dim() == 4:
        found.append(x.contiguous(memory_format=torch.channels_last))
        spread = torch.zeros_like(x).repeat(1, 1, 2, 1).contiguous(memory_format=torch.channels_last)
        found.append(spread[:, :, ::2].copy_(x))
    if x.dim() == 5:
        found.append(x.contiguous(memory_format=torch.channels_last_3d))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 6), (3, 4, 6, 6), (3, 4, 2, 3, 4)], ids=str)
def test_layouts_of_memory(backend, training, shape):
    x0, weight, bias, mean, var = case(shape)
    r0 = reward_for(x0)
    for x in layouts(x0):
        stats_in = mean.clone(), var.clone()
        want, *_ = torch_forward(x, weight, bias, mean, var, training)
        z, *stats = forward(backend, x, weight, bias, *stats_in, training=training)
        close(z, want)
        dense = torch.empty_like(x).stride()
        assert z.stride() == dense
        truth = oracle(x, weight, bias, z, r0, mean, var, training)
        for r in (r0, *layouts(r0)):
            got = run(backend, x, weight, bias, z, r, *stats, training)
            assert got.input.stride() == dense
            for a, b in zip(got, truth):
                close(a, b, 1e-10)
    for got, want in zip(
        run(backend, x0, weight.repeat(2)[::2].copy_(weight), bias, z, r0, *stats, training),
        run(backend, x0, weight, bias, z, r0, *stats, training),
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3)], ids=str)
def test_empty(backend, training, shape):
    x, weight, bias, mean, var = case(shape)
    before = mean.clone(), var.clone()
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    assert z.shape == x.shape and torch.equal(mean, before[0]) and torch.equal(var, before[1])
    assert not stats[0].isnan().any() and not stats[1].isnan().any()
    got = run(backend, x, weight, bias, z, x, *stats, training)
    assert got.input.shape == x.shape
    assert got.weight.tolist() == got.bias.tolist() == [0] * shape[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [True, False])
def test_every_element_is_written_and_reruns_have_the_same_bits(dtype, last):
    x, weight, bias, mean, var = case((5, 9, 13, 11), dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    r, found = reward_for(x), []
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            with poisoned_empty():
                z, *stats = forward("native", x, weight, bias, mean.clone(), var.clone())
                found.append((z, *stats, *run("native", x, weight, bias, z, r, *stats, True)))
    finally:
        torch.set_num_threads(threads)
    for got in found[1:]:
        for a, b in zip(got, found[0]):
            assert torch.equal(a, b) and not a.isnan().any()


def test_offsets_beyond_32_bits():
    """Two samples 2^31 elements apart, on untouched pages."""
    stride = 2**31 + 64
    x, weight, bias, mean, var = case((2, 3, 4, 4), torch.bfloat16)
    far = torch.empty(stride + 48, dtype=x.dtype).as_strided(x.shape, (stride, 16, 4, 1)).copy_(x)
    for got, want in zip(
        forward("native", far, weight, bias, mean.clone(), var.clone()),
        forward("native", x, weight, bias, mean, var),
    ):
        assert torch.equal(got, want)


# ---- torch machinery


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training):
    x, weight, bias, mean, var = case((4, 3, 5, 5), torch.float32)
    quick = ("test_schema", "test_faketensor")  # the others trace through autograd: slow
    for k, each in enumerate((x, x.bfloat16(), layouts(x)[0], layouts(x)[2], layouts(x)[3])):
        z, *stats = forward("native", each, weight, bias, mean, var, training=training)
        for op, args in (
            (OPS.batch_norm_forward, (each, weight, bias, mean, var, training, 0.1, EPS, True)),
            (
                OPS.batch_norm_redistribute,
                (each, weight, bias, z, reward_for(each), *stats, training, 0, [1e-6, 1.0],
                 k != 1, True, k != 2, k % 4),
            ),
        ):  # fmt: skip
            if k == 0:
                torch.library.opcheck(op.default, args)
            else:
                torch.library.opcheck(op.default, args, test_utils=quick)


def test_compiles_without_graph_breaks():
    x, weight, bias, mean, var = case((4, 3, 5, 5), torch.float32)

    def layer(x, r, mean, var):
        z, *stats = F.batch_norm(x * 2, weight, bias, mean, var, True, 0.1, EPS, relu=True)
        return z, *F.batch_norm_redistribute(x * 2, weight, bias, z, r, *stats, True)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    twins = mean.clone(), var.clone()
    r = reward_for(x).abs()
    for got, want in zip(compiled(x, r, mean, var), layer(x, r, *twins)):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(mean, twins[0])  # updated once under the compiler, too


def test_no_graph_is_built():
    x, weight, bias, mean, var = case((4, 3, 5, 5))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    z, *stats = forward("native", *leaves, mean, var)
    assert not z.requires_grad
    got = run("native", *leaves, z, reward_for(x), *stats, True)
    assert not any(t.requires_grad for t in got)


# ---- errors


def test_errors_name_the_argument_and_leave_the_statistics_alone():
    x, weight, bias, mean, var = case((4, 3, 5, 5))
    before = mean.clone(), var.clone()

    def refused(error, match, **changes):
        names = ("x", "weight", "bias", "running_mean", "running_var")
        given = dict(zip(names, (x, weight, bias, mean, var)), training=True, momentum=0.1, eps=EPS)
        with pytest.raises(error, match=match):
            F.batch_norm(**(given | changes))

    refused(TypeError, "batch_norm: x: .*int64", x=x.long())
    refused(ValueError, r"batch_norm: x: .*\[N, C, \*\].*\(3,\)", x=torch.ones(3))
    refused(ValueError, r"weight: expected shape \(3,\), got \(4,\)", weight=torch.ones(4).double())
    refused(TypeError, "bias: expected torch.float64 like x.*float32", bias=bias.float())
    refused(ValueError, "running_mean: expected shape", running_mean=mean[:2])
    refused(ValueError, "running_var: expected a tensor, got None", running_var=None)
    refused(ValueError, "weight: expected device cpu.*meta", weight=weight.to("meta"))
    refused(TypeError, "momentum: expected a finite number, got None", momentum=None)
    refused(ValueError, "eps: expected a number >= 0", eps=-1.0)
    one = x[:1, :, :1, :1]
    refused(ValueError, r"more than 1 value per channel.*\(1, 3, 1, 1\)", x=one)
    F.batch_norm(one, weight, bias, mean, var, False, 0.1, EPS)  # no statistics of one value needed
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_redistribute_errors_name_the_argument():
    x, weight, bias, mean, var = case((4, 3, 5, 5))
    z, *stats = forward("native", x, weight, bias, mean, var)
    names = ("x", "weight", "bias", "z", "reward", "mean", "invstd", "training")
    given = dict(zip(names, (x, weight, bias, z, x, *stats, True)))

    def refused(error, match, **changes):
        with pytest.raises(error, match="batch_norm_redistribute: " + match):
            F.batch_norm_redistribute(**(given | changes))

    refused(ValueError, "reward: expected shape", reward=x[:2])
    refused(ValueError, "z: expected shape", z=z[:, :, 1:])
    refused(TypeError, "z: expected torch.float64 like x", z=z.float())
    refused(TypeError, "mean: expected a torch.Tensor, got NoneType", mean=None)
    refused(ValueError, "invstd: expected shape", invstd=stats[1][:2])
    refused(TypeError, "rule: expected one of", rule=1e-6)
