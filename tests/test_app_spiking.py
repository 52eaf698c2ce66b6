"""The application with spiking models: training, resuming, refusals, the demo's page, the example
on spike trains."""

import json

import pytest
import torch
from app_files import make_mnist

from examples import event_digits
from lfp_kernels.app import AppError, checkpoint, data, methods, models, plots, spiking_demo
from lfp_kernels.app.cli import main
from lfp_kernels.app.train import Run, Settings, accuracy
from lfp_kernels.nn import Spiking

SPIKING = sorted(models.SPIKING)


pytestmark = pytest.mark.usefixtures("one_thread")


def options(folder, *more):
    return ["--data", str(folder), "--batch-size", "48", "--threads", "1", *map(str, more)]


def same_weights(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model", SPIKING)
@pytest.mark.parametrize("method", ["lfp", "sgd"])
def test_spiking_models_learn(mnist, tmp_path, capsys, model, method):
    log = tmp_path / "log.jsonl"
    given = options(mnist, "--model", model, "--method", method, "--steps", 6, "--epochs", 4)
    assert main(["train", *given, "--json-log", str(log)]) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[-1]["train_accuracy"] > 0.3 and 0 <= records[-1]["reward"] < 10
    how = "LFP (fused)" if method == "lfp" else "SGD (surrogate: atan)"
    assert f"{model} by {how}  epoch   4/4" in capsys.readouterr().out


def test_a_step_function_has_no_gradient(mnist):
    """Without a surrogate autograd moves nothing; with one, and by LFP, every weight moves."""
    images = data.load(str(mnist))
    moved = {}
    for method, surrogate in (("sgd", "none"), ("sgd", "atan"), ("lfp", "none")):
        settings = Settings("snn-mlp", method=method, surrogate=surrogate, epochs=1, steps=6)
        run = Run(settings, images)
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        moved[method, surrogate] = [
            not torch.equal(p, before[name]) for name, p in run.model.named_parameters()
        ]
    assert not any(moved["sgd", "none"])
    assert all(moved["sgd", "atan"]) and all(moved["lfp", "none"])


@pytest.mark.parametrize("way", methods.WAYS)
@pytest.mark.parametrize("model", SPIKING)
def test_resume_gives_the_same_bits(mnist, tmp_path, model, way):
    """With noise, whose seeds come from a generator that the checkpoint keeps."""
    images = data.load(str(mnist))
    settings = Settings(
        model, str(mnist), "lfp", way, epochs=3, batch_size=48, threads=1, steps=6, chunk=4,
        noise=0.05,
    )  # fmt: skip
    whole = Run(settings, images)
    assert isinstance(whole.model, Spiking)
    assert (whole.model.steps, whole.model.chunk, whole.model.noise) == (6, 4, 0.05)
    whole.train()
    file = tmp_path / "checkpoint"
    Run(settings, images).train(save=file, until=1)
    torch.manual_seed(99)
    rest = Run(settings, images)
    rest.load_state(checkpoint.load(file), file)
    assert rest.epoch == 1
    rest.train()
    assert same_weights(rest.model.state_dict(), whole.model.state_dict())
    for a, b in zip(rest.history, whole.history, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_resume_by_command_keeps_the_options(mnist, tmp_path, capsys):
    file, whole = tmp_path / "half", tmp_path / "whole"
    given = options(mnist, "--model", "snn-mlp", "--steps", 5, "--chunk", 2, "--epochs", 2)
    settings = Settings(
        "snn-mlp", str(mnist), epochs=2, batch_size=48, threads=1, steps=5, chunk=2,
        lr=models.SPIKING_LR,
    )  # fmt: skip
    Run(settings, data.load(str(mnist))).train(save=file, until=1)
    capsys.readouterr()
    assert main(["train", "--resume", str(file), "--steps", "6"]) == 2
    assert "was made with --steps 5, got 6" in capsys.readouterr().err
    assert main(["train", "--resume", str(file)]) == 0
    assert main(["train", *given, "--save", str(whole)]) == 0
    states = [checkpoint.load(path) for path in (file, whole)]
    assert states[0]["settings"] == states[1]["settings"]
    assert same_weights(states[0]["model"], states[1]["model"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "snn-mlp", "--method", "fa"], "--method: expected lfp or sgd for a spiking"),
        (["--model", "snn-cnn", "--method", "dfa"], "needs the derivatives that a spike does not"),
        (["--model", "lenet", "--steps", "5"], "--steps: expected 0 for lenet, which has no spik"),
        (["--model", "mlp", "--chunk", "5"], "--chunk: expected 0 for mlp"),
        (["--noise", "0.1"], "--noise: expected 0.0 for lenet"),
        (["--surrogate", "none"], "--surrogate: expected atan for lenet"),
        (["--model", "snn-mlp", "--steps", "-1"], "--steps: expected at least 1 time step"),
        (["--model", "snn-mlp", "--chunk", "-1"], "--chunk: expected at least 1 time step"),
        (["--model", "snn-mlp", "--noise", "-1"], "--noise: expected a standard deviation >= 0"),
        (["--model", "snn-mlp", "--noise", "nan"], "--noise: expected a standard deviation >= 0"),
        (["--model", "snn-mlp", "--surrogate", "relu"], "expected one of atan, fast_sigmoid, none"),
        (["--model", "snn-mlp", "--method", "sgd", "--chunk", "5"], "--chunk: expected 0 with sgd"),
    ],
)
def test_refusals(capsys, arguments, message):
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line and captured.out == ""


def test_the_learner_itself_refuses_the_feedback_alignment_family():
    model = models.build("snn-mlp", 1, 8, 4)
    for method in methods.ALIGNMENT:
        with pytest.raises(AppError, match=f"expected lfp or sgd .*got '{method}'"):
            methods.learner(model, method)


def test_small_images_are_refused():
    with pytest.raises(AppError, match="snn-cnn needs images of at least 16 pixels, got 12"):
        models.build("snn-cnn", 1, 12, 10)


def test_the_answer_is_the_neuron_that_fires_most():
    out = torch.zeros(3, 2, 4)
    out[0, 0, 1] = out[2, 0, 1] = out[1, 0, 3] = out[0, 1, 2] = 1
    assert methods.scores(out).tolist() == [[0, 2, 0, 1], [0, 0, 1, 0]]
    logits = torch.randn(2, 4)
    assert methods.scores(logits) is logits
    model = models.build("snn-mlp", 1, 8, 4, models.Neurons(steps=7))
    x = torch.randn(6, 1, 8, 8)
    answers = model(x).sum(0).argmax(1)
    assert accuracy(model, x, answers) == 1


def test_record_is_what_the_network_does():
    torch.manual_seed(0)
    net = models.build("snn-cnn", 1, 16, 10, models.Neurons(steps=6))
    x = torch.randn(3, 1, 16, 16)
    layers = spiking_demo.record(net, x)
    assert [layer.name for layer in layers] == ["hidden layer 1", "hidden layer 2", "output"]
    assert torch.equal(layers[-1].spikes, net(x)) and layers[-1].spikes.any()
    for layer in layers:
        assert layer.spikes.shape == layer.membrane.shape
        assert torch.equal(layer.spikes, (layer.membrane > layer.threshold).float())


def test_relevance_asks_for_the_true_class():
    """Rewards flow back from one class, and only where its neuron fires."""
    torch.manual_seed(0)
    net = models.build("snn-mlp", 2, 6, 4, models.Neurons(steps=9))
    x = torch.randn(5, 2, 6, 6) * 2
    counts = net(x).sum(0)
    maps = torch.stack([spiking_demo.relevance(net, x, torch.full((5,), k)) for k in range(4)], 1)
    assert maps.shape == (5, 4, 6, 6)
    assert torch.equal(maps.flatten(2).any(2), counts > 0) and (counts > 0).any()
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("model", SPIKING)
def test_demo_report(mnist, tmp_path, capsys, model):
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo"
    given = options(mnist, "--epochs", 2, "--repeats", 2, "--steps", 6, "--chunk", 4)
    assert main(["demo", "--model", model, *given, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    page = (out / "report.html").read_text()
    for title in ("Accuracy", "What the neurons do", "Membranes", "What the networks look at",
                  "Cost of a step", "How this was made"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    for name in (*spiking_demo.WAYS, *spiking_demo.COSTS):
        assert name in printed
    for name in spiking_demo.COSTS:
        assert name in page
    images = sorted(path.name for path in out.glob("*.png"))
    assert [sum(name.startswith(kind) for name in images) for kind in
            ("accuracy", "raster", "membranes", "heatmaps")] == [2, 4, 2, 2]  # fmt: skip
    captions = {"Each bar is a spike": 4, "Dashed: the threshold": 2, "Top: test image": 2,
                "Test accuracy after each epoch": 1}  # fmt: skip
    for caption, count in captions.items():
        assert page.count(f"<figcaption>{caption}") == count
    assert page.count('src="data:image/png;base64,iVBOR') == len(images)
    assert all((out / name).stat().st_size > 3000 for name in images)
    assert "6 time steps in chunks of 4" in page and "beta=0.9, threshold=1" in page
    assert "<script" not in page and "<link" not in page and 'src="http' not in page


# ------------------------------------------------------------------- examples/event_digits.py


def test_poisson_trains_follow_the_brightness():
    pixels = torch.tensor([[0.0, 0.25, 1.0]]).expand(200, 3)
    g = torch.Generator().manual_seed(0)
    spikes = event_digits.poisson(pixels, 50, g)
    assert spikes.shape == (50, 200, 3) and set(spikes.unique().tolist()) == {0.0, 1.0}
    rate = spikes.mean((0, 1))
    torch.testing.assert_close(rate, event_digits.RATE * pixels[0], atol=0.01, rtol=0)
    again = event_digits.poisson(pixels, 50, torch.Generator().manual_seed(0))
    assert torch.equal(again, spikes)
    assert not torch.equal(event_digits.poisson(pixels, 50, g), spikes)


def test_latency_trains_fire_once_and_the_brightest_first():
    pixels = torch.tensor([[0.0, event_digits.DARK, 0.6, 1.0]])
    spikes = event_digits.latency(pixels, 9, torch.Generator())[:, 0]
    assert spikes.sum(0).tolist() == [0, 1, 1, 1]
    assert spikes.argmax(0).tolist() == [0, 8, 4, 0]


def test_example_runs(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    whole = data.load(str(make_mnist(tmp_path)))
    wide = {"train_x": torch.nn.functional.pad(whole.train_x, (6, 6, 6, 6), value=-0.42),
            "test_x": torch.nn.functional.pad(whole.test_x, (6, 6, 6, 6), value=-0.42)}  # fmt: skip
    monkeypatch.setattr(data, "load", lambda source: data.Dataset(**{**whole.__dict__, **wide}))
    given = ["--epochs", "1", "--steps", "7", "--chunk", "3", "--threads", "1"]
    assert event_digits.main([*given, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Poisson coding, 7 steps: test accuracy" in printed
    assert "latency coding, 7 steps: test accuracy" in printed
    assert (tmp_path / "out" / "raster.png").stat().st_size > 3000
    assert event_digits.main(["--steps", "0"]) == 2
    monkeypatch.setattr(data, "load", lambda source: whole)
    assert event_digits.main(["--out", str(tmp_path / "out")]) == 2
    assert "expected images of 784 pixels" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("way", methods.WAYS)
def test_lfp_learns_the_digits_with_spikes(way):
    """What the page promises, with room: docs/applications.md has the figures."""
    run = Run(Settings("snn-mlp", way=way, epochs=4, threads=2, lr=0.03), data.load())
    run.train()
    assert run.history[-1]["accuracy"] > 0.9


@pytest.mark.slow
def test_example_reaches_its_accuracy(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert plots.plt is not None
    assert event_digits.main(["--out", str(tmp_path)]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if "test accuracy" in line]
    assert len(found) == 2 and all(float(line.split()[-1].strip("%")) > 85 for line in found)
