"""Attribution: where the relevance of an output comes from (layer-wise relevance propagation)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .composites import Composite, EpsilonPlus


class Attribution(NamedTuple):
    """What :func:`attribute` finds.

    Attributes:
        input: relevance of every input value, shaped like x.
        output: the model's output. start: the relevance that it was given, of the same shape.
        layers: name -> relevance at the output of that layer, shaped like it.
        weights: parameter name -> relevance that flowed through it, summed over the batch, shaped
            like it; of a bias: the relevance that it absorbed.
    """

    input: Tensor
    output: Tensor
    start: Tensor
    layers: dict[str, Tensor]
    weights: dict[str, Tensor]


def attribute(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None = None,
    composite: Composite | None = None,
    *,
    layers: Sequence[str] = (),
    weights: bool = False,
) -> Attribution:
    """Relevance of inputs, layers and weights for a model's output (Bach 2015).

    The model runs once forward and once back, in the mode (train, eval) that it is in; its
    parameters, their ``.grad`` and its buffers stay as they are, but for what its own forward
    changes.

    Args:
        model: takes x, returns one tensor [N, C].
        x: input [N, ...], floating point.
        target: whose relevance: a class for all samples, labels [N], a tensor of the output's shape
            that is the relevance itself, or None: each sample's largest output. A class starts with
            its output value.
        composite: the rules; by default ``EpsilonPlus()``. Feedback matrices of the
            feedback-alignment family work as well: then it is a gradient that is attributed.
        layers: names of modules whose outputs' relevance is wanted.
        weights: whether to find the relevance of the parameters, one more product per layer.

    Raises:
        TypeError, ValueError: x, target or a layer's name does not fit; a layer has no rule.
    """
    composite = EpsilonPlus() if composite is None else composite
    if not isinstance(composite, Composite):
        raise TypeError(
            "attribute: composite: expected e.g. lfp_kernels.composites.EpsilonPlus(), got "
            f"{type(composite).__name__}"
        )
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"attribute: x: expected a floating-point tensor, got {kind}")
    named = dict(model.named_modules())
    for name in layers:
        if name not in named:
            known = ", ".join(n for n in named if n)
            raise ValueError(f"attribute: layers: no module is named {name!r}; there are: {known}")
    outputs: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters()) if weights else {}
    with _watched(named, layers, outputs), _trainable(model, weights), torch.enable_grad():
        inputs = x.detach().requires_grad_()
        with composite.context(model):
            out = model(inputs)
        start = _start(out.detach(), target)
        wanted = [inputs, *outputs.values(), *parameters.values()]
        found = torch.autograd.grad(out, wanted, start, allow_unused=True)
    relevance = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found)]
    split = 1 + len(outputs)
    # The feedback of a weight is sign(w) times the relevance that flowed through it.
    through = [g * p.detach().sign() for p, g in zip(wanted[split:], relevance[split:])]
    return Attribution(
        relevance[0],
        out.detach(),
        start,
        dict(zip(outputs, relevance[1:split])),
        dict(zip(parameters, through)),
    )


def _start(out: Tensor, target: int | Tensor | None) -> Tensor:
    if isinstance(target, Tensor) and target.is_floating_point():
        if target.shape != out.shape:
            raise ValueError(
                f"attribute: target: expected the output's shape {tuple(out.shape)} or integer "
                f"labels {tuple(out.shape[:-1])}, got {tuple(target.shape)}"
            )
        return target.to(out.dtype)
    if target is None:
        labels = out.argmax(-1)
    elif isinstance(target, Tensor):
        labels = target.to(out.device)
    elif isinstance(target, int) and not isinstance(target, bool):
        labels = torch.full(out.shape[:-1], target, device=out.device)
    else:
        raise TypeError(
            "attribute: target: expected a class, labels [N], a tensor of the output's shape or "
            f"None, got {type(target).__name__}"
        )
    if labels.shape != out.shape[:-1] or labels.dtype == torch.bool:
        raise ValueError(
            f"attribute: target: expected integer labels of shape {tuple(out.shape[:-1])}, got "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    classes = out.shape[-1]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"attribute: target: expected classes in [0, {classes}), got {target}")
    chosen = labels.long()[..., None]
    return torch.zeros_like(out).scatter_(-1, chosen, out.gather(-1, chosen))


@contextlib.contextmanager
def _watched(
    named: dict[str, nn.Module], layers: Sequence[str], outputs: dict[str, Tensor]
) -> Iterator[None]:
    """Note the outputs of the named modules as they are made."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> Tensor:
            if not isinstance(out, Tensor):
                raise ValueError(
                    f"attribute: layers: {name!r}: expected a module that returns one tensor, got "
                    f"{type(out).__name__}"
                )
            # The model goes on with a copy: an in-place ReLU would move what was noted.
            outputs[name] = out
            return out.clone()

        return hook

    hooks = [named[name].register_forward_hook(note(name)) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _trainable(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Parameters take part in the graph only where their relevance is wanted."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(wanted)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)
