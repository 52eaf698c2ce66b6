"""Peak memory of one training step, measured in a process of its own.

    peak     = tensors alive between steps (parameters, buffers, optimizer state, batch, whatever
               the step keeps; each storage once; gradients of the step before are freed)
             + how far the resident set rises above its level during a steady-state step (VmHWM,
               reset just before; freed blocks are handed back to the system at once)
    allocated = the same first term + the highest sum of live allocations of torch's allocator
               during the step (torch.profiler), blind to memory that libraries take themselves

On a CUDA device both are torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DEFINITION = (
    "peak: tensors alive between steps + rise of the resident set's high-water mark in one step"
)
STEPS_BEFORE = 3  # the first allocates the momentum; libraries fill their caches
# Every large block is mapped on its own and unmapped when freed, so that the resident set follows
# what is in use.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


def measure(workload: str, variant: str, threads: int, device: str = "cpu") -> dict[str, int]:
    """{"peak_bytes", "allocated_bytes", "resident_bytes"} from a fresh process.

    Raises:
        RuntimeError: the process failed; the message holds its last line.
    """
    result = subprocess.run(
        [sys.executable, "-m", "bench.memory", workload, variant, str(threads), device],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **ALLOCATOR},
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"bench.memory {workload} {variant}: {last}")
    return json.loads(result.stdout.splitlines()[-1])


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def live_tensor_bytes() -> int:
    """Bytes of all tensors with data that Python can reach, each storage once."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        # Subclasses other than parameters are wrappers of the tracer, without storage of their own.
        if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def rise_of_resident_set(run: Any) -> int:
    _trim()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def _rise_of_allocations(run: Any) -> int:
    """Highest running sum of torch's CPU allocations and frees during ``run``."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def _measure_here(workload: str, variant: str, device: str) -> dict[str, int]:
    from . import specs, steps

    step = steps.build(specs.workload_named(workload), variant, device)
    for _ in range(STEPS_BEFORE):
        step.run()
    step.drop_transients()
    gc.collect()
    resident = live_tensor_bytes()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return {"peak_bytes": peak, "allocated_bytes": peak, "resident_bytes": resident}
    rise = rise_of_resident_set(step.run)
    step.drop_transients()
    allocated = _rise_of_allocations(step.run)
    return {
        "peak_bytes": resident + rise,
        "allocated_bytes": resident + allocated,
        "resident_bytes": resident,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=DEFINITION)
    parser.add_argument("workload")
    parser.add_argument("variant")
    parser.add_argument("threads", type=int)
    parser.add_argument("device")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(_measure_here(arguments.workload, arguments.variant, arguments.device)))


if __name__ == "__main__":
    main()
