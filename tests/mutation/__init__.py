"""Bugs planted in the GPU kernels, one at a time; the op tests have to see each of them.

``python -m tests.mutation cuda|triton [-k text] [--workers 2]`` (make test-mutations) copies the
sources, plants a bug, runs the tests of that file in the simulation and expects them to fail.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One planted bug.

    Attributes:
        file: path from the root of the project.
        before: text that occurs in it exactly once. after: what takes its place.
        why: the kind of bug: mask, barrier, stride, epilogue, accumulation, launch, ...
        survives: why no test can see it, where that is so.
    """

    file: str
    before: str
    after: str
    why: str
    survives: str = ""


@dataclass(frozen=True)
class Group:
    """Bugs of one kernel file and the tests that must fail, which must pass without the bug.

    Attributes:
        tests: arguments of pytest, as a shell would read them.
        sources: files of csrc/cuda to build ("" builds all).
        dtypes: the element types to compile, such as "Float BFloat16": what the tests use. nvcc
            takes most of the time of a mutant, and it compiles every kernel once per type.
    """

    tests: str
    mutations: tuple[Mutation, ...]
    sources: str = ""
    dtypes: str = ""


def plant(file: str, *bugs: tuple[str, ...]) -> tuple[Mutation, ...]:
    """The bugs (why, before, after) or (why, before, after, survives) of one file."""
    return tuple(
        Mutation(file, before, after, why, *survives) for why, before, after, *survives in bugs
    )
