"""Two processes on this machine, each with half of the batch, make the step of the whole batch."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim, rewards, rules
from lfp_kernels.nn import LIF, Spiking

WAYS = ("ddp", "fsdp", "fused", "fused-clip", "fused-shared", "fused-spiking")


def model(way):
    torch.manual_seed(0)
    if way == "fused-spiking":
        chain = nn.Sequential(nn.Linear(6, 16), LIF(0.9, 0.3), nn.Linear(16, 4), LIF(0.9, 0.3))
        return Spiking(chain, steps=5, chunk=2).double()
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
    layers += [layers[2], nn.ReLU()] if way == "fused-shared" else []
    return nn.Sequential(*layers, nn.Linear(16, 4)).double()


def data():
    g = torch.Generator().manual_seed(1)
    x = torch.rand(8, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (8,), generator=g)


def composite():
    return composites.Epsilon(layers=[("*2", rules.WSquare())])  # a rule of its own


def drop_in(net, x, y):
    with composite().context(net):
        out = net(x)
        lfp_kernels.backward(out, rewards.softmax(out, y))
    return [p.grad for p in net.parameters()]


def fused(net, x, y, way, group=None):
    clip = 0.05 if way == "fused-clip" else None
    rule = composites.Epsilon() if way == "fused-spiking" else composite()
    step = lfp_kernels.fuse(
        net, rule, reward="snn_rate" if way == "fused-spiking" else "softmax",
        optimizer=optim.SGD(0.1, momentum=0.9, clip_norm=clip), process_group=group,
    )  # fmt: skip
    for _ in range(3):
        step(x, y)
    return [p.detach() for p in net.parameters()]


def part_of_the_work(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x, y = (t.chunk(2)[rank] for t in data())
    for way in WAYS:
        net = model(way)
        if way == "ddp":
            found = [2 * g for g in drop_in(nn.parallel.DistributedDataParallel(net), x, y)]
        elif way == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for layer in net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            fully_shard(net)
            found = [2 * g.full_tensor() for g in drop_in(net, x, y)]  # they take the mean
        else:
            found = fused(net, x, y, way, True)
        if rank == 0:
            queue.put([t.numpy() for t in found])
    dist.barrier()
    dist.destroy_process_group()


def lost(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = model("fused")
    step = lfp_kernels.fuse(net, composites.Epsilon(), optimizer=optim.SGD(0.1), process_group=True)
    step(*(t.chunk(2)[rank] for t in data()))
    if rank == 1:
        os._exit(1)
    before = [p.detach().clone() for p in net.parameters()]
    try:
        for _ in range(3):
            step(*(t.chunk(2)[rank] for t in data()))
    except RuntimeError as error:
        same = all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
        queue.put((str(error), same))
        queue.close()
        queue.join_thread()  # what is in it has left this process
    os._exit(0)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(work):
    queue = mp.get_context("spawn").Queue()
    return queue, mp.spawn(work, (free_port(), queue), nprocs=2, join=False)


def test_two_processes_are_one():
    queue, context = spawn(part_of_the_work)
    results = {way: queue.get(timeout=120) for way in WAYS}
    context.join(60)
    for way, found in results.items():
        net = model(way)
        x, y = data()
        expected = drop_in(net, x, y) if way in ("ddp", "fsdp") else fused(net, x, y, way)
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            torch.testing.assert_close(torch.from_numpy(a), b, msg=way)


def test_a_lost_process_is_named():
    queue, context = spawn(lost)
    message, unchanged = queue.get(timeout=120)
    for process in context.processes:
        process.join(30)
    assert "rank 0 of 2 lost another process" in message and "last checkpoint" in message
    assert unchanged


def test_without_a_group():
    with pytest.raises(ValueError, match="process_group: expected a group of an initialised"):
        lfp_kernels.fuse(
            model("fused"), composites.Epsilon(), optimizer=optim.SGD(0.1), process_group=True
        )
