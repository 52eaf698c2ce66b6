"""What is special about attention on GPUs: its bytes, its memory, its bits, unaligned and strided
operands, wide heads, and that the kernels compile without spills. tests/test_attention.py has the
values. Runs under ``pytest --simulate cuda|triton``."""

from __future__ import annotations

import math

import pytest
import torch
from gpusim import counting, shuffled
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpusim
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("plain", "attnlrp")
EPS = 1e-3


@pytest.fixture
def only_cuda(request) -> None:
    if request.config.getoption("--simulate") != "cuda":
        pytest.skip("of the CUDA kernels")


def tensors(sizes, dtype, placed=lambda t: t) -> list[Tensor]:
    """q, k, v, reward with memory [B, L, H, E]; ``placed`` lays each of them out."""
    b, h, kv, queries, keys, e, f = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    shapes = (b, queries, h, e), (b, keys, kv, e), (b, keys, kv, f), (b, queries, h, f)
    found = [torch.randn(s, generator=g) for s in shapes]
    found[2] += 2  # outputs stay away from the stabilizer
    return [placed(t.to(dtype).transpose(1, 2)) for t in found]


def run(given, mode, mask=None, **options):
    q, k, v, reward = given
    out, lse = F.attention(q, k, v, mask, **options)
    rewards = F.attention_redistribute(
        q, k, v, out, reward, mask, lse=lse, mode=mode, eps=EPS, **options
    )
    return out, lse, *rewards


def check(given, mode, mask=None, **options) -> None:
    def as_double(t):
        return t.double() if t is not None and t.is_floating_point() else t

    with use_backend("reference"):
        truth = run([t.double() for t in given], mode, as_double(mask), **options)
        same = run(given, mode, mask, **options)
    for name, *results in zip(
        ("out", "lse", "q", "k", "v"), run(given, mode, mask, **options), same, truth
    ):
        assert_within_budget(*results, name)


def moved(t: Tensor) -> Tensor:
    """The same tensor, one element behind where a 16-byte access may begin."""
    store = torch.cat([t.new_zeros(1), t.transpose(1, 2).flatten()])[1:]
    b, h, rows, width = t.shape
    return store.view(b, rows, h, width).transpose(1, 2)


def spread(t: Tensor) -> Tensor:
    """Every other head and row of a larger tensor."""
    b, h, rows, width = t.shape
    large = t.new_full((b, 2 * h, 2 * rows, width), math.nan)
    large[:, ::2, ::2] = t
    return large[:, ::2, ::2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [moved, spread], ids=["moved", "spread"])
def test_layouts(layout, dtype, mode) -> None:
    check(tensors((2, 4, 2, 35, 70, 16, 24), dtype, layout), mode, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("e, f", [(128, 72), (40, 256), (250, 17)], ids=str)
def test_wide_heads(e, f, dtype) -> None:
    check(tensors((1, 2, 1, 35, 40, e, f), dtype), "attnlrp", causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [72, 71, 70])
def test_dropout_of_any_row_length(keys, dtype) -> None:
    """A Philox block serves four neighbouring keys, wherever a row of them begins."""
    given = tensors((1, 2, 1, 67, keys, 8, 16), dtype)
    check(given, "attnlrp", dropout=0.25, seed=2**40 + 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["row", "column", "head", "added"])
def test_masks_that_share_memory(kind, mode) -> None:
    """Strides of 0 in any dimension; rows and columns that are hidden."""
    sizes = b, h, _, queries, keys, *_ = (2, 2, 1, 37, 66, 8, 8)
    g = torch.Generator().manual_seed(0)
    shape = {
        "row": (1, 1, 1, keys), "column": (b, 1, queries, 1), "head": (1, h, 1, 1),
        "added": (b, 1, queries, keys),
    }[kind]  # fmt: skip
    mask = torch.rand(shape, generator=g) > 0.3
    if kind == "head":
        mask[0, 0] = False
    if kind == "added":
        mask = torch.randn(shape, generator=g).masked_fill(~mask, -math.inf)
        mask[0, 0, 3] = -math.inf
    out, lse, *_ = run(tensors(sizes, torch.float32), mode, mask, causal=True)
    hidden = lse == math.inf
    assert kind == "row" or hidden.any()
    assert (out[hidden] == 0).all()
    check(tensors(sizes, torch.float32), mode, mask, causal=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_order_of_threads(dtype, mode) -> None:
    given = tensors((1, 4, 2, 70, 70, 16, 16), dtype)
    options = {"causal": True, "dropout": 0.2, "seed": 3}
    expected = run(given, mode, **options)
    for seed in (1, 2):
        with shuffled(seed):
            assert all(map(torch.equal, expected, run(given, mode, **options)))


# ---- bytes and memory


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_of_the_model(dtype, causal, mode, only_cuda) -> None:
    from bench.gpu_model import devices, traffic

    for sizes in (
        (2, 4, 2, 70, 130, 16, 24),
        (1, 2, 1, 130, 40, 72, 64),
        (1, 1, 1, 70, 40, 8, 200),
    ):
        given = tensors(sizes, dtype)
        with counting() as counts, traffic.Recorder(devices.A100) as recorder:
            run(given, mode, causal=causal)
        model = [launch for call in recorder.calls for launch in call.launches]
        assert len(model) == len(counts.launches) == 3
        for formula, counted in zip(model, counts.launches):
            assert formula.kernel in counted.kernel
            detail = [
                (b.name, b.load.bytes, b.load.unique_bytes, b.store.bytes) for b in counted.buffers
            ]
            expected = formula.requested, formula.distinct
            assert expected == (counted.bytes, counted.unique_bytes), (sizes, formula, detail)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_linear(dtype, mode) -> None:
    """Nothing of the size [queries, keys] moves: the distinct bytes of twice the tokens are twice
    as many, and of one block of them hardly more than every operand and result once."""

    def moved_bytes(tokens):
        given = tensors((1, 2, 2, tokens, tokens, 32, 32), dtype)
        with counting() as counts:
            run(given, mode, causal=True)
        return [launch.unique_bytes for launch in counts.launches]

    small, large = moved_bytes(64), moved_bytes(128)
    assert len(small) == len(large) == 3
    for a, b in zip(small, large):
        assert b == 2 * a
    operands = 2 * 64 * 32 * dtype.itemsize  # bytes of q, and of each of the others
    statistics = 2 * 64 * 4
    signal = operands * (mode == "attnlrp")
    # without tensor cores, Triton's kernel of queries reads the signal that it wrote
    again = signal if small[1] > 6 * operands + signal + 2 * statistics else 0
    assert small == [
        4 * operands + statistics, 6 * operands + signal + again + 2 * statistics,
        6 * operands + 2 * statistics,
    ]  # fmt: skip


# ---- compiled for every architecture


@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100", "120"])
@pytest.mark.parametrize("source", ["attention.cu", "attention_redistribute.cu"])
def test_cuda_compiles(source, arch, only_cuda, monkeypatch) -> None:
    """Registers for two blocks of 128 threads, no local memory, tensor cores and wide accesses."""
    import re

    import test_compile_cuda as compiler

    path = compiler.ROOT / "csrc" / "cuda" / source
    report, binary = compiler.compile_one(path, compiler.command(path, arch, monkeypatch))
    kernels = compiler.parse(report)
    assert len(kernels) == report.count("Compiling entry function") > 0
    for name, kernel in kernels.items():
        assert kernel.spilled == kernel.stack == 0, compiler.label(name)
        assert kernel.registers <= 255, compiler.label(name)
    for name, code in compiler.disassemble(binary).items():
        if name in kernels:
            assert not re.search(r"\b(LDL|STL)\b", code), compiler.label(name)
            assert "LDG.E.128" in code and "STG.E.128" in code, compiler.label(name)
            assert ("HMMA" in code) == ("BFloat16" in name or "Half" in name), compiler.label(name)
