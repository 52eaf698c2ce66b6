"""The application: training that resumes to the same bits, command line, progress, demo."""

import io
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from app_files import make_mnist

from lfp_kernels.app import checkpoint, data, measure, methods, models
from lfp_kernels.app.cli import main
from lfp_kernels.app.progress import Progress
from lfp_kernels.app.train import Run, Settings
from lfp_kernels.nested import NestedReference

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------ training


def assert_same(a, b, path=""):
    """Equal to the last bit, through dicts and lists; times aside."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds", "data"}:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


@pytest.mark.parametrize(
    "model, method, way",
    [
        ("lenet", "lfp", "fused"),
        ("lenet", "lfp", "drop-in"),
        ("lenet", "sgd", "fused"),
        ("vgg", "lfp", "fused"),
    ],
)
def test_resume_gives_the_same_bits(mnist, tmp_path, model, method, way):
    images = data.load(str(mnist))
    settings = Settings(model, str(mnist), method, way, epochs=3, batch_size=40, threads=1)
    whole = Run(settings, images)
    whole.train()
    file = tmp_path / "checkpoint"
    Run(settings, images).train(save=file, until=1)
    torch.manual_seed(99)  # a new process starts elsewhere
    rest = Run(settings, images)
    rest.load_state(checkpoint.load(file), file)
    assert rest.epoch == 1
    rest.train()
    assert_same(rest.state(), whole.state())
    assert rest.learner.optimizer.state_dict()["state"], "the momentum was not saved"


def test_sigkill_and_resume(mnist, tmp_path):
    common = ["--data", str(mnist), "--batch-size", "16", "--threads", "1"]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    command = [sys.executable, "-m", "lfp_kernels", "train", *common, "--epochs", "60"]
    process = subprocess.Popen(
        [*command, "--save", str(killed), "--json-log", str(log)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(checkpoint.load(killed)["history"]) - 1
    assert 3 <= done < 60
    assert main(["train", "--resume", str(killed)]) == 0
    assert main(["train", *common, "--epochs", "60", "--save", str(whole)]) == 0
    assert_same(checkpoint.load(killed), checkpoint.load(whole))


def test_an_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint"
    checkpoint.save(file, {"epoch": 1})

    def half(state, stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(file, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(file)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_one_epoch_learns_the_digits(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    assert main(["train", "--epochs", "1", "--batch-size", "32", "--json-log", str(log)]) == 0
    (record,) = map(json.loads, log.read_text().splitlines())
    assert record["accuracy"] > 0.8
    assert f"test accuracy {record['accuracy']:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-feedback"])
def test_low_precision_learns_the_digits(precision, tmp_path):
    log = tmp_path / "log.jsonl"
    options = ["--epochs", "1", "--batch-size", "32", "--precision", precision]
    assert main(["train", *options, "--json-log", str(log)]) == 0
    (record,) = map(json.loads, log.read_text().splitlines())
    assert record["accuracy"] > 0.8


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_other_models_train(mnist, model, capsys):
    options = ["--model", model, "--data", str(mnist), "--epochs", "1", "--batch-size", "48"]
    assert main(["train", *options, "--way", "drop-in"]) == 0
    assert main(["train", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch   1/1" in line]
    assert len(lines) == 2


# -------------------------------------------------------------------------------- command line


def fails(capsys, *arguments):
    """The one line on stderr of a command that must end with code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--model", "alexnet"], "resnet, snn-mlp, snn-cnn, got 'alexnet'"),
        (["train", "--data", "/nowhere/at/all"], "neither 'digits' nor an existing path"),
        (["train", "--method", "adam"], "expected one of lfp, sgd, fa, usf, brsf, frsf, kp, dfa"),
        (["train", "--way", "sideways"], "expected one of fused, drop-in, got 'sideways'"),
        (["train", "--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["train", "--batch-size", "-1"], "--batch-size: expected at least 1"),
        (["train", "--lr", "nan"], "--lr: expected a number > 0, got nan"),
        (["train", "--eps", "0"], "--eps: expected a number > 0"),
        (["train", "--momentum", "1"], "--momentum: expected a number in"),
        (["train", "--clip", "-3"], "--clip: expected"),
        (["train", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["train", "--resume", "/nowhere/file"], "checkpoint: /nowhere/file does not exist"),
        (["train", "--save", "/dev/null/x"], "cannot write /dev/null/x"),
        (["demo", "--repeats", "1"], "--repeats: expected at least 2"),
        (["backends", "--op", "fold"], "--op: expected one of"),
        (["backends", "--device", "abacus"], "--device: expected cpu or cuda, got 'abacus'"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required: command"),
    ],
)
def test_user_errors(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def test_checkpoint_errors(mnist, tmp_path, capsys):
    images = data.load(str(mnist))
    settings = Settings(data=str(mnist), epochs=2, batch_size=48)
    file = tmp_path / "checkpoint"
    run = Run(settings, images)
    run.train(save=file, until=1)
    state = checkpoint.load(file)
    content = file.read_bytes()
    capsys.readouterr()

    line = fails(capsys, "train", "--resume", file, "--model", "mlp")
    assert "was made with --model lenet, got mlp" in line
    for cut in (content[: len(content) // 2], b"", b"text", content[:-400] + bytes(400)):
        file.write_bytes(cut)
        assert "is damaged" in fails(capsys, "train", "--resume", file)
    torch.save({"weights": 1}, file)
    assert "was not written by lfp_kernels train" in fails(capsys, "train", "--resume", file)
    assert "cannot read" in fails(capsys, "train", "--resume", tmp_path)

    del state["format"]
    wrong = {**state, "model": models.build("mlp", 1, 16, 10).state_dict()}
    checkpoint.save(file, wrong)
    line = fails(capsys, "train", "--resume", file)
    assert "does not fit model lenet: conv1.bias: expected (16,), got nothing" in line
    for name in ("order", "optimizer", "settings", "shape"):
        checkpoint.save(file, {k: v for k, v in state.items() if k != name})
        assert "is damaged" in fails(capsys, "train", "--resume", file)

    checkpoint.save(file, state)
    other = tmp_path / "other"
    other.mkdir()
    make_mnist(other, train=50)
    line = fails(capsys, "train", "--resume", file, "--data", other)
    assert "(1, 16, 10, 96), this data has (1, 16, 10, 50)" in line


def test_resuming_a_finished_run_only_reports(mnist, tmp_path, capsys):
    file = tmp_path / "checkpoint"
    options = ["--data", str(mnist), "--epochs", "1", "--save", str(file)]
    assert main(["train", *options]) == 0
    before = file.read_bytes()
    assert main(["train", "--resume", str(file)]) == 0
    assert "1 of 1 epochs are done" in capsys.readouterr().out
    assert file.read_bytes() == before


def test_info_and_backends(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("torch", "CPU features", "threads", "library cpu", "library cuda"):
        assert f"\n{name}  " in text
    assert main(["backends"]) == 0
    assert "reference" in capsys.readouterr().out
    assert main(["backends", "--op", "linear", "--device", "cuda", "--dtype", "bfloat16"]) == 0
    assert "native     no: " in capsys.readouterr().out


def test_a_failing_probe_does_not_hide_the_others(monkeypatch):
    from lfp_kernels import info

    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", broken)
    facts = info.collect()
    assert facts["CPU code of torch"] == "unknown (RuntimeError: no such thing)"
    assert facts["torch"] == torch.__version__


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("plain", [True, False])
def test_progress_bar(monkeypatch, capsys, plain):
    if plain:
        monkeypatch.setattr("lfp_kernels.app.progress.tqdm", None)
    stream = Terminal()
    monkeypatch.setattr(Progress, "REFRESH", -1)
    with Progress(4, "title", initial=1, stream=stream) as progress:
        progress.step()
        progress.line("epoch 1", "test 50%")
        progress.step()
    assert capsys.readouterr().out == "epoch 1\n"
    assert "title" in stream.getvalue()
    if plain:
        assert "2/4" in stream.getvalue() and "3/4 test 50%" in stream.getvalue()


def test_no_terminal_no_bar(capsys):
    stream = io.StringIO()
    with Progress(2, "title", stream=stream) as progress:
        progress.step()
        progress.line("epoch 1")
    assert stream.getvalue() == "" and capsys.readouterr().out == "epoch 1\n"


# ---------------------------------------------------------------------------------------- demo


def test_demo_report(mnist, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo"
    options = ["--data", str(mnist), "--epochs", "2", "--batch-size", "32", "--repeats", "2"]
    assert main(["demo", *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    page = (out / "report.html").read_text()
    for title in ("Accuracy", "Reward", "What the networks look at", "What the weights receive",
                  "Cost of a step", "How this was made"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    for name in (
        "LFP, fused",
        "LFP, drop-in",
        "gradient descent, autograd",
        "LFP, nested autograd",
    ):
        assert name in printed and name in page
    images = sorted(path.name for path in out.glob("*.png"))
    assert len(images) == 4 + 2 + 5  # curves, heatmaps, a histogram per layer with weights
    assert page.count('src="data:image/png;base64,iVBOR') == len(images)
    assert all((out / name).stat().st_size > 3000 for name in images)
    # self-contained: nothing is loaded from elsewhere
    assert "<script" not in page and "<link" not in page and 'src="http' not in page
    assert torch.__version__ in page and "x</td>" not in page


def test_relevance_and_weight_rewards_are_those_of_the_oracle():
    torch.manual_seed(0)
    model = models.build("mlp", 2, 4, 10).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(200, 2, 4, 4, dtype=torch.float64), torch.arange(200) % 10
    maps = measure.relevance(model, x, y, eps=0.25)
    rewards = measure.weight_rewards(model, x, y, eps=1e-6)

    def one_logit(out, labels):
        return out * torch.nn.functional.one_hot(labels, 10)

    oracle = NestedReference(model, eps=0.25)
    with oracle.context():
        _, input_reward = oracle.redistribute(x, y, one_logit)
    torch.testing.assert_close(maps, input_reward.sum(1))
    oracle = NestedReference(model, eps=1e-6)
    with oracle.context():
        oracle.redistribute(x, y)
    assert rewards.keys() == {"fc1.weight", "fc2.weight", "fc3.weight"}
    for name, reward in rewards.items():
        torch.testing.assert_close(reward, model.get_parameter(name).feedback)
    assert_same(dict(model.state_dict()), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_peak_memory_counts_what_is_alive_together():
    def step(x, y):
        for _ in range(3):
            both = torch.empty(1 << 20), torch.empty(1 << 20)
            del both
        return x

    x = torch.zeros(1)
    assert 2 << 22 <= measure.peak_memory(step, x, x) < (2 << 22) + (1 << 20)


def test_demo_starts_both_from_the_same_weights_and_leaves_them_apart(mnist):
    images = data.load(str(mnist))
    runs = [Run(Settings(data=str(mnist), method=m, epochs=1), images) for m in ("lfp", "sgd")]
    first, second = (run.model.state_dict() for run in runs)
    assert_same(first, second)
    runs[0].train()
    assert not torch.equal(first["fc3.weight"], second["fc3.weight"])


@pytest.mark.parametrize("method", methods.ALIGNMENT)
def test_every_method_of_the_feedback_alignment_family_trains(method):
    """Both ways give the same losses, and they move."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 1, 28, 28), torch.randint(10, (32,))
    found = []
    for way in methods.WAYS:
        torch.manual_seed(1)
        model = models.build("lenet", 1, 28, 10)
        step = methods.learner(model, method, way, lr=0.02, example=x[:1]).step
        losses = [torch.nn.functional.cross_entropy(step(x, y), y) for _ in range(4)]
        found.append(torch.stack(losses))
    tolerance = 1e-2 if method == "brsf" else 1e-4  # brsf draws in the order of the layers' turns
    torch.testing.assert_close(*found, rtol=tolerance, atol=0)
    assert found[0][-1] != found[0][0]
