"""``python -m bench tune``: measures tiles of Triton's products on this GPU and writes the table of
``LFP_KERNELS_TUNED`` (lfp_kernels/ops/_tuned.py)."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.ops import _tuned
from lfp_kernels.ops._tuned import LEGAL, Choice, Size

from . import timing
from .environment import environment

# Rows, inputs, outputs; and batch, channels, height, filters, kernel, stride of ResNet's stages.
LINEAR = ((128, 784, 256), (64, 4096, 4096), (1024, 4096, 4096))
CONV = ((64, 64, 56, 64, 3, 1), (64, 128, 28, 128, 3, 1), (64, 256, 14, 256, 3, 1),
        (64, 256, 14, 512, 1, 2), (64, 512, 7, 512, 3, 1))  # fmt: skip
GAIN = 0.97  # of the heuristic's time: what wins by less may have won by noise
START = Choice(64, 64, 32, 1, 4, 3)
_SAMPLES = 9


@dataclass(frozen=True)
class Job:
    """One product of one layer: a call that consists of it."""

    label: str
    run: Callable[[], Tensor]


def linear_jobs(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> list[Job]:
    x, weight, reward = (
        torch.randn(size, device=device, dtype=dtype)
        for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    z = x @ weight.T
    label = f"{rows} x {inputs} x {outputs} {str(dtype).removeprefix('torch.')}"

    def feedback(k: int) -> Tensor:
        found = F.linear_redistribute(x, weight, None, z, reward, need=(k == 0, k == 1, False))[k]
        assert found is not None
        return found

    return [
        Job(f"linear forward {label}", lambda: F.linear(x, weight)),
        Job(f"linear input {label}", lambda: feedback(0)),
        Job(f"linear weight {label}", lambda: feedback(1)),
    ]


def conv_jobs(
    batch: int, channels: int, height: int, filters: int, kernel: int, stride: int,
    dtype: torch.dtype, device: str,
) -> list[Job]:  # fmt: skip
    if channels <= 4 and filters <= 4:
        raise ValueError(
            f"--conv: expected more than 4 channels or filters, got {channels} and {filters}; fix: "
            "leave it out, the tiles of so few are not chosen"
        )
    shape = (batch, channels, height, height)
    x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(filters, channels, kernel, kernel, device=device, dtype=dtype)
    geometry = F.ConvGeometry.make((kernel, kernel), stride, kernel // 2)
    z = F.conv(x, weight, None, geometry)
    reward = torch.randn_like(z)
    label = f"{'x'.join(map(str, shape))}, {filters} of {kernel}x{kernel} by {stride}"
    label += f" {str(dtype).removeprefix('torch.')}"

    def feedback(k: int) -> Tensor:
        need = (k == 0, k == 1, False)
        found = F.conv_redistribute(x, weight, None, z, reward, geometry, need=need)[k]
        assert found is not None
        return found

    return [
        Job(f"conv forward {label}", lambda: F.conv(x, weight, None, geometry)),
        Job(f"conv input {label}", lambda: feedback(0)),
        Job(f"conv weight {label}", lambda: feedback(1)),
    ]


# ---- search


def neighbours(choice: Choice) -> Iterator[Choice]:
    """Every choice that differs in one field by one step; splits go by factors of 2."""
    for field in Choice._fields:
        value = getattr(choice, field)
        legal = [v for v in LEGAL[field] if field != "splits" or v & (v - 1) == 0]
        at = legal.index(value)
        for step in (at - 1, at + 1):
            if 0 <= step < len(legal):
                yield choice._replace(**{field: legal[step]})


def search(start: Choice, cost: Callable[[Choice], float]) -> tuple[Choice, float]:
    """The best choice that single steps lead to; each is measured once."""
    known = {start: cost(start)}
    best = start
    while True:
        for choice in neighbours(best):
            if choice not in known:
                known[choice] = cost(choice)
        least = min(known, key=known.__getitem__)
        if least == best or not known[least] < known[best]:
            return best, known[best]
        best = least


class _Asked(dict[Size, Choice]):
    """A table that is empty and keeps what it was asked for."""

    def __init__(self) -> None:
        self.keys_asked: list[Size] = []

    def get(self, key: Size, default: Any = None) -> Any:
        self.keys_asked.append(key)
        return default


def tune(job: Job, sample: Callable[[Callable[[], Any]], float]) -> tuple[Size, Choice | None, Any]:
    """(size, the tile where it beats the heuristic, times in seconds) of a job.

    Args:
        sample: seconds of a call.

    Raises:
        RuntimeError: a tile gives other values than the heuristic's; no table is written of those.
    """
    from triton.runtime.errors import OutOfResources, PTXASError

    asked = _Asked()
    with _tuned.using(asked):
        expected = job.run()
        heuristic = sample(job.run)
    (key,) = set(asked.keys_asked)
    scale = float(expected.abs().max())
    # The order of a sum moves, so results differ by roundings; a wrong tile is wrong by a term.
    allowed = (2e-4 if key.dtype == "float32" and key.mode == "ieee" else 2e-2) * scale

    def cost(choice: Choice) -> float:
        if choice.m * choice.n > 128 * 256:
            return math.inf
        with _tuned.using({key: choice}):
            try:
                found = job.run()
            except (OutOfResources, PTXASError):
                return math.inf
            error = float((found.float() - expected.float()).abs().max())
            if not error <= allowed:
                raise RuntimeError(f"{job.label}: {choice} is off by {error:.3g}; fix: report it")
            return sample(job.run)

    best, least = search(START, cost)
    times = {"heuristic_us": heuristic * 1e6, "us": least * 1e6}
    return key, best if least < GAIN * heuristic else None, times


# ---- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=run)
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"), help="folder of the table")
    parser.add_argument(
        "--linear", action="append", metavar="N,I,O", type=_sizes(3), help="rows, inputs, outputs"
    )
    parser.add_argument(
        "--conv", action="append", metavar="N,C,H,O,K,S", type=_sizes(6),
        help="batch, channels, height, filters, kernel, stride",
    )  # fmt: skip
    parser.add_argument("--dtype", action="append", choices=_tuned.DTYPES, help="of the tensors")


def _sizes(count: int) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        parts = text.split(",")
        if len(parts) != count or not all(p.isdecimal() and int(p) for p in parts):
            raise argparse.ArgumentTypeError(f"expected {count} ints >= 1 by commas, got {text}")
        return tuple(map(int, parts))

    return parse


def run(options: argparse.Namespace) -> int:
    """Exit status 0, whether tiles were found that beat the heuristic or not."""
    if not torch.cuda.is_available():
        raise ValueError("bench tune: no GPU in this machine; nothing was measured")
    from tqdm import tqdm

    given = options.linear or options.conv
    by_events = timing.CudaSample()

    def sample(call: Callable[[], Any]) -> float:
        by_events(call, 3)
        return statistics.median(by_events(call, 5) for _ in range(_SAMPLES))

    path, facts = options.out / f"{_tuned.architecture()}.json", asdict(environment("cuda"))
    table: dict[Size, Choice] = {}
    times: dict[Size, Any] = {}
    with use_backend("triton"):
        jobs = []
        for name in options.dtype or ("float32", "bfloat16"):
            for shape in (options.linear or ()) if given else LINEAR:
                jobs += linear_jobs(*shape, getattr(torch, name), "cuda")
            for shape in (options.conv or ()) if given else CONV:
                jobs += conv_jobs(*shape, getattr(torch, name), "cuda")
        for job in tqdm(jobs, unit="product"):
            key, choice, measured = tune(job, sample)
            if choice is not None:
                table[key], times[key] = choice, measured
            # after each product: who stops half way keeps what was found
            _tuned.write(path, table, facts, times)
            tqdm.write(
                f"{job.label}: {measured['heuristic_us']:.1f} us by the heuristic, "
                f"{measured['us']:.1f} us at best" + (f" by {choice}" if choice else ": kept")
            )
    print(f"{path}: {len(table)} tiles; use: {_tuned.VARIABLE}={options.out}")
    return 0
