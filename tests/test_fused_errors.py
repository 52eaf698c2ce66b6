"""What the fused way refuses, and that a refused batch changes nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import batches, lenet, small_vgg
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels import composites, optim
from lfp_kernels.fused import FusedStep


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.linear(x)
        return x


class Softmaxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.linear(x), -1)


def passing_on(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return forward(*args, **kwargs)

    return wrapper


class Wrapped(nn.Module):
    """torch.fx cannot follow, and no line of forward itself is to blame."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @passing_on
    def forward(self, x: Tensor, mask: Any = None, cache: Any = None, **more: Any) -> Tensor:
        return self.linear(x)


class Later(nn.Module):
    """Comes further with the values of its buffer, and branches then on its input's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(self.count)):
            x = self.linear(x)
        return x if x.sum() > 0 else self.linear(x)


def make_step(model: nn.Module) -> FusedStep:
    return lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(lr=0.1, momentum=0.9))


def test_untraceable_models_name_the_line() -> None:
    with pytest.raises(ValueError, match=r"_errors\.py:\d+ \(if x\.sum\(\) > 0:\).*drop-in way"):
        make_step(Branching())
    with pytest.raises(ValueError, match=r"_errors\.py:\d+ \(forward of Wrapped\): .*drop-in way"):
        make_step(Wrapped())
    with pytest.raises(ValueError, match=r"_errors\.py:\d+ \(return x if x\.sum\(\) > 0 "):
        make_step(Later())
    with pytest.raises(ValueError, match=r"softmax has no stage.*return torch\.softmax.*drop-in"):
        make_step(Softmaxed())
    with pytest.raises(ValueError, match=r"layer '1' \(LayerNorm\)"):
        make_step(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


def test_bad_batches_change_nothing() -> None:
    torch.manual_seed(13)
    model = small_vgg()
    step = make_step(model)
    x, y = batches((3, 8, 8), 4, 1)[0]
    step(x, y)
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(step.state_dict()["state"])

    def nan(out: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(out, float("nan"))

    bad_reward = lfp_kernels.fuse(
        model, composites.Epsilon(), reward=nan, optimizer=optim.SGD(lr=0.1)
    )
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: step(x, y + 2), ValueError, r"range|\[0, 4\)"),
        (lambda: step(x, y.float()), TypeError, "integer"),
        (lambda: step(x, y[:3]), ValueError, r"\(6,\)"),
        (lambda: step(x.float(), y), TypeError, "x: expected torch.float64"),
        (lambda: step([1.0], y), TypeError, "x: expected a torch.Tensor"),
        (lambda: step(x[:, :2], y), (ValueError, RuntimeError), "channel|shape"),  # type: ignore[list-item]
        (lambda: bad_reward(x, y), ValueError, "reward: expected finite values"),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
    for key, value in step.state_dict()["state"].items():
        assert torch.equal(value["momentum_buffer"], state[key]["momentum_buffer"])


def test_wrong_arguments_of_fuse() -> None:
    model = lenet()
    with pytest.raises(ValueError, match="softmax"):  # the error lists what exists
        lfp_kernels.fuse(model, composites.Epsilon(), reward="softmx", optimizer=optim.SGD(lr=0.1))
    with pytest.raises(TypeError, match="optimizer: expected"):
        lfp_kernels.fuse(
            model,
            composites.Epsilon(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),  # type: ignore[arg-type]
        )
    with pytest.raises(TypeError, match="composite: expected"):
        lfp_kernels.fuse(model, "epsilon", optimizer=optim.SGD(lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="feedback_dtype: expected torch.bfloat16"):
        lfp_kernels.fuse(
            model, composites.Epsilon(), optimizer=optim.SGD(lr=0.1), feedback_dtype=torch.float16
        )
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameter"):
        make_step(model)
