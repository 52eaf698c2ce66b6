"""What the rewards refuse, and how they say it."""

from __future__ import annotations

import math

import pytest
import torch

from lfp_kernels import rewards


def error_cases():
    out, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    yield rewards.softmax, (out, torch.tensor([0, 1, 3, 0])), ValueError, r"y: .*\[0, 3\), got 3"
    yield rewards.softmax, (out, torch.tensor([0, -7, 2, 0])), ValueError, r"y: .*\[0, 3\), got -7"
    yield rewards.softmax, (out, y[:3]), ValueError, r"y: expected shape \(4,\), got \(3,\)"
    yield rewards.softmax, (out, y.float()), TypeError, "y: .*integer.*float32.*long"
    yield rewards.softmax, (out, y.bool()), TypeError, "y: .*integer.*bool"
    yield rewards.softmax, (out, [0, 1]), TypeError, "y: expected a torch.Tensor, got list"
    yield rewards.softmax, (out, None), TypeError, "y: expected a torch.Tensor"
    yield rewards.softmax, (out.long(), y), TypeError, "out: .*int64"
    yield rewards.softmax, (out[0, 0], y), ValueError, r"out: expected shape \[N, C\]"
    yield rewards.softmax, (out, y.to("meta")), ValueError, "y: expected device cpu"
    yield rewards.sigmoid, (out, y + 3), ValueError, "y: .*got 5"
    yield rewards.bounded_softmax, (out, y, 0.6, 0.1), ValueError, "low, high: .*0.6 and 0.1"
    yield rewards.bounded_softmax, (out, y, -0.1, 0.5), ValueError, "low, high"
    yield rewards.bounded_softmax, (out, y, 0.1, math.nan), ValueError, "low, high"
    yield rewards.binary_sigmoid, (out, y), ValueError, r"y: expected shape \(4, 3\), got \(4,\)"
    yield rewards.binary_sigmoid, (out[:, :1], y[:3]), ValueError, r"y: .*\(4, 1\) or \(4,\)"
    yield rewards.regression, (out, None), TypeError, "y: expected a torch.Tensor"
    yield rewards.snn_rate, (out[0], y), ValueError, r"spikes: expected shape \[T, N, C\]"
    yield rewards.snn_rate, (out[None], y + 1), ValueError, "y: .*got 3"
    yield rewards.snn_rate, (out[None].long(), y), TypeError, "spikes: .*int64"


@pytest.mark.parametrize("function, arguments, kind, text", list(error_cases()))
def test_errors_name_function_argument_and_value(function, arguments, kind, text):
    with pytest.raises(kind, match=rf"rewards\.{function.__name__}: {text}"):
        function(*arguments)


@pytest.mark.parametrize("function", [rewards.maximize, rewards.minimize])
def test_neuron_must_exist(function):
    out = torch.randn(4, 3)
    for bad in (3, -1):
        with pytest.raises(ValueError, match=rf"neuron: .*\[0, 3\), got {bad}"):
            function(out, neuron=bad)
    for bad in (1.0, True, "1"):
        with pytest.raises(TypeError, match="neuron: expected an int or None"):
            function(out, neuron=bad)
