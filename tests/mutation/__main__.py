"""Runs the mutation suite and prints which planted bugs were caught."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from . import Group, Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "lfp_kernels", "tests", "pyproject.toml")
LIMIT = 600  # seconds for one mutant: a bug may be an endless loop
GOAL = 0.95


def copy_tree(to: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "golden")
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignore)
        else:
            shutil.copy(source, to / name)
    return to


def run_tests(tree: Path, backend: str, group: Group) -> tuple[bool, str]:
    """Whether the group's tests pass in this tree, and the last line of what they said."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    if group.sources:
        environment["LFP_SIM_SOURCES"] = group.sources
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--simulate", backend, *group.tests.split()]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return False, f"no end after {LIMIT} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return done.returncode == 0, lines[-1] if lines else ""


def try_mutation(tree: Path, backend: str, group: Group, mutation: Mutation) -> tuple[bool, str]:
    """Plants the bug, runs the tests, takes it out again; whether it was caught."""
    file = tree / mutation.file
    text = file.read_text()
    if text.count(mutation.before) != 1:
        raise SystemExit(
            f"{mutation.file}: the text occurs {text.count(mutation.before)} times, expected once:"
            f"\n{mutation.before}"
        )
    file.write_text(text.replace(mutation.before, mutation.after))
    try:
        passed, last = run_tests(tree, backend, group)
    finally:
        file.write_text(text)
    return not passed, last


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("backend", choices=("cuda", "triton"))
    parser.add_argument("-k", dest="only", default="", help="only files whose path has this text")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    groups = importlib.import_module(f"{__package__}.{options.backend}_bugs").GROUPS
    jobs = [(g, m) for g in groups for m in g.mutations if options.only in m.file]
    caught, missed = 0, []
    with tempfile.TemporaryDirectory() as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for k in range(options.workers):
            trees.put(copy_tree(Path(folder) / f"worker{k}"))

        def work(job: tuple[Group, Mutation]) -> tuple[Mutation, bool, str, float]:
            tree, start = trees.get(), time.monotonic()
            try:
                found, last = try_mutation(tree, options.backend, *job)
            finally:
                trees.put(tree)
            return job[1], found, last, time.monotonic() - start

        with ThreadPoolExecutor(options.workers) as pool:
            for mutation, found, last, seconds in pool.map(work, jobs):
                word = "caught" if found else "MISSED"
                print(f"{word} {mutation.file} [{mutation.why}] {seconds:.0f} s: {last[:110]}")
                sys.stdout.flush()
                caught += found
                if not found:
                    missed.append(mutation)
    unexplained = [m for m in missed if not m.survives]
    print(f"{caught} of {len(jobs)} planted bugs caught ({caught / max(1, len(jobs)):.1%})")
    for mutation in missed:
        print(f"missed: {mutation.file} [{mutation.why}]: {mutation.survives or 'UNEXPLAINED'}")
    return 1 if unexplained or caught < GOAL * len(jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
