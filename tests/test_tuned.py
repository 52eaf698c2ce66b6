"""Tables of measured tiles, and the search that makes them (no GPU, no Triton)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench import tune
from bench.__main__ import main
from lfp_kernels.ops import _tuned
from lfp_kernels.ops._tuned import LEGAL, Choice, Size

KEY = Size("linear input", "bfloat16", "bf16", 64, 4096, 4096)
TILE = Choice(64, 128, 32, 2, 8, 4)


def written(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "sm_90.json"
    _tuned.write(path, {KEY: TILE}, {"machine": "none"}, {KEY: {"us": 1.0}})
    data = json.loads(path.read_text())
    for name, value in changes.items():
        part = "size" if name in Size._fields and name not in ("m", "n", "k") else "tile"
        data["entries"][0][part][name] = value
    path.write_text(json.dumps(data))
    return path


def test_what_is_written_is_read(tmp_path) -> None:
    path = written(tmp_path)
    assert _tuned.read(path) == {KEY: TILE}
    assert json.loads(path.read_text())["entries"][0]["measured"] == {"us": 1.0}


def test_sizes_near_the_measured_ones_share_its_tile() -> None:
    def asked(m, n, k, dtype=torch.bfloat16):
        return _tuned.choice("linear input", dtype, "bf16", m, n, k)

    assert asked(64, 4096, 4096) is None
    with _tuned.using({KEY: TILE}):
        assert asked(64, 4096, 4096) == asked(33, 4000, 2049) == TILE
        assert asked(32, 4096, 4096) is None and asked(65, 4096, 4096) is None
        assert asked(64, 4096, 4096, torch.float32) is None
        with _tuned.using({}):
            assert asked(64, 4096, 4096) is None
    assert asked(64, 4096, 4096) is None


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"warps": 3}, "expected warps one of 1, 2, 4, 8, 16, got 3"),
        ({"m": 48}, "expected m one of 16, 32, 64, 128, 256, got 48"),
        ({"stages": True}, "expected stages one of"),
        ({"splits": 65}, "expected splits one of"),
        ({"product": "linear backward"}, "expected one of linear forward, "),
        ({"mode": "fp64"}, "in ieee, tf32, fp16, bf16"),
        ({"depth": 3}, "expected a table of tiles, got TypeError"),
    ],
)
def test_bad_entries_are_named(changes, said, tmp_path) -> None:
    with pytest.raises(ValueError) as raised:
        _tuned.read(written(tmp_path, **changes))
    message = str(raised.value)
    assert said in message and "sm_90.json" in message and "fix: write it with" in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": [{}]}'])
def test_other_files_are_refused(text, tmp_path) -> None:
    path = tmp_path / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a table of tiles"):
        _tuned.read(path)


def test_a_size_that_is_no_power_of_2_would_never_be_found(tmp_path) -> None:
    path = tmp_path / "sm_90.json"
    _tuned.write(path, {KEY._replace(m=65): TILE}, {}, {})
    with pytest.raises(ValueError, match="powers of 2"):
        _tuned.read(path)


def test_table_of_the_architecture(tmp_path, monkeypatch) -> None:
    written(tmp_path)
    monkeypatch.setattr(_tuned, "folder", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, found in (("sm_90", TILE), ("sm_80", None)):
        monkeypatch.setattr(_tuned, "architecture", lambda name=name: name)
        assert _tuned.choice("linear input", torch.bfloat16, "bf16", 64, 4096, 4096) == found
    monkeypatch.setattr(_tuned, "folder", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="LFP_KERNELS_TUNED: expected a folder"):
        _tuned.choice("linear input", torch.bfloat16, "bf16", 64, 4096, 4096)


def test_search_finds_what_single_steps_lead_to() -> None:
    goal, measured = Choice(128, 16, 64, 8, 2, 2), []

    def cost(choice: Choice) -> float:
        measured.append(choice)
        if choice.m == 16:
            return math.inf  # does not fit
        steps = (LEGAL[f].index(getattr(choice, f)) - LEGAL[f].index(getattr(goal, f))
                 for f in ("m", "n", "k", "warps", "stages"))  # fmt: skip
        return sum(map(abs, steps)) + abs(math.log2(choice.splits / goal.splits))

    assert tune.search(tune.START, cost) == (goal, 0)
    assert len(set(measured)) == len(measured) < 150
    assert all(v in LEGAL[f] for c in measured for f, v in c._asdict().items())


def test_nothing_is_measured_without_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "no GPU in this machine; nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["1,2", "0,4,4", "a,b,c", ""])
def test_sizes_on_the_command_line(bad, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--linear", bad])
    assert "expected 3 ints >= 1 by commas" in capsys.readouterr().err


def test_products_without_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="expected more than 4 channels or filters, got 3 and 4"):
        tune.conv_jobs(2, 3, 6, 4, 3, 1, torch.float32, "cpu")
