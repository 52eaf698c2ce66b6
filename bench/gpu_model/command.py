"""``python -m bench gpu-model``."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import LABEL, page, resources, shapes, steps, table, targets
from .devices import GPUS
from .traffic import as_on_cuda


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=run)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-model"), help="results' folder")
    parser.add_argument("--quick", action="store_true", help="one shape of each kind, LeNet alone")
    parser.add_argument("--no-page", action="store_true", help="no HTML page with pictures")
    parser.add_argument(
        "--resources", action="store_true",
        help="compile csrc/cuda with nvcc and rewrite the table of registers (minutes)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Exit status 0, whether the figures are reached or not: it is a report."""
    if options.resources:
        sources = resources.digest()  # before: an edit meanwhile shows as stale
        print(resources.write(resources.compile_all(), sources))
        return 0
    print(f"bench gpu-model: {LABEL}")
    with as_on_cuda():  # pools make the winners that their feedback takes
        cases = shapes.cases(options.quick)
    rows = [table.row_of(case, gpu) for gpu in GPUS for case in cases]
    print(table.text(rows))
    if resources.stale():
        print("note: registers are those of other sources than these; fix: --resources")
    networks = steps.QUICK_NETWORKS if options.quick else steps.NETWORKS
    comparisons = [steps.compare(network) for network in networks]
    print("\n" + steps.text(comparisons))
    found = targets.of_steps(comparisons) + targets.of_rows(rows)
    print(f"\nfigures to reach: {LABEL}\n  " + "\n  ".join(map(str, found)))
    options.out.mkdir(parents=True, exist_ok=True)
    print(table.write(rows, options.out / "gpu_model.csv"))
    print(steps.write(comparisons, options.out / "gpu_model_steps.csv"))
    if not options.no_page:
        print(page.write(rows, comparisons, found, options.out / "gpu_model.html"))
    return 0
