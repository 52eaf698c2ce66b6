"""The operators ``torch.ops.lfp_kernels.*``: schemas and fakes here, kernels in compiled code.

Schemas and fakes are plain Python, so the package imports, traces and tests without a compiler.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = "lfp_kernels"
_FOLDER = Path(__file__).parent
_library = torch.library.Library(NAMESPACE, "DEF")
_reasons: dict[str, str | None] = {}


def define(schema: str, fake: Callable) -> None:
    """Declare ``lfp_kernels::<schema>`` and its fake (output shapes and dtypes, no data)."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def why_not_loaded(library: str) -> str | None:
    """Reason why ``_C_<library>.so`` is not in use, or None when it is ("cpu" or "cuda")."""
    if library not in _reasons:
        _reasons[library] = _load(library)
    return _reasons[library]


def why_not_usable(device: str) -> str | None:
    """Reason why the compiled kernels cannot run on tensors of ``device``, or None."""
    reason = why_not_loaded(device)
    if reason is None and device == "cuda" and torch.cuda.is_available():
        return why_not_built_for(torch.cuda.get_device_capability())
    return reason


@functools.cache
def why_not_built_for(capability: tuple[int, int]) -> str | None:
    """Reason why the CUDA library has no code for a GPU of this compute capability, or None."""
    built = json.loads((_FOLDER / "_build_info.json").read_text()).get("architectures", [])
    major, minor = capability
    for name in built:
        portable = name.endswith("+PTX")
        version = name.removesuffix("+PTX")
        first, second = (int(part) for part in version.rstrip("af").split("."))
        exact = version[-1].isalpha()
        if (first, second) == capability or (portable and (first, second) <= capability):
            return None
        if not exact and first == major and second <= minor:  # binaries run on later minors
            return None
    return (
        f"_C_cuda.so was built for {' '.join(built)}, this GPU is sm_{major}{minor}; fix: rebuild "
        f"with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def _load(library: str) -> str | None:
    path = _FOLDER / f"_C_{library}.so"
    if not path.exists():
        needs = "nvcc and a C++ compiler" if library == "cuda" else "a C++ compiler"
        return (
            f"the {library} library was not built; fix: LFP_KERNELS_BUILD={library} "
            f"pip install --no-build-isolation -e . with {needs} on PATH"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} did not load in torch {torch.__version__}: {error}; fix: rebuild it"
    return None
