"""Attribution: where the relevance of an output comes from (layer-wise relevance propagation)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .composites import Composite, EpsilonPlus, Transformer

_TOKENS = (torch.int64, torch.int32)


class Attribution(NamedTuple):
    """What :func:`attribute` finds.

    Attributes:
        input: relevance of every input value, shaped like x; of tokens, summed over what each was
            embedded as.
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
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Attribution:
    """Relevance of inputs, layers and weights for a model's output (Bach 2015).

    The model runs once forward and once back, in the mode (train, eval) that it is in; its
    parameters, their ``.grad`` and its buffers stay as they are, but for what its own forward
    changes.

    Args:
        model: takes x, returns one tensor [N, C].
        x: input [N, ...], floating point; or tokens [N, T], int64 or int32, whose relevance is that
            of the output of the first nn.Embedding that looks them up.
        target: whose relevance: a class for all samples, labels [N], a tensor of the output's shape
            that is the relevance itself, or None: each sample's largest output. A class starts with
            its output value.
        composite: the rules; by default ``EpsilonPlus()``, for tokens ``Transformer()``. Feedback
            matrices of the feedback-alignment family work as well: then it is a gradient that is
            attributed.
        layers: names of modules whose outputs' relevance is wanted.
        weights: whether to find the relevance of the parameters, one more product per layer.
        call: ``(model, x) -> [N, C]`` for a model that takes or returns more than a tensor:
            ``lambda m, x: m(input_ids=x).logits[:, -1]``. It is to choose only: what it computes
            outside of the model's forward is derived by autograd, without rules.

    Raises:
        TypeError, ValueError: x, target or a layer's name does not fit; a layer has no rule.
    """
    tokens = isinstance(x, Tensor) and x.dtype in _TOKENS
    if composite is None:
        composite = Transformer() if tokens else EpsilonPlus()
    if not isinstance(composite, Composite):
        raise TypeError(
            "attribute: composite: expected e.g. lfp_kernels.composites.EpsilonPlus(), got "
            f"{type(composite).__name__}"
        )
    if not isinstance(x, Tensor) or not (x.is_floating_point() or tokens):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            "attribute: x: expected a floating-point tensor, or tokens of torch.int64 or "
            f"torch.int32, got {kind}"
        )
    if tokens and not any(isinstance(m, nn.Embedding) for m in model.modules()):
        raise TypeError(
            f"attribute: x: expected a floating-point tensor, got {x.dtype}; tokens need a model "
            "with an nn.Embedding, and this one has none"
        )
    named = dict(model.named_modules())
    for name in layers:
        if name not in named:
            known = ", ".join(n for n in named if n)
            raise ValueError(f"attribute: layers: no module is named {name!r}; there are: {known}")
    outputs: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters()) if weights else {}
    embedded: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_trainable(model, weights))
        if tokens:  # before layers are watched: the embedding may be one of them
            stack.enter_context(_looked_up(model, x, embedded))
        stack.enter_context(_watched(named, layers, outputs))
        stack.enter_context(torch.enable_grad())
        inputs = x if tokens else x.detach().requires_grad_()
        with composite.context(model):
            out = model(inputs) if call is None else call(model, inputs)
        if tokens and not embedded:
            raise ValueError(
                f"attribute: x: no nn.Embedding of the model was given these tokens "
                f"{tuple(x.shape)}; expected the model to look them up as they are"
            )
        _check_output(out)
        start = _start(out.detach(), target)
        source = embedded[0] if tokens else inputs
        wanted = [source, *outputs.values(), *parameters.values()]
        found = torch.autograd.grad(out, wanted, start, allow_unused=True)
    relevance = [torch.zeros_like(t) if g is None else g.to_dense() for t, g in zip(wanted, found)]
    split = 1 + len(outputs)
    # The feedback of a weight is sign(w) times the relevance that flowed through it.
    through = [g * p.detach().sign() for p, g in zip(wanted[split:], relevance[split:])]
    return Attribution(
        relevance[0].sum(-1) if tokens else relevance[0],
        out.detach(),
        start,
        dict(zip(outputs, relevance[1:split])),
        dict(zip(parameters, through)),
    )


def _check_output(out: Any) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(
            f"attribute: model: expected one tensor [N, C], got {type(out).__name__}; choose it by "
            "call, e.g. call=lambda m, x: m(x).logits"
        )
    if not out.requires_grad or out.dim() == 0:
        raise ValueError(
            "attribute: model: expected an output [N, C] that depends on x, got shape "
            f"{tuple(out.shape)}{'' if out.requires_grad else ', which does not'}"
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
            outputs[name] = out if out.requires_grad else out.detach().requires_grad_()
            return outputs[name].clone()

        return hook

    hooks = [named[name].register_forward_hook(note(name)) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _looked_up(model: nn.Module, tokens: Tensor, found: list[Tensor]) -> Iterator[None]:
    """Note what the first embedding that is given ``tokens`` returns."""

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        seen = args[0] if args else kwargs["input"]
        if found or seen.shape != tokens.shape or not torch.equal(seen, tokens):
            return None
        found.append(out if out.requires_grad else out.detach().requires_grad_())
        return found[0].clone()

    hooks = [
        m.register_forward_hook(hook, with_kwargs=True)
        for m in model.modules()
        if isinstance(m, nn.Embedding)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


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


def tokens_html(
    tokens: Sequence[str],
    relevance: Tensor,
    path: str | Path | None = None,
    title: str = "Relevance of tokens",
) -> str:
    """A page that shows each token on a colour: red for positive relevance, blue for negative, the
    more the closer to the largest magnitude. A token "\\n" breaks the line.

    Args:
        tokens: as they are to be read. relevance: [T], e.g. ``attribute(...).input[0]``.
        path: where to write the page as well.

    Raises:
        ValueError: relevance is not one finite number per token.
    """
    if not isinstance(relevance, Tensor) or relevance.shape != (len(tokens),):
        got = tuple(relevance.shape) if isinstance(relevance, Tensor) else type(relevance).__name__
        raise ValueError(f"tokens_html: relevance: expected shape ({len(tokens)},), got {got}")
    values = relevance.detach().double().tolist()
    largest = max(map(abs, values), default=0.0)
    if not largest < float("inf") or any(v != v for v in values):
        raise ValueError("tokens_html: relevance: expected finite numbers, got NaN or inf")
    words, newline = [], chr(10)
    for token, value in zip(tokens, values):
        colour = _POSITIVE if value > 0 else _NEGATIVE
        share = _DEEPEST * abs(value) / largest if largest else 0.0
        words.append(
            f'<span style="background:rgba({colour},{share:.3f})" title="{value:+.4g}">'
            f"{escape(token).replace(newline, '⏎')}</span>{'<br>' * token.endswith(newline)}"
        )
    page = _PAGE.format(
        title=escape(title),
        words="".join(words),
        least=f"{-largest:.3g}" if largest else "0",
        most=f"{largest:+.3g}" if largest else "0",
        total=f"{sum(values):+.4g}",
        negative=f"rgba({_NEGATIVE},{_DEEPEST})",
        positive=f"rgba({_POSITIVE},{_DEEPEST})",
    )
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


# On these the text stays readable, dark on a light page and light on a dark one.
_POSITIVE, _NEGATIVE, _DEEPEST = "220,38,38", "37,99,235", 0.75
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #111827; --page: #ffffff; --faint: #4b5563; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #f9fafb; --page: #111827; --faint: #9ca3af; }}
}}
body {{ background: var(--page); color: var(--ink); margin: 2rem auto; padding: 0 1rem;
  max-width: 50rem; font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.25rem; }}
.tokens {{ font: 1.05rem/2.1 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
.tokens span {{ padding: .25em .15em; margin: 0 1px; border-radius: 3px; }}
.legend {{ display: flex; align-items: center; gap: .6rem; margin-top: 1.5rem;
  color: var(--faint); font-size: .875rem; flex-wrap: wrap; }}
.bar {{ width: 12rem; height: .8rem; border-radius: 3px;
  background: linear-gradient(to right, {negative}, transparent, {positive}); }}
</style></head>
<body><h1>{title}</h1>
<p class="tokens">{words}</p>
<div class="legend"><span>against {least}</span><span class="bar"></span><span>{most} for</span>
<span>sum {total}; point at a token to see its number</span></div>
</body></html>
"""
