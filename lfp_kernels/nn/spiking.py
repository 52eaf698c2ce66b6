"""``Spiking``: a chain of layers and spiking neurons, run over time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..functional import add_noise
from .neurons import LIF

INPUTS = ("auto", "static", "sequence")
WEIGHTED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)  # fmt: skip
State = Sequence[Tensor]


class Spiking(nn.Module):
    """A network of spiking neurons over T time steps: input [N, ...] or [T, N, ...], spikes
    [T, N, C] out.

    Time is stacked into the batch for every product, so a layer runs once and not T times, and the
    layers before the first neurons see a static input once. Every call begins with neurons at rest;
    :meth:`stream` goes on from a state. Under a composite, or fused, the rewards of the spikes flow
    back over time (docs/spiking.md).

    Args:
        module: an ``nn.Sequential`` of layers and :class:`LIF` neurons that ends with neurons.
        steps: T. None: as long as the sequence that comes.
        input: "static" [N, ...], "sequence" [T, N, ...], or "auto": told by the number of
            dimensions (by that of features behind a Flatten) that the first layer takes.
        chunk: time steps that are processed at once in training: memory then depends on the chunk
            and not on T, for a second forward pass. The result is the same.
        noise: standard deviation of the Gaussian noise on the input of every layer with a weight
            matrix while training.
    """

    def __init__(
        self,
        module: nn.Sequential,
        steps: int | None = None,
        *,
        input: str = "auto",
        chunk: int | None = None,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Sequential):
            raise TypeError(
                f"Spiking: module: expected an nn.Sequential, got {type(module).__name__}"
            )
        for name, count in (("steps", steps), ("chunk", chunk)):
            wrong = isinstance(count, bool) or not isinstance(count, (int, type(None)))
            if wrong or (count is not None and count < 1):
                raise ValueError(f"Spiking: {name}: expected at least one time step, got {count!r}")
        if input not in INPUTS:
            raise ValueError(f"Spiking: input: expected one of {INPUTS}, got {input!r}")
        if steps is None and input == "static":
            raise ValueError("Spiking: steps: expected the number of steps of a static input")
        if not (isinstance(noise, (int, float)) and 0 <= noise < math.inf):
            raise ValueError(f"Spiking: noise: expected a standard deviation >= 0, got {noise!r}")
        self.module = module
        self.steps, self.input, self.chunk, self.noise = steps, input, chunk, float(noise)
        chain = [m for _, m in self.layers()]
        if not chain or not isinstance(chain[-1], LIF):
            last = type(chain[-1]).__name__ if chain else "nothing"
            raise ValueError(
                f"Spiking: module: expected a chain that ends with LIF neurons, got {last} at its "
                "end; add lfp_kernels.nn.LIF(beta=0.9)"
            )

    def extra_repr(self) -> str:
        parts = [f"steps={self.steps}"]
        parts += [f"chunk={self.chunk}"] if self.chunk is not None else []
        parts += [f"noise={self.noise:g}"] if self.noise else []
        return ", ".join(parts)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the chain in order, nested Sequentials laid out."""
        yield from _chain("module", self.module)

    def time(self, x: Any) -> tuple[int, bool]:
        """(T, whether ``x`` is static) of an input.

        Raises:
            TypeError, ValueError: x does not fit this network.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"Spiking: x: expected a floating-point tensor, got {got}")
        static = self.input == "static"
        if self.input == "auto":
            static = self.steps is not None and not self._is_sequence(x)
        if static:
            assert self.steps is not None
            return self.steps, True
        if x.dim() < 2 or not len(x):
            raise ValueError(f"Spiking: x: expected shape [T, N, ...], got {tuple(x.shape)}")
        if self.steps is not None and len(x) != self.steps:
            raise ValueError(
                f"Spiking: x: expected {self.steps} time steps, got a sequence of {len(x)}, shape "
                f"{tuple(x.shape)}; Spiking(steps=None) takes any length"
            )
        return len(x), False

    def _is_sequence(self, x: Tensor) -> bool:
        """Whether x has a dimension more than the first layer takes."""
        flattened = False
        for _, layer in self.layers():
            if isinstance(layer, nn.Linear):
                if flattened:
                    return math.prod(x.shape[1:]) != layer.in_features and (
                        math.prod(x.shape[2:]) == layer.in_features
                    )
                return x.dim() > 2
            if isinstance(layer, WEIGHTED):
                return x.dim() > layer.weight.dim()
            flattened = flattened or isinstance(layer, nn.Flatten)
        return False

    def forward(self, x: Tensor) -> Tensor:
        """Spikes [T, N, C] of ``x`` [N, ...] or [T, N, ...], from neurons at rest."""
        self.time(x)
        return run(self, x, *self.parameters())

    def stream(self, x: Tensor, state: State | None = None) -> tuple[Tensor, list[Tensor]]:
        """Spikes [T, N, C], and the membranes after the last step, one tensor per LIF layer; the
        next call goes on from there. For inference over long sequences, without rewards.
        """
        with torch.no_grad():
            return self._walk(x, state)

    def _walk(self, x: Tensor, state: State | None) -> tuple[Tensor, list[Tensor]]:
        steps, static = self.time(x)
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        before = list(state) if state is not None else []
        after: list[Tensor] = []
        batch = len(x) if static else x.shape[1]
        x = x if static else x.flatten(0, 1)
        for name, layer in self.layers():
            if isinstance(layer, LIF):
                old = _state_of(name, before, len(after))
                current = x if static else x.unflatten(0, (steps, batch))
                count = steps if static else None
                if graph:
                    spikes, new = layer.scan_with_graph(current, steps=count, state=old)
                else:
                    found = layer.scan(current, steps=count, state=old, keep=False)
                    spikes, new = found.spikes.unpack(x.dtype), found.state
                after.append(new)
                x, static = spikes.flatten(0, 1), False
                continue
            if self.noise and self.training and isinstance(layer, WEIGHTED):
                x = self._noisy(x, steps, batch, static)
                static = False
            x = layer(x)
        return x.unflatten(0, (steps, batch)), after

    def _noisy(self, x: Tensor, steps: int, batch: int, static: bool) -> Tensor:
        moving = x[None] if static else x.unflatten(0, (steps, batch))
        draws = add_noise(torch.zeros_like(moving), self.noise, draw_seed(), steps=steps)
        return (moving + draws).flatten(0, 1)


def draw_seed() -> int:
    """A seed from torch's generator: torch.manual_seed makes noise reproducible."""
    return int(torch.randint(2**31, ()))


def _chain(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():  # named_children() leaves out a second use
        assert child is not None
        path = f"{prefix}.{name}"
        if type(child) is nn.Sequential:
            yield from _chain(path, child)
            continue
        if isinstance(child, Spiking) or (
            not isinstance(child, LIF) and any(isinstance(m, LIF) for m in child.modules())
        ):
            raise ValueError(
                f"Spiking: module: {path} ({type(child).__name__}) holds neurons of its own; "
                "expected layers and LIF modules directly in nn.Sequential"
            )
        yield path, child


def _state_of(name: str, states: list[Tensor], index: int) -> Tensor | None:
    if not states:
        return None
    if index >= len(states):
        raise ValueError(
            f"Spiking: state: expected one tensor per LIF layer, got {len(states)} and none for "
            f"{name}"
        )
    return states[index]


def run(spiking: Spiking, x: Tensor, *parameters: Tensor) -> Tensor:
    """The forward pass as one call, so that an attached model can put its rules in its place."""
    tensors = (x, *parameters)
    if has_torch_function(tensors):
        return handle_torch_function(run, tensors, spiking, x, *parameters)
    return spiking._walk(x, None)[0]
