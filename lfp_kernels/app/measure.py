"""Step times, peak memory, relevance heatmaps and weight rewards of a model."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lfp_kernels

# Larger than in training: heatmaps are to be read, and a small one lets weak neurons flicker
HEATMAP_EPS = 0.25

Step = Callable[[Tensor, Tensor], Tensor]


class Cost(NamedTuple):
    """Median time of a step in seconds, its quartiles, and the peak of its tensors in bytes."""

    seconds: float
    low: float
    high: float
    memory: int | None


def costs(
    steps: dict[str, Step], x: Tensor, y: Tensor, repeats: int = 40, warmup: int = 3
) -> dict[str, Cost]:
    """Time each step ``repeats`` times, interleaved so that a busy moment meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warmup + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x, y)
            if repeat >= warmup:
                times[name].append(time.perf_counter() - start)
    result = {}
    for name, step in steps.items():
        low, middle, high = statistics.quantiles(times[name], n=4)
        result[name] = Cost(middle, low, high, peak_memory(step, x, y))
    return result


def peak_memory(step: Step, x: Tensor, y: Tensor) -> int | None:
    """Peak bytes of the tensors that ``step`` allocates, or None when the profiler is missing.

    Parameters, optimizer state and inputs, which exist before, do not count.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        try:
            with _no_stderr():  # the profiler reports its starts and stops there
                with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                    step(x, y)
                profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        except (RuntimeError, OSError, KeyError, ValueError):
            return None
    memory = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def relevance(model: nn.Module, x: Tensor, y: Tensor, eps: float = HEATMAP_EPS) -> Tensor:
    """Relevance of each pixel for class y [N, H, W]: the input reward when only the logit of y is
    rewarded, with its own value (LRP-epsilon), summed over colour channels."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    x = x.clone().requires_grad_()
    with lfp_kernels.composites.Epsilon(eps=eps).context(model):
        out = model(x)
        chosen = nn.functional.one_hot(y, out.shape[1]).to(out.dtype)
        lfp_kernels.backward(out, out.detach() * chosen)
    assert x.grad is not None
    return -x.grad.sum(1)


def weight_rewards(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    """Feedback of every weight with two or more dimensions, summed over the images x; the model
    stays as it is."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    with lfp_kernels.composites.Epsilon(eps=eps).context(model):
        for part, labels in zip(x.split(128), y.split(128)):
            out = model(part)
            lfp_kernels.backward(out, lfp_kernels.rewards.softmax(out, labels))
    return {
        name: -parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.dim() > 1
    }
