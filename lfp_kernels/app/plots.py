"""The figures of the demo report, one PNG each, small enough to stack on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import AppError

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        MaxNLocator,
        NullLocator,
        PercentFormatter,
    )
except ImportError:
    plt = None  # type: ignore[assignment]

# Okabe and Ito's palette: distinct for all common kinds of colour vision
LFP, SGD, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b7280"
INK = "#1f2937"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}

History = list[dict[str, float]]


def require() -> None:
    if plt is None:
        raise AppError("demo: the figures need matplotlib; fix: pip install matplotlib")


def curves(path: Path, runs: dict[str, History], x: tuple[str, str], y: tuple[str, str]) -> None:
    """Field ``y`` over field ``x`` of the finished epochs, each with its label; a line per run."""
    percent = y[0] == "accuracy"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5, 3.2))
        for (name, history), colour, marker in zip(runs.items(), (LFP, SGD, GREEN), "os^"):
            records = [record for record in history if y[0] in record]
            axes.plot(
                [record[x[0]] for record in records],
                [record[y[0]] for record in records],
                color=colour,
                marker=marker,
                markersize=4.5,
                label=f"{name}: {records[-1][y[0]]:.1%}" if percent else name,
            )
        axes.set(xlabel=x[1], ylabel=y[1], xlim=(0, None), ylim=(0, None))
        place: Any = "upper right"
        if percent:
            place = "center right"
            if all(history[-1][y[0]] > 0.8 for history in runs.values()):
                axes.set_ylim(0.5, 1.01)  # the first moments would flatten the rest
                place = "lower right"
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if x[0] == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc=place)
        save(figure, path)


def heatmaps(path: Path, pixels: Tensor, labels: list[str], maps: dict[str, Tensor]) -> None:
    """A column per image: the image, then its relevance under each model."""
    rows = ["input", *maps]
    with plt.rc_context({**STYLE, "axes.grid": False, "figure.constrained_layout.use": False}):
        figure, grid = plt.subplots(
            len(rows), len(labels), figsize=(5.4, 3.35), squeeze=False,
            gridspec_kw={"wspace": 0.05, "hspace": 0.05, "left": 0.09, "right": 0.995,
                         "top": 0.93, "bottom": 0.01},
        )  # fmt: skip
        for column, label in enumerate(labels):
            image = pixels[column].permute(1, 2, 0).squeeze(-1).numpy()
            grid[0, column].imshow(image, cmap="Greys", vmin=0, vmax=1)
            grid[0, column].set_title(label, loc="center", pad=3)
            for row, values in enumerate(maps.values(), 1):
                _relevance(grid[row, column], values[column].numpy(), image)
        for row, name in enumerate(rows):
            grid[row, 0].set_ylabel(name)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, color="#d1d5db")
        save(figure, path)


def _relevance(axes: Axes, values: np.ndarray, image: np.ndarray) -> None:
    limit = float(np.quantile(np.abs(values), 0.995)) or 1.0  # one hot pixel must not hide the rest
    axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if image.ndim == 2 and image.min() < 0.5 < image.max():
        axes.contour(image, levels=[0.5], colors="#374151", linewidths=0.5)


def histogram(path: Path, title: str, before: Tensor, after: Tensor) -> None:
    """Weight rewards of one layer before and after training, on a common axis that is linear
    around zero and logarithmic beyond: they span many orders of magnitude."""
    values = {
        "before training": before.flatten().numpy(),
        "after training": after.flatten().numpy(),
    }
    top = max(float(np.abs(v).max()) for v in values.values()) or 1.0
    linear = top / 1e3
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(3.6, 2.7))
        positive = np.geomspace(linear, top, 16)
        bins = [*-positive[::-1], 0, *positive]
        for (name, v), colour, filled in zip(values.items(), (GREY, LFP), (True, False)):
            axes.hist(
                v, bins, weights=np.full(v.size, 1 / max(1, v.size)), color=colour, label=name,
                histtype="stepfilled" if filled else "step", alpha=0.4 if filled else 1,
                linewidth=1.6,
            )  # fmt: skip
        axes.set_xscale("symlog", linthresh=linear, linscale=0.5)
        axes.xaxis.set_major_locator(FixedLocator([-top, -top / 30, 0, top / 30, top]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(title=title, xlabel="reward per weight", ylabel="share of weights")
        figure.legend(fontsize=8, loc="outside upper right", ncols=2, handlelength=1.2)
        save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
