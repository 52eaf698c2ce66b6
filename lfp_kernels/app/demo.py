"""The demo: one network, trained by LFP and by gradient descent from the same initial weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, data, measure, methods, models, plots, report
from .train import Run, Settings

LFP, SGD = "LFP", "gradient descent"
SGD_STEP = "gradient descent, autograd"
STEPS = {  # name in the table: method and way
    "LFP, fused": ("lfp", "fused"),
    "LFP, drop-in": ("lfp", "drop-in"),
    SGD_STEP: ("sgd", "fused"),
}
HISTOGRAM_IMAGES = 512
# Larger than in training: heatmaps are to be read, and a small one lets weak neurons flicker
HEATMAP_EPS = 0.25
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
    options = dict(
        lr=settings.lr / 100,  # the time does not depend on it, and the weights stay reasonable
        momentum=settings.momentum,
        clip=settings.clip or None,
        eps=settings.eps,
    )
    steps = {}
    for name, (method, way) in STEPS.items():
        steps[name] = methods.learner(copy.deepcopy(initial).train(), method, way, **options).step
    return measure.costs(steps, x, y, repeats)


def _examples(digits: data.Dataset, model: nn.Module) -> tuple[Tensor, Tensor]:
    """For each of ten classes, the first test image that ``model`` gets right (or the first)."""
    with torch.no_grad():
        right = model.eval()(digits.test_x).argmax(1) == digits.test_y
    rows = []
    for label in digits.test_y.unique()[:10]:
        of_label = digits.test_y == label
        rows.append(int((of_label.int() * 2 + (of_label & right).int()).argmax()))
    return digits.test_x[rows], digits.test_y[rows]


def _figures(
    out: Path, results: report.Results, initial: nn.Module, trained: dict[str, nn.Module]
) -> report.Figures:
    settings, digits, runs = results.settings, results.data, results.histories
    test = "test accuracy"
    plots.curves(out / "accuracy.png", runs, "epoch", "accuracy", ("epoch", test), True)
    labels = ("seconds of training", test)
    plots.curves(out / "accuracy_time.png", runs, "seconds", "accuracy", labels, True)
    labels = ("epoch", "reward handed out per image")
    plots.curves(out / "reward.png", runs, "epoch", "reward", labels, False)

    x, y = _examples(digits, trained[LFP])
    maps = {
        name: measure.relevance(model, x, y, HEATMAP_EPS)
        for name, model in zip(("LFP", "SGD"), trained.values())
    }
    heatmaps = []
    for part, rows in enumerate(torch.arange(len(y)).split(5), 1):
        heatmaps.append(out / f"heatmaps_{part}.png")
        names = [str(int(label)) for label in y[rows]]
        here = {name: values[rows] for name, values in maps.items()}
        plots.heatmaps(heatmaps[-1], digits.pixels(x[rows]), names, here)

    images = digits.train_x[:HISTOGRAM_IMAGES], digits.train_y[:HISTOGRAM_IMAGES]
    before, after = (
        measure.weight_rewards(model, *images, settings.eps) for model in (initial, trained[LFP])
    )
    histograms = []
    for name in _spread(list(before)):
        histograms.append(out / f"rewards_{name.replace('.', '_')}.png")
        plots.histogram(histograms[-1], name, before[name], after[name])
    return report.Figures(
        curves=[out / "accuracy.png", out / "accuracy_time.png", out / "reward.png"],
        heatmaps=heatmaps,
        histograms=histograms,
    )


def _spread(names: list[str]) -> list[str]:
    """At most six layers, from the first to the last."""
    if len(names) <= LAYERS_SHOWN:
        return names
    last = len(names) - 1
    return [names[round(i * last / (LAYERS_SHOWN - 1))] for i in range(LAYERS_SHOWN)]
