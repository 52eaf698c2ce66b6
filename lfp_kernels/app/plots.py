"""The figures of the demo report, one PNG each, small enough to stack on a phone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from . import AppError

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError:
    plt = None

# Okabe and Ito's palette: distinct for all common kinds of colour vision
LFP, SGD, GREY = "#0072B2", "#D55E00", "#6b7280"
INK = "#1f2937"
STYLE = {
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


def curves(
    path: Path, runs: dict[str, History], x: str, y: str, labels: tuple[str, str], percent: bool
) -> None:
    """``y`` over ``x`` of the finished epochs, one line per run."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5, 3.2))
        for (name, history), colour, marker in zip(runs.items(), (LFP, SGD), "os"):
            records = history[1:]  # at epoch 0 nothing was learned yet: it would flatten the rest
            axes.plot(
                [record[x] for record in records],
                [record[y] for record in records],
                color=colour,
                marker=marker,
                markersize=4.5,
                label=name,
            )
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
            axes.set_ylim(top=1)
        else:
            axes.set_ylim(bottom=0)
        if x == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.set_xlim(left=0)
        axes.legend(loc="lower right" if percent else "upper right")
        _save(figure, path)


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
        _save(figure, path)


def _relevance(axes: Axes, values: np.ndarray, image: np.ndarray) -> None:
    limit = float(np.quantile(np.abs(values), 0.995)) or 1.0  # one hot pixel must not hide the rest
    axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if image.ndim == 2:
        axes.contour(image, levels=[0.5], colors="#374151", linewidths=0.5)


def histogram(path: Path, title: str, before: Tensor, after: Tensor) -> None:
    """Weight rewards of one layer before and after training, on a common axis."""
    values = {"before training": before.flatten().numpy(), "after": after.flatten().numpy()}
    limit = max(float(np.quantile(np.abs(v), 0.99)) for v in values.values()) or 1.0
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(3.4, 2.4))
        bins = np.linspace(-limit, limit, 41)
        for (name, v), colour, filled in zip(values.items(), (GREY, LFP), (True, False)):
            share = np.full(v.size, 1 / max(1, v.size))
            axes.hist(
                np.clip(v, -limit, limit), bins, weights=share, color=colour, label=name,
                histtype="stepfilled" if filled else "step", alpha=0.45 if filled else 1,
                linewidth=1.6,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(title=title, xlabel="reward per weight", ylabel="share of weights")
        axes.legend(fontsize=8, loc="upper right")
        _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
