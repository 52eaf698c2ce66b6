"""Layer, RMS and group norms and softmax: every backend against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.testing import assert_within_budget, poisoned_empty

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("native", "reference")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_identity = pytest.mark.parametrize("identity", [False, True], ids=["whole", "attnlrp"])
SETTINGS = {"eps": 0.3, "stabilizer": 0.5}


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64)


def stab(z, eps):
    return torch.where(z < 0, z - eps, z + eps)


def check(function, tensors, dtype, truth, **options):
    """All backends within the budget around the truth; the same bits twice; nothing left out."""
    given = [None if t is None else t.to(dtype) for t in tensors]
    found = {}
    for backend in BACKENDS:
        with use_backend(backend), poisoned_empty():
            found[backend] = function(*given, **options)
    again = function(*given, **options)
    expected = truth(*(None if t is None else t.double() for t in given))
    if isinstance(again, torch.Tensor):
        found, again, expected = {k: [v] for k, v in found.items()}, [again], [expected]
    for k, want in enumerate(expected):
        if want is None:
            assert found["native"][k] is None
            continue
        assert torch.equal(again[k], found["native"][k])
        for backend in BACKENDS:
            a = found[backend][k]
            if dtype == torch.float64:
                torch.testing.assert_close(a, want, rtol=1e-9, atol=1e-9)
            else:
                assert_within_budget(a, found["reference"][k], want, f"{backend} {k}")


def norm_truth(options, groups=None):
    """Relevance from the definition: the derivative of z, or AttnLRP's formula, in float64."""

    def truth(x, weight, bias, reward):
        if x.numel() == 0:
            return x, *(None if p is None else torch.zeros_like(p) for p in (weight, bias))
        x = x.detach().requires_grad_()
        parameters = [p.detach().requires_grad_() for p in (weight, bias) if p is not None]
        given = iter(parameters)
        w, b = (None if p is None else next(given) for p in (weight, bias))
        rows = x if groups is None else x.reshape(len(x) * groups, -1)
        axes = (
            tuple(range(x.dim() - weight.dim(), x.dim()))
            if groups is None and w is not None
            else -1
        )
        shifted = rows - rows.mean(axes, keepdim=True) if options.get("centred", True) else rows
        deviation = (shifted.square().mean(axes, keepdim=True) + options["eps"]).sqrt()
        if options["identity"]:
            deviation = deviation.detach()
        z = (shifted / deviation).view(x.shape)
        if groups is not None:
            w, b = (None if p is None else p.view(-1, *[1] * (x.dim() - 2)) for p in (w, b))
        z = z if w is None else z * w
        z = z if b is None else z + b
        s = reward / stab(z.detach(), options["stabilizer"])
        of_x, *of_parameters = torch.autograd.grad(z, [x, *parameters], s)
        found = x.detach() * of_x
        if options["identity"] and not options.get("centred", True) and bias is None:
            found = reward
        left = iter([p.detach().abs() * g for p, g in zip(parameters, of_parameters)])
        return found, *(None if p is None else next(left) for p in (weight, bias))

    return truth


# Rows that a warp, a block and a loop of blocks have; widths that fill 16 bytes and do not.
ROWS = [
    (1, 1), (3, 16), (5, 31), (70, 64), (7, 520), (6, 517), (33, 1032), (3, 4104), (19, 4099),
    (0, 4), (5, 0), (600, 8),
]  # fmt: skip


@by_dtype
@by_identity
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(shape, centred, identity, dtype):
    options = {"centred": centred, "identity": identity, **SETTINGS}
    tensors = [rand(*shape), rand(shape[1]), rand(shape[1], seed=1), rand(*shape, seed=2)]
    parameters = {  # not every combination for every shape: which ones, the shape decides
        0: (True, True), 1: (True, False), 2: (False, False), 3: (False, True),
    }  # fmt: skip
    for kept in (parameters[0], parameters[sum(shape) % 3 + 1]):
        weight, bias = (t if keep else None for t, keep in zip(tensors[1:3], kept))
        call = [tensors[0], weight, bias, tensors[3]]
        check(F.norm_redistribute, call, dtype, norm_truth(options), **options)


# N, C, then what a channel has; groups
PLANES = {
    "plain": ((3, 4, 5, 2), 2), "one element": ((5, 6), 3), "one group": ((2, 8, 7), 1),
    "instance": ((2, 4, 33), 4), "batch": ((40, 6, 4, 4), 2), "large": ((2, 8, 600), 2),
    "no batch": ((0, 4, 3), 2), "no plane": ((2, 4, 0), 2), "single": ((1, 1, 1), 1),
    "3d": ((2, 4, 3, 2, 8), 2), "many": ((3, 64, 8), 4),
}  # fmt: skip


@by_dtype
@by_identity
@pytest.mark.parametrize("name", PLANES)
def test_groups(name, identity, dtype):
    shape, groups = PLANES[name]
    options = {"identity": identity, **SETTINGS}
    tensors = [rand(*shape), rand(shape[1]), rand(shape[1], seed=1), rand(*shape, seed=2)]
    for kept in ((True, True), (False, False), (True, False)):
        weight, bias = (t if keep else None for t, keep in zip(tensors[1:3], kept))
        call = [tensors[0], weight, bias, tensors[3]]
        truth = norm_truth(options, groups)
        check(F.norm_redistribute, call, dtype, truth, groups=groups, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@by_identity
def test_not_contiguous(identity, backend):
    options = {"identity": identity, **SETTINGS}
    x, r, weight, bias = rand(3, 4, 5, 6), rand(3, 4, 5, 6, seed=1), rand(6), rand(6, seed=3)
    channel = [rand(4), rand(4, seed=5)]
    moved = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, r)]
    wide = [t.repeat_interleave(2)[::2] for t in (weight, bias, *channel)]
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, r)]
    with use_backend(backend):
        found = F.norm_redistribute(moved[0], wide[0], wide[1], moved[1], **options)
        plane = F.norm_redistribute(last[0], *wide[2:], last[1], groups=2, **options)
        soft = F.softmax_redistribute(moved[0], last[0].softmax(2), r, 2)
    for a, b in zip(found, norm_truth(options)(x, weight, bias, r)):
        torch.testing.assert_close(a, b)
    for a, b in zip(plane, norm_truth(options, 2)(x, *channel, r)):
        torch.testing.assert_close(a, b)
    p = x.softmax(2)
    torch.testing.assert_close(soft, x * (r - p * r.sum(2, keepdim=True)))


def test_several_dimensions_and_modules():
    """A weight of several dimensions; what torch's modules compute is what is explained."""
    torch.manual_seed(0)
    layer, group = nn.LayerNorm((5, 6)).double(), nn.GroupNorm(2, 4).double()
    for module, options, shape in (
        (layer, {}, (3, 5, 6)), (group, {"groups": 2}, (3, 4, 5, 2))
    ):  # fmt: skip
        for p in module.parameters():
            nn.init.normal_(p)
        x, r = rand(*shape).requires_grad_(), rand(*shape, seed=1)
        z = module(x)
        parameters = [module.weight, module.bias]
        expected = torch.autograd.grad(z, [x, *parameters], r / stab(z.detach(), 1e-3))
        found = F.norm_redistribute(
            x.detach(), *parameters, r, eps=module.eps, stabilizer=1e-3, **options
        )
        for a, b, c in zip(found, [x, *parameters], expected):
            torch.testing.assert_close(
                a, b.detach().abs() * c if a is not found[0] else b.detach() * c
            )


@by_dtype
@pytest.mark.parametrize("kind", ["layer", "group"])
def test_large_means_do_not_cancel(kind, dtype):
    """The mean is far from 0 and the deviation small: two passes over a row, not one."""
    options = {"identity": False, **SETTINGS}
    shape, groups, weight = ((8, 96), None, 96) if kind == "layer" else ((8, 4, 24), 2, 4)
    x = rand(*shape) + 30
    call = [x, rand(weight), rand(weight, seed=1), rand(*shape, seed=2)]
    check(F.norm_redistribute, call, dtype, norm_truth(options, groups), groups=groups, **options)


@pytest.mark.host
def test_same_bits_for_any_number_of_threads():
    threads, found = torch.get_num_threads(), []
    x, r = rand(999, 130).float(), rand(999, 130, seed=1).float()
    plane = [t[:990].reshape(99, 10, 130) for t in (x, r)]
    weight = torch.ones(10)
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            found.append([
                *F.norm_redistribute(x, x[0], x[1], r),
                *F.norm_redistribute(plane[0], weight, weight, plane[1], groups=5),
                F.softmax_redistribute(x, x.softmax(1), r),
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


# ---- softmax

SOFTMAX = [
    ((1,), 0), ((), -1), ((3, 5, 7), 1), ((2, 3, 4, 5), -1), ((9, 16), 1), ((5, 515), 1),
    ((3, 1040), -1), ((2, 4112), 1), ((3, 4101), 1), ((0, 5), 1), ((5, 0), 1), ((40, 33), 0),
]  # fmt: skip


@by_dtype
@pytest.mark.parametrize("shape, dim", SOFTMAX, ids=str)
def test_softmax(shape, dim, dtype):
    x, reward = 2 * rand(*shape), rand(*shape, seed=1)
    if x.numel() > 3:
        x.view(-1)[1] = -math.inf
        x.view(-1)[-1] = -math.inf

    def truth(x, p, reward):
        found = x * (reward - p * reward.sum(dim, keepdim=True))
        return torch.where(x.isinf(), 0.0, found)

    check(lambda *t: F.softmax_redistribute(*t, dim), [x, x.softmax(dim), reward], dtype, truth)


# ---- arguments


@pytest.mark.operators
def test_opcheck():
    ops = torch.ops.lfp_kernels
    x, weight = torch.randn(5, 7), torch.randn(7)
    call = (x, weight, None, x, True, 1e-5, 1e-6, False)
    torch.library.opcheck(ops.norm_redistribute, call)
    planes, of = torch.randn(3, 4, 5), torch.randn(4)
    for bias in (of, None):
        call = (planes, of, bias, planes, 2, 1e-5, 1e-6, True)
        torch.library.opcheck(ops.group_norm_redistribute, call)
    torch.library.opcheck(ops.softmax_redistribute, (x, x.softmax(1), x))


ERRORS = {
    "x: expected float64": (TypeError, lambda x, w: F.norm_redistribute(x.long(), w, w, x)),
    "reward: expected torch": (TypeError, lambda x, w: F.norm_redistribute(x, w, w, x.double())),
    "reward: expected shape": (ValueError, lambda x, w: F.norm_redistribute(x, w, w, x[:2])),
    "weight: expected torch": (TypeError, lambda x, w: F.norm_redistribute(x, w.double(), w, x)),
    "bias: expected shape": (ValueError, lambda x, w: F.norm_redistribute(x, w, w[:2], x)),
    "x: expected shape": (ValueError, lambda x, w: F.norm_redistribute(x, w[:2], w[:2], x)),
    "groups: expected a divisor of the 6 channels of x, got 4": (
        ValueError, lambda x, w: F.norm_redistribute(x, w, w, x, groups=4)
    ),
    "groups: expected a divisor of the 6 channels of x, got 0": (
        ValueError, lambda x, w: F.norm_redistribute(x, w, w, x, groups=0)
    ),
    "centred: expected True": (
        ValueError, lambda x, w: F.norm_redistribute(x, w, w, x, groups=2, centred=False)
    ),
    "weight and bias: expected shape": (
        ValueError, lambda x, w: F.norm_redistribute(x, w[:3], w[:3], x, groups=2)
    ),
    r"x: expected shape \[N, C, ...\]": (
        ValueError, lambda x, w: F.norm_redistribute(w, w, w, w, groups=2)
    ),
    "p: expected shape": (ValueError, lambda x, w: F.softmax_redistribute(x, w, x)),
    "p: expected torch": (TypeError, lambda x, w: F.softmax_redistribute(x, x.double(), x)),
    "dim: expected one of 2": (ValueError, lambda x, w: F.softmax_redistribute(x, x, x, 2)),
}  # fmt: skip


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text):
    kind, call = ERRORS[text]
    with pytest.raises(kind, match=f"redistribute: {text}"):
        call(torch.randn(4, 6), torch.randn(6))
