"""What lfp_kernels.compat.lfprop mirrors of a module of lfprop."""

from __future__ import annotations

import importlib
from types import ModuleType

PACKAGES = ("lfprop", "lfp_kernels.compat.lfprop")


def not_mirrored(path: str) -> set[str]:
    """Public names of lfprop's own that the module of the same path here lacks."""
    theirs, ours = (importlib.import_module(f"{package}.{path}") for package in PACKAGES)
    names = {
        name
        for name, value in vars(theirs).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", theirs.__name__) == theirs.__name__
    }
    return {name for name in names if not hasattr(ours, name)}
