"""The training loop: one-cycle schedule, evaluation and an exactly resumable state per epoch."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfp_kernels.nn import Spiking

from . import AppError, checkpoint, methods, models
from .data import Dataset
from .progress import Progress


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run (``save`` and the like do not)."""

    model: str = "lenet"
    data: str = "digits"
    method: str = "lfp"
    way: str = "fused"
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    clip: float = 3.0  # global norm limit; 0: none
    seed: int = 0
    threads: int = 0  # 0: torch's default. Decides the order of sums, so the last bits
    eps: float = 1e-6
    precision: str = "float32"
    # Of spiking models: time steps (0: the model's), steps at once (0: all), noise on layer inputs,
    # derivative of a spike for sgd
    steps: int = 0
    chunk: int = 0
    noise: float = 0.0
    surrogate: str = "atan"

    def __post_init__(self) -> None:
        def require(name: str, fine: bool, expected: str) -> None:
            if not fine:
                option = name.replace("_", "-")
                raise AppError(f"--{option}: expected {expected}, got {getattr(self, name)!r}")

        for name, choices in (
            ("model", (*models.MODELS, *models.SPIKING)),
            ("method", methods.METHODS),
            ("way", methods.WAYS),
            ("precision", methods.PRECISIONS),
            ("surrogate", models.SURROGATES),
        ):
            require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        require("epochs", self.epochs >= 1, "at least 1")
        require("batch_size", self.batch_size >= 1, "at least 1")
        require("lr", 0 < self.lr < math.inf, "a number > 0")
        require("momentum", 0 <= self.momentum < 1, "a number in [0, 1)")
        require("clip", 0 <= self.clip < math.inf, "a number > 0, or 0 for none")
        require("seed", 0 <= self.seed < 2**63, "a number in [0, 2^63)")
        require("threads", self.threads >= 0, "a number >= 0")
        require("eps", 0 < self.eps < math.inf, "a number > 0")
        require("steps", self.steps >= 0, "at least 1 time step, or 0 for the model's")
        require("chunk", self.chunk >= 0, "at least 1 time step, or 0 for all at once")
        require("noise", 0 <= self.noise < math.inf, "a standard deviation >= 0")
        if self.method == "sgd":
            fits = self.precision != "bfloat16-feedback"
            require("precision", fits, "float32 or bfloat16 for sgd, which has no feedback")
        if self.model in models.SPIKING:
            require("precision", self.precision == "float32", f"float32 for {self.model}")
            require("method", self.method in ("lfp", "sgd"), methods.NOT_SPIKING.split(" ", 1)[1])
            if self.method == "sgd":
                require("chunk", not self.chunk, "0 with sgd: autograd keeps every time step")
        else:
            for name, default in models.Neurons()._asdict().items():
                fine = getattr(self, name) == default
                require(name, fine, f"{default} for {self.model}, which has no spiking neurons")

    @property
    def neurons(self) -> models.Neurons:
        return models.Neurons(self.steps, self.chunk, self.noise, self.surrogate)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch: int = 500) -> Tensor:
    """Classes that ``model`` gives the images x [N]; leaves it in evaluation mode."""
    model.eval()
    batch = batch // 5 if isinstance(model, Spiking) else batch  # each image at every time step
    return torch.cat([methods.scores(model(part)).argmax(1) for part in x.split(batch)])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images x whose class ``model`` gets right."""
    return int((predict(model, x) == y).sum()) / len(y)


class Run:
    """A model on its way through the epochs. ``history`` has one record per finished epoch and
    one, epoch 0, for the initial weights."""

    def __init__(self, settings: Settings, data: Dataset) -> None:
        self.settings = settings
        self.dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
        self.data = replace(
            data, train_x=data.train_x.to(self.dtype), test_x=data.test_x.to(self.dtype)
        )
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.order = torch.Generator().manual_seed(settings.seed)
        shape = data.channels, data.size, data.classes
        self.model = models.build(settings.model, *shape, settings.neurons).to(self.dtype)
        self.learner = methods.learner(
            self.model,
            settings.method,
            settings.way,
            lr=settings.lr,
            momentum=settings.momentum,
            clip=settings.clip or None,
            eps=settings.eps,
            example=self.data.train_x[:1],
            feedback_dtype=torch.bfloat16 if settings.precision == "bfloat16-feedback" else None,
        )
        self.steps_per_epoch = math.ceil(len(data.train_y) / settings.batch_size)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.learner.optimizer,
            settings.lr,
            total_steps=self.total_steps,
            cycle_momentum=False,
        )
        self.history: list[dict[str, float]] = []

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return max(0, len(self.history) - 1)

    @property
    def title(self) -> str:
        s = self.settings
        how = s.way
        if s.method == "sgd":
            how = f"surrogate: {s.surrogate}" if s.model in models.SPIKING else ""
        if s.precision != "float32":
            how = ", ".join(filter(None, (how, s.precision)))
        return f"{s.model} by {s.method.upper()}" + (f" ({how})" if how else "")

    def train(
        self, save: Path | None = None, json_log: Path | None = None, until: int | None = None
    ) -> None:
        """Train to the last epoch, or to epoch ``until``; save and log after each."""
        last = self.settings.epochs if until is None else until
        done = self.epoch * self.steps_per_epoch
        if not self.history:
            start = accuracy(self.model, self.data.test_x, self.data.test_y)
            self.history.append({"epoch": 0, "accuracy": start, "seconds": 0.0})
        with Progress(self.total_steps, self.title, done) as progress:
            while self.epoch < last:
                record = self._epoch(progress)
                self.history.append(record)
                if save is not None:
                    checkpoint.save(save, self.state())
                if json_log is not None:
                    with json_log.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                shown = f"test {record['accuracy']:.2%}"
                progress.line(
                    f"{self.title}  epoch {self.epoch:>3}/{self.settings.epochs}  {shown}  "
                    f"train {record['train_accuracy']:.2%}  reward {record['reward']:.3f}  "
                    f"{record['seconds']:.1f} s",
                    shown,
                )

    def _epoch(self, progress: Progress) -> dict[str, float]:
        x, y = self.data.train_x, self.data.train_y
        self.model.train()
        hits, reward = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)
        seconds = 0.0
        for rows in torch.randperm(len(y), generator=self.order).split(self.settings.batch_size):
            a, b = x[rows], y[rows]
            start = time.perf_counter()
            out = self._step(a, b)
            seconds += time.perf_counter() - start
            hits += (methods.scores(out).argmax(1) == b).sum()
            reward += methods.reward(out, b).double().abs().sum()
            progress.step()
        if not math.isfinite(float(reward)):
            raise AppError(f"epoch {self.epoch + 1}: the training diverged; try a smaller --lr")
        return {
            "epoch": self.epoch + 1,
            "accuracy": accuracy(self.model, self.data.test_x, self.data.test_y),
            "train_accuracy": int(hits) / len(y),
            "reward": float(reward) / len(y),
            "lr": float(self.scheduler.get_last_lr()[0]),
            "seconds": self.history[-1]["seconds"] + seconds,
        }

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        try:
            out = self.learner.step(x, y)
        except ValueError as error:  # NaN in the reward, a label out of range
            raise AppError(f"epoch {self.epoch + 1}: {error}") from error
        self.scheduler.step()
        return out

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on."""
        return {
            "settings": asdict(self.settings),
            "shape": [
                self.data.channels,
                self.data.size,
                self.data.classes,
                len(self.data.train_y),
            ],
            "model": self.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Take over :meth:`state`, read from ``path``; a misfit is an AppError."""
        shape = self.state()["shape"]
        try:
            if state["shape"] != shape:
                raise AppError(
                    f"checkpoint: {path} was made for data of (channels, size, classes, images) "
                    f"{tuple(state['shape'])}, this data has {tuple(shape)}"
                )
            expected = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
            got = {name: tuple(t.shape) for name, t in state["model"].items()}
            for name in sorted(expected.keys() | got.keys()):
                if expected.get(name) != got.get(name):
                    raise AppError(
                        f"checkpoint: {path} does not fit model {self.settings.model}: {name}: "
                        f"expected {_shape(expected, name)}, got {_shape(got, name)}"
                    )
            self.learner.optimizer.load_state_dict(state["optimizer"])
            self.model.load_state_dict(state["model"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.order.set_state(state["order"])
            torch.set_rng_state(state["rng"])
            self.history = [dict(record) for record in state["history"]]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise AppError(f"checkpoint: {path} is damaged: {error!r}") from None


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "nothing"


def new_settings(given: dict[str, Any]) -> Settings:
    """Options given on the command line, over the defaults."""
    if given.get("model") in models.SPIKING:
        given = {"lr": models.SPIKING_LR, **given}
    return Settings(**given)


def settings_of(given: dict[str, Any], state: dict[str, Any] | None, path: Path | None) -> Settings:
    """Options given on the command line, over those of the checkpoint, over the defaults.

    A resumed run goes on to the same numbers, so an option that would change them is an error.
    """
    if state is None:
        return new_settings(given)
    names = {field.name for field in fields(Settings)}
    saved = state.get("settings")
    if not isinstance(saved, dict) or saved.keys() != names:
        raise AppError(f"checkpoint: {path} is damaged: its settings are incomplete")
    for name, value in given.items():
        if name not in ("threads", "data") and value != saved[name]:
            raise AppError(
                f"checkpoint: {path} was made with --{name.replace('_', '-')} {saved[name]}, "
                f"got {value}; leave the option out, or start a new run"
            )
    return Settings(**{**saved, **given})
