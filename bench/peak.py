"""The processor's peak: multiply-adds of registers alone, and what the step's products allow.

``python -m bench.peak`` compiles a loop of independent AVX-512 instructions, float32 (vfmadd231ps)
and pairs of bfloat16 (vdpbf16ps), runs it on one thread and on all, and prints GFLOP/s and the
shortest time that the five large products of the 4096 MLP's step at batch 128 can take.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

INSTRUCTIONS = {"float32": ("vfmadd231ps", 2), "bfloat16": ("vdpbf16ps", 4)}
ACCUMULATORS, TURNS, LANES = 24, 40_000_000, 16
PRODUCT = 2 * 128 * 4096 * 4096  # FLOPs of one product

SOURCE = """
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
static void loop(long turns) {{
  for (long i = 0; i < turns; ++i) asm volatile("{body}" ::: {clobbered});
}}
int main(int, char** argv) {{
  const long turns = std::atol(argv[1]);
  std::vector<std::thread> all;
  const auto start = std::chrono::steady_clock::now();
  for (int t = std::atoi(argv[2]); t > 0; --t) all.emplace_back(loop, turns);
  for (auto& t : all) t.join();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  std::printf("%.9f", taken.count());
}}
"""


def gflops(name: str, threads: int, folder: Path) -> float:
    """GFLOP/s of the instruction `name`, the median of five runs.

    Raises:
        subprocess.CalledProcessError: no compiler, or a processor without the instruction.
    """
    instruction, flops = INSTRUCTIONS[name]
    body = "".join(f"{instruction} %%zmm30,%%zmm31,%%zmm{i}\\n" for i in range(ACCUMULATORS))
    clobbered = ",".join(f'"xmm{i}"' for i in range(ACCUMULATORS))
    source, program = folder / f"{name}.cpp", folder / name
    source.write_text(SOURCE.format(body=body, clobbered=clobbered))
    compiler = os.environ.get("CXX", "g++")
    if not program.exists():
        subprocess.run(
            [compiler, "-O2", "-std=c++17", "-mavx512f", "-pthread", source, "-o", program],
            check=True,
        )
    turns = TURNS // ACCUMULATORS

    def seconds() -> float:
        run = subprocess.run(
            [program, str(turns), str(threads)], check=True, capture_output=True, text=True
        )
        return float(run.stdout)

    median = statistics.median(seconds() for _ in range(5))
    return threads * turns * ACCUMULATORS * LANES * flops / median / 1e9


def main() -> int:
    """Exit status: 0; 2 where the processor or the compiler cannot run the loop."""
    if platform.machine() != "x86_64":
        print("error: expected an x86-64 processor with AVX-512", file=sys.stderr)
        return 2
    threads = len(os.sched_getaffinity(0))
    peak: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in INSTRUCTIONS:
            try:
                one, peak[name] = (gflops(name, n, Path(folder)) for n in (1, threads))
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                return 2
            print(f"{name:9} {one:7.0f} GFLOP/s on one thread, {peak[name]:7.0f} on {threads}")
    fp32, bf16 = (PRODUCT / peak[name] / 1e6 for name in ("float32", "bfloat16"))
    print(f"{'':9} bfloat16 / float32: {fp32 / bf16:.2f}")
    print("five products of the 4096 MLP at batch 128, ms at peak:")
    print(f"  float32 {5 * fp32:.1f}   bfloat16 {5 * bf16:.1f}", end="")
    print(f"   bfloat16 feedback {2 * fp32 + 3 * bf16:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
