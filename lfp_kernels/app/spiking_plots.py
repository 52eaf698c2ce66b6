"""Figures of spiking networks: rasters and membranes over time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .plots import GREY, INK, LFP, SGD, STYLE, Axes, MaxNLocator, plt, save


class Rows(NamedTuple):
    """Spikes of some neurons of one layer [T, K]."""

    name: str
    spikes: Tensor


class Trace(NamedTuple):
    """One neuron over time: membrane [T], spikes [T], and its threshold."""

    name: str
    membrane: Tensor
    spikes: Tensor
    threshold: float


def raster(path: Path, image: Tensor, title: str, layers: list[Rows], label: int) -> None:
    """Spikes of each layer over time, the last one's neurons by class with ``label`` in colour;
    the image [C, H, W] that the network sees, beside them."""
    *hidden, out = (rows.spikes.shape[1] for rows in layers)
    heights = [*(0.055 * max(10, count) for count in hidden), 0.13 * out]  # inches
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure = plt.figure(figsize=(5.4, 0.7 + sum(heights)))
        grid = figure.add_gridspec(len(layers), 2, width_ratios=(1, 4.2), height_ratios=heights)
        picture = figure.add_subplot(grid[:, 0])
        picture.imshow(_picture(image), cmap="Greys", vmin=0, vmax=1)
        picture.set(xticks=[], yticks=[], anchor="C")
        picture.spines[:].set(visible=True, color="#d1d5db")
        picture.set_title(title, loc="center", fontsize=9.5)
        shared = None
        for row, (name, spikes) in enumerate(layers):
            axes = shared = figure.add_subplot(grid[row, 1], sharex=shared)
            spikes_over_time(axes, spikes, label if row == len(layers) - 1 else None)
            axes.set_ylabel(name, fontsize=9)
            axes.tick_params(labelbottom=row == len(layers) - 1)
        assert shared is not None
        shared.set_xlabel("time step")
        save(figure, path)


def spikes_over_time(axes: Axes, spikes: Tensor, label: int | None = None) -> None:
    """A bar per spike of ``spikes`` [T, K]; with ``label`` the rows are classes."""
    steps, count = spikes.shape
    colours = [INK] * count if label is None else [SGD] * count
    if label is not None:
        colours[label] = LFP
        axes.axhspan(label - 0.5, label + 0.5, color=LFP, alpha=0.12, linewidth=0)
    times = [spikes[:, k].numpy().nonzero()[0] + 1 for k in range(count)]
    axes.eventplot(
        times, lineoffsets=range(count), linelengths=0.85, linewidths=1.8, colors=colours
    )
    axes.set(xlim=(0.3, steps + 0.7), ylim=(count - 0.4, -0.6))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_yticks([] if label is None else range(0, count, 1 if count <= 10 else 10))
    axes.tick_params(axis="y", labelsize=7.5, length=0)


def membranes(path: Path, title: str, traces: list[Trace]) -> None:
    """Membranes over time with their thresholds; a mark above where the neuron fires."""
    steps = len(traces[0].membrane)
    at = np.arange(1, steps + 1)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, grid = plt.subplots(
            len(traces), 1, figsize=(5.4, 0.8 + 1.05 * len(traces)), sharex=True, squeeze=False
        )
        figure.suptitle(title, x=0.02, ha="left", fontsize=10.5)
        for axes, trace in zip(grid.flat, traces):
            u, fired = trace.membrane.numpy(), trace.spikes.numpy() > 0
            axes.axhline(trace.threshold, color=GREY, linestyle="--", linewidth=1)
            axes.axhline(0, color="#e5e7eb", linewidth=0.8, zorder=0)
            axes.plot(at, u, color=LFP, marker="o", markersize=2.5, linewidth=1.3)
            low, high = min(0.0, float(u.min())), max(trace.threshold, float(u.max()))
            span = high - low
            top = high + 0.22 * span
            axes.vlines(at[fired], top - 0.13 * span, top, color=SGD, linewidth=1.8)
            axes.set(ylim=(low - 0.08 * span, top + 0.04 * span), xlim=(0.3, steps + 0.7))
            axes.set_title(f"{trace.name}: {int(fired.sum())} spikes", fontsize=9, pad=3)
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(labelsize=8)
        grid[-1, 0].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        grid[-1, 0].set_xlabel("time step")
        figure.supylabel("membrane potential", fontsize=9)
        save(figure, path)


def _picture(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).squeeze(-1).numpy()
