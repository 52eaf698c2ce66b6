"""The bugs planted in csrc/cuda, by file."""

from __future__ import annotations

from . import (
    Group,
    attention_bugs,
    cuda_bugs_conv,
    cuda_bugs_linear,
    cuda_bugs_memory,
    cuda_bugs_pool,
    cuda_bugs_rules,
    norms_bugs,
)

GROUPS: tuple[Group, ...] = (
    *cuda_bugs_linear.GROUPS,
    *cuda_bugs_memory.GROUPS,
    *cuda_bugs_pool.GROUPS,
    *cuda_bugs_conv.GROUPS,
    *cuda_bugs_rules.GROUPS,
    *norms_bugs.CUDA_GROUPS,
    *attention_bugs.CUDA_GROUPS,
)
