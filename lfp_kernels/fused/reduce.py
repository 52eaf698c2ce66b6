"""Feedback summed over the processes of a group, a bucket at a time, while the walk goes on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 4 << 20


class Buckets:
    """All-reduces that are under way.

    Feedback is a sum over the batch, so its sum over processes is that of one process on the whole
    batch. A bucket starts to travel as soon as it is full.
    """

    def __init__(self, group: Any, limit: int = BUCKET_BYTES) -> None:
        self.group, self.limit = group, limit
        self.waiting: list[Tensor] = []
        self.bytes = 0
        self.sent: list[tuple[Any, Tensor, list[Tensor]]] = []

    def add(self, feedback: Tensor) -> None:
        """Sum ``feedback`` in place, by the end of :meth:`finish`."""
        if self.waiting and self.waiting[0].dtype != feedback.dtype:
            self.send()
        self.waiting.append(feedback)
        self.bytes += feedback.numel() * feedback.element_size()
        if self.bytes >= self.limit:
            self.send()

    def send(self) -> None:
        if not self.waiting:
            return
        members, self.waiting, self.bytes = self.waiting, [], 0
        flat = torch.cat([m.reshape(-1) for m in members])
        work = self._guarded(dist.all_reduce, flat, group=self.group, async_op=True)
        self.sent.append((work, flat, members))

    def finish(self) -> None:
        """Wait for everything that was added.

        Raises:
            RuntimeError: another process is gone. Parameters are as before the step.
        """
        self.send()
        for work, flat, members in self.sent:
            self._guarded(work.wait)
            for member, total in zip(members, flat.split([m.numel() for m in members])):
                member.copy_(total.view(member.shape))
        self.sent = []

    def _guarded(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RuntimeError as error:
            rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
            raise RuntimeError(
                f"fuse: process_group: rank {rank} of {size} lost another process during the "
                f"all-reduce of feedback ({error}); parameters are as before this step: start all "
                "processes again from the last checkpoint"
            ) from error


def check_group(group: Any) -> Any:
    """The group, after a look at whether it can be used."""
    if group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "fuse: process_group: expected a group of an initialised torch.distributed; call "
            "torch.distributed.init_process_group first (torchrun sets what it needs)"
        )
    return dist.group.WORLD if group is True else group
