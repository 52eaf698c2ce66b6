"""How the applications show what they found: tables, figures with bands over the seeds, a page."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch

from lfp_kernels import info
from lfp_kernels.app import plots, report

COLOURS = {"LFP": plots.LFP, "SGD": plots.SGD}
MARKERS = {"LFP": "o", "SGD": "s"}


class Section(NamedTuple):
    """A part of the page: text, which may hold markup, then figures, then a table."""

    title: str
    text: str
    figures: Sequence[tuple[Path, str]] = ()
    table: Sequence[Sequence[str]] = ()


def spread(values: Sequence[float]) -> str:
    """Mean of accuracies, and their range where there are several."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.1%}"
    return f"{mean:.1%} ({min(values) * 100:.1f} - {max(values) * 100:.1f})"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first row being the head, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def bands(
    path: Path,
    runs: dict[str, list[list[float]]],
    at: Sequence[float],
    labels: tuple[str, str],
    ticks: Callable[[float], str] | None = None,
) -> None:
    """Accuracy over ``at``: per method the mean of its runs, and a band from least to largest.

    Args:
        runs: "LFP" or "SGD" -> for each seed its values at ``at``.
        ticks: text of a value of ``at``; with it the axis is logarithmic and falls from left to
            right.
    """
    plt = plots.plt
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(figsize=(5, 3.4))
        for name, values in runs.items():
            columns = list(zip(*values))
            style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 4.5}
            axes.plot(at, [statistics.fmean(c) for c in columns], label=name, **style)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(at, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        least = min(value for values in runs.values() for run in values for value in run)
        # Without empty space below curves that all lie high.
        axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(0.5 if least > 0.6 else 0, 1.02))
        axes.yaxis.set_major_formatter(plots.PercentFormatter(1, decimals=0))
        if ticks is not None:
            axes.set_xscale("log")
            axes.invert_xaxis()
            axes.set_xticks(list(at), [ticks(value) for value in at])
            axes.xaxis.set_minor_locator(plots.NullLocator())
        axes.legend(loc="lower left" if ticks is not None else "lower right")
        figure.savefig(path)
        plt.close(figure)


def write_page(
    path: Path,
    title: str,
    lead: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    facts: dict[str, str],
) -> None:
    """One HTML file with everything in it, in the style of the demo's report.

    Args:
        lead, and the sections' texts: markup. tiles: (figure, what it is), the second may hold
            markup. facts: name -> text of the last section; the machine's are added.
    """
    collected = info.collect()
    facts = facts | {name: collected[name] for name in report.FACTS}
    facts["threads"] = str(torch.get_num_threads())
    boxes = "".join(
        f'<div class="tile"><b>{escape(number)}</b><span>{text}</span></div>'
        for number, text in tiles
    )
    body = "".join(map(_section, sections))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{report.STYLE}{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p>{lead}</p><div class="tiles">{boxes}</div></header>'
        f"{body}<section><h2>How this was made</h2>"
        f'<div class="scroll"><table class="facts">{rows}</table></div></section>'
        "</main></body></html>\n",
        encoding="utf-8",
    )


def _section(section: Section) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{escape(caption)}'
        "</figcaption></figure>"
        for path, caption in section.figures
    )
    table = ""
    if section.table:
        head, *rows = section.table
        top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        cells = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        table = (
            f'<div class="scroll"><table class="numbers"><thead><tr>{top}</tr></thead>'
            f"<tbody>{cells}</tbody></table></div>"
        )
    return (
        f"<section><h2>{escape(section.title)}</h2><p>{section.text}</p>"
        f'<div class="grid">{figures}</div>{table}</section>'
    )


STYLE = """
.numbers{margin-top:12px}
.numbers td,.numbers thead th:not(:first-child){text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
"""
