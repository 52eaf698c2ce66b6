"""One HTML page: training steps, operators, rooflines. It says on top that nothing was measured."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plot import STYLE
from . import LABEL, steps
from .devices import GPUS
from .table import COLUMNS, LEGEND, Row, cell
from .targets import Target

OURS, THEIRS, MET, NOT_MET = "#1b6ca8", "#7d3c98", "#148f77", "#c0392b"


def write(
    rows: Sequence[Row], comparisons: Sequence[steps.Comparison], found: Sequence[Target],
    path: Path,
) -> Path:  # fmt: skip
    """The page, pictures inside.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "bench gpu-model: the page needs matplotlib; fix: pip install 'lfp_kernels[bench]'"
        ) from error
    matplotlib.use("Agg")
    title = f"lfp_kernels on GPUs: {LABEL}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
        f"<style>{STYLE}.met{{color:{MET}}}.no{{color:{NOT_MET}}}</style><h1>{title}</h1>",
        "<p>Bytes, FLOPs and launches follow from shapes and tilings; registers and shared memory "
        "are those that ptxas reports; times are data-sheet rooflines, bounds from below. No GPU "
        "has run any of this.</p>",
        f"<p>{'<br>'.join(map(html.escape, LEGEND))}</p>",
        "<h2>A training step</h2>", _picture(_steps(comparisons), "launches and bytes of steps"),
        f"<pre>{html.escape(steps.text(comparisons))}</pre>",
        f"<p>{html.escape(' '.join((steps.__doc__ or '').split()))}</p>",
        "<h2>Figures to reach</h2><table>", *map(_target, found), "</table>",
        "<h2>Operators bound by memory</h2>", _picture(_memory(rows), "bytes over the least"),
        "<h2>Rooflines</h2>", *(_picture(_roofline(rows, g), g.name) for g in GPUS),
    ]  # fmt: skip
    for gpu in dict.fromkeys(row.gpu for row in rows):
        parts.append(f"<h2>{html.escape(gpu)}: {LABEL}</h2>")
        parts.append(_table([row for row in rows if row.gpu == gpu]))
    path.write_text("\n".join(parts) + "</html>\n")
    return path


def _target(target: Target) -> str:
    mark, kind = ("met", "met") if target.met else ("NOT met", "no")
    return (
        f"<tr><td>{html.escape(target.what)}<td>{target.value:.3f}<td>&le; {target.limit:.3f}"
        f"<td class={kind}>{mark}</tr>"
    )


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for _, title, _ in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell(r, n, f))}" for n, _, f in COLUMNS) + "</tr>"
        for r in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _picture(figure: Any, alt: str) -> str:
    import matplotlib.pyplot as plt

    data = io.BytesIO()
    figure.suptitle(LABEL, fontsize=8, color="#777")
    figure.tight_layout()
    figure.savefig(data, dpi=120, format="png")
    plt.close(figure)
    coded = base64.b64encode(data.getvalue()).decode()
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{coded}"></figure>'


def _steps(comparisons: Sequence[steps.Comparison]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 1.4 + 0.8 * len(comparisons)))
    for axis, unit, scale, limit in (
        (axes[0], "launches", 1, steps.LAUNCHES), (axes[1], "bytes", 1e6, steps.BYTES)
    ):  # fmt: skip
        for k, c in enumerate(comparisons):
            bars = (
                ("reference, ATen operators", c.reference, THEIRS),
                ("fused, operators", c.operators, "#6aaed6"),
                ("fused, kernels", c.kernels, OURS),
            )
            for j, (label, count, colour) in enumerate(bars):
                size, at = getattr(count, unit), k + (j - 1) * 0.27
                value = size / getattr(c.reference, unit)
                axis.barh(at, value, 0.25, color=colour, label=label if k == 0 else None)
                axis.text(value, at, f" {size / scale:,.0f}", va="center", fontsize=7)
        axis.set_yticks(range(len(comparisons)), [c.network.name for c in comparisons])
        axis.invert_yaxis()
        axis.axvline(limit, color="black", linestyle=":", linewidth=0.9)
        axis.set_xlim(0, 1.15)
        name = {"launches": "launches", "bytes": "MB"}[unit]
        axis.set_xlabel(f"{name} of a step, reference = 1 (dotted: to reach)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _memory(rows: Sequence[Row]) -> Any:
    import matplotlib.pyplot as plt

    ops: dict[str, float] = {}
    for row in rows:
        if row.group == "memory":
            name = f"{row.op}, {row.dtype}"
            ops[name] = max(ops.get(name, 0.0), row.requested_to_minimum)
    figure, axis = plt.subplots(figsize=(9, 1 + 0.22 * len(ops)))
    axis.barh(list(ops), [v - 1 for v in ops.values()], left=1, color=OURS)
    axis.axvline(1.05, color="black", linestyle=":")
    axis.invert_yaxis()
    axis.set_xlim(0.99, max(1.06, *ops.values(), 1.06))
    axis.tick_params(labelsize=7)
    axis.set_xlabel("bytes that threads request / least bytes, worst shape (dotted: the limit)")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _roofline(rows: Sequence[Row], gpu: Any) -> Any:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4))
    mine = [row for row in rows if row.gpu == gpu.name and row.flops]
    reach = [2.0**k for k in range(-1, 13)]
    for unit, style in (("float", "-"), ("tf32", "--"), ("bf16", "-.")):
        roof = [min(i * gpu.bandwidth, gpu.flops[unit]) / 1e12 for i in reach]
        axis.plot(reach, roof, style, color="#555", linewidth=0.9, label=f"roof, {unit}")
    for dtype, colour in (("fp32", OURS), ("bf16", "#e07b39")):
        some = [row for row in mine if row.dtype == dtype]
        rates = [row.flops / row.roofline_us / 1e6 for row in some]
        axis.scatter([r.intensity for r in some], rates, s=14, color=colour, label=dtype)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(f"{gpu.name}: FLOPs per distinct byte")
    axis.set_ylabel("TFLOP/s that the rooflines\nof its launches allow")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
