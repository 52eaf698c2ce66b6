"""One training step of lfprop, of its drop-in and of the fused way: ``python -m bench.peers``.

Needs an environment that has lfprop 1.0.0 and its dependencies (transformers < 5). A step is what
lfprop's own loop does: composite's context, forward, reward, input reward by autograd,
``grad = -feedback``, SGD with momentum. Before anything is timed, both packages must have given the
same feedback.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

import lfp_kernels

from .environment import environment
from .timing import Plan, interleave, paired_ratio, settle_allocator

OWN = "lfp_kernels.compat.lfprop"
PACKAGES = ("lfprop", OWN)
EPSILON, LR, MOMENTUM, BATCH = 1e-6, 1e-6, 0.9, 128
TOLERANCE = 1e-5


def part(package: str, path: str) -> ModuleType:
    return importlib.import_module(f"{package}.{path}")


def mlp(package: str) -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))


def lenet(package: str) -> nn.Module:
    return part(package, "model.model_definitions").LeNet(1, 10)


WORKLOADS: dict[str, tuple[Callable[[str], nn.Module], tuple[int, ...]]] = {
    "MLP 784-1024-10, batch 128": (mlp, (BATCH, 784)),
    "LeNet, batch 128": (lenet, (BATCH, 1, 28, 28)),
}


def build(workload: str, package: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Model and batch, the same numbers for both packages."""
    make, shape = WORKLOADS[workload]
    torch.manual_seed(0)
    model = make(package)
    return model, torch.randn(shape), torch.randint(10, (shape[0],))


def propagate(
    package: str, model: nn.Module, x: Tensor, y: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Runs (output, input reward) and leaves ``.feedback``, as lfprop's README does."""
    composite = part(package, "propagation.propagator_lxt").LFPEpsilonComposite(epsilon=EPSILON)
    reward_func = part(package, "rewards.reward_functions").SoftmaxLossReward("cpu")

    def run() -> tuple[Tensor, Tensor]:
        with composite.context(model) as modified:
            inputs = x.detach().requires_grad_(True)
            out = modified(inputs)
            reward = reward_func(out, y).detach()
            (found,) = torch.autograd.grad((out,), (inputs,), grad_outputs=(reward,))
        return out, found

    return run


def loop_step(workload: str, package: str) -> Callable[[], object]:
    model, x, y = build(workload, package)
    run = propagate(package, model, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

    def step() -> None:
        run()
        for parameter in model.parameters():
            parameter.grad = -parameter.feedback  # type: ignore[attr-defined]
        optimizer.step()

    return step


def fused_step(workload: str) -> Callable[[], object]:
    model, x, y = build(workload, OWN)
    step = lfp_kernels.fuse(
        model,
        lfp_kernels.composites.Epsilon(eps=EPSILON),
        reward="softmax",
        optimizer=lfp_kernels.optim.SGD(lr=LR, momentum=MOMENTUM),
    )
    return lambda: step(x, y)


def largest_difference(workload: str) -> float:
    """Of outputs, input rewards and feedback between the packages, relative to each one's size."""
    found = []
    for package in PACKAGES:
        model, x, y = build(workload, package)
        model = copy.deepcopy(model).double()
        torch.manual_seed(1)  # dropout
        out, reward = propagate(package, model, x.double(), y)()
        found.append([out.detach(), reward, *(p.feedback for p in model.parameters())])
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--threads", type=int, help="of every variant (torch's default)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lxt")
    try:
        part("lfprop", "propagation.propagator_lxt")
    except ImportError as error:
        print(f"error: lfprop cannot be imported here: {error}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    settle_allocator()
    here = environment("cpu")
    print(f"{here.machine}, {here.threads} threads, torch {here.torch}, {here.commit}, {here.date}")
    print("| workload | lfprop ms | drop-in / lfprop | fused / lfprop |\n|---|---|---|---|")
    for workload in WORKLOADS:
        difference = largest_difference(workload)
        if not difference < TOLERANCE:
            print(f"error: {workload}: results differ by {difference:.1e}", file=sys.stderr)
            return 1
        times = interleave(
            {
                "lfprop": loop_step(workload, "lfprop"),
                "drop-in": loop_step(workload, OWN),
                "fused": fused_step(workload),
            },
            Plan(repeats=options.repeats),
        )
        ratios = [f"{paired_ratio(times[k], times['lfprop']):.2f}" for k in ("drop-in", "fused")]
        milliseconds = 1e3 * statistics.median(times["lfprop"])
        print(f"| {workload} | {milliseconds:.2f} | {' | '.join(ratios)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
