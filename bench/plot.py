"""Pictures of a result file: PNGs, and one HTML page that holds them and the table."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from . import floor, memory
from .report import BASES, Row, cell, columns_of

COLOURS = {
    "fused": "#1b6ca8",
    "dropin": "#6aaed6",
    "native": "#1b6ca8",
    "sgd": "#e07b39",
    "sgd_fused_optimizer": "#f0b27a",
    "sgd_compiled": "#a04000",
    "reference": "#7d3c98",
    "reference_compiled": "#bb8fce",
    "floor": "#7f8c8d",
    "floor_aten": "#bdc3c7",
    "fused_fp32": "#148f77",
}


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """PNGs and index.html in ``folder``.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "bench plot: needs matplotlib; fix: pip install 'lfp_kernels[bench]'"
        ) from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    steps = [row for row in rows if row.kind == "step"]
    ops = [row for row in rows if row.kind == "op"]
    pictures: list[tuple[Path, str]] = []

    def picture(name: str, subset: Sequence[Row], column: str, title: str, note: str) -> None:
        base = BASES.get(column, "sgd")  # the dotted line at 1
        subset = [row for row in subset if getattr(row, column) is not None and row.variant != base]
        if subset:
            path = folder / f"{name}.png"
            _bars(subset, column, title, path)
            pictures.append((path, note))

    picture(
        "steps_to_sgd", steps, "to_sgd", "training step / autograd SGD step",
        "Below 1: faster than gradient descent by autograd.",
    )  # fmt: skip
    picture(
        "steps_to_floor", steps, "to_floor", "training step / floor", floor.DEFINITION
    )  # fmt: skip
    picture("memory", steps, "peak_to_sgd", "peak memory / autograd SGD", memory.DEFINITION)
    picture(
        "ops_to_floor", ops, "to_floor", "operator / floor",
        "floor of an operator: its bare products, or a copy that moves as many bytes.",
    )  # fmt: skip
    page = folder / "index.html"
    page.write_text(_page(rows, pictures))
    return [path for path, _ in pictures] + [page]


def _bars(rows: Sequence[Row], column: str, title: str, path: Path) -> None:
    """Horizontal bars, grouped by workload, one colour per variant."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.name for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * (len(rows) + len(names))))
    position, ticks, seen = 0.0, [], set()
    for name in names:
        group = [row for row in rows if row.name == name]
        ticks.append(position + (len(group) - 1) / 2)
        for row in group:
            value = getattr(row, column)
            colour = COLOURS.get(row.variant, "#34495e")
            label = None if row.variant in seen else row.variant
            seen.add(row.variant)
            axes.barh(position, value, color=colour, label=label, height=0.9)
            axes.text(value, position, f" {value:.2f}", va="center", fontsize=7)
            position += 1
        position += 1
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(ticks, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    if max(getattr(row, column) for row in rows) > LOGARITHMIC_ABOVE:
        axes.set_xscale("log")
    axes.set_xlabel(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


LOGARITHMIC_ABOVE = 20
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}"
    "img{max-width:100%}table{border-collapse:collapse;font-size:12px;margin:0 0 1.5rem}"
    "td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}figcaption,.where{color:#555}"
)


def _page(rows: Sequence[Row], pictures: Sequence[tuple[Path, str]]) -> str:
    where = dict.fromkeys(
        f"{r.machine}, {r.cores} cores, {r.threads} threads, torch {r.torch}, commit {r.commit}"
        for r in rows
    )
    dates = sorted(row.date for row in rows)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>lfp_kernels benchmark</title>",
        f"<style>{STYLE}</style><h1>lfp_kernels benchmark</h1>",
        *(f"<p class=where>{html.escape(line)}</p>" for line in where),
        f"<p class=where>{html.escape(dates[0])} to {html.escape(dates[-1])}</p>" if dates else "",
    ]
    for path, note in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<figure><img alt="{path.stem}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(note)}</figcaption></figure>"
        )
    for kind, name in dict.fromkeys((row.kind, row.name) for row in rows):
        parts.append(_table([row for row in rows if (row.kind, row.name) == (kind, name)]))
    return "\n".join(parts) + "</html>\n"


def _table(rows: Sequence[Row]) -> str:
    columns = columns_of(rows)
    head = "".join(f"<th>{html.escape(title)}</th>" for _, title, _ in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell(getattr(row, n), form))}</td>" for n, _, form in columns)
        + "</tr>"
        for row in rows
    )
    title = html.escape(f"{rows[0].kind} {rows[0].name}, {rows[0].dtype}, batch {rows[0].batch}")
    return f"<h3>{title}</h3><table><tr>{head}</tr>{body}</table>"
