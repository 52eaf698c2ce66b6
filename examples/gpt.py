"""A language model: a small byte-level GPT learns English by LFP and by gradient descent.

The text is the Python language reference as it comes with Python (``pydoc_data.topics``), without
paragraphs that were there before. Its last tenth is held out; the twentieth in front of it chooses
the learning rates. Both methods start from the same weights and see the same batches; each gets the
rate that does best in a short run. Baselines: unigram and bigram counts of the training part.

    python -m examples.gpt --out runs/gpt
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import lfp_kernels
from examples.results import text_table
from lfp_kernels import composites, metrics, rewards
from lfp_kernels.app import AppError, plots
from lfp_kernels.app.progress import Progress

BYTES = 256
NAMES = {"lfp": "LFP", "sgd": "gradient descent"}
COLOURS = {"lfp": plots.LFP, "sgd": plots.SGD}


class Text(NamedTuple):
    """Bytes [n] of the three parts, as int64."""

    train: Tensor
    validation: Tensor
    held_out: Tensor


def reference() -> bytes:
    """The Python language reference; many of its topics repeat parts of others."""
    seen, kept = {""}, []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                kept.append(paragraph)
    return "\n\n".join(kept).encode()


def split(text: bytes) -> Text:
    values = torch.tensor(list(text))
    train, validation = round(0.85 * len(values)), round(0.9 * len(values))
    return Text(values[:train], values[train:validation], values[validation:])


class Block(nn.Module):
    """Norm, attention, sum; norm, two layers with GELU between them, sum."""

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = TF.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(TF.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """[N, T] bytes -> [N, T, 256] logits of the bytes that follow.

    Args:
        context: the largest T. tied: the head's weight is the embedding's.
        counts: of the bytes [256]: the head has a bias that begins as the log of their shares.
    """

    def __init__(
        self, width: int = 256, layers: int = 4, heads: int = 4, context: int = 128,
        tied: bool = False, counts: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=counts is not None)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, 0.0, 0.1)
        if tied:
            self.head.weight = self.tokens.weight
        if counts is not None:
            with torch.no_grad():
                self.head.bias.copy_((counts / counts.sum()).log())

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def windows(text: Tensor, context: int, most: int | None = None) -> Tensor:
    """[n, context + 1] pieces side by side; with ``most``, that many, evenly spread."""
    pieces = text.unfold(0, context + 1, context)
    if most is None or most >= len(pieces):
        return pieces
    return pieces[torch.linspace(0, len(pieces) - 1, most).long()]


@torch.no_grad()
def bits(model: nn.Module, pieces: Tensor) -> float:
    """Bits per byte: every byte of a piece but the first, from those in front of it."""
    total = 0.0
    for part in pieces.split(32):
        out = model(part[:, :-1]).flatten(0, 1)
        total += float(TF.cross_entropy(out, part[:, 1:].flatten(), reduction="sum"))
    return total / (pieces.shape[0] * (pieces.shape[1] - 1)) / math.log(2)


def byte_counts(text: Tensor) -> Tensor:
    """Add-one smoothed, [256]."""
    return torch.bincount(text, minlength=BYTES) + 1.0


def baselines(train: Tensor, pieces: Tensor) -> dict[str, float]:
    """Bits per byte by add-one smoothed counts of single bytes and of pairs."""
    pairs = torch.bincount(train[:-1] * BYTES + train[1:], minlength=BYTES**2).view(BYTES, BYTES)
    singles = byte_counts(train)
    unigram = -(singles / singles.sum()).log2()
    bigram = -((pairs + 1.0) / (pairs.sum(1, keepdim=True) + BYTES)).log2()
    before, after = pieces[:, :-1], pieces[:, 1:]
    return {"unigram": float(unigram[after].mean()), "bigram": float(bigram[before, after].mean())}


def _composite(o: argparse.Namespace) -> composites.Transformer:
    return composites.Transformer(o.mode, o.eps, residual=o.residual, norms=o.norms)


def _finite(out: Tensor) -> Tensor:
    if not out.isfinite().all():
        raise FloatingPointError("logits: the learning rate is too high")
    return out


class Setup(NamedTuple):
    """What both methods share: the text, windows of its validation part (``pieces``) and of its
    held-out part (``test``), and the program's options."""

    text: Text
    pieces: Tensor
    test: Tensor
    options: argparse.Namespace

    def model(self) -> GPT:
        """The same at every call."""
        o = self.options
        torch.manual_seed(o.seed)
        counts = byte_counts(self.text.train) if o.start == "unigram" else None
        return GPT(o.width, o.layers, o.heads, o.context, o.tied, counts)

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        if self.options.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)

    def compute(self, method: str, model: nn.Module) -> Callable[[Tensor, Tensor], None]:
        """What leaves the gradient, or -feedback, in ``.grad``: means over the bytes."""
        o = self.options
        rules, reward = _composite(o), rewards.get(o.reward)

        def lfp(x: Tensor, y: Tensor) -> None:
            with rules.context(model):
                out = _finite(model(x))
                count = 1 if reward is rewards.cross_entropy else y.numel()  # has its own 1/N
                lfp_kernels.backward(out, reward(out.detach(), y) / count)

        def gradient(x: Tensor, y: Tensor) -> None:
            TF.cross_entropy(_finite(model(x)).flatten(0, 1), y.flatten()).backward()

        return lfp if method == "lfp" else gradient


def train(
    setup: Setup, method: str, lr: float, marks: Sequence[int], pieces: Tensor, progress: Progress
) -> dict[str, Any]:
    """Bits per byte ("bits") on ``pieces`` after each number of steps in ``marks``, the last being
    the length of the run (inf once it diverged), CPU "seconds" of a step, and the "model".

    The rate rises over the first tenth and falls to a tenth by a half cosine.
    """
    options, text, steps = setup.options, setup.text.train, marks[-1]
    model = setup.model()
    compute, optimizer = setup.compute(method, model), setup.optimizer(model, lr)
    batches = torch.Generator().manual_seed(options.seed)
    found: list[float] = []
    seconds = []
    for step in range(1, steps + 1):
        scale = min(1.0, step / (0.1 * steps)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        starts = torch.randint(len(text) - options.context, (options.batch, 1), generator=batches)
        batch = text[starts + torch.arange(options.context + 1)]
        begin = time.process_time()
        optimizer.zero_grad()
        try:
            compute(batch[:, :-1], batch[:, 1:])
        except FloatingPointError:
            found += [math.inf] * (len(marks) - len(found))
            break
        if options.clip:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        seconds.append(time.process_time() - begin)
        progress.step()
        if step in marks:
            value = bits(model, pieces)
            found.append(value if math.isfinite(value) else math.inf)
            progress.line(f"  {NAMES[method]:>16} rate {lr:g} step {step}: {value:.3f} bits")
    return {"bits": found, "seconds": statistics.median(seconds or [0.0]), "model": model}


def agreement(setup: Setup, model: GPT) -> dict[str, dict[str, float]]:
    """Of every matrix: "angle" in degrees between -feedback and gradient, and "size", the ratio of
    their norms; on windows spread over the training part."""
    batch = windows(setup.text.train, setup.options.context, setup.options.batch)
    steps: dict[str, dict[str, Tensor]] = {}
    for method in NAMES:
        model.zero_grad()
        setup.compute(method, model)(batch[:, :-1], batch[:, 1:])
        steps[method] = {
            n: p.grad.clone()
            for n, p in model.named_parameters()
            if p.grad is not None and p.dim() > 1
        }
    angles = metrics.gradient_angle(steps["lfp"], steps["sgd"])
    sizes = {n: metrics.norm_ratio(g, steps["lfp"][n]) for n, g in steps["sgd"].items()}
    return {n: {"angle": angles[n], "size": size} for n, size in sizes.items()}


def collapse(model: GPT, pieces: Tensor) -> float:
    """Mean cosine of the last block's outputs at different places: 1 if all bytes look alike."""
    seen: list[Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(pieces[:, :-1])
    hook.remove()
    rows = TF.normalize(seen[0].flatten(0, 1), dim=-1)
    n = len(rows)
    return float((rows.sum(0).square().sum() - n) / (n * (n - 1)))


def run(setup: Setup, method: str, rates: Sequence[float], progress: Progress) -> dict[str, Any]:
    """Search, then train: what ``train`` finds and "search", rate -> validation bits per byte."""
    options, trials = setup.options, {}
    for lr in rates if len(rates) > 1 else ():
        found = train(setup, method, lr, [options.search_steps], setup.pieces, progress)
        trials[lr] = found["bits"][-1]
    best = min(trials, key=trials.__getitem__) if trials else rates[0]
    parts = range(1, options.marks + 1)
    at = sorted({max(1, round(options.steps * part / options.marks)) for part in parts})
    found = train(setup, method, best, at, setup.test, progress)
    model = found.pop("model")
    finite = math.isfinite(found["bits"][-1])
    found |= {"search": {f"{lr:g}": v for lr, v in trials.items()}, "rate": best, "steps": at}
    everything = windows(setup.text.held_out, options.context)
    found["held_out"] = bits(model, everything) if finite else math.inf
    found["collapse"] = collapse(model, setup.test)
    if method == "lfp" and finite:
        found["agreement"] = agreement(setup, model)
    return found


def figure(path: Path, found: dict[str, Any]) -> None:
    """Bits per byte over the steps, and the baselines as lines."""
    with plots.plt.rc_context(plots.STYLE):
        picture, axes = plots.plt.subplots(figsize=(5.4, 3.6))
        for method, here in found["runs"].items():
            label = f"{NAMES[method]}: {here['held_out']:.2f}"
            axes.plot(here["steps"], here["bits"], label=label, color=COLOURS[method])
        for name, value in found["baselines"].items():
            axes.axhline(value, color=plots.GREY, linewidth=1, linestyle="--")
            axes.text(0, value, f" {name}", va="bottom", color=plots.GREY)
        axes.set(xlabel="steps", ylabel="bits per byte, held-out", xlim=(0, None))
        axes.legend(loc="upper right", bbox_to_anchor=(1, 0.93))  # below the unigram line
        picture.savefig(path)
        plots.plt.close(picture)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--method", choices=(*NAMES, "both"), default="both")
    add("--steps", type=int, default=400)
    add("--search-steps", type=int, default=40, help="of a trial of a learning rate (40)")
    add("--marks", type=int, default=10, help="points of the curve (10)")
    add("--batch", type=int, default=8)
    add("--width", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--context", type=int, default=128)
    add("--tied", action="store_true", help="the head's weight is the embedding's")
    start = "unigram: a bias of the head that begins as the log of the bytes' shares"
    add("--start", choices=("random", "unigram"), default="random", help=start)
    add("--mode", choices=("plain", "attnlrp"), default="attnlrp")
    norms = "attnlrp is what composites.Transformer('attnlrp') does"
    add("--norms", choices=("attnlrp", "epsilon"), default="epsilon", help=norms)
    add("--residual", choices=("epsilon", "gradient"), default="epsilon")
    add("--eps", type=float, default=0.01)
    add("--reward", default="softmax", help="a name in lfp_kernels.rewards")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--lr", type=float, nargs="+", default=[0.001, 0.003, 0.01])
    add("--lr-sgd", type=float, nargs="+", help="of gradient descent, if they differ")
    add("--clip", type=float, default=1.0, help="norm limit; 0: none (1)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=Path("runs/gpt"))
    options = parser.parse_args(arguments)
    counts = ("steps", "search_steps", "marks", "batch", "width", "layers", "heads", "context")
    if min(getattr(options, name) for name in (*counts, "threads")) < 1:
        raise AppError("steps, marks, sizes and threads: expected at least 1")
    if options.width % options.heads:
        raise AppError(f"--width: expected a multiple of --heads {options.heads}")
    if min(*options.lr, *(options.lr_sgd or options.lr), options.eps) <= 0 or options.clip < 0:
        raise AppError("--lr, --eps: expected numbers above 0, and --clip at least 0")
    return options


def main(arguments: Sequence[str] | None = None, text: bytes | None = None) -> int:
    try:
        options = parse(arguments)
        plots.require()
        torch.set_num_threads(options.threads)
        parts = split(reference() if text is None else text)
        held_out = windows(parts.held_out, options.context)
        test = windows(parts.held_out, options.context, 64)
        setup = Setup(parts, windows(parts.validation, options.context), test, options)
        options.out.mkdir(parents=True, exist_ok=True)
        methods = list(NAMES) if options.method == "both" else [options.method]
        rates = {"lfp": options.lr, "sgd": options.lr_sgd or options.lr}
        found: dict[str, Any] = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "bytes": [len(part) for part in parts],
            "parameters": sum(p.numel() for p in setup.model().parameters()),
            "baselines": baselines(parts.train, held_out),
            "start": agreement(setup, setup.model()),
            "runs": {},
        }
        trials = [len(rates[m]) for m in methods if len(rates[m]) > 1]
        total = len(methods) * options.steps + sum(trials) * options.search_steps
        with Progress(total, "gpt") as progress:
            for method in methods:
                found["runs"][method] = run(setup, method, rates[method], progress)
                (options.out / "results.json").write_text(json.dumps(found, indent=1))
        figure(options.out / "bits.png", found)
    except (AppError, ValueError, ModuleNotFoundError) as error:
        print(f"gpt: {error}", file=sys.stderr)
        return 2
    rows = [["", "rate", "bits per byte", "CPU ms per step"]]
    rows += [[name, "", f"{value:.3f}", ""] for name, value in found["baselines"].items()]
    for method, here in found["runs"].items():
        milliseconds = f"{1e3 * here['seconds']:.0f}"
        rows.append([NAMES[method], f"{here['rate']:g}", f"{here['held_out']:.3f}", milliseconds])
    print(text_table(rows))
    print(f"figure and numbers: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
