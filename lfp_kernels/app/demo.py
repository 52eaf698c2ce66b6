"""The demo: one network, trained by LFP and by gradient descent from the same initial weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, data, measure, methods, plots, report
from .train import Run, Settings, predict

LFP, SGD = "LFP", "gradient descent"
SGD_STEP, NESTED = "gradient descent, autograd", "LFP, nested autograd"
STEPS = {  # name in the table: method and way
    "LFP, fused": ("lfp", "fused"),
    "LFP, drop-in": ("lfp", "drop-in"),
    SGD_STEP: ("sgd", "fused"),
}
LAYERS_SHOWN = 6


def run(settings: Settings, out: Path, repeats: int = 40) -> report.Results:
    """Train both ways, measure, print, and write ``out``/report.html and its figures."""
    plots.require()
    checkpoint.check_writable(out / "report.html")
    digits = data.load(settings.data)
    settings = replace(settings, method="lfp", way="fused")
    lfp, sgd = Run(settings, digits), Run(replace(settings, method="sgd"), digits)
    initial = copy.deepcopy(lfp.model)
    print(
        f"{settings.model}: {sum(p.numel() for p in initial.parameters()):,} parameters; "
        f"{digits.name}: {len(digits.train_y):,} training and {len(digits.test_y):,} test images; "
        f"{torch.get_num_threads()} threads",
        flush=True,
    )
    lfp.train()
    sgd.train()
    print("timing the steps ...", flush=True)
    results = report.Results(
        settings,
        digits,
        histories={LFP: lfp.history, SGD: sgd.history},
        costs=_costs(settings, initial, digits, repeats),
        baseline=SGD_STEP,
        parameters=sum(p.numel() for p in initial.parameters()),
        repeats=repeats,
    )
    figures = _figures(out, results, initial, {LFP: lfp.model, SGD: sgd.model})
    page = report.write(out, results, figures)
    print(report.summary(results))
    print(f"report: {page}")
    return results


def _costs(
    settings: Settings, initial: nn.Module, digits: data.Dataset, repeats: int
) -> dict[str, measure.Cost]:
    """The steps as they train: one batch, momentum, norm limit."""
    x, y = digits.train_x[: settings.batch_size], digits.train_y[: settings.batch_size]
    options: dict[str, Any] = dict(
        lr=settings.lr / 100,  # the time does not depend on it, and the weights stay reasonable
        momentum=settings.momentum,
        clip=settings.clip or None,
        eps=settings.eps,
    )
    steps = {}
    for name, (method, way) in STEPS.items():
        steps[name] = methods.learner(copy.deepcopy(initial).train(), method, way, **options).step
    steps[NESTED] = methods.nested(copy.deepcopy(initial).train(), **options).step
    return measure.costs(steps, x, y, repeats)


def examples(digits: data.Dataset, model: nn.Module) -> tuple[Tensor, Tensor]:
    """For each of ten classes, the first test image that ``model`` gets right (or the first)."""
    right = predict(model, digits.test_x) == digits.test_y
    rows = []
    for label in digits.test_y.unique()[:10]:
        of_label = digits.test_y == label
        rows.append(int((of_label.int() * 2 + (of_label & right).int()).argmax()))
    return digits.test_x[rows], digits.test_y[rows]


def _figures(
    out: Path, results: report.Results, initial: nn.Module, trained: dict[str, nn.Module]
) -> report.Figures:
    settings, digits = results.settings, results.data
    curves = []
    for y, label in (("accuracy", "test accuracy"), ("reward", "reward handed out per image")):
        for x, over in (("epoch", "epoch"), ("seconds", "seconds of training")):
            curves.append(out / f"{y}_by_{x}.png")
            plots.curves(curves[-1], results.histories, (x, over), (y, label))

    images, labels = examples(digits, trained[LFP])
    maps = {
        name: measure.relevance(model, images, labels)
        for name, model in zip(("LFP", "SGD"), trained.values())
    }
    heatmaps = []
    for part, rows in enumerate(torch.arange(len(labels)).split(5), 1):
        heatmaps.append(out / f"heatmaps_{part}.png")
        names = [str(int(label)) for label in labels[rows]]
        here = {name: values[rows] for name, values in maps.items()}
        plots.heatmaps(heatmaps[-1], digits.pixels(images[rows]), names, here)

    batch = digits.train_x[: report.HISTOGRAM_IMAGES], digits.train_y[: report.HISTOGRAM_IMAGES]
    before, after = (
        measure.weight_rewards(model, *batch, settings.eps) for model in (initial, trained[LFP])
    )
    histograms = []
    for name in _spread(list(before)):
        histograms.append(out / f"rewards_{name.replace('.', '_')}.png")
        plots.histogram(histograms[-1], name, before[name], after[name])
    return report.Figures(curves, heatmaps, histograms)


def _spread(names: list[str]) -> list[str]:
    """At most six layers, from the first to the last."""
    if len(names) <= LAYERS_SHOWN:
        return names
    last = len(names) - 1
    return [names[round(i * last / (LAYERS_SHOWN - 1))] for i in range(LAYERS_SHOWN)]
