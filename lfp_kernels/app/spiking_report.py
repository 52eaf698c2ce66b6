"""The page of the spiking demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lfp_kernels.nn import Spiking

from . import report


@dataclass(frozen=True)
class Figures:
    """Paths of the PNG files, which the page embeds."""

    curves: list[Path]
    rasters: list[Path]
    membranes: list[Path]
    heatmaps: list[Path]


ACCURACY = "Test accuracy after each epoch."
SECONDS = "The same over the seconds spent in training steps."
RASTER = "Each bar is a spike. Below: the output neurons, one per class; blue: the true class."
MEMBRANES = (
    "Dashed: the threshold. Red marks: spikes. A step after a spike the threshold is taken off."
)
HEATMAPS = (
    "Top: test image. Below: relevance in the network trained by LFP and by surrogate gradients."
)


def write(
    folder: Path, results: report.Results, figures: Figures, net: Spiking, density: dict[str, float]
) -> Path:
    """Write ``folder``/report.html; returns its path.

    Args:
        net: the network that LFP trained. density: share of spikes by layer of neurons.
    """
    sections = [
        report.section(
            "Accuracy",
            """All three start from the same weights, see the same images in the same order and use
            the same optimizer. A spike is a step: its derivative is zero wherever it exists.
            Backpropagation therefore hands no gradient to any weight and stays where it began.
            Surrogate gradients put the derivative of a smooth function in its place. LFP needs
            none: it redistributes rewards by what each connection contributed.""",
            report.figure(figures.curves[0], ACCURACY) + report.figure(figures.curves[1], SECONDS),
        ),
        report.section(
            "What the neurons do",
            f"""Test images in the network trained by LFP: some hidden neurons above, the output
            below. The class whose neuron fires most often is the answer. {_density(density)}""",
            "".join(report.figure(path, RASTER) for path in figures.rasters),
        ),
        report.section(
            "Membranes",
            """A neuron adds its input to what is left of its membrane, and fires when the sum is
            above the threshold. Two output neurons, of the true class and of the one that comes
            second, and two hidden neurons that fire in about half of the steps.""",
            "".join(report.figure(path, MEMBRANES) for path in figures.membranes),
        ),
        report.section(
            "What the networks look at",
            """The reward that arrives at the pixels, summed over time, when only the spikes of the
            true class are rewarded. <b class="red">Red</b> pixels speak for the class,
            <b class="blue">blue</b> ones against it.""",
            "".join(report.figure(path, HEATMAPS) for path in figures.heatmaps),
        ),
        report.cost_section(results),
        report.made_section(results, {"Neurons": _neurons(net), "Surrogate": _SURROGATE}),
    ]
    page = folder / "report.html"
    page.write_text(report.page(results, _header(results, net), sections), encoding="utf-8")
    return page


_SURROGATE = (
    "derivative of arctan(pi x) / pi; cross-entropy of the spike counts; one product per layer for "
    "all time steps, neurons step by step in torch operations"
)


def _density(density: dict[str, float]) -> str:
    parts = [f"{share:.1%} in {name}" for name, share in density.items()]
    return (
        "Share of neurons that fire in a time step, over the test images: " + ", ".join(parts) + "."
    )


def _neurons(net: Spiking) -> str:
    lif = next(layer for _, layer in reversed(list(net.layers())))
    return (
        f"LIF, {lif.extra_repr()}; {net.steps} time steps"
        + (f" in chunks of {net.chunk}" if net.chunk else "")
        + (f"; noise {net.noise:g} on the layers' inputs" if net.noise else "")
    )


NAMES = {
    "snn-mlp": "A spiking network with one hidden layer",
    "snn-cnn": "A spiking convolutional network",
}


def _header(results: report.Results, net: Spiking) -> str:
    lfp, surrogate, step = (history[-1] for history in results.histories.values())
    fused, unit = next(iter(results.costs.values())), results.costs[results.baseline]
    tiles = [
        (f"{lfp['accuracy']:.1%}", "test accuracy by LFP (surrogate gradient: "
         f"{surrogate['accuracy']:.1%})"),
        (f"{step['accuracy']:.1%}", "by backpropagation through the step function, which has no "
         "gradient (chance: "
         f"{1 / results.data.classes:.0%})"),
        (f"{fused.seconds / unit.seconds:.2f}&times;", "time of the fused LFP step, relative to "
         "a surrogate gradient step"),
    ]  # fmt: skip
    if fused.memory is not None and unit.memory:
        tiles.append((f"{fused.memory / unit.memory:.2f}&times;", "its peak memory, relative to "
                      "surrogate gradients"))  # fmt: skip
    text = (
        f"{NAMES[results.settings.model]} ({results.parameters:,} parameters, {net.steps} time "
        f"steps) on {len(results.data.train_y):,} {report.DATA_NAMES[results.data.name]}, tested "
        f"on {len(results.data.test_y):,} held-out ones. Its neurons fire or they do not: "
        "gradients cannot train them as they are, Layer-wise Feedback Propagation (LFP) can "
        '(<a href="https://arxiv.org/abs/2308.12053">arXiv 2308.12053</a>).'
    )
    return report.header("Training spikes without gradients", text, tiles)
