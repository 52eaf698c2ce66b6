"""Row by row comparison of two results: ratios, not absolute times."""

from __future__ import annotations

from collections.abc import Sequence

from .report import Row

# What this project is answerable for, and whether more is worse.
OWN_VARIANTS = ("fused", "dropin", "native")
RATIOS = {
    "to_floor": True,
    "to_sgd": True,
    "speedup_on_reference": False,
    "peak_to_sgd": True,
    "allocated_to_sgd": True,
}


def fraction(text: str) -> float:
    """``"5%"`` or ``"0.05"`` as 0.05."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"--fail-above: expected a percentage >= 0 such as 5%, got {text!r}")
    return value


def compare(before: Sequence[Row], after: Sequence[Row], limit: float) -> tuple[list[str], int]:
    """(report lines, number of regressions): ratios worse by more than ``limit``, and lost rows."""
    new = {row.key: row for row in after}
    lines: list[str] = []
    regressions = 0
    machines = {row.machine for row in before} | {row.machine for row in after}
    if len(machines) > 1:
        lines.append(f"note: different machines ({'; '.join(sorted(machines))})")
    for row in before:
        if row.variant not in OWN_VARIANTS:
            continue
        label = f"{row.kind} {row.name} {row.variant} {row.dtype} {row.device}"
        other = new.get(row.key)
        if other is None:
            regressions += 1
            lines.append(f"MISSING     {label}: not in the second file")
            continue
        for column, more_is_worse in RATIOS.items():
            old_value, new_value = getattr(row, column), getattr(other, column)
            if old_value is None or new_value is None:
                continue
            factor = new_value / old_value if more_is_worse else old_value / new_value
            verdict = "ok"
            if factor > 1 + limit:
                verdict, regressions = "REGRESSION", regressions + 1
            elif factor < 1 / (1 + limit):
                verdict = "better"
            lines.append(
                f"{verdict:<11} {label} {column}: {old_value:.3f} -> {new_value:.3f} "
                f"({(factor - 1) * 100:+.1f}%)"
            )
    return lines, regressions
