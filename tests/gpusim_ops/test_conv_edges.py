"""The convolution kernels where packs, phases and planes end, and on tensors that are not aligned.

Runs under ``pytest --simulate cuda|triton``; test_conv_tiles.py has the edges of the tiles.
"""

from __future__ import annotations

import conv_cases
import pytest
import torch
from conv_cases import RULE, channels_last, forward, layer, oracle

import lfp_kernels.functional as lf
from lfp_kernels import use_backend
from lfp_kernels.testing import assert_within_budget, poisoned_empty

pytestmark = pytest.mark.gpusim

# name: (x shape, O, kernel, arguments of ConvGeometry.make)
EDGES: dict[str, tuple] = {
    "rows of packs": ((2, 8, 12, 16), 12, (3, 3), {"padding": 1}),
    "few channels, a long sum": ((1, 12, 9, 9), 16, (7, 7), {}),  # split over programs
    "pointwise planes": ((3, 24, 8, 8), 20, (1, 1), {}),
    "stride and dilation share a factor": (
        (2, 8, 15, 15), 12, (3, 3), {"stride": 2, "dilation": 4, "padding": 3}),
    "stride 3 of dilation 2": ((2, 8, 13, 16), 8, (3, 2), {"stride": 3, "dilation": 2}),
    "many positions, few channels": ((6, 4, 40, 40), 4, (3, 3), {"padding": 1, "groups": 4}),
    "few channels, transposed": (
        (2, 4, 9, 9), 4, (3, 3), {"stride": 2, "transposed": True, "groups": 2}),
}  # fmt: skip


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch):
    """tensors(name, layout): x, weight, bias, z, reward in float32 and the geometry."""

    def make(name: str, layout: str) -> tuple:
        monkeypatch.setitem(conv_cases.CASES, name, EDGES[name])
        *made, geometry = layer(name)
        x, weight, bias, z, reward = (t.float() for t in made)
        if layout == "channels_last":
            x, z, reward = channels_last(x, z, reward)
        return (x, weight, bias, z, reward), geometry

    return make


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
@pytest.mark.parametrize("name", EDGES)
def test_forward_and_redistribute(name: str, layout: str, tensors) -> None:
    args, geometry = tensors(name, layout)
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend), poisoned_empty():
            made = lf.conv(*args[:3], geometry, relu=True)
            results.append((made, *lf.conv_redistribute(*args, geometry, RULE)))
    truth = forward(*(t.double() for t in args[:3]), geometry).relu()
    for got, same, true in zip(*results, (truth, *oracle(*args, geometry))):
        assert_within_budget(got, same, true)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """A dense copy that starts one element behind what 16-byte accesses need."""
    store = torch.empty(t.numel() + 1, dtype=t.dtype)
    return store[1:].as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
@pytest.mark.parametrize("name", ["rows of packs", "many positions, few channels"])
def test_unaligned_tensors(name: str, layout: str, tensors) -> None:
    """Each tensor in turn lies where wide accesses are not allowed."""
    args, geometry = tensors(name, layout)

    def run(backend: str, *args: torch.Tensor):
        with use_backend(backend):
            fed = lf.conv_redistribute(*args, geometry, RULE)
            return (lf.conv(*args[:3], geometry), *fed)

    same, truth = run("reference", *args), run("reference", *(t.double() for t in args))
    for k, moved in enumerate(args):
        found = run("native", *args[:k], shifted(moved), *args[k + 1 :])
        for a, b, c in zip(found, same, truth):
            assert_within_budget(a, b, c, f"argument {k}")
