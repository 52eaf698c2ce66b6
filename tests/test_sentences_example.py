"""The examples that fine-tune an encoder and train a vision transformer: they learn, both ways, and
what they are judged on is kept apart. The pretrained encoder itself: tests/peers."""

from __future__ import annotations

import io
import json
import random
import tarfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from examples import sentences, vit_digits
from lfp_kernels.app import AppError

TINY = (
    "--train 64 --validation 32 --test 32 --batch 8 --epochs 3 --marks 2 --seeds 1 --lr 0.01 "
    "--threads 1"
)
TINY_VIT = "--width 32 --layers 1 --heads 2 --steps 60 --marks 2 --seeds 1 --lr 0.01 --threads 1"
GOOD, BAD, OTHER = range(1, 6), range(6, 11), range(11, 30)


class Encoder(nn.Module):
    """Stands for a pretrained one: it is called as those of transformers are."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.block = nn.Embedding(30, width), vit_digits.Block(width, 2, causal=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids, attention_mask):
        # Its attention sees padding: only the mean over tokens is to leave it out.
        return SimpleNamespace(last_hidden_state=self.norm(self.block(self.tokens(input_ids))))


def toy():
    """Sentences of words that are numbers; those of valence 0 have no label."""
    choose = random.Random(0)
    found = []
    for i in range(150):
        words = choose.choices(GOOD if i % 2 else BAD, k=2) + choose.choices(OTHER, k=i % 4)
        choose.shuffle(words)
        valence = choose.uniform(0.1, 3) * (1 if i % 2 else -1) if i < 140 else 0.0
        found.append((" ".join(map(str, words)), valence))
    return sentences.Parts(found, lambda s: [[int(w) for w in t.split()] for t in s], Encoder, 16)


def learn(tmp_path, extra=""):
    out = tmp_path / "runs"
    assert sentences.main([*TINY.split(), *extra.split(), "--out", str(out)], parts=toy()) == 0
    assert (out / "accuracy.png").stat().st_size > 0
    assert "LFP" in (out / "report.html").read_text(encoding="utf-8")
    return json.loads((out / "results.json").read_text())


def test_fine_tunes_by_lfp(tmp_path, capsys):
    found = learn(tmp_path, "--lr 0.003 0.01")
    lfp, gradient = (found["runs"][method] for method in ("lfp", "gradient"))
    assert lfp["test"][0] > 0.9 and gradient["test"][0] > 0.9
    assert lfp["steps"] == [12, 24] and len(lfp["validation"][0]) == 2
    best = max(lfp["search"].values())
    assert lfp["search"][f"{lfp['rate']:g}"] == best and len(lfp["search"]) == 2
    assert found["majority"] < 0.7 and 0.5 < found["head"]["accuracy"] <= 1
    printed = capsys.readouterr().out
    assert "larger class" in printed and "head alone" in printed


def test_plain_mode_fine_tunes_too(tmp_path):
    found = learn(tmp_path, "--method lfp --mode plain --eps 0.1")
    assert list(found["runs"]) == ["lfp"] and found["runs"]["lfp"]["test"][0] > 0.7


def test_the_parts_do_not_overlap_and_leave_zero_out():
    parts = toy()
    numbered = parts._replace(encode=lambda s: [[i] for i in range(len(s))])
    options = sentences.parse(TINY.split())
    rows = sentences.split(numbered, options)
    assert list(map(len, rows)) == [64, 32, 32]
    assert len({tokens[0] for part in rows for tokens, _ in part}) == 128
    valences = [v for _, v in parts.sentences if v]
    assert all(label == (valences[tokens[0]] > 0) for part in rows for tokens, label in part)
    options.train = 8
    assert sentences.split(numbered, options)[2] == rows[2]  # the test part stays


def test_an_epoch_has_every_row_once():
    rows = [([i] * (1 + i % 5), i % 2) for i in range(1, 100)]
    batches = sentences.epoch(rows, 8, torch.Generator().manual_seed(0))
    seen = [int(t[0]) for (tokens, _), _ in batches for t in tokens]
    assert len(batches) == 12 and len(set(seen)) == len(seen) == 96
    for (tokens, mask), y in batches:
        assert torch.equal(mask, (tokens > 0).long()) and torch.equal(y, tokens[:, 0] % 2)


def test_the_mean_leaves_padding_out():
    model = sentences.Classifier(Encoder(), 16)
    model.encoder.forward = lambda input_ids, attention_mask: SimpleNamespace(
        last_hidden_state=input_ids[..., None].float()
    )
    found = model.pooled(torch.tensor([[2, 4, 99]]), torch.tensor([[1, 1, 0]]))
    assert found.tolist() == [[3.0]]


def packed(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_reads_the_source_package(tmp_path):
    text = "1\t2.5\tGood\tfun.\r\n2\t-0.6\tTepid ä at best\r\n3\t0.0\tA film\r\n".encode()
    inner = packed(tmp_path / "inner", {f"hutto_ICWSM_2014/{sentences.MEMBER}": text})
    name = f"vaderSentiment-3.3.2/additional_resources/{sentences.ARCHIVE}"
    path = packed(tmp_path / "package.tar.gz", {name: inner.read_bytes()})
    found = sentences.read(path)
    assert found == [("Good\tfun.", 2.5), ("Tepid ä at best", -0.6), ("A film", 0.0)]
    for wrong in (tmp_path / "none", packed(tmp_path / "empty", {"a": b""})):
        with pytest.raises(AppError, match="pip download"):
            sentences.read(wrong)


@pytest.mark.parametrize("extra", ["", "--norms attnlrp --method lfp"])
def test_vit_learns_digits(tmp_path, extra):
    out = tmp_path / "vit"
    assert vit_digits.main([*TINY_VIT.split(), *extra.split(), "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())["runs"]
    assert found["lfp"]["test"][0] > 0.4  # chance: 0.1
    assert (out / "report.html").stat().st_size > 1000


def test_both_methods_start_alike_and_see_the_same_batches():
    task = vit_digits.build(vit_digits.parse(TINY_VIT.split()))
    first, second = (task.model(3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = (next(task.batches(3)) for _ in range(2))
    assert torch.equal(one[0][0], two[0][0]) and torch.equal(one[1], two[1])
    assert [len(part[0][1]) for part in (task.validation, task.test)] == [300, 400]


def test_divergence_is_an_accuracy_of_0(tmp_path):
    arguments = [*TINY_VIT.split(), "--lr", "1e12", "--clip", "0", "--method", "gradient"]
    assert vit_digits.main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["runs"]["gradient"]
    assert found["validation"] == [[0.0, 0.0]] and found["test"] == [0.0]


@pytest.mark.parametrize("extra", ["--steps 0", "--width 30 --heads 4", "--lr 0", "--clip -1"])
def test_errors(extra, capsys):
    assert vit_digits.main(extra.split()) == 2
    assert "vit_digits: " in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["--epochs 0", "--train 8", "--adam-eps 0", "--test 9000"])
def test_errors_of_sentences(extra, capsys):
    assert sentences.main(extra.split(), parts=toy()) == 2
    assert "sentences: " in capsys.readouterr().err
