"""The benchmark measures, writes, reads, compares and draws. No test asserts a speed."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as cli
from bench import compare, floor, memory, ops, peak, report, specs, steps, timing

STEPS = ("quick-mlp", "quick-vgg_bn")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run of two workloads and of every operator."""
    folder = tmp_path_factory.mktemp("bench")
    chosen = [word for name in STEPS for word in ("--workload", name)]
    common = ["run", "--quick", "--threads", "1", "--no-memory", "--out", str(folder)]
    assert cli.main([*common, *chosen, "--op", ""]) == 0
    return folder


def test_a_run_writes_a_row_per_variant(results: Path) -> None:
    with (results / "results.csv").open() as file:
        records = list(csv.DictReader(file))
    found = {(r["kind"], r["name"], r["variant"]) for r in records}
    for name in STEPS:
        for variant in specs.workload_named(name).variants:
            assert ("step", name, variant) in found
    for spec in ops.specs(quick=True):
        for variant in ("native", "reference", "floor"):
            assert ("op", spec.label, variant) in found
    for record in records:
        assert float(record["p10_ms"]) <= float(record["median_ms"]) <= float(record["p90_ms"])
        for column in ("machine", "cores", "threads", "commit", "torch", "date"):
            assert record[column]
        if record["variant"] == "floor":
            assert float(record["to_floor"]) == 1
    fused = next(r for r in records if r["variant"] == "fused")
    assert fused["to_sgd"] and fused["to_floor"] and fused["speedup_on_reference"]


def test_both_files_hold_the_same_rows(results: Path) -> None:
    rows = report.read(results)
    assert rows and rows == report.read(results / "results.jsonl")
    assert isinstance(rows[0].batch, int) and isinstance(rows[0].median_ms, float)
    for bad in (results / "nothing.csv", Path(__file__)):
        with pytest.raises(ValueError, match=bad.name):
            report.read(bad)


def test_compare_finds_a_planted_regression(results: Path, tmp_path: Path) -> None:
    before = str(results)
    assert cli.main(["compare", before, before, "--fail-above", "5%"]) == 0

    rows = report.read(results)
    at = next(k for k, r in enumerate(rows) if r.variant == "fused")
    rows[at] = replace(rows[at], to_floor=rows[at].to_floor * 1.2)
    report.write(rows, tmp_path)
    assert cli.main(["compare", before, str(tmp_path), "--fail-above", "5%"]) == 1
    assert cli.main(["compare", before, str(tmp_path), "--fail-above", "25%"]) == 0
    assert cli.main(["compare", str(tmp_path), before]) == 0  # an improvement

    del rows[at]
    report.write(rows, tmp_path)
    assert cli.main(["compare", before, str(tmp_path), "--fail-above", "900%"]) == 1
    for bad in ("--fail-above=-1%", "--fail-above=much"):
        assert cli.main(["compare", before, before, bad]) == 2


def test_less_speedup_on_the_reference_is_a_regression(results: Path) -> None:
    row = next(r for r in report.read(results) if r.variant == "fused")
    slower = replace(row, speedup_on_reference=row.speedup_on_reference / 1.2)
    assert compare.compare([row], [slower], 0.05)[1] == 1
    assert compare.compare([slower], [row], 0.05)[1] == 0


def test_plot_draws_pictures_and_a_page(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", str(results), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    for name in ("steps_to_sgd", "steps_to_floor", "ops_to_floor"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'alt="{name}"' in page
    assert all(name in page for name in STEPS)


def test_no_cuda_device_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["run", "--device", "cuda", "--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--workload", "no such"], ["--threads", "0"], ["--repeats", "0"]]
)
def test_bad_arguments_end_with_status_2(arguments: list[str]) -> None:
    assert cli.main(["run", "--quick", *arguments]) == 2


def test_figures_say_what_is_met(results: Path) -> None:
    row = next(r for r in report.read(results) if r.variant == "fused")
    row = replace(row, to_sgd=0.8)
    for target, mark in ((">= 0.7", " met"), ("<= 0.7", "NOT met"), ("<= 0.8", " met")):
        (line,) = report.figures([row], {("fused", "to_sgd"): target})
        assert mark in line


def test_memory_counts_what_a_step_holds() -> None:
    found = memory.measure("quick-mlp", "fused", threads=1)
    model = specs.workload_named("quick-mlp").model("cpu")
    weights = sum(p.nbytes for p in model.parameters())
    assert found["resident_bytes"] >= 2 * weights  # and momentum
    assert found["allocated_bytes"] > found["resident_bytes"]  # activations
    assert found["peak_bytes"] >= found["resident_bytes"]


def test_memory_of_an_unknown_workload_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="no such"):
        memory.measure("no such", "sgd", threads=1)
    with pytest.raises(ValueError, match="expected one of"):
        specs.workload_named("no such")


def test_live_tensors_are_counted_once_per_storage() -> None:
    before = memory.live_tensor_bytes()
    a = torch.ones(1000)
    views = [a[:10], a.view(10, 100)]
    assert memory.live_tensor_bytes() - before == a.nbytes
    del views, a
    assert memory.live_tensor_bytes() == before


def test_floor_holds_every_product_once() -> None:
    model = specs.lenet(2, (12, 12))
    found = floor.layers(model, torch.rand(4, 1, 28, 28))
    assert [layer.products for layer in found] == [2, 3, 3, 3, 3]
    conv, dense = found[1], found[3]
    assert conv.flops == 2 * 4 * 2 * 8 * 8 * (2 * 5 * 5)
    assert dense.flops == 2 * 4 * 12 * 12
    for aten in (False, True):
        for call in floor.calls(found, None, aten=aten):
            call()


def test_floor_products_are_those_of_the_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 40)
    x = torch.randn(5, 7)
    found = floor.layers(torch.nn.Sequential(torch.nn.Identity(), layer), x)[0]
    tiled = floor.calls([replace(found, first=False)], None, aten=False)
    whole = floor.calls([replace(found, first=False)], None, aten=True)
    s_tiled, s_whole = tiled[1].args[0], whole[1].args[0]
    with torch.no_grad():
        torch.testing.assert_close(tiled[0](), whole[0]())
        torch.testing.assert_close(tiled[1](), s_tiled @ layer.weight)
        torch.testing.assert_close(torch.cat([c() for c in tiled[2:]]), s_tiled.t() @ x)
        torch.testing.assert_close(whole[2](), s_whole.t() @ x)


@pytest.mark.parametrize("variant", ["fused", "dropin", "reference"])
def test_step_variants_make_the_same_update(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compared algorithms do the same work: one step, one result."""
    monkeypatch.setattr(steps, "LR", 1e-2)
    workload = specs.workload_named("quick-mlp")
    expected = steps.build(workload, "reference", "cpu")
    actual = steps.build(workload, variant, "cpu")
    start = [p.detach().clone() for p in actual.model.parameters()]
    for step in (expected, actual):
        step.run()
        step.run()
        step.close()
    for a, e, s in zip(actual.model.parameters(), expected.model.parameters(), start):
        assert not torch.equal(a, s)
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_interleaving_and_ratios() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleave(runs, timing.Plan(repeats=4, min_sample=0, warmup=1))
    assert order[-16:] == list("aabb" * 4)  # one run to settle, one that counts
    assert [len(v) for v in times.values()] == [4, 4]
    assert timing.paired_ratio([2, 4, 9], [1, 2, 3]) == 2
    assert timing.percentile([3, 1, 2], 50) == 2
    assert timing.percentile([0, 10], 10) == 1


def test_peak_says_what_the_processor_can_do(monkeypatch, capsys) -> None:
    monkeypatch.setattr(peak, "TURNS", 10_000)
    status = peak.main()
    shown = capsys.readouterr()
    if status:  # no AVX-512, no pairs of bfloat16, or no compiler
        assert status == 2 and shown.err.startswith("error: ")
    else:
        assert re.search(r"^bfloat16 .*GFLOP/s on one thread", shown.out, re.M)
        assert "five products of the 4096 MLP" in shown.out
