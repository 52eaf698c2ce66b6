"""The application's data readers and models."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from app_files import cifar_batch, make_cifar, make_mnist, write_idx

from lfp_kernels.app import AppError, data, models


@pytest.fixture
def mnist(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    return make_mnist(folder)


# ---------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_mnist_files(tmp_path, ending, below):
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    make_mnist(folder, ending=ending)
    found = data.load(str(tmp_path))
    assert found.train_x.shape == (96, 1, 16, 16) and found.test_x.shape == (32, 1, 16, 16)
    assert (found.channels, found.size, found.classes) == (1, 16, 10)
    assert found.train_y.tolist() == [i % 10 for i in range(96)]
    pixels = found.pixels(found.train_x)
    assert pixels[13, 0, :, 3].min() == 1  # image 13 is a 3: its column is white
    torch.testing.assert_close(found.train_x[13, 0, 0, 3], torch.tensor((1 - 0.1307) / 0.3081))


def test_cifar_folder_and_archive(tmp_path):
    folder = make_cifar(tmp_path / "cifar-10-batches-py")
    archive = tmp_path / "c.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "cifar-10-batches-py")
    results = [data.load(str(path)) for path in (tmp_path, folder, archive)]
    for found in results:
        assert found.train_x.shape == (20, 3, 32, 32) and len(found.test_y) == 4
        assert torch.equal(found.train_x, results[0].train_x)
        raw = torch.from_numpy(cifar_batch(0)[b"data"][1]).view(3, 32, 32) / 255
        torch.testing.assert_close(found.pixels(found.train_x[1]), raw)
        assert found.train_y[:4].tolist() == cifar_batch(0)[b"labels"]


def test_digits_are_shuffled_and_held_out():
    digits = data.load("digits")
    assert digits.train_x.shape == (4000, 1, 28, 28) and len(digits.test_y) == 1000
    assert (digits.test_y.bincount(minlength=10) > 60).all()
    assert digits.test_y[:12].tolist() == [
        6,
        0,
        3,
        3,
        1,
        5,
        4,
        8,
        6,
        7,
        1,
        4,
    ]  # the split is part of every figure
    assert abs(digits.train_x.mean()) < 0.05 and abs(digits.train_x.std() - 1) < 0.05


class _Command:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    folder = make_cifar(tmp_path)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": _Command()}))
    with pytest.raises(AppError, match=r"data_batch_2 .*asks for \w+.system"):
        data.load(str(folder))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "t10k-labels-idx1-ubyte").unlink(), "t10k-labels-idx1-ubyte.* is missing"),
        (lambda f: _truncate(f / "train-images-idx3-ubyte"), "promises 24576 bytes .* holds 24571"),
        (lambda f: (f / "train-labels-idx1-ubyte").write_bytes(b"text"), "not an idx file"),
        (lambda f: write_idx(f / "train-labels-idx1-ubyte", np.zeros(7)), "96 .* and 7 labels"),
        (lambda f: write_idx(f / "t10k-images-idx3-ubyte", np.zeros((32, 9, 9))), "test images"),
        (lambda f: write_idx(f / "train-images-idx3-ubyte", np.zeros((96, 9, 8))), "square"),
        (lambda f: (f / "train-labels-idx1-ubyte").write_bytes(b"\x1f\x8bx"), "cannot read"),
    ],
)
def test_damaged_mnist(mnist, damage, message):
    damage(mnist)
    with pytest.raises(AppError, match=message):
        data.load(str(mnist))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no pickle", "data_batch_3 is not a CIFAR-10 python batch"),
        (pickle.dumps({b"labels": [1]}), "KeyError"),
        (pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": [1, 2]}), "3072"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "2 images"),
    ],
)
def test_damaged_cifar(tmp_path, content, message):
    folder = make_cifar(tmp_path)
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(AppError, match=message):
        data.load(str(folder))


def test_unusable_paths(tmp_path):
    with pytest.raises(AppError, match="neither 'digits' nor an existing path"):
        data.load(str(tmp_path / "nowhere"))
    with pytest.raises(AppError, match="no known files"):
        data.load(str(tmp_path))
    text = tmp_path / "text"
    text.write_text("no archive")
    with pytest.raises(AppError, match="as a tar archive"):
        data.load(str(text))
    with tarfile.open(tmp_path / "short.tar", "w") as file:
        file.addfile(tarfile.TarInfo("data_batch_1"), io.BytesIO())
    with pytest.raises(AppError, match="lacks data_batch_2, .*test_batch"):
        data.load(str(tmp_path / "short.tar"))


# -------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("channels, size, classes", [(1, 28, 10), (3, 32, 7)])
def test_models_fit_the_images(name, channels, size, classes):
    model = models.build(name, channels, size, classes).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, classes)
    assert all(part.isidentifier() or part.isdigit() for n in model.state_dict()
               for part in n.split("."))  # fmt: skip


@pytest.mark.parametrize("name", models.MODELS)
def test_smallest_images(name):
    size = models.SMALLEST[name]
    model = models.build(name, 1, size, 10).eval()
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 10)
    if size > 1:
        with pytest.raises(AppError, match=f"at least {size} pixels, got {size - 1}"):
            models.build(name, 1, size - 1, 10)
