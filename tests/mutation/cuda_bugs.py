"""The bugs planted in csrc/cuda, by file."""

from __future__ import annotations

from . import Group, cuda_bugs_linear

GROUPS: tuple[Group, ...] = (*cuda_bugs_linear.GROUPS,)
