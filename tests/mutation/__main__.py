"""Runs the mutation suite and prints which planted bugs were caught."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

from . import Group, Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "lfp_kernels", "tests", "pyproject.toml")
LIMIT = 600  # seconds for one mutant: a bug may be an endless loop
GOAL = 0.95
# Files whose `case ScalarType::X: return ...` lines choose what is compiled.
DISPATCHERS = ("csrc/common.h", "csrc/cuda/product_types.cuh")
CASE = re.compile(r"^ *case ScalarType::(\w+): return.*\n", re.MULTILINE)
FLOAT = re.compile(
    r"^ *case ScalarType::Float:\n(.*\n)*? *return f\(float\{\}, float\{\}\);\n", re.M
)
# Files that name the types they are compiled for themselves.
INSTANTIATORS = ("csrc/cuda/conv_rules.cu", "csrc/cuda/linear_rules.cu")
INSTANCE = re.compile(r"^LFP_INSTANTIATE\((\w+)\)\n", re.MULTILINE)
PRODUCT = re.compile(r"^ *if \(product == ScalarType::\w+\) return.*\n", re.MULTILINE)


class BrokenTests(Exception):
    """The tests said nothing about the bug: they did not start, or fail without it too."""


def copy_tree(to: Path) -> Path:
    """Always to the same place: the path of a source is part of what the caches go by."""
    shutil.rmtree(to, ignore_errors=True)
    for name in COPIED:
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignore)
        else:
            shutil.copy(source, to / name)
    return to


def run_tests(tree: Path, backend: str, group: Group) -> tuple[bool, str]:
    """Whether the group's tests pass in this tree, and what they said."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    if group.sources:
        environment["LFP_SIM_SOURCES"] = group.sources
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--simulate", backend, *shlex.split(group.tests)]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return False, f"no end after {LIMIT} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if done.returncode > 1:  # 0 passed, 1 failed, below 0 crashed
        errors = [line for line in lines if "error" in line.lower()]
        raise BrokenTests(f"pytest exit {done.returncode}: {(errors or [last])[0]}")
    failure = [line[1:].strip() for line in lines if line.startswith("E  ")]
    return done.returncode == 0, failure[0] if failure else last


@contextmanager
def fewer_types(tree: Path, group: Group) -> Iterator[None]:
    """Compiles the kernels for the group's element types only."""
    types = group.dtypes.split()
    files = [tree / name for name in DISPATCHERS + INSTANTIATORS] if group.dtypes else []
    texts = [file.read_text() for file in files]
    for file, text in zip(files, texts):
        kept = CASE.sub(lambda m: m[0] if m[1] in types else "", text)
        kept = INSTANCE.sub(lambda m: m[0] if m[1].title() in map(str.title, types) else "", kept)
        kept = PRODUCT.sub("", kept) if "Float" in types else FLOAT.sub("", kept)
        file.write_text(kept)
    try:
        yield
    finally:
        for file, text in zip(files, texts):
            file.write_text(text)


def try_mutation(tree: Path, backend: str, group: Group, mutation: Mutation) -> tuple[bool, str]:
    """Plants the bug, runs the tests, takes it out again; whether it was caught."""
    with fewer_types(tree, group):
        file = tree / mutation.file
        text = file.read_text()
        file.write_text(text.replace(mutation.before, mutation.after))
        try:
            passed, said = run_tests(tree, backend, group)
        finally:
            file.write_text(text)
    return not passed, said


def check_texts(jobs: list[tuple[Group, Mutation]]) -> None:
    """Every text that is to be replaced occurs once."""
    for _, mutation in jobs:
        count = (ROOT / mutation.file).read_text().count(mutation.before)
        if count != 1:
            raise SystemExit(f"{mutation.file}: {count} times, not once:\n{mutation.before}")


def key(mutation: Mutation) -> tuple[str, str, str]:
    return mutation.file, mutation.before, mutation.after


def first_of_each_file(
    jobs: list[tuple[Group, Mutation]], count: int
) -> list[tuple[Group, Mutation]]:
    seen: Counter[str] = Counter()
    kept = []
    for job in jobs:
        seen[job[1].file] += 1
        if seen[job[1].file] <= count:
            kept.append(job)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("backend", choices=("cuda", "triton"))
    parser.add_argument("-k", dest="only", default="", help="only files whose path has this text")
    parser.add_argument("--why", default="", help="only bugs whose kind has this text")
    parser.add_argument("--first", type=int, default=0, help="only so many bugs of each file")
    parser.add_argument(
        "--results", type=Path, help="file to append to; what it says was caught is not run again"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--no-baseline", action="store_true", help="trust that the tests pass without a bug"
    )
    options = parser.parse_args()
    groups = importlib.import_module(f"{__package__}.{options.backend}_bugs").GROUPS
    jobs = [
        (g, m) for g in groups for m in g.mutations
        if options.only in m.file and options.why in m.why
    ]  # fmt: skip
    check_texts(jobs)
    if options.first:
        jobs = first_of_each_file(jobs, options.first)
    words: dict[str, Counter[str]] = {}
    if options.results and options.results.exists():
        known = [json.loads(line) for line in options.results.read_text().splitlines()]
        done = {(entry["file"], entry["before"], entry["after"]) for entry in known}
        for _, mutation in jobs:
            if key(mutation) in done:
                words.setdefault(mutation.file, Counter())["caught"] += 1
        jobs = [job for job in jobs if key(job[1]) not in done]
    trees: SimpleQueue[Path] = SimpleQueue()
    folder = Path(tempfile.gettempdir()) / f"lfp_mutation_{options.backend}"
    for k in range(options.workers):
        trees.put(copy_tree(folder / f"worker{k}"))

    def baseline(group: Group) -> None:
        tree = trees.get()
        try:
            with fewer_types(tree, group):
                passed, said = run_tests(tree, options.backend, group)
        finally:
            trees.put(tree)
        if not passed:
            raise BrokenTests(f"fails without a bug: {said}")

    def work(job: tuple[Group, Mutation]) -> tuple[Mutation, str, str, float]:
        tree, start = trees.get(), time.monotonic()
        try:
            found, said = try_mutation(tree, options.backend, *job)
            word = "caught" if found else "MISSED"
        except BrokenTests as error:
            word, said = "BROKEN", str(error)
        finally:
            trees.put(tree)
        return job[1], word, said, time.monotonic() - start

    missed: list[Mutation] = []
    with ThreadPoolExecutor(options.workers) as pool:
        for group in dict.fromkeys(g for g, _ in jobs):
            if not options.no_baseline:
                baseline(group)
            for mutation, word, said, seconds in pool.map(work, [j for j in jobs if j[0] is group]):
                print(f"{word} {mutation.file} [{mutation.why}] {seconds:.0f} s: {said[:110]}")
                sys.stdout.flush()
                words.setdefault(mutation.file, Counter())[word] += 1
                if word != "caught":
                    missed.append(mutation)
                elif options.results:
                    with options.results.open("a") as file:
                        print(json.dumps(asdict(mutation)), file=file)
    shutil.rmtree(folder, ignore_errors=True)
    for file, counts in words.items():
        print(f"{file}: {counts['caught']} of {counts.total()}")
    caught, total = (
        sum(counts["caught"] for counts in words.values()),
        sum(counts.total() for counts in words.values()),
    )
    print(f"{caught} of {total} planted bugs caught ({caught / max(1, total):.1%})")
    for mutation in missed:
        print(f"not caught: {mutation.file} [{mutation.why}]: {mutation.survives or 'UNEXPLAINED'}")
    unexplained = [m for m in missed if not m.survives]
    return 1 if unexplained or caught < GOAL * total else 0


if __name__ == "__main__":
    sys.exit(main())
