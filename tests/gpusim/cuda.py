"""Builds a CUDA C++ library whose kernels run on the executor, host launchers included.

nvcc compiles the real .cu to PTX only; the object is linked with the CUDA-runtime stand-in of
cudart/. Load such a library in a process of its own: its ops stand where the CPU ops stand.
"""

from __future__ import annotations

import _thread
import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import cache as store
from . import engine, toolkit

# nvcc leaves PTX as plain text in the object, for one virtual architecture.
_NVCC_FLAGS = ("-std=c++20", "-O2", "-lineinfo", "--no-compress", "-cudart=none")
_HOST_FLAGS = ("-Xcompiler", "-fPIC")
# Largest dynamic shared memory of a block by compute capability, in KiB; 227 for the others.
_SHARED_OPTIN = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 120: 99, 121: 99}


def shared_optin(capability: int) -> int:
    """Bytes of shared memory that a block may opt into."""
    return _SHARED_OPTIN.get(capability, 227) << 10


def build(
    sources: Sequence[str | Path],
    *,
    name: str,
    arch: str = "80",
    flags: Sequence[str] = (),
    torch: bool = True,
) -> Path:
    """Compiles .cu and .cpp sources to a library for load(); cached by content.

    arch: the virtual architecture, such as "80" or "90a".
    flags: further compiler flags, understood by nvcc (-D, -I, ...).
    torch: compile against the stable ABI of the installed torch and link to it.
    """
    flags = [*flags, *(_torch_compile_flags() if torch else ())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(Path(source), arch, flags), sources))
    objects += _standin_objects()
    # -Bsymbolic: two libraries with kernels of one name must not take each other's host stubs.
    link = ["-Wl,-Bsymbolic", *(_torch_link_flags() if torch else [])]
    key = store.digest(store.compiler_version(), *link, *(o.name for o in objects))
    final = store.directory() / f"{name}-{key}.so"
    if not final.exists():
        new = store.temporary(final)
        store.run([store.compiler(), "-shared", *objects, *link, "-o", new])
        store.publish(new, final)
    return final


def load(path: Path, *, capability: int = 80, processors: int = 108) -> ctypes.CDLL:
    """Loads a built library as if on a device of this compute capability."""
    engine.runtime()
    library = ctypes.CDLL(str(path))
    library.gpusim_init(
        _resolve_kernel, _resolve_variable, capability, processors, shared_optin(capability)
    )
    return library


# ---- compilation


def _torch_root() -> Path:
    import torch

    return Path(torch.__file__).parent


def _torch_compile_flags() -> list[str]:
    # The stable ABI of torch 2.13; the CPU wheel has all its headers.
    target = "-DTORCH_TARGET_VERSION=0x020d000000000000"
    return ["-DUSE_CUDA", target, f"-I{_torch_root() / 'include'}"]


def _torch_link_flags() -> list[str]:
    lib = _torch_root() / "lib"
    return [f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"]


def _compile(source: Path, arch: str, flags: Sequence[str]) -> Path:
    """An object file. A manifest remembers which headers the source read, and their contents."""
    target = ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    command = [*_NVCC_FLAGS, *target, *_HOST_FLAGS, *flags]
    base = store.digest(
        toolkit.version(), store.compiler_version(), *command, str(source.resolve())
    )
    manifest = store.directory() / f"{source.stem}-{base}.json"
    if manifest.exists():
        entry = json.loads(manifest.read_text())
        target_path = store.directory() / entry["object"]
        if target_path.exists() and _unchanged(entry["files"]):
            return target_path
    new = store.temporary(store.directory() / f"{source.stem}-{base}.o")
    dependencies = new.with_suffix(".d")
    extra = ["-x", "cu"] if source.suffix == ".cu" else []
    compiler = [toolkit.nvcc(), *command, "-ccbin", store.compiler(), *extra]
    started = time.time()
    try:
        store.run([*compiler, "-MD", "-MF", dependencies, "-c", source, "-o", new])
        read = _dependencies(dependencies)
        files = {name: store.digest(Path(name)) for name in read}
    finally:
        dependencies.unlink(missing_ok=True)
    # What was edited meanwhile is not what was compiled: an object under its hash would be wrong
    # for ever.
    edited = [name for name in read if Path(name).stat().st_ctime > started]
    if edited:
        new.unlink()
        raise store.BuildError(f"{source}: edited while it was compiled: {', '.join(edited)}")
    final = new.with_name(f"{source.stem}-{store.digest(base, json.dumps(files))}.o")
    store.publish(new, final)
    text = store.temporary(manifest)
    text.write_text(json.dumps({"object": final.name, "files": files}))
    store.publish(text, manifest)
    return final


def _unchanged(files: dict[str, str]) -> bool:
    return all(Path(f).exists() and store.digest(Path(f)) == h for f, h in files.items())


def _dependencies(makefile: Path) -> list[str]:
    """Headers outside the toolkit and the system, whose versions are in the key already."""
    words = makefile.read_text().replace("\\\n", " ").split()[2:]
    system = ("/usr/include/", "/usr/lib/", str(toolkit.root()), str(toolkit.include()))
    resolved = {str(Path(word).resolve()) for word in words}
    return sorted(w for w in resolved if not w.startswith(system) and Path(w).is_file())


def _standin_objects() -> list[Path]:
    folder = store.HERE / "cudart"
    headers = [folder / "state.h", store.RUNTIME / "sim.h", store.RUNTIME / "tensor_map.h"]
    flags = [*store.CXX_FLAGS, "-O1", "-w", "-fvisibility=hidden", f"-I{toolkit.include()}"]
    objects = []
    for source in sorted(folder.glob("*.cpp")):
        key = store.digest(store.compiler_version(), toolkit.version(), *flags, source, *headers)
        final = store.directory() / f"cudart-{source.stem}-{key}.o"
        if not final.exists():
            new = store.temporary(final)
            store.run([store.compiler(), *flags, "-c", source, "-o", new])
            store.publish(new, final)
        objects.append(final)
    return objects


# ---- callbacks of the stand-in


def _answer(find, text: int, size: int, name: bytes, message: int, capacity: int) -> int | None:
    try:
        return find(ctypes.string_at(text, size).decode(), name.decode())
    except BaseException as error:  # must not cross the C++ frames between here and the launch
        if isinstance(error, KeyboardInterrupt):
            threading.Timer(0.1, _thread.interrupt_main).start()  # again, once they are left
        data = f"{type(error).__name__}: {error}".encode()[: capacity - 1] + b"\0"
        ctypes.memmove(message, data, len(data))
        print(f"gpusim: {error}", file=sys.stderr)
        return None


_RESOLVER = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


@_RESOLVER
def _resolve_kernel(text, size, name, message, capacity):
    return _answer(lambda p, n: engine.load(p, n).address, text, size, name, message, capacity)


@_RESOLVER
def _resolve_variable(text, size, name, message, capacity):
    return _answer(lambda p, n: engine.variable(p, n)[0], text, size, name, message, capacity)
