"""The heap of a long run is given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lfp_kernels
from lfp_kernels import composites, heap, optim, rewards


@pytest.mark.skipif(heap.heap_bytes() == (0, 0), reason="the C library is not glibc >= 2.33")
def test_what_is_in_use_is_seen():
    before = heap.heap_bytes()[0]
    blocks = [bytearray(1 << 16) for _ in range(64)]  # too small to be mapped on their own
    assert heap.heap_bytes()[0] - before > len(blocks) << 15


def test_gives_back_what_is_free(monkeypatch):
    sizes, trimmed = [(100, 400)], []

    class Library:
        malloc_trim = trimmed.append

    monkeypatch.setattr(heap, "heap_bytes", lambda: sizes[0])
    monkeypatch.setattr(heap, "_LIBRARY", Library)
    monkeypatch.setattr(heap, "SLACK", 200)
    heap.HEAP.steps = heap.HEAP.trims = 0
    model = nn.Linear(4, 2)
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(0.1))
    x, y = torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
    for _ in range(heap.EVERY):
        step(x, y)
    assert not trimmed  # no more than twice what is in use, and the slack
    sizes[0] = (100, 401)
    for _ in range(heap.EVERY - 1):
        step(x, y)
    assert not trimmed
    step(x, y)
    assert trimmed == [0]
    assert heap.HEAP.trims == 1
    composite = composites.Epsilon()
    for _ in range(heap.EVERY):  # the drop-in way counts too
        with composite.context(model):
            out = model(x)
        lfp_kernels.backward(out, rewards.softmax(out, y))
    assert trimmed == [0, 0]


def test_other_c_libraries(monkeypatch):
    monkeypatch.setattr(heap, "_LIBRARY", None)
    assert heap.heap_bytes() == (0, 0)
    keeper = heap.Heap()
    for _ in range(3 * heap.EVERY):
        keeper.step()
    assert keeper.trims == 0
