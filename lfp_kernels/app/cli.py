"""Command line: info, backends, train, demo. A mistake of the user is one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from lfp_kernels import backends, info

from . import AppError, checkpoint, data, demo, methods, models, spiking_demo
from .train import Run, Settings, new_settings, settings_of

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in backends.FLOATS}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AppError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lfp_kernels",
        description="Train networks by Layer-wise Feedback Propagation.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    commands.add_parser("info", help="versions, CPU, threads, compiled libraries")

    table = commands.add_parser("backends", help="which implementation runs which op, and why")
    table.add_argument("--op", help="one op only")
    table.add_argument("--device", default="cpu", help="of the tensors (default: %(default)s)")
    table.add_argument("--dtype", default="float32", choices=sorted(DTYPES))

    train = commands.add_parser("train", help="train a model")
    _training_options(train)
    train.add_argument("--method", help=f"{' or '.join(methods.METHODS)} ({Settings.method})")
    train.add_argument("--way", help=f"lfp: {' or '.join(methods.WAYS)} ({Settings.way})")
    train.add_argument(
        "--precision", help=f"{', '.join(methods.PRECISIONS)} ({Settings.precision})"
    )
    train.add_argument(
        "--surrogate",
        help="spiking models by sgd: what stands in for the derivative of a spike, "
        f"{', '.join(models.SURROGATES)} ({Settings.surrogate})",
    )
    train.add_argument("--save", type=Path, metavar="FILE", help="checkpoint, after each epoch")
    train.add_argument("--resume", type=Path, metavar="FILE", help="go on from a checkpoint")
    train.add_argument("--json-log", type=Path, metavar="FILE", help="one JSON line per epoch")

    show = commands.add_parser("demo", help="LFP and gradient descent side by side, with a report")
    _training_options(show)
    show.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    show.add_argument("--repeats", type=int, default=40, help="timed steps (%(default)s)")
    return parser


def _training_options(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    names = ", ".join((*models.MODELS, *models.SPIKING))
    parser.add_argument("--model", help=f"{names} ({default.model})")
    parser.add_argument(
        "--data", help=f"digits, or a path to MNIST idx or CIFAR-10 batches ({default.data})"
    )
    parser.add_argument("--epochs", type=int, help=f"({default.epochs})")
    parser.add_argument("--batch-size", type=int, help=f"({default.batch_size})")
    rates = f"{default.lr}; spiking {models.SPIKING_LR}"
    parser.add_argument("--lr", type=float, help=f"highest learning rate ({rates})")
    parser.add_argument("--momentum", type=float, help=f"({default.momentum})")
    parser.add_argument("--clip", type=float, help=f"global norm limit, 0: none ({default.clip})")
    parser.add_argument("--eps", type=float, help=f"stabiliser of the rule ({default.eps})")
    parser.add_argument("--seed", type=int, help=f"({default.seed})")
    parser.add_argument("--threads", type=int, help="0: torch's choice (0)")
    spiking = parser.add_argument_group("spiking models")
    spiking.add_argument("--steps", type=int, metavar="T", help="time steps, 0: the model's (0)")
    spiking.add_argument(
        "--chunk", type=int, help="lfp: time steps in memory at once in training, 0: all (0)"
    )
    spiking.add_argument("--noise", type=float, help="noise on the layers' inputs in training (0)")


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user wrote."""
    names = Settings.__dataclass_fields__
    return {name: v for name, v in vars(options).items() if name in names and v is not None}


def _train(options: argparse.Namespace) -> None:
    state = checkpoint.load(options.resume) if options.resume else None
    settings = settings_of(_given(options), state, options.resume)
    save = options.save or options.resume
    for path in filter(None, (save, options.json_log)):
        checkpoint.check_writable(path)
    run = Run(settings, data.load(settings.data))
    if state is not None:
        run.load_state(state, options.resume)
        print(f"{options.resume}: {run.epoch} of {settings.epochs} epochs are done")
    run.train(save, options.json_log)
    last = run.history[-1]
    print(f"test accuracy {last['accuracy']:.2%} after {last['seconds']:.1f} s of training")


def _demo(options: argparse.Namespace) -> None:
    if options.repeats < 2:
        raise AppError(f"--repeats: expected at least 2, got {options.repeats}")
    settings = new_settings(_given(options))
    if settings.model in models.SPIKING:
        spiking_demo.run(settings, options.out, options.repeats)
    else:
        demo.run(settings, options.out, options.repeats)


def _backends(options: argparse.Namespace) -> None:
    if options.op is not None and options.op not in backends.ops():
        raise AppError(f"--op: expected one of {', '.join(backends.ops())}, got {options.op!r}")
    try:
        device = torch.device(options.device).type
    except RuntimeError:
        raise AppError(f"--device: expected cpu or cuda, got {options.device!r}") from None
    print(backends.explain(options.op, device, DTYPES[options.dtype]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        if options.command == "info":
            print(info.text())
        elif options.command == "backends":
            _backends(options)
        elif options.command == "train":
            _train(options)
        else:
            _demo(options)
    except AppError as error:
        print(f"lfp_kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lfp_kernels: interrupted", file=sys.stderr)
        return 130
    return 0
