"""Calls of transformers, in the forms that models write them: what each hands on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from test_transformer import EPS, close, feedback, rand, stab
from torch import nn

from lfp_kernels import composites

MODES = pytest.mark.parametrize("mode", ["attnlrp", "plain"])


class Calls(nn.Module):
    """A function of two linear layers' outputs; ``w`` and ``table`` are parameters of both signs."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.w, self.table = nn.Parameter(rand(6)), nn.Parameter(rand(1, 9, 6))
        self.function = function

    def forward(self, x):
        return self.function(self, self.a(x), self.b(x))


def found_of(function, **options):
    composite = composites.Transformer(eps=EPS, **options)
    return feedback(Calls(function).double(), composite, rand(2, 4, 6))


def expected_of_layer(layer, r):
    """LFP-epsilon of a layer without bias whose output got the reward r."""
    x = rand(2, 4, 6)
    weight = layer.weight.detach()
    return weight.abs() * torch.einsum("nto,nti->oi", r / stab(x @ weight.T), x)


@pytest.mark.parametrize("norms", ["attnlrp", "epsilon"])
def test_rms_norm_without_weight_covers_all_its_dimensions(norms):
    found = found_of(lambda m, a, b: TF.rms_norm(a, (4, 6), eps=1e-3), norms=norms)
    weight = torch.ones(4, 6, dtype=torch.float64)
    expected = found_of(lambda m, a, b: TF.rms_norm(a, (4, 6), weight, eps=1e-3), norms=norms)
    close(found, expected)


def in_place(a, b):
    a += b
    return a.add_(b)


@MODES
def test_gradient_sums_in_place_are_those_out_of_place(mode):
    options = {"mode": mode, "residual": "gradient"}
    found = found_of(lambda m, a, b: in_place(a, b), **options)
    close(found, found_of(lambda m, a, b: a + b + b, **options))
    model = Calls(None).double()
    torch.testing.assert_close(found["a.weight"], expected_of_layer(model.a, rand(2, 4, 6, seed=3)))
    found = found_of(lambda m, a, b: torch.zeros_like(a).add_(a, alpha=2) + b, **options)
    close(found, found_of(lambda m, a, b: torch.add(b, a, alpha=2), **options))
    with pytest.raises(ValueError, match="on a view"):
        found_of(lambda m, a, b: a[:, :1].add_(b[:, :1]), **options)


@MODES
def test_learned_masks_are_refused_by_name(mode):
    def attend(m, a, b):
        return TF.scaled_dot_product_attention(a, b, b, attn_mask=m.table[:, :4, :4])

    with pytest.raises(ValueError, match="scaled_dot_product_attention: attn_mask: .*requires_grad"):
        found_of(attend, mode=mode)
    layer = nn.MultiheadAttention(6, 2, batch_first=True).double()
    for name in ("attn_mask", "key_padding_mask"):
        mask = nn.Parameter(rand(4, 4) if name == "attn_mask" else rand(2, 4))
        call = {"need_weights": False, name: mask}
        with pytest.raises(ValueError, match=f"multi_head_attention: {name}: .*requires_grad"):
            found_of(lambda m, a, b, call=call: layer(a, b, b, **call)[0], mode=mode)
        call[name] = mask.detach()
        assert found_of(lambda m, a, b, call=call: layer(a, b, b, **call)[0], mode=mode)


@MODES
def test_dtype_of_softmax_by_position(mode):
    model = Calls(lambda m, a, b: torch.softmax(a.float(), -1, torch.float64))
    with composites.Transformer(mode).context(model.double()):
        assert model(rand(2, 4, 6)).dtype == torch.float64
    found = found_of(lambda m, a, b: torch.softmax(a.float(), -1, torch.float64), mode=mode)
    close(found, found_of(lambda m, a, b: a.float().softmax(-1, dtype=torch.float64), mode=mode))
