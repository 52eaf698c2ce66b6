"""The operators ``torch.ops.lfp_kernels.*``: schemas and fakes here, kernels in compiled code.

Schemas and fakes are plain Python, so the package imports, traces and tests without a compiler.
"""

from __future__ import annotations

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


def _load(library: str) -> str | None:
    path = _FOLDER / f"_C_{library}.so"
    if not path.exists():
        return (
            f"the {library} library was not built; fix: pip install --no-build-isolation -e . "
            "with a C++ compiler on PATH"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} did not load in torch {torch.__version__}: {error}; fix: rebuild it"
    return None
