"""The model of the CUDA kernels' traffic: its formulas' properties, the command, and the counting
of training steps. tests/gpusim_ops/test_cuda_model.py holds the formulas against counted bytes."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.__main__ import main
from bench.gpu_model import (
    LABEL,
    devices,
    occupancy,
    resources,
    roofline,
    shapes,
    steps,
    table,
    targets,
    traffic,
    windows,
)
from bench.gpu_model.launch import Launch
from lfp_kernels import functional as F
from lfp_kernels.nested import NestedReference


def linear_calls(batch: int, size: int, gpu: devices.Gpu = devices.A100) -> list[traffic.Call]:
    x, w, r = (shapes.meta((batch, size), torch.float32) for _ in range(3))
    w, b = shapes.meta((size, size), torch.float32), shapes.meta((size,), torch.float32)
    return traffic.model(lambda: F.linear_redistribute(x, w, b, r, r, signal_in=True), gpu)


def test_distinct_bytes_are_at_most_the_requested_ones() -> None:
    with traffic.as_on_cuda():
        cases = shapes.cases(quick=True)
    for case in cases:
        for gpu in devices.GPUS:
            for call in case.calls(gpu):
                assert call.launches and call.minimum >= call.once > 0, case
                for launch in call.launches:
                    accesses = launch.accesses
                    assert accesses and all(a.distinct <= a.requested for a in accesses), case
                    assert launch.blocks > 0 and launch.threads % 32 == 0


def test_a_small_product_by_hand() -> None:
    """16 x 64 x 64 in one launch of 64 x 64 tiles: one tile, then sums split four ways."""
    x, w = shapes.meta((16, 64), torch.float32), shapes.meta((64, 64), torch.float32)
    (call,) = traffic.model(lambda: F.linear(x, w, None))
    (launch,) = call.launches
    assert (launch.blocks, launch.flops) == (1, 2 * 16 * 64 * 64)
    assert launch.requested == launch.distinct == call.minimum == 4 * (16 * 64 * 2 + 64 * 64)
    x, w = shapes.meta((16, 512), torch.float32), shapes.meta((64, 512), torch.float32)
    (call,) = traffic.model(lambda: F.linear(x, w, None))
    first, second = call.launches
    assert first.blocks == 4
    assert first.stores["partial sums"].requested == 4 * 4 * 16 * 64
    assert second.loads["partial sums"] == first.stores["partial sums"]


def test_traffic_grows_with_the_batch_and_reads_w_once_when_that_is_small() -> None:
    moved = [sum(c.requested for c in linear_calls(n, 1024)) for n in (8, 16, 32, 64, 128, 256)]
    assert moved == sorted(moved)
    (call,) = linear_calls(32, 1024)
    one_pass = call.launches[0]
    assert one_pass.kernel == "one_pass_kernel"
    assert one_pass.loads["weight"].requested == 4 * 1024 * 1024


def test_hopper_takes_its_own_kernel() -> None:
    x, w = shapes.meta((1024, 1024), torch.bfloat16), shapes.meta((1024, 1024), torch.bfloat16)
    kernels = {}
    for gpu in devices.GPUS:
        (call,) = traffic.model(lambda: F.linear(x, w, None), replace(gpu, processors=32))
        kernels[gpu.name] = call.launches[0].kernel
    assert kernels == {"A100 SXM 80GB": "product_kernel", "H100 SXM": "hopper_kernel"}


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel, padding", [(1, 0), (3, 1), (4, 0)])
def test_windows_meet_the_same_pairs_both_ways(stride, dilation, kernel, padding) -> None:
    large = 17
    small = (large + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    sizes = (large, small, kernel, stride, padding, dilation)
    assert windows.down(*sizes).meetings == windows.up(*sizes).real_meetings
    assert windows.up(*sizes).touched <= small and windows.down(*sizes).touched <= large


def test_occupancy_by_hand() -> None:
    launch = Launch("product_kernel", ("SimtCore<float, 128, 128, 8>", "ForwardEpilogue<float>"))
    found = occupancy.of(launch, devices.A100)
    assert found is not None and found.limit == "registers" and not found.spilled
    assert found.blocks == 65536 // (256 * -(-found.registers // 8) * 8)
    assert found.share == found.blocks * 256 / 2048
    assert occupancy.of(Launch("aten"), devices.A100) is None
    launch = replace(launch, shared=100 * 1024)
    assert occupancy.of(launch, devices.A100).blocks == 1  # type: ignore[union-attr]
    assert occupancy.of(replace(launch, shared=200 * 1024), devices.A100).blocks == 0  # type: ignore[union-attr]


def test_every_kernel_has_its_resources() -> None:
    with traffic.as_on_cuda():
        cases = shapes.cases(quick=True)
    for gpu in devices.GPUS:
        for case in cases:
            for call in case.calls(gpu):
                for launch in call.launches:
                    known = occupancy.kernels(launch, gpu.architecture)
                    assert known or launch.kernel == "aten", (launch.kernel, launch.tokens)


def test_report_of_ptxas_is_read() -> None:
    report = (
        "ptxas info    : Compiling entry function 'void lfp::cuda::(anonymous namespace)::k"
        "<(int)4, lfp::cuda::F<float>>(long, int (*)(int))' for 'sm_80'\n"
        "    0 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem, 400 bytes cmem[0]\n"
    )
    assert resources.parse(report) == {"k<4, F<float>>": [40, 64, 12]}


def test_roofline_takes_the_larger_bound() -> None:
    launch = Launch("k", flops=10**12, unit="bf16")
    launch.load("x", 10**9)
    assert roofline.seconds(launch, devices.A100) == (10**12 / 312e12, "compute")
    launch.load("x", 10**9, 10**10)
    assert roofline.seconds(launch, devices.A100) == (10**10 / 2039e9, "memory")


def test_operators_are_counted_by_one_rule() -> None:
    x, y = torch.ones(4, 8), torch.ones(8)
    for run, launches, size in (
        (lambda: x + y, 1, 4 * (32 + 8 + 32)),
        (lambda: x.t()[2].detach().view(2, 2), 0, 0),
        (lambda: x.mul_(2), 1, 4 * 64),
        (lambda: x.copy_(y), 1, 4 * (8 + 32)),
        (lambda: torch._foreach_add_([x, y], [x, y]), 1, 4 * 80),
        (lambda: torch.empty(5), 0, 0),
    ):
        counter = steps.counted(run)
        assert (counter.operators.launches, counter.operators.bytes) == (launches, size)


def test_the_reference_is_counted_as_the_profiler_counts_it() -> None:
    """On real tensors: as many calls of every operator as torch.profiler reports."""
    network = steps.QUICK_NETWORKS[0]
    torch.manual_seed(0)
    model, y = network.build(), torch.arange(network.batch)
    x = torch.rand(network.batch, *network.sample)
    nested = NestedReference(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    with nested.context():
        counts = steps.counted(lambda: nested.step(x, y, optimizer)).operators.by_name
        with profile(activities=[ProfilerActivity.CPU]) as found:
            nested.step(x, y, optimizer)
    profiled: Counter[str] = Counter()
    for event in found.events():
        name, parent = event.name.removeprefix("aten::"), event.cpu_parent
        while parent is not None and parent.name.removeprefix("aten::") not in counts:
            parent = parent.cpu_parent
        if name in counts and parent is None:  # else a counted operator calls it
            profiled[name] += 1
    assert profiled == counts


def test_a_step_moves_less_than_the_reference() -> None:
    c = steps.compare(steps.QUICK_NETWORKS[0])
    assert c.operators.launches <= c.kernels.launches < c.reference.launches
    assert c.bytes < 1 and c.launches < 1
    marks = [str(t).rsplit("  ", 1)[1] for t in targets.of_steps([c])]
    assert set(marks) <= {"met", "NOT met"}


def test_the_switch_of_torch_chooses_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x, weight = shapes.meta((64, 512), torch.float32), shapes.meta((512, 512), torch.float32)
    geometry = F.ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    image, kernel = (shapes.meta(s, torch.float32) for s in ((4, 64, 8, 8), (64, 64, 3, 3)))

    def units() -> set[str]:
        calls = traffic.model(lambda: F.linear(x, weight, None))
        calls += traffic.model(lambda: F.linear_redistribute(x, weight, None, x, x))
        calls += traffic.model(lambda: F.conv(image, kernel, None, geometry))
        calls += traffic.model(
            lambda: F.conv_redistribute(image, kernel, None, image, image, geometry)
        )
        return {launch.unit for c in calls for launch in c.launches if launch.flops}

    try:
        assert units() == {"float"}
        matmul.fp32_precision = "tf32"
        assert units() == {"tf32"}
    finally:
        matmul.fp32_precision = before
    assert units() == {"float"}


def test_the_figures_to_reach_are_reached() -> None:
    """A launch or a pass more in a training step, or over W, shows here."""
    found = targets.of_steps([steps.compare(network) for network in steps.NETWORKS])
    cases = [c for c in shapes.cases() if c.group == "small batch"]
    found += targets.of_rows([table.row_of(c, gpu) for gpu in devices.GPUS for c in cases])
    assert len(found) == 4 * len(steps.NETWORKS) + 2 * 6
    assert not [str(t) for t in found if not t.met]


def test_command(tmp_path, capsys) -> None:
    assert main(["gpu-model", "--quick", "--no-page", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"bench gpu-model: {LABEL}\n")
    assert LABEL == "model, not measured"
    for line in text.splitlines():  # every table's header says it
        if line.startswith(("A100", "H100", "a training step", "figures to reach")):
            assert line.endswith(LABEL)
    with (tmp_path / "gpu_model.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["label"] == LABEL for row in rows)


def test_page(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["gpu-model", "--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "gpu_model.html").read_text()
    assert f"<h1>lfp_kernels on GPUs: {LABEL}</h1>" in page and "data:image/png" in page
