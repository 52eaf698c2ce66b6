"""A small vision transformer learns scikit-learn's 8x8 digits by LFP and by gradient descent.

1,797 images: 1,097 to train on, 300 that choose the learning rates, 400 to test. Both methods start
from the same weights, see the same batches and use AdamW with warm-up and a half cosine; each gets
the rate that does best on the validation images over a run of full length with a seed of its own.

    pip install scikit-learn matplotlib
    python -m examples.vit_digits --threads 1 --out runs/vit
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import lfp_kernels
from examples.gpt import Block
from examples.results import Section, spread, text_table, write_page
from lfp_kernels import composites, rewards
from lfp_kernels.app import AppError, plots
from lfp_kernels.app.progress import Progress

NAMES = {"lfp": "LFP", "gradient": "gradient descent"}
COLOURS = {"lfp": plots.LFP, "gradient": plots.SGD}
SEARCH_SEED = 1000
SIZE, CLASSES = 8, 10
VALIDATION, TEST = 300, 400

Batch = tuple[tuple[Tensor, ...], Tensor]  # what the model is called with, labels [N]


class ViT(nn.Module):
    """[N, 1, 8, 8] images -> [N, 10] logits, from the class token."""

    def __init__(
        self, width: int = 64, layers: int = 3, heads: int = 4, patch: int = 2
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.first = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 1 + (SIZE // patch) ** 2, width))
        self.blocks = nn.ModuleList([Block(width, heads, causal=False) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Task(NamedTuple):
    """What two methods are compared on; examples/sentences.py has one, too.

    Attributes:
        model: seed -> the model before training. batches: seed -> those of a run, ``steps`` of
            them. options: of the program (``add_options``).
    """

    model: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    steps: int
    validation: Sequence[Batch]
    test: Sequence[Batch]
    options: argparse.Namespace

    def runs(self) -> int:
        """Search included."""
        o = self.options
        return sum(len(rates) * (len(rates) > 1) + o.seeds for rates in rates_of(o).values())


def rates_of(options: argparse.Namespace) -> dict[str, list[float]]:
    """The learning rates to try of every method that runs."""
    rates = {"lfp": options.lr, "gradient": options.lr_gradient or options.lr}
    return {m: rates[m] for m in NAMES if options.method in (m, "both")}


def step_of(method: str, model: nn.Module, o: argparse.Namespace) -> Callable[[Batch], None]:
    """What leaves the gradient, or -feedback, in ``.grad``: means over the batch."""
    rules = composites.Transformer(o.mode, o.eps, residual=o.residual, norms=o.norms)
    reward = rewards.get(o.reward)

    def lfp(batch: Batch) -> None:
        inputs, y = batch
        with rules.context(model):
            out = _finite(model(*inputs))
            lfp_kernels.backward(out, reward(out.detach(), y) / len(y))

    def gradient(batch: Batch) -> None:
        inputs, y = batch
        TF.cross_entropy(_finite(model(*inputs)), y).backward()

    return lfp if method == "lfp" else gradient


def _finite(out: Tensor) -> Tensor:
    if not out.isfinite().all():
        raise FloatingPointError("logits: the learning rate is too high")
    return out


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    right = sum(int((model(*inputs).argmax(1) == y).sum()) for inputs, y in batches)
    return right / sum(len(y) for _, y in batches)


def train(
    task: Task, method: str, lr: float, seed: int, marks: Sequence[int], progress: Progress
) -> dict[str, Any]:
    """Accuracies on the validation part after the numbers of steps in ``marks`` ("validation"; 0
    once it diverged), CPU "seconds" of a step, and the "model".

    The rate rises over the first tenth and falls to 0 by a half cosine.
    """
    o = task.options
    model = task.model(seed).eval()  # no dropout: both methods see the same network
    compute = step_of(method, model, o)
    # Feedback is smaller than gradients, by abs(weight): some of it is not far above Adam's 1e-8.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=o.adam_eps, weight_decay=0.01)
    found: list[float] = []
    seconds = []
    for step, batch in enumerate(task.batches(seed), 1):
        scale = min(1.0, step / (0.1 * task.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / task.steps))
        begin = time.process_time()
        optimizer.zero_grad()
        try:
            compute(batch)
        except FloatingPointError:
            found += [0.0] * (len(marks) - len(found))
            break
        if o.clip:
            nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
        seconds.append(time.process_time() - begin)
        progress.step()
        if step in marks:
            found.append(accuracy(model, task.validation))
            progress.line(
                f"  {NAMES[method]:>16} rate {lr:g} seed {seed} step {step}: {found[-1]:.1%} of "
                "the validation part"
            )
    return {"validation": found, "seconds": statistics.median(seconds or [0.0]), "model": model}


def compare(task: Task, save: Callable[[dict[str, Any]], None], title: str) -> dict[str, Any]:
    """method -> "search": rate -> validation accuracy, "rate", and of every seed the "validation"
    accuracies after "steps", the "test" accuracy, and CPU "seconds" of a step."""
    o, found = task.options, {}
    marks = sorted({max(1, round(task.steps * part / o.marks)) for part in range(1, o.marks + 1)})
    with Progress(task.runs() * task.steps, title) as progress:
        for method, rates in rates_of(o).items():
            search = {}
            for lr in rates if len(rates) > 1 else ():
                trial = train(task, method, lr, SEARCH_SEED, [task.steps], progress)
                search[lr] = trial["validation"][-1]
            best = max(rates, key=lambda lr: search.get(lr, 0.0))
            if search and best in (min(rates), max(rates)):
                progress.line(f"  {NAMES[method]}: {best:g} is at the edge of the search")
            here: dict[str, Any] = {"search": {f"{lr:g}": a for lr, a in search.items()}}
            here |= {"rate": best, "steps": marks, "validation": [], "test": [], "seconds": []}
            for seed in range(o.seeds):
                run = train(task, method, best, seed, marks, progress)
                ended = run["validation"][-1] > 0
                here["test"].append(accuracy(run["model"], task.test) if ended else 0.0)
                for name in ("validation", "seconds"):
                    here[name].append(run[name])
                progress.line(f"  {NAMES[method]:>16} seed {seed}: test {here['test'][-1]:.1%}")
                found[method] = here
                save(found)
    return found


def figure(path: Path, found: dict[str, Any]) -> None:
    """Validation accuracy over the steps: means of the seeds, and bands of their range."""
    with plots.plt.rc_context(plots.STYLE):
        picture, axes = plots.plt.subplots(figsize=(5, 3.4))
        for method, here in found.items():
            columns = list(zip(*here["validation"]))
            means = [statistics.fmean(c) for c in columns]
            label = f"{NAMES[method]}: test {statistics.fmean(here['test']):.1%}"
            axes.plot(here["steps"], means, label=label, color=COLOURS[method], marker="o")
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(here["steps"], low, high, color=COLOURS[method], alpha=0.15)
        axes.set(xlabel="training steps", ylabel="validation accuracy", xlim=(0, None))
        axes.yaxis.set_major_formatter(plots.PercentFormatter(1, decimals=0))
        axes.legend(loc="lower right")
        picture.savefig(path)
        plots.plt.close(picture)


def table(found: dict[str, Any], others: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """Rows for the terminal and the page, ``others`` first."""
    rows = [["", "rate", "test accuracy", "CPU ms per step"], *map(list, others)]
    for method, here in found.items():
        milliseconds = f"{1e3 * statistics.median(here['seconds']):.1f}"
        rows.append([NAMES[method], f"{here['rate']:g}", spread(here["test"]), milliseconds])
    return rows


def write(
    out: Path, found: dict[str, Any], rows: list[list[str]], title: str, lead: str,
    facts: dict[str, str], options: argparse.Namespace,
) -> None:  # fmt: skip
    """Figure and page; prints the table."""
    print(text_table(rows))
    figure(out / "accuracy.png", found)
    for method, here in found.items():
        if here["search"]:
            text = ", ".join(f"{lr}: {a:.1%}" for lr, a in here["search"].items())
            facts[f"Rates, {NAMES[method]}"] = f"{text} of the validation part"
    facts["Options"] = ", ".join(f"{k} {v}" for k, v in vars(options).items() if k != "out")
    tiles = [
        (f"{statistics.fmean(here['test']):.1%}", f"{NAMES[method]}, test accuracy")
        for method, here in found.items()
    ]
    caption = f"Mean of {options.seeds} seeds; band: their range."
    section = Section(
        "Accuracy", "After equal steps on the same batches.",
        [(out / "accuracy.png", caption)], rows,
    )  # fmt: skip
    write_page(out / "report.html", title, lead, tiles, [section], facts)
    print(f"figure, page and numbers: {out}")


def add_options(add: Callable[..., Any], lr: list[float], batch: int, out: str) -> None:
    """Options that the two examples share, with their own defaults."""
    add("--method", choices=(*NAMES, "both"), default="both")
    add("--seeds", type=int, default=3)
    add("--marks", type=int, default=4, help="points of the curve (4)")
    add("--batch", type=int, default=batch)
    add("--mode", choices=("plain", "attnlrp"), default="attnlrp")
    add("--norms", choices=("attnlrp", "epsilon"), default="epsilon")
    add("--residual", choices=("epsilon", "gradient"), default="epsilon")
    add("--eps", type=float, default=0.01)
    add("--reward", default="softmax", help="a name in lfp_kernels.rewards")
    add("--lr", type=float, nargs="+", default=lr, help="to choose from")
    add("--lr-gradient", type=float, nargs="+", help="of gradient descent, if they differ")
    add("--adam-eps", type=float, default=1e-12)
    add("--clip", type=float, default=1.0, help="norm limit; 0: none (1)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=Path(out))


def check(options: argparse.Namespace, *counts: str) -> None:
    for name in ("seeds", "marks", "batch", "threads", *counts):
        if getattr(options, name) < 1:
            raise AppError(f"--{name.replace('_', '-')}: expected at least 1")
    if min(*options.lr, *(options.lr_gradient or options.lr), options.eps) <= 0:
        raise AppError("--lr, --eps: expected numbers above 0")
    if options.clip < 0 or options.adam_eps <= 0:
        raise AppError("--clip: expected at least 0, and --adam-eps above 0")


def digits() -> tuple[Tensor, Tensor]:
    """(images [1797, 1, 8, 8] of mean 0 and deviation 1, labels), in a fixed random order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise AppError("the digits come with scikit-learn; fix: pip install scikit-learn") from None
    found = load_digits()
    images, labels = torch.tensor(found.images).float()[:, None], torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return ((images - images.mean()) / images.std())[order], labels.long()[order]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_options(parser.add_argument, [0.001, 0.003, 0.01], 32, "runs/vit")
    add = parser.add_argument
    add("--steps", type=int, default=600)
    add("--width", type=int, default=64)
    add("--layers", type=int, default=3)
    add("--heads", type=int, default=4)
    add("--patch", type=int, default=2, choices=(1, 2, 4))
    options = parser.parse_args(arguments)
    check(options, "steps", "width", "layers", "heads")
    if options.width % options.heads:
        raise AppError(f"--width: expected a multiple of --heads {options.heads}")
    return options


def build(options: argparse.Namespace) -> Task:
    o, (x, y) = options, digits()
    count = len(y) - VALIDATION - TEST

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ViT(o.width, o.layers, o.heads, o.patch)

    def batches(seed: int) -> Iterator[Batch]:
        g = torch.Generator().manual_seed(seed)
        for _ in range(o.steps):
            rows = torch.randint(count, (o.batch,), generator=g)
            yield (x[rows],), y[rows]

    validation, test = slice(count, count + VALIDATION), slice(count + VALIDATION, None)
    parts = [[((x[part],), y[part])] for part in (validation, test)]
    return Task(model, batches, o.steps, parts[0], parts[1], o)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
        plots.require()
        torch.set_num_threads(options.threads)
        task = build(options)
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "results.json"
        said = {name: str(value) for name, value in vars(options).items()}
        found = compare(
            task,
            lambda runs: path.write_text(json.dumps({"options": said, "runs": runs}, indent=1)),
            "vit",
        )
        count = sum(p.numel() for p in task.model(0).parameters())
        write(
            options.out, found, table(found), "A vision transformer and digits",
            f"A transformer of {count:,} parameters learns scikit-learn's 8x8 digits, by Layer-wise"
            " Feedback Propagation (LFP) and by gradient descent: same start, same batches, AdamW.",
            {"Data": f"{len(digits()[1]) - VALIDATION - TEST:,} training, {VALIDATION} validation "
             f"and {TEST} test images"}, options,
        )  # fmt: skip
    except (AppError, ValueError, ModuleNotFoundError) as error:
        print(f"vit_digits: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
