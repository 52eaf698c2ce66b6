"""The example that fine-tunes MiniLM, with its real weights and tokens, on sentences of its own."""

from __future__ import annotations

import json

import pytest
import torch

from examples import sentences, vit_digits

pytestmark = pytest.mark.peers

SUBJECTS = ("The film", "This movie", "The plot", "Her acting", "The music", "A scene near the end")
GOOD = ("is wonderful", "was a great joy", "made me happy", "is clever and warm", "is brilliant")
BAD = ("is awful", "was a dull waste", "made me angry", "is stupid and cold", "is terrible")
RATED = [
    (f"{s} {g}.", v) for words, v in ((GOOD, 2.0), (BAD, -2.0)) for s in SUBJECTS for g in words
]
TINY = (
    "--train 32 --validation 8 --test 16 --batch 8 --epochs 3 --marks 1 --seeds 1 --lr 3e-4 "
    "--threads 1"
)


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(sentences, "read", lambda path: RATED)
    return lambda options: sentences.pretrained(options)


def test_fine_tunes_minilm(tmp_path, parts):
    assert sentences.main([*TINY.split(), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["runs"]["lfp"]["test"][0] >= 0.9
    assert found["runs"]["gradient"]["test"][0] >= 0.9


@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_padding_has_no_part_in_the_feedback(parts, mode):
    """The feedback of a padded batch is the sum of that of its sentences alone."""
    options = sentences.parse([*TINY.split(), "--mode", mode])
    found = parts(options)
    model = sentences.build(found, ([], [], []), options).model(0).double().eval()
    tokens = found.encode([RATED[0][0], RATED[59][0]])
    assert len(tokens[0]) != len(tokens[1])
    step = vit_digits.step_of("lfp", model, options)

    def feedback(rows):
        model.zero_grad()
        step(sentences.padded(rows))
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    both = feedback([(tokens[0], 1), (tokens[1], 0)])
    alone = [feedback([(t, y)]) for t, y in zip(tokens, (1, 0))]
    for name, value in both.items():
        expected = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9 * float(value.abs().max()))
