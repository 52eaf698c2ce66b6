"""Executes the PTX of CUDA C++ and Triton kernels on the CPU and checks every memory access.

See README.md. The parts that need torch, triton or nvcc are imported by name when they are used:
gpusim.cuda, gpusim.triton_driver.
"""

from .buffers import DeviceArray, hook_torch, name, unhook_torch
from .counting import counting
from .engine import Kernel, SimError, load, seed, shuffled, statistics, time_limit
from .ptx import PtxError, UnsupportedInstruction

__all__ = [
    "DeviceArray",
    "Kernel",
    "PtxError",
    "SimError",
    "UnsupportedInstruction",
    "counting",
    "hook_torch",
    "load",
    "name",
    "seed",
    "shuffled",
    "statistics",
    "time_limit",
    "unhook_torch",
]
