"""Step, the activation that no gradient passes, and the module of a residual sum."""

from __future__ import annotations

import math

import pytest
import torch

from lfp_kernels import functional as F
from lfp_kernels import nn, use_backend
from lfp_kernels.testing import poisoned_empty


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_step_activation(backend, dtype):
    tiny = torch.finfo(dtype).tiny
    values = [-1.0, -tiny, -0.0, 0.0, tiny, 1.0, math.inf, -math.inf, math.nan]
    x = torch.tensor(values, dtype=dtype).repeat(3, 1)
    with use_backend(backend), poisoned_empty():
        got = nn.Step()(x.requires_grad_())
        assert not got.requires_grad and got.dtype == dtype
        assert got.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 0]] * 3
        assert F.step(torch.ones((), dtype=dtype)) == 1
        assert F.step(x[:0]).shape == (0, 9)
        for view in (x.t(), x[:, ::2], x[:1].expand(5, 9), x[None, None, 1:, 2:]):
            y = F.step(view)
            assert torch.equal(y, (view > 0).to(dtype))
            assert y.stride() == torch.empty_like(view).stride()
        for long in (torch.randn(5000).to(dtype), torch.randn(70, 80).to(dtype).t()):
            assert torch.equal(F.step(long), (long > 0).to(dtype))
        image = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)
        assert F.step(image).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(F.step(image), (image > 0).to(dtype))


@pytest.mark.operators
def test_step_opcheck():
    torch.library.opcheck(torch.ops.lfp_kernels.step.default, (torch.randn(4, 3).t(),))


def test_step_errors():
    with pytest.raises(TypeError, match="step: x: .*int64"):
        F.step(torch.ones(3).long())


def test_sum_module():
    assert torch.equal(nn.Sum()(torch.ones(2), torch.tensor([1.0, 2.0])), torch.tensor([2.0, 3.0]))
