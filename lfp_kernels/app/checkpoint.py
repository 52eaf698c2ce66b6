"""Checkpoints of the training loop: written atomically, read without running code from them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import AppError

FORMAT = "lfp_kernels.train/1"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Find out before the first epoch that the first save will fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "is a directory")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise AppError(f"cannot write {path}: {error.strerror}") from None


def load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise AppError(f"checkpoint: {path} does not exist") from None
    except OSError as error:
        raise AppError(f"checkpoint: cannot read {path}: {error.strerror or error}") from None
    except Exception:  # zip, pickle and tensor errors of any type: the file is damaged or foreign
        raise AppError(f"checkpoint: {path} is damaged or not a checkpoint") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise AppError(f"checkpoint: {path} was not written by lfp_kernels train ({FORMAT})")
    return state
