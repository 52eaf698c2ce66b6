"""The demo's page: one HTML file with everything in it, and the same figures as text."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

from lfp_kernels import info

from .data import Dataset
from .measure import HEATMAP_EPS, Cost
from .train import Settings

HISTOGRAM_IMAGES = 512
FACTS = ("lfp_kernels", "torch", "python", "CPU", "CPU features", "cores", "threads", "library cpu")


@dataclass(frozen=True)
class Results:
    """What the demo found. The first history is LFP's; the costs are in the table's order."""

    settings: Settings
    data: Dataset
    histories: dict[str, list[dict[str, float]]]
    costs: dict[str, Cost]
    baseline: str  # the cost that the others are compared with
    parameters: int
    repeats: int


@dataclass(frozen=True)
class Figures:
    """Paths of the PNG files, which the page embeds."""

    curves: list[Path]
    heatmaps: list[Path]
    histograms: list[Path]


def _memory(cost: Cost) -> str:
    return "not measured" if cost.memory is None else f"{cost.memory / 2**20:.1f} MB"


def summary(results: Results) -> str:
    """Accuracies, step times, ratios and memory for the terminal."""
    lines = ["", f"{'':<28}{'test accuracy':>14}{'training':>12}"]
    for name, history in results.histories.items():
        last = history[-1]
        lines.append(f"{name:<28}{last['accuracy']:>14.2%}{last['seconds']:>10.1f} s")
    head = f"{'step':<28}{'median':>14}{'/ autograd':>12}{'peak memory':>14}"
    lines += ["", head]
    unit = results.costs[results.baseline].seconds
    for name, cost in results.costs.items():
        lines.append(
            f"{name:<28}{cost.seconds * 1e3:>11.2f} ms{cost.seconds / unit:>11.2f}x"
            f"{_memory(cost):>14}"
        )
    return "\n".join(lines) + "\n"


def write(folder: Path, results: Results, figures: Figures) -> Path:
    """Write ``folder``/report.html; returns its path."""
    path = folder / "report.html"
    path.write_text(_page(results, figures), encoding="utf-8")
    return path


def _page(results: Results, figures: Figures) -> str:
    data = results.data
    sections = [
        section(
            "Accuracy",
            f"""Both networks start from the same weights, see the same {len(data.train_y):,} images
            in the same order and use the same optimizer. They differ in one thing: gradient descent
            asks how the loss changes with a weight, LFP asks how much reward flowed through it.""",
            figure(figures.curves[0], "Test accuracy after each epoch.")
            + figure(figures.curves[1], "The same over the seconds spent in training steps."),
        ),
        section(
            "Reward",
            """At each logit LFP hands out the reward <i>o</i>&thinsp;(<i>y</i> &minus; <i>p</i>):
            logit times target minus probability. A network that is sure and right has nothing left
            to hand out, so learning shows as a falling curve. Gradient descent does not use the
            reward; its curve is there to compare.""",
            figure(figures.curves[2], "Absolute reward per training image, mean of each epoch.")
            + figure(figures.curves[3], "The same over the seconds spent in training steps."),
        ),
        section(
            "What the networks look at",
            """The reward that arrives at the pixels when only the logit of the true class is
            rewarded. <b class="red">Red</b> pixels speak for the class, <b class="blue">blue</b>
            ones against it. The same pass that trains the network makes these maps.""",
            "".join(figure(path, _HEATMAP_CAPTION) for path in figures.heatmaps),
        ),
        section(
            "What the weights receive",
            f"""The reward that each weight receives, summed over {HISTOGRAM_IMAGES} images:
            what flowed through the connection, times the sign of the weight, so that adding it
            strengthens useful connections and weakens harmful ones. The axis is linear around zero
            and logarithmic beyond it.""",
            "".join(figure(path, alt=path.stem) for path in figures.histograms),
            "small",
        ),
        cost_section(results),
        made_section(results),
    ]
    return page(results, _header(results), sections)


def page(results: Results, header: str, sections: list[str]) -> str:
    """The whole of an HTML file."""
    title = f"{results.settings.model} on {results.data.name}: Layer-wise Feedback Propagation"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{header}{''.join(sections)}</main></body></html>\n"
    )


def cost_section(results: Results) -> str:
    """The section on what a step costs."""
    return section("Cost of a step", _cost_text(results), _cost_table(results), "wide")


def made_section(results: Results, more: dict[str, str] | None = None) -> str:
    """The section on how the page was made; ``more`` facts come behind those of the training."""
    return section("How this was made", "", _facts(results, more or {}), "wide")


_HEATMAP_CAPTION = "Top: test image. Below: relevance in the network trained by LFP and by SGD."


def section(title: str, text: str, body: str, kind: str = "") -> str:
    """A titled part of the page; ``text`` and ``body`` are markup."""
    text = f"<p>{text}</p>" if text else ""
    return f'<section><h2>{title}</h2>{text}<div class="grid {kind}">{body}</div></section>'


def figure(path: Path, caption: str = "", alt: str = "") -> str:
    """A PNG with its caption, embedded."""
    code = base64.b64encode(path.read_bytes()).decode()
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{escape(alt or caption)}" src="data:image/png;base64,{code}">'
        f"{text}</figure>"
    )


def _header(results: Results) -> str:
    s, data = results.settings, results.data
    (_, lfp), (_, sgd) = ((name, history[-1]) for name, history in results.histories.items())
    fused, unit = next(iter(results.costs.values())), results.costs[results.baseline]
    tiles = [
        (f"{lfp['accuracy']:.1%}", f"test accuracy by LFP, without gradients (SGD: "
         f"{sgd['accuracy']:.1%})"),
        (f"{lfp['seconds']:.1f} s", f"training time for {s.epochs} epochs (SGD: "
         f"{sgd['seconds']:.1f} s)"),
        (f"{fused.seconds / unit.seconds:.2f}&times;", "time of the fused LFP step, relative to "
         "a gradient descent step"),
    ]  # fmt: skip
    if fused.memory is not None and unit.memory:
        tiles.append((f"{fused.memory / unit.memory:.2f}&times;", "its peak memory, relative to "
                      "gradient descent"))  # fmt: skip
    text = (
        f"{MODEL_NAMES[s.model]} ({results.parameters:,} parameters) on {len(data.train_y):,} "
        f"{DATA_NAMES[data.name]}, tested on {len(data.test_y):,} held-out ones. Layer-wise "
        "Feedback Propagation (LFP) rewards each connection for what it contributed, layer by "
        'layer (<a href="https://arxiv.org/abs/2308.12053">arXiv 2308.12053</a>).'
    )
    return header("Training without gradients", text, tiles)


def header(title: str, text: str, tiles: list[tuple[str, str]]) -> str:
    """The top of the page; ``text`` and ``tiles``, (figure, what it is), are markup."""
    boxes = "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
    return f'<header><h1>{title}</h1><p>{text}</p><div class="tiles">{boxes}</div></header>'


MODEL_NAMES = {"lenet": "LeNet", "mlp": "An MLP", "vgg": "A VGG", "resnet": "ResNet-18"}
DATA_NAMES = {
    "digits": "handwritten digits",
    "mnist": "MNIST images",
    "cifar10": "CIFAR-10 images",
}


def _cost_text(results: Results) -> str:
    s = results.settings
    return (
        f"One training step on a batch of {s.batch_size}: forward, feedback, "
        + ("norm limit, " if s.clip else "")
        + f"update with momentum. Median of {results.repeats} interleaved repeats; the quartiles "
        "tell how busy the machine was. Memory is the peak of all tensors that the step itself "
        "allocates: parameters, momentum and the batch come on top and are the same for all."
    )


def _cost_table(results: Results) -> str:
    unit, top = (
        results.costs[results.baseline].seconds,
        max(cost.seconds for cost in results.costs.values()),
    )
    rows = []
    for name, cost in results.costs.items():
        kind = "lfp" if name.startswith("LFP") else "sgd"
        rows.append(
            f'<tr><th scope="row">{escape(name)}'
            f'<span class="bar {kind}" style="width:{100 * cost.seconds / top:.1f}%"></span></th>'
            f"<td>{cost.seconds * 1e3:.2f}</td><td>{cost.low * 1e3:.2f} &ndash; "
            f"{cost.high * 1e3:.2f}</td><td>{cost.seconds / unit:.2f}&times;</td>"
            f"<td>{_memory(cost)}</td></tr>"
        )
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("Step", "Median, ms", "Quartiles, ms", "Relative", "Peak memory")
    )
    return (
        f'<div class="scroll"><table class="cost"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _facts(results: Results, more: dict[str, str]) -> str:
    s = results.settings
    collected = info.collect()
    facts = {
        "Model and data": f"{s.model}, {results.data.name}",
        "Optimizer": f"SGD, one-cycle learning rate up to {s.lr:g}, momentum {s.momentum:g}, "
        + (f"norm limit {s.clip:g}" if s.clip else "no norm limit"),
        "Training": f"{s.epochs} epochs, batches of {s.batch_size}, seed {s.seed}",
        "Rule": f"LFP-epsilon, eps {s.eps:g}; in the heatmaps {HEATMAP_EPS:g}",
        **more,
        **{name: collected[name] for name in FACTS},
        "threads": f"{torch.get_num_threads()}",
    }
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f'<div class="scroll"><table class="facts">{rows}</table></div>'


STYLE = """
:root{--ink:#1f2937;--soft:#4b5563;--line:#e5e7eb;--lfp:#0072B2;--sgd:#D55E00}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:2rem;line-height:1.2;margin:0 0 .4em}
h2{font-size:1.25rem;margin:0 0 .4em}
p{max-width:72ch;margin:0 0 1em;color:var(--soft)}
a{color:var(--lfp)}
section{background:#fff;border:1px solid var(--line);border-radius:10px;padding:22px 24px;
margin-top:20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px}
.tile{background:#fff;border:1px solid var(--line);border-top:4px solid var(--lfp);
border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:1.75rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{font-size:.875rem;line-height:1.35;color:var(--soft);display:block;margin-top:4px}
.grid{display:grid;gap:18px;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.grid.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr))}
.grid.wide{display:block}
figure{margin:0;max-width:620px}
img{width:100%;height:auto;display:block}
figcaption{font-size:.875rem;color:var(--soft);margin-top:4px}
.red{color:#b2182b}.blue{color:#2166ac}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9375rem}
th,td{padding:8px 10px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-size:.8125rem;white-space:nowrap}
th[scope=row]{font-weight:600}
.cost th[scope=row]{min-width:190px;width:40%}
.cost td{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.cost thead th:not(:first-child){text-align:right}
.bar{display:block;height:6px;border-radius:3px;margin-top:5px;background:var(--lfp)}
.bar.sgd{background:var(--sgd)}
.facts th{width:170px;color:var(--soft);font-weight:600}
.facts td{overflow-wrap:anywhere}
@media(max-width:600px){main{padding:20px 12px 40px}section{padding:16px 14px}h1{font-size:1.6rem}
.facts th{width:110px}th,td{padding:7px 5px}.cost th[scope=row]{min-width:110px}
.cost th:nth-child(3),.cost td:nth-child(3){display:none}.cost{font-size:.875rem}
.cost thead th{white-space:normal;font-size:.75rem}}
"""
