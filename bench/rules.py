"""``python -m bench rules``: every learning rule, found by its registry.

Two tables. *Layers*: ``linear_redistribute_update`` of each rule on one large layer behind a ReLU,
compiled against the reference backend, and the memory that each needs besides the result.
*Networks*: the fused step of each method of the feedback-alignment family against a gradient step
(autograd, torch SGD with momentum) on the same network and batch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import lfp_kernels
from lfp_kernels import composites as C
from lfp_kernels import functional as F
from lfp_kernels import optim, use_backend
from lfp_kernels.rules import REGISTRY, Rule

from . import memory, timing

LR, MOMENTUM = 1e-6, 0.9
# (name, N, I, O)
LAYERS = {"4096": (128, 4096, 4096), "800": (1024, 800, 800)}
QUICK_LAYERS = {"64": (8, 64, 64)}
# widths and batch
NETWORKS = {
    "784-800-800-10, batch 1024": ([784, 800, 800, 10], 1024),
    "ten of 1024, batch 1024": ([1024] * 10 + [10], 1024),
}
QUICK_NETWORKS = {"16-16-4, batch 8": ([16, 16, 4], 8)}
METHODS: dict[str, Callable[[], C.Composite]] = {
    "FA": lambda: C.FeedbackAlignment(),
    "uSF": lambda: C.UniformSignSymmetry(),
    "brSF": lambda: C.BatchSignSymmetry(),
    "frSF": lambda: C.FixedSignSymmetry(),
    "KP": lambda: C.KolenPollack(),
    "DFA": lambda: C.DirectFeedbackAlignment(),
    "sDFA": lambda: C.DirectFeedbackAlignment("sdfa"),
    "DRTP": lambda: C.DirectFeedbackAlignment("drtp"),
    "TF": lambda: C.TargetFeedback(),
    "NF": lambda: C.NonlinearFeedback(),
    "NFA": lambda: C.NoisyFeedbackAlignment(),
    "LinBP": lambda: C.LinBP(),
    "LFP-epsilon": lambda: C.Epsilon(),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--threads", type=int, help="threads of every variant (torch's default)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--only", choices=("layers", "networks"), help="one of the two tables")
    parser.add_argument("--rule", action="append", metavar="TEXT", help="rules whose name has it")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory processes")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> int:
    if options.repeats < 1:
        raise ValueError(f"--repeats: expected an int >= 1, got {options.repeats}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    timing.settle_allocator()
    plan = timing.Plan.quick() if options.quick else timing.Plan(repeats=options.repeats)
    if options.only != "networks":
        layers(QUICK_LAYERS if options.quick else LAYERS, plan, options)
    if options.only != "layers":
        networks(QUICK_NETWORKS if options.quick else NETWORKS, plan, options)
    return 0


def chosen(names: Any, options: argparse.Namespace) -> list[str]:
    wanted = options.rule or [""]
    return [n for n in names if any(text.lower() in n.lower() for text in wanted)]


# ---- one layer


def layer_update(rule: Rule, n: int, inputs: int, outputs: int) -> Callable[[], object]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, inputs, generator=g).relu()
    weight = torch.randn(outputs, inputs, generator=g) / inputs**0.5
    matrix = torch.randn(outputs, inputs, generator=g) if rule.takes_matrix else None
    z = x @ weight.t()
    reward = torch.randn(n, outputs, generator=g)
    bound = optim.BoundOptimizer(optim.SGD(LR, momentum=MOMENTUM), [weight])
    update = bound.update_of(weight, bound.param_groups[0])
    return lambda: F.linear_redistribute_update(
        x, weight, None, z, reward, update, None, rule, need_input=rule.has_input, matrix=matrix,
        nonnegative=True,
    )  # fmt: skip


def on(backend: str, run: Callable[[], object]) -> object:
    with use_backend(backend):
        return run()


def layers(sizes: dict[str, tuple[int, int, int]], plan: timing.Plan, options: Any) -> None:
    for size in sizes.values():
        n, inputs, outputs = size
        print(f"\nupdate of a layer {inputs} -> {outputs}, batch {n}, x >= 0, SGD with momentum")
        print(
            f"{'rule':<22} {'native ms':>10} {'reference / native':>19} {'MB more: native':>16} ref"
        )
        for name in chosen(REGISTRY, options):
            run = layer_update(REGISTRY[name](), *size)

            def on(backend: str, run: Callable[[], object] = run) -> object:
                with use_backend(backend):
                    return run()

            times = timing.interleave({b: lambda b=b: on(b) for b in ("native", "reference")}, plan)  # type: ignore[misc]
            native, reference = (timing.percentile(times[b], 0.5) for b in ("native", "reference"))
            more = ["-", "-"]
            if not options.no_memory:
                more = [f"{extra_memory(name, size, b):.0f}" for b in ("native", "reference")]
            print(
                f"{name:<22} {native * 1e3:>10.2f} {reference / native:>19.2f} {more[0]:>16} "
                f"{more[1]}"
            )


def extra_memory(name: str, size: tuple[int, int, int], backend: str) -> float:
    """Megabytes by which one call raises the resident set of a process of its own, its result (the
    input reward) included."""
    result = subprocess.run(
        [sys.executable, "-m", "bench.rules", name, *map(str, size), backend],
        env={**os.environ, **memory.ALLOCATOR}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(result.stdout)


def _measure_here(name: str, n: str, inputs: str, outputs: str, backend: str) -> None:
    run = partial(on, backend, layer_update(REGISTRY[name](), int(n), int(inputs), int(outputs)))
    for _ in range(memory.STEPS_BEFORE):
        run()
    print(memory.rise_of_resident_set(run) / 2**20)


# ---- whole networks


def network(widths: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        parts += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def networks(sizes: dict[str, tuple[list[int], int]], plan: timing.Plan, options: Any) -> None:
    for label, (widths, batch) in sizes.items():
        g = torch.Generator().manual_seed(1)
        x = torch.randn(batch, widths[0], generator=g)
        y = torch.randint(widths[-1], (batch,), generator=g)
        runs: dict[str, Callable[[], object]] = {"SGD": sgd_step(network(widths), x, y)}
        for name in chosen(METHODS, options):
            reward = "softmax" if name == "LFP-epsilon" else "cross_entropy"
            step = lfp_kernels.fuse(
                network(widths), METHODS[name](), reward=reward,
                optimizer=optim.SGD(LR, momentum=MOMENTUM),
            )  # fmt: skip
            runs[name] = partial(step, x, y)
        times = timing.interleave(runs, plan)
        base = timing.percentile(times["SGD"], 0.5)
        print(f"\nfused step / gradient step (autograd, torch SGD, foreach), {label}")
        print(f"gradient step {base * 1e3:.2f} ms")
        for name in list(times)[1:]:
            print(f"{name:<14} {timing.percentile(times[name], 0.5) / base:.2f}")


def sgd_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    _measure_here(*sys.argv[1:])
