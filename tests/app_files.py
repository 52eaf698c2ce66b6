"""Tiny MNIST and CIFAR-10 files for the tests of the application."""

import gzip
import pickle

import numpy as np

from lfp_kernels.app import data


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def make_mnist(folder, train=96, test=32, size=16, ending=""):
    """Images whose label is the bright column, so that a few steps learn something."""
    rng = np.random.RandomState(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        images = rng.randint(0, 60, (count, size, size))
        images[np.arange(count), :, labels] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels)
    return folder


def cifar_batch(seed, count=4):
    rng = np.random.RandomState(seed)
    images = rng.randint(0, 256, (count, 3072)).astype(np.uint8)
    return {b"data": images, b"labels": [int(v) for v in rng.randint(0, 10, count)]}


def make_cifar(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate((*data.CIFAR_TRAIN, data.CIFAR_TEST)):
        (folder / name).write_bytes(pickle.dumps(cifar_batch(seed), protocol=2))
    return folder
