"""The language model of the examples: it learns a toy text, and its baselines are right."""

from __future__ import annotations

import json
import math

import pytest
import torch

from examples import gpt
from lfp_kernels.app import AppError

WORDS = b"the cat sat on the mat and the dog ate the hat. a man ran to the van. "
TINY = (
    "--width 32 --layers 1 --heads 2 --context 16 --batch 8 --steps 60 --marks 2 --lr 0.01 "
    "--threads 1"
)


def learn(tmp_path, extra=""):
    out = tmp_path / "gpt"
    arguments = [*TINY.split(), *extra.split(), "--out", str(out)]
    assert gpt.main(arguments, text=WORDS * 60) == 0
    assert (out / "bits.png").stat().st_size > 0
    return json.loads((out / "results.json").read_text())


def test_learns_a_toy_text_by_lfp(tmp_path, capsys):
    found = learn(tmp_path)
    lfp, gradient = (found["runs"][method] for method in ("lfp", "sgd"))
    assert lfp["held_out"] < found["baselines"]["bigram"] < found["baselines"]["unigram"]
    assert lfp["held_out"] < 1.2 * gradient["held_out"] + 0.1
    assert lfp["steps"] == [30, 60] and len(lfp["bits"]) == 2
    assert "bigram" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra", ["--mode plain --eps 0.1", "--norms attnlrp --start unigram --tied"]
)
def test_other_rules_learn_it_too(tmp_path, extra):
    found = learn(tmp_path, f"--method lfp {extra}")
    assert found["runs"]["lfp"]["held_out"] < found["baselines"]["unigram"] - 0.3


def test_lfp_points_where_the_gradient_does():
    """With norms by the epsilon rule the feedback is about abs(W) times minus the gradient; in the
    plain mode attention turns it away."""
    options = gpt.parse(f"{TINY} --layers 2 --eps 1e-6".split())
    parts = gpt.split(WORDS * 60)
    widest = {}
    for mode in ("attnlrp", "plain"):
        options.mode = mode
        setup = gpt.Setup(parts, parts.validation, parts.held_out, options)
        found = gpt.agreement(setup, setup.model())
        widest[mode] = max(entry["angle"] for entry in found.values())
    assert widest["attnlrp"] < 60 and widest["plain"] > 80


def test_baselines_are_counts():
    found = gpt.baselines(torch.tensor(list(b"abac")), torch.tensor([list(b"ab")]))
    assert math.isclose(found["unigram"], -math.log2(2 / 260), rel_tol=1e-6)
    assert math.isclose(found["bigram"], -math.log2(2 / 258), rel_tol=1e-6)


def test_the_parts_do_not_overlap():
    text = gpt.reference()
    parts = gpt.split(text)
    assert bytes(torch.cat(parts).tolist()) == text and len(text) > 200_000
    paragraphs = [p.strip() for p in text.split(b"\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)


@pytest.mark.parametrize("extra", ["--steps 0", "--width 30 --heads 4", "--lr 0"])
def test_errors(extra, capsys):
    with pytest.raises(AppError, match="expected"):
        gpt.parse(extra.split())
    assert gpt.main(extra.split()) == 2
    assert "gpt: " in capsys.readouterr().err
