"""The convolution kernels where their tiles end: channels and positions around each limit, groups,
phases of transposed layers, packs of channels and of widths. Runs under ``pytest --simulate
cuda|triton``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import conv_cases
import pytest
import torch
from conv_cases import DTYPES, RULE, channels_last, copy, forward, layer, oracle, update_for

import lfp_kernels.functional as lf
from lfp_kernels.backends import use_backend
from lfp_kernels.testing import assert_within_budget, poisoned_empty

pytestmark = pytest.mark.gpusim

# name: (x shape, O, kernel, arguments of ConvGeometry.make); in brackets the channels of a group
TILES: dict[str, tuple] = {
    "1-to-17": ((2, 1, 8, 8), 17, (3, 3), {}),
    "3-to-65": ((1, 3, 10, 10), 65, (3, 3), {"padding": 1}),
    "16-to-130-pointwise": ((2, 16, 8, 8), 130, (1, 1), {}),  # 128 positions
    "17-to-64-pointwise": ((1, 17, 5, 13), 64, (1, 1), {}),  # 65 positions
    "64-to-16": ((1, 64, 7, 9), 16, (3, 3), {"padding": 1}),  # 63 positions, a long sum
    "65-to-3": ((2, 65, 5, 8), 3, (2, 2), {}),
    "130-to-17-1d": ((1, 130, 65), 17, (1,), {}),  # 65 positions
    "16-to-64-wide": ((2, 16, 8, 16), 64, (3, 3), {"padding": 1}),  # rows that are packs
    "17-to-20-long": ((5, 17, 11, 12), 20, (3, 3), {"padding": 1}),  # sums over 660 positions
    "stride-dilation": ((1, 17, 13, 17), 16, (3, 2), {"stride": 2, "dilation": 2, "padding": 1}),
    "1d": ((3, 16, 44), 65, (5,), {"padding": 2}),
    "3d": ((2, 17, 3, 4, 5), 16, (2, 3, 3), {"padding": 1, "stride": (1, 2, 1)}),
    "2-groups": ((2, 34, 5, 7), 130, (3, 3), {"padding": 1, "groups": 2}),  # [17, 65]
    "4-groups-stride": ((2, 64, 6, 8), 20, (3, 3), {"stride": 2, "padding": 1, "groups": 4}),
    "108-groups": ((1, 540, 3, 3), 540, (2, 2), {"groups": 108}),  # [5, 5]: the large tile
    "depthwise": ((2, 65, 6, 6), 65, (3, 3), {"padding": 1, "groups": 65}),
    "depthwise-twice": ((2, 16, 6, 8), 32, (3, 3), {"padding": 1, "groups": 16}),
    "depthwise-dilation": (
        (1, 64, 9, 8), 64, (3, 3), {"stride": 2, "dilation": 2, "padding": 2, "groups": 64}
    ),
    "transposed": (
        (1, 17, 6, 7), 65, (3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True},
    ),
    "transposed-packs": ((2, 16, 5, 8), 64, (2, 2), {"stride": 2, "transposed": True}),
    "transposed-groups": (
        (2, 32, 5, 3), 34, (2, 3),
        {"stride": (2, 1), "output_padding": (1, 0), "groups": 2, "transposed": True},
    ),
    "transposed-3d": (
        (1, 16, 2, 3, 4), 3, (2, 2, 3),
        {"stride": (2, 1, 2), "output_padding": (1, 0, 1), "transposed": True},
    ),
}  # fmt: skip
LAYOUTS = [(name, "plain") for name in TILES]
LAYOUTS += [(name, "channels_last") for name, (shape, *_) in TILES.items() if len(shape) > 3]
LONG = ("17-to-64-pointwise", "stride-dilation", "2-groups", "depthwise", "transposed", "3d")


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch):
    """case(name): x, weight, bias, z, reward in float64 and the geometry."""

    def make(name: str) -> tuple:
        monkeypatch.setitem(conv_cases.CASES, name, TILES[name])
        return layer(name)

    return make


def check(actual, reference, truth, name: str) -> None:
    """float64 results and the oracle are equal to a few roundings; others have their budget."""
    if actual.dtype == torch.float64:
        scale = 1e-14 * float(truth.abs().max())
        torch.testing.assert_close(actual, truth, rtol=1e-13, atol=scale * 64, msg=name)
    else:
        assert_within_budget(actual, reference, truth, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_forward_and_redistribute(name, dtype, layout, case) -> None:
    *tensors, geometry = case(name)
    if layout == "channels_last":
        tensors = [*channels_last(*tensors[:2]), tensors[2], *channels_last(*tensors[3:])]
    args = [t.to(dtype) for t in tensors]
    truths = (*oracle(*args, geometry), forward(*(t.double() for t in args[:3]), geometry))
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend), poisoned_empty():
            z = lf.conv(*args[:3], geometry)
            results.append((*lf.conv_redistribute(*args, geometry, RULE), z))
    for what, *three in zip(("input", "weight", "bias", "z"), *results, truths):
        check(*three, what)


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", [0, 1, 2])
@pytest.mark.parametrize("name", ["2-groups", "transposed", "108-groups"])
def test_update_in_place(name, code, dtype, layout, case) -> None:
    *tensors, geometry = case(name)
    if layout == "channels_last":
        tensors = [*channels_last(tensors[0]), *tensors[1:3], *channels_last(*tensors[3:])]
    torch.manual_seed(0)
    updates = [update_for(t, code) for t in tensors[1:3]]
    results = []
    for backend, kind in (("native", dtype), ("reference", dtype), ("reference", torch.float64)):
        # all three start from the same values, those of dtype
        x, w, b, z, reward = (t.to(dtype).to(kind, copy=True) for t in tensors)
        own = [copy(u) for u in updates]
        own = [u._replace(states=[s.to(dtype).to(kind) for s in u.states]) for u in own]
        with use_backend(backend):
            r = lf.conv_redistribute_update(x, w, b, z, reward, geometry, *own, RULE)
        results.append((r, w, b, *own[0].states, *own[1].states))
    for k, (got, same, truth) in enumerate(zip(*results)):
        assert_within_budget(got, same, truth, f"result {k}")


def results_of_layers() -> list[torch.Tensor]:
    results = []
    conv_cases.CASES.update({name: TILES[name] for name in LONG})
    for name in LONG:
        *tensors, geometry = layer(name)
        x, weight, bias, z, reward = (t.float() for t in tensors)
        for last in (False, True):
            if last:
                x, z, reward = channels_last(x, z, reward)
            with use_backend("native"):
                results += lf.conv_redistribute(x, weight, bias, z, reward, geometry, RULE)
                results.append(lf.conv(x, weight, bias, geometry))
    return [t.contiguous() for t in results]


IN_64_BITS = """
import sys
import conftest
from gpusim import hook_torch

hook_torch()
conftest.simulate_cuda(int(sys.argv[2]), int(sys.argv[3]))
import torch
from test_conv_tiles import results_of_layers

torch.save(results_of_layers(), sys.argv[1])
"""


def test_64_bit_positions(request, monkeypatch, tmp_path) -> None:
    """Positions that count in 64 bits, forced upon small tensors, give the same bits."""
    monkeypatch.setattr(conv_cases, "CASES", dict(conv_cases.CASES))
    want = results_of_layers()
    if request.config.getoption("--simulate") == "triton":
        from lfp_kernels.ops.conv import triton as kernels

        monkeypatch.setattr(kernels, "is_long", lambda *tensors: True)
        got = results_of_layers()
    else:
        # The library reads the variable once: in a process of its own.
        here, file = Path(__file__).resolve(), tmp_path / "results.pt"
        options = ("--capability", "--processors")
        numbers = [str(request.config.getoption(name)) for name in options]
        path = os.pathsep.join(str(here.parents[k]) for k in (2, 1, 0))
        sources = "conv.cu,conv_rules.cu"
        environment = {**os.environ, "LFP_KERNELS_INDEX64": "1", "LFP_SIM_SOURCES": sources}
        command = [sys.executable, "-c", IN_64_BITS, str(file), *numbers]
        subprocess.run(command, env={**environment, "PYTHONPATH": path}, check=True)
        got = torch.load(file)
    assert len(got) == len(want) > 0
    for k, (a, b) in enumerate(zip(got, want)):
        assert torch.equal(a, b), f"result {k}"
