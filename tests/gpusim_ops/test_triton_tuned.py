"""Measured tiles in place of the heuristic's, and the measurement itself but for its clock. Runs
under ``pytest --simulate triton``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from conv_cases import layer as conv_case
from linear_cases import SPECS, case, check_all, oracle, run, updates

from bench import tune
from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.ops import _tuned
from lfp_kernels.ops._tuned import Choice, Size
from lfp_kernels.rules import Epsilon
from lfp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpusim

TILE = Choice(32, 16, 32, 2, 2, 2)
MODE = {torch.float32: "ieee", torch.bfloat16: "bf16", torch.float16: "tf32"}


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[dict]]:
    """Tiles of the products that are launched."""
    found: list[dict] = []
    for op in ("linear", "conv"):
        module = importlib.import_module(f"lfp_kernels.ops.{op}.triton")
        plain = module.launch

        def launch(kernel, *args, plain=plain, **meta):
            found.append({**meta, "kernel": kernel.__name__})
            return plain(kernel, *args, **meta)

        monkeypatch.setattr(module, "launch", launch)
    yield found


def chosen(meta: dict, with_warps: bool = True) -> bool:
    """Whether a launch has TILE; a convolution may take more warps than it says."""
    sizes = (meta["M"], meta["N"], meta["K"], meta["num_stages"])
    same = sizes == (TILE.m, TILE.n, TILE.k, TILE.stages)
    return same and (meta["num_warps"] == TILE.warps or not with_warps)


def table(products: dict[str, tuple[int, int, int]], dtype, modes) -> dict[Size, Choice]:
    return {_tuned.size(f"{p}", dtype, modes[p], *sizes): TILE for p, sizes in products.items()}


@pytest.mark.parametrize("dtype", MODE, ids=str)
def test_linear(dtype, launched) -> None:
    n, n_in, n_out = 70, 136, 72
    sizes = {"linear forward": (n, n_out, n_in), "linear input": (n, n_in, n_out),
             "linear weight": (n_out, n_in, n)}  # fmt: skip
    args = case((n,), n_in, n_out, dtype)
    modes = dict.fromkeys(sizes, MODE[dtype])
    modes["linear forward"] = "fp16" if dtype == torch.float16 else MODE[dtype]
    with _tuned.using(table(sizes, dtype, modes)):
        found = run("native", *args)
        with use_backend("native"):
            z = F.linear(*args[:3])
    assert len(launched) == 3 and all(map(chosen, launched))
    check_all(found, run("reference", *args), oracle(*args))
    x, weight, bias = args[:3]
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_within_budget(z, torch.nn.functional.linear(x, weight, bias), exact, "z")


@pytest.mark.parametrize("spec", SPECS[:2], ids=repr)
def test_update(spec, launched) -> None:
    n, n_in, n_out = 70, 136, 72
    sizes = {"linear weight": (n_out, n_in, n)}
    results = []
    for backend, kind in (
        ("native", "float32"),
        ("reference", "float32"),
        ("reference", "float64"),
    ):
        x, w, b, z, reward = (
            t.to(getattr(torch, kind), copy=True) for t in case((n,), n_in, n_out, torch.float32)
        )
        _, to_w, to_b = updates(spec, w, b)
        with use_backend(backend), _tuned.using(table(sizes, x.dtype, {"linear weight": "ieee"})):
            r_in = F.linear_redistribute_update(x, w, b, z, reward, to_w, to_b)
        results.append((r_in, w, b, *to_w.states, *to_b.states))
    assert [chosen(meta) for meta in launched if meta["kernel"] == "weight_kernel"] == [True]
    for k, (got, same, truth) in enumerate(zip(*results)):
        assert_within_budget(got, same, truth, f"result {k}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution(dtype, launched) -> None:
    *exact, geometry = conv_case("2d-5x5")
    tensors = [t.to(dtype) for t in exact]
    exact = [t.double() for t in tensors]
    (n, c, h, _), o, (k, _) = tensors[0].shape, tensors[1].shape[0], tensors[1].shape[2:]
    z = tensors[3]
    positions = n * z.shape[2] * z.shape[3]
    sizes = {
        "conv forward": (positions, o, c * k * k),  # few channels: they and the taps are one sum
        "conv input": (n * h * h, c, o),
        "conv weight": (o, c * k * k, positions),
    }
    with _tuned.using(table(sizes, dtype, dict.fromkeys(sizes, MODE[dtype]))):
        with use_backend("native"):
            forward = F.conv(*tensors[:3], geometry)
            found = F.conv_redistribute(*tensors, geometry, Epsilon(0.05))
    assert len(launched) == 3 and all(chosen(meta, with_warps=False) for meta in launched)
    with use_backend("reference"):
        same, truth = (
            (F.conv(*args[:3], geometry), *F.conv_redistribute(*args, geometry, Epsilon(0.05)))
            for args in (tensors, exact)
        )
    for name, *values in zip(("z", "r_in", "w", "b"), (forward, *found), same, truth):
        assert_within_budget(*values, name)


def test_compiled_functions_take_them(launched) -> None:
    args = case((70,), 136, 72, torch.float32)
    sizes = {"linear input": (70, 136, 72), "linear weight": (72, 136, 70)}

    def layer(x, weight, bias, z, reward):
        return F.linear_redistribute(x, weight, bias, z, reward)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = run("reference", *args)
    with (
        use_backend("native"),
        _tuned.using(table(sizes, torch.float32, dict.fromkeys(sizes, "ieee"))),
    ):
        found = compiled(*args)
    assert len(launched) == 2 and all(map(chosen, launched))
    check_all(found, expected, oracle(*args))


@pytest.fixture
def few(monkeypatch) -> None:
    """Eight tiles to search in."""
    legal = {
        "m": (16, 32),
        "n": (16,),
        "k": (16,),
        "splits": (1, 2),
        "warps": (2,),
        "stages": (2, 3),
    }
    monkeypatch.setattr(tune, "LEGAL", legal)
    monkeypatch.setattr(tune, "START", Choice(16, 16, 16, 1, 2, 2))


def clock(call) -> float:
    """Seconds of a call, not measured: short in tiles of 32 rows and two parts."""
    if not _tuned._given:
        return 5.0
    (choice,) = _tuned._given.values()
    return 10.0 - 3 * (choice.m == 32) - 4 * (choice.splits == 2)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_tuning(kind, few) -> None:
    make, sizes = {
        "linear": (tune.linear_jobs, (40, 24, 36)), "conv": (tune.conv_jobs, (2, 16, 6, 18, 3, 1)),
    }[kind]  # fmt: skip
    with use_backend("native"):
        jobs = make(*sizes, torch.float32, "cpu")
        found = [tune.tune(job, clock) for job in jobs]
        with pytest.raises(RuntimeError, match="is off by .*; fix: report it"):
            wrong = tune.Job("wrong", lambda: jobs[0].run() * (1.0 if not _tuned._given else 1.01))
            tune.tune(wrong, clock)
    assert [key.product for key, *_ in found] == [
        f"{kind} {p}" for p in ("forward", "input", "weight")
    ]
    for key, choice, times in found:
        assert key.dtype == "float32" and key.mode == "ieee"
        assert choice == Choice(32, 16, 16, 2, 2, 2)
        assert times == {"heuristic_us": 5e6, "us": 3e6}


def test_what_does_not_win_is_left_to_the_heuristic(few) -> None:
    with use_backend("native"):
        job = tune.linear_jobs(40, 24, 36, torch.float32, "cpu")[0]
        _, choice, _ = tune.tune(job, lambda call: 5.0 if not _tuned._given else 4.9)
    assert choice is None
