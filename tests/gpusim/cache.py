"""Compiled things, kept on disk under the hash of everything that went into them."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "runtime"


class BuildError(RuntimeError):
    """A compiler refused its input; the message carries its output."""


def directory() -> Path:
    """The cache folder: $GPUSIM_CACHE, or one in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("GPUSIM_CACHE") or Path(base) / "lfp_gpusim")
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*parts: str | bytes | Path) -> str:
    """Hash of texts and of the contents of files."""
    state = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        data = data.encode() if isinstance(data, str) else data
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:24]


def publish(temporary: Path, final: Path) -> Path:
    """Moves a finished file into place at once: sessions may share the cache."""
    os.replace(temporary, final)
    return final


def temporary(final: Path) -> Path:
    return final.with_name(f"{os.getpid()}-{final.name}")


def run(command: list[str | Path], **options) -> str:
    """Runs a compiler; returns what it printed or raises BuildError."""
    try:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    except FileNotFoundError as error:
        hint = "install g++ 12 or newer, or name a compiler in CXX"
        raise BuildError(f"no program {command[0]}: {hint}") from error
    if result.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"[:8000])
    return result.stdout


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def compiler_version() -> str:
    """Part of every key: another compiler must not reuse these files, least of all a PCH."""
    global _version
    if _version is None:
        _version = run([compiler(), "-dumpfullversion", "-dumpmachine"])
    return _version


_version: str | None = None
CXX_FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off")


def shared_library(
    name: str,
    sources: list[Path],
    flags: list[str],
    depends: list[Path] | None = None,
    link: list[str] | None = None,
) -> Path:
    """Compiles C++ sources to a shared library; `depends` are the headers they include."""
    contents = sorted([*sources, *(depends or [])])
    key = digest(compiler_version(), *CXX_FLAGS, *flags, *(link or []), *contents)
    final = directory() / f"{name}-{key}.so"
    if not final.exists():
        new = temporary(final)
        run([compiler(), *CXX_FLAGS, *flags, "-shared", *sources, *(link or []), "-o", new])
        publish(new, final)
    return final
