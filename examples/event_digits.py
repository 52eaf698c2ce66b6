"""Events: the digits as spike trains, learned by feedback through a spiking network.

Two codings of the same images, [T, N, 784]: Poisson (a bright pixel fires often) and latency (it
fires once, the earlier the brighter). The network takes sequences of any length and is trained by
the fused step in chunks of time, so that its memory does not grow with T.

    python -m examples.event_digits --out runs/event_digits
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.app import AppError, data, methods, plots
from lfp_kernels.app.progress import Progress
from lfp_kernels.app.spiking_plots import spikes_over_time
from lfp_kernels.nn import LIF, Spiking

BATCH = 128
RATE = 0.5  # spikes per step of a white pixel, Poisson
HIDDEN_SHOWN = 20
DARK = 0.2  # pixels below never fire, latency


def poisson(pixels: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Spikes [T, N, 784] of images [N, 784] in [0, 1]: at each step with a chance that is
    proportional to the brightness."""
    draws = torch.rand(steps, *pixels.shape, generator=generator)
    return (draws < RATE * pixels).float()


def latency(pixels: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Spikes [T, N, 784] of images [N, 784] in [0, 1]: one per bright pixel, at a step that is
    proportional to its darkness. Nothing in it is random."""
    times = ((1 - pixels) / (1 - DARK) * (steps - 1)).round().long()
    return ((torch.arange(steps).view(-1, 1, 1) == times) & (pixels >= DARK)).float()


Coding = Callable[[Tensor, int, torch.Generator], Tensor]
CODINGS: dict[str, Coding] = {"Poisson": poisson, "latency": latency}


def network(chunk: int | None) -> Spiking:
    """784-500-10, for sequences of any length."""
    neurons = LIF(0.95, threshold=0.1), LIF(0.95, threshold=0.5)  # spikes of pixels are sparse
    layers = nn.Sequential(nn.Linear(784, 500), neurons[0], nn.Linear(500, 10), neurons[1])
    return Spiking(layers, steps=None, chunk=chunk)


def train(
    coding: Coding, digits: data.Dataset, options: argparse.Namespace, progress: Progress
) -> Spiking:
    """One network by LFP, on fresh spike trains in every epoch."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    net = network(options.chunk)
    optimizer = lfp_kernels.optim.SGD(lr=options.lr, momentum=0.9, clip_norm=3.0)
    step = lfp_kernels.fuse(
        net, lfp_kernels.composites.Epsilon(), reward=methods.spike_rate, optimizer=optimizer
    )
    x, y = images(digits, digits.train_x), digits.train_y
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        step.optimizer, options.lr, total_steps=total(options, digits), cycle_momentum=False
    )
    for _ in range(options.epochs):
        for rows in torch.randperm(len(y), generator=generator).split(BATCH):
            step(coding(x[rows], options.steps, generator), y[rows])
            scheduler.step()
            progress.step()
    return net.eval()


def images(digits: data.Dataset, x: Tensor) -> Tensor:
    """Brightness [N, 784] in [0, 1]."""
    return digits.pixels(x).flatten(1)


def total(options: argparse.Namespace, digits: data.Dataset) -> int:
    return options.epochs * -(-len(digits.train_y) // BATCH)


@torch.no_grad()
def accuracy(net: Spiking, coding: Coding, digits: data.Dataset, steps: int) -> float:
    """Share of the test images, as spike trains, whose neuron fires most often."""
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for x, y in zip(images(digits, digits.test_x).split(BATCH), digits.test_y.split(BATCH)):
        hits += int((net(coding(x, steps, generator)).sum(0).argmax(1) == y).sum())
    return hits / len(digits.test_y)


@torch.no_grad()
def raster(path: Path, nets: dict[str, Spiking], digits: data.Dataset, steps: int) -> None:
    """A column per coding, for the first test image: spikes of the pixels, of some of the hidden
    neurons that fire, and of the output."""
    generator = torch.Generator().manual_seed(1)
    image, label = images(digits, digits.test_x[:1]), int(digits.test_y[0])
    plt = plots.plt
    with plt.rc_context({**plots.STYLE, "axes.grid": False}):
        figure, grid = plt.subplots(
            3, 2, figsize=(6.4, 5.6), sharex=True, sharey="row", squeeze=False,
            gridspec_kw={"height_ratios": (3, 2, 1.5)},
        )  # fmt: skip
        for column, (name, net) in enumerate(nets.items()):
            spikes = CODINGS[name](image, steps, generator)
            hidden = Spiking(net.module[:2], steps=None)(spikes)[:, 0]
            fired = hidden.any(0).nonzero().flatten()
            at, pixel = spikes[:, 0].nonzero(as_tuple=True)
            grid[0, column].scatter(at + 1, pixel, s=1.2, color=plots.INK, linewidths=0)
            grid[0, column].set(ylim=(784, 0), title=f"{name} coding of a {label}")
            spikes_over_time(grid[1, column], hidden[:, fired[:HIDDEN_SHOWN]])
            spikes_over_time(grid[2, column], net(spikes)[:, 0], label)
            grid[2, column].set_xlabel("time step")
        for row, name in enumerate(("pixels, row by row", "hidden that fire", "output")):
            grid[row, 0].set_ylabel(name)
        plots.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", default="digits", help="digits, or MNIST files")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="length of the trains (%(default)s)")
    parser.add_argument("--chunk", type=int, default=10, help="steps at once (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/event_digits"))
    options = parser.parse_args(arguments)
    try:
        if min(options.epochs, options.steps, options.chunk, options.threads) < 1:
            raise AppError("--epochs, --steps, --chunk, --threads: expected at least 1")
        plots.require()
        torch.set_num_threads(options.threads)
        options.out.mkdir(parents=True, exist_ok=True)
        digits = data.load(options.data)
        if digits.train_x[0].numel() != 784:
            raise AppError(f"--data: expected images of 784 pixels, got {digits.name}")
        nets = {}
        with Progress(len(CODINGS) * total(options, digits), "event digits") as progress:
            for name, coding in CODINGS.items():
                nets[name] = train(coding, digits, options, progress)
                found = accuracy(nets[name], coding, digits, options.steps)
                progress.line(f"{name} coding, {options.steps} steps: test accuracy {found:.1%}")
        raster(options.out / "raster.png", nets, digits, options.steps)
        print(f"raster: {options.out / 'raster.png'}")
    except AppError as error:
        print(f"event_digits: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
