"""The spiking demo: LFP beside surrogate gradients and beside backpropagation through the step."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.nn import LIF, Spiking

from . import checkpoint, data, demo, measure, methods, plots, report, spiking_report
from .spiking_plots import Rows, Trace, membranes, raster
from .train import Run, Settings

LFP, SURROGATE, STEP = "LFP", "surrogate gradient", "backprop, step function"
WAYS = {  # name: method and derivative of a spike
    LFP: ("lfp", Settings.surrogate),
    SURROGATE: ("sgd", Settings.surrogate),
    STEP: ("sgd", "none"),
}
BASELINE = "surrogate gradient, autograd"
COSTS = {  # name in the table: method and way
    "LFP, fused": ("lfp", "fused"),
    "LFP, drop-in": ("lfp", "drop-in"),
    BASELINE: ("sgd", "fused"),
}
RASTERS, TRACED = 4, 2  # digits shown
HIDDEN_ROWS = 36  # over all hidden layers


class Recorded(NamedTuple):
    """A layer of neurons: membranes and spikes [T, N, K] with the neurons flattened."""

    name: str
    membrane: Tensor
    spikes: Tensor
    threshold: float


def run(settings: Settings, out: Path, repeats: int = 40) -> report.Results:
    """Train all three, measure, print, and write ``out``/report.html and its figures."""
    plots.require()
    checkpoint.check_writable(out / "report.html")
    digits = data.load(settings.data)
    settings = replace(settings, method="lfp", way="fused", surrogate=Settings.surrogate)
    runs = {}
    for name, (method, surrogate) in WAYS.items():
        chunk = settings.chunk if method == "lfp" else 0
        changed = replace(settings, method=method, surrogate=surrogate, chunk=chunk)
        runs[name] = Run(changed, digits)
    nets = {name: cast(Spiking, trained.model) for name, trained in runs.items()}
    initial = copy.deepcopy(nets[LFP])
    parameters = sum(p.numel() for p in initial.parameters())
    print(
        f"{settings.model}: {parameters:,} parameters, {initial.steps} time steps; "
        f"{digits.name}: {len(digits.train_y):,} training and {len(digits.test_y):,} test images; "
        f"{torch.get_num_threads()} threads",
        flush=True,
    )
    for trained in runs.values():
        trained.train()
    print("timing the steps ...", flush=True)
    results = report.Results(
        settings,
        digits,
        histories={name: trained.history for name, trained in runs.items()},
        costs=_costs(settings, initial, digits, repeats),
        baseline=BASELINE,
        parameters=parameters,
        repeats=repeats,
    )
    figures = _figures(out, results, nets)
    density = {
        layer.name: float(layer.spikes.mean()) for layer in record(nets[LFP], digits.test_x[:200])
    }
    page = spiking_report.write(out, results, figures, nets[LFP], density)
    print(report.summary(results))
    print(f"report: {page}")
    return results


def _costs(
    settings: Settings, initial: nn.Module, digits: data.Dataset, repeats: int
) -> dict[str, measure.Cost]:
    """The steps as they train: one batch, momentum, norm limit."""
    x, y = digits.train_x[: settings.batch_size], digits.train_y[: settings.batch_size]
    options: dict[str, Any] = dict(
        lr=settings.lr / 100,  # the neurons are to go on firing as they do at the beginning
        momentum=settings.momentum,
        clip=settings.clip or None,
        eps=settings.eps,
    )
    steps = {}
    for name, (method, way) in COSTS.items():
        model = copy.deepcopy(initial).train()
        steps[name] = methods.learner(model, method, way, **options).step
    return measure.costs(steps, x, y, repeats)


@torch.no_grad()
def record(net: Spiking, x: Tensor) -> list[Recorded]:
    """What every layer of neurons does for the static input ``x`` [N, ...], without noise."""
    steps, _ = net.time(x)
    batch, static = len(x), True
    found: list[Recorded] = []
    for _, layer in net.layers():
        if isinstance(layer, LIF):
            current = x if static else x.unflatten(0, (steps, batch))
            result = layer.scan(current, steps=steps if static else None)
            spikes = result.spikes.unpack(x.dtype)
            x, static = spikes.flatten(0, 1), False
            assert result.membrane is not None
            number = len(found) + 1
            found.append(
                Recorded(
                    f"hidden layer {number}",
                    result.membrane.flatten(2),
                    spikes.flatten(2),
                    float(layer.threshold.mean()),
                )
            )
        else:
            x = layer(x)
    if len(found) == 2:
        found[0] = found[0]._replace(name="hidden layer")
    return [*found[:-1], found[-1]._replace(name="output")]


def relevance(net: Spiking, x: Tensor, y: Tensor, eps: float = measure.HEATMAP_EPS) -> Tensor:
    """Relevance of each pixel for class y [N, H, W]: the reward that arrives at it when each spike
    of the true class is rewarded with one, summed over time and colour channels."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    x = x.clone().requires_grad_()
    with lfp_kernels.composites.Epsilon(eps=eps).context(net):
        out = net(x)
        chosen = nn.functional.one_hot(y, out.shape[-1]).to(out.dtype)
        lfp_kernels.backward(out, out.detach() * chosen)
    assert x.grad is not None
    return -x.grad.sum(1)


def _figures(
    out: Path, results: report.Results, nets: dict[str, Spiking]
) -> spiking_report.Figures:
    digits = results.data
    curves = []
    for x, over in (("epoch", "epoch"), ("seconds", "seconds of training")):
        curves.append(out / f"accuracy_by_{x}.png")
        plots.curves(curves[-1], results.histories, (x, over), ("accuracy", "test accuracy"))

    images, labels = demo.examples(digits, nets[LFP])
    layers = record(nets[LFP], images)
    pixels = digits.pixels(images)
    chosen = [_lively(layer, HIDDEN_ROWS // (len(layers) - 1)) for layer in layers[:-1]]
    answers = layers[-1].spikes.sum(0).argmax(1)
    rasters, traces = [], []
    for column in _spread(len(labels), RASTERS):
        label = int(labels[column])
        rows = [Rows(r.name, r.spikes[:, column, k]) for r, k in zip(layers, chosen)]
        rows.append(Rows("output", layers[-1].spikes[:, column]))
        rasters.append(out / f"raster_{label}.png")
        title = f"{label}, answer {int(answers[column])}"
        raster(rasters[-1], pixels[column], title, rows, label)
    for column in _spread(len(labels), TRACED):
        label = int(labels[column])
        traces.append(out / f"membranes_{label}.png")
        membranes(traces[-1], f"Test image of class {label}", _traces(layers, column, label))

    maps = {
        "LFP": relevance(nets[LFP], images, labels),
        "surrogate": relevance(nets[SURROGATE], images, labels),
    }
    heatmaps = []
    for part, rows_shown in enumerate(torch.arange(len(labels)).split(5), 1):
        heatmaps.append(out / f"heatmaps_{part}.png")
        names = [str(int(label)) for label in labels[rows_shown]]
        here = {name: values[rows_shown] for name, values in maps.items()}
        plots.heatmaps(heatmaps[-1], pixels[rows_shown], names, here)
    return spiking_report.Figures(curves, rasters, traces, heatmaps)


def _spread(count: int, shown: int) -> list[int]:
    """``shown`` of ``count`` indices, evenly."""
    return sorted({round(k * (count - 1) / max(1, shown - 1)) for k in range(shown)})


def _lively(layer: Recorded, count: int) -> Tensor:
    """Indices of ``count`` neurons, evenly spaced among those that fire for some of the images."""
    fires = (layer.spikes.sum((0, 1)) > 0).nonzero().flatten()
    if not len(fires):
        fires = torch.arange(layer.spikes.shape[2])
    return fires[torch.linspace(0, len(fires) - 1, min(count, len(fires))).round().long()]


def _traces(layers: list[Recorded], column: int, label: int) -> list[Trace]:
    """Output neurons of the true class and of the best other one; two hidden neurons."""
    *_, hidden, output = layers
    counts = output.spikes[:, column].sum(0)
    others = counts.clone()
    others[label] = -1
    second = int(others.argmax())
    fired = hidden.spikes[:, column].sum(0)
    ranked = (fired - len(hidden.spikes) / 2).abs().argsort(stable=True)
    wanted = [
        (output, label, f"output {label}"),
        (output, second, f"output {second}"),
        *((hidden, int(k), f"{hidden.name}, neuron {int(k)}") for k in ranked[:2]),
    ]
    return [
        Trace(name, layer.membrane[:, column, k], layer.spikes[:, column, k], layer.threshold)
        for layer, k, name in wanted
    ]
