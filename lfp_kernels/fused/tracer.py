"""The symbolic trace of a model's forward, with help where torch.fx alone cannot follow."""

from __future__ import annotations

import dis
import inspect
import operator
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .. import nn as lfp_nn
from ..composites import Composite

DROP_IN = "; use the drop-in way for this model: with composite.context(model): ..."

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
# They take no traced arguments in some places: sizes one by one, dtypes, values.
_CREATE = ("ones", "zeros", "empty", "full", "tensor", "arange", "eye", "finfo")


class _Value(fx.Proxy):
    """Tells ``x += y`` from ``x = x + y``: other names of x see the sum too."""

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class Tracer(fx.Tracer):
    record_stack_traces = True

    def __init__(self, composite: Composite, given: Collection[str], *, buffers: bool) -> None:
        super().__init__()
        self.composite, self.given = composite, given
        # Traced buffers may be cut by traced sizes; forward cannot branch on their values then.
        self.proxy_buffer_attributes = buffers

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, (lfp_nn.Step, lfp_nn.Sum, lfp_nn.LIF, lfp_nn.Spiking)):
            return True
        if isinstance(module, nn.MultiheadAttention) or self.composite.is_activation(module):
            return True
        return type(module) not in _FORWARDS and super().is_leaf_module(module, qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if type(m) in _FORWARDS:
            forward = partial(_FORWARDS[type(m)], m)
        elif any(True for _ in m.parameters(recurse=False)):  # a norm that is written out
            forward = self.composite.as_one_call(m) or forward
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["no_grad"] = not torch.is_grad_enabled()
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Arguments that a step does not give have their defaults."""
        found, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for place, parameter in enumerate(_named(root_fn)):
            optional = parameter.default is not parameter.empty
            if place > 1 and optional and parameter.name not in self.given:
                args[place] = parameter.default
        return found, args

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A branch that only raises (``assert``, ``if ...: raise``) is not taken here, and every
        step checks that it need not be; others stop the trace."""
        fine = _no_raise()
        if fine is None:
            return super().to_bool(obj)
        if not fine:
            obj = self.create_proxy("call_function", operator.not_, (obj,), {})
        says = "fuse: forward would raise at a check of the model's sizes"
        self.create_proxy("call_function", torch._assert, (obj, says), {})
        return fine


def _named(function: Any) -> list[inspect.Parameter]:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(function).parameters.values() if p.kind not in several]


def further_arguments(model: nn.Module) -> dict[str, bool]:
    """The arguments of forward after the first, and whether each must be given."""
    named = _named(type(model).forward)[2:]
    return {p.name: p.default is p.empty for p in named}


def traced(model: nn.Module, composite: Composite, given: Collection[str] = ()) -> fx.Graph:
    """The graph of ``model``. ``given``: the arguments of forward after the first that it takes.

    Raises:
        ValueError: torch.fx cannot follow; names the line.
    """
    attempts: list[tuple[int, Exception]] = []
    for buffers in (True, False):  # forward may want a buffer's values
        tracer = Tracer(composite, given, buffers=buffers)
        try:
            with _creation_traced(), torch.enable_grad():
                return tracer.trace(model)
        except Exception as error:
            attempts.append((len(getattr(tracer, "graph", fx.Graph()).nodes), error))
    cause = max(attempts, key=lambda attempt: attempt[0])[1]  # of the one that came further
    raise ValueError(
        f"fuse: model: cannot be traced at {_user_line(cause, model)}: {cause}{DROP_IN}"
    ) from cause


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """The model has the attributes it had: torch.fx leaves the constants of forward at it, and
    forward itself may store what it computes.

    Raises:
        ValueError: forward stores a value, which a step would not renew.
    """
    before = {module: dict(vars(module)) for module in model.modules()}
    try:
        yield
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                held = value.values() if isinstance(value, dict) else [value]
                if next(_proxies(held), None) is not None:
                    at = f"{name}.{attribute}" if name else attribute
                    raise ValueError(
                        f"fuse: model: forward stores a value in {at!r}, which has no stage: a "
                        f"step would not renew it; return it or leave it out{DROP_IN}"
                    )
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def _creation_traced() -> Iterator[None]:
    """``torch.ones(t, t)``, ``torch.finfo(x.dtype)`` of traced arguments: calls of the graph."""
    originals = {name: getattr(torch, name) for name in _CREATE}

    def create(function: Any, *args: Any, **options: Any) -> Any:
        proxy = next(_proxies((*args, *options.values())), None)
        if proxy is None:
            return function(*args, **options)
        return proxy.tracer.create_proxy("call_function", function, args, options)

    try:
        for name, function in originals.items():
            setattr(torch, name, partial(create, function))
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


def _proxies(values: Any) -> Iterator[fx.Proxy]:
    for value in values:
        if isinstance(value, fx.Proxy):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _proxies(value)


def _no_raise() -> bool | None:
    """The truth value with which the user's line that branches now does not raise, if the other
    one leads straight to a raise; else None."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    if frame is None:
        return None
    code = [i for i in dis.get_instructions(frame.f_code) if i.opname not in _FILLERS]
    at = next((n for n, i in enumerate(code) if i.offset >= frame.f_lasti), len(code))
    jump = code[at].opname if at < len(code) else ""
    if "JUMP" not in jump or "_IF_" not in jump:
        return None
    target = next((n for n, i in enumerate(code) if i.offset == code[at].argval), len(code))
    goes_on, jumps = _raises(code[at + 1 :]), _raises(code[target:])
    if goes_on == jumps:
        return None
    return ("TRUE" in jump) == goes_on


_FILLERS = ("CACHE", "EXTENDED_ARG", "TO_BOOL", "NOT_TAKEN")


def _raises(code: list[dis.Instruction]) -> bool:
    """Whether a raise comes before any branch or return."""
    ends = (i.opname for i in code if i.opname == "RAISE_VARARGS" or _leaves(i.opname))
    return next(ends, "") == "RAISE_VARARGS"


def _leaves(name: str) -> bool:
    return "JUMP" in name or "RETURN" in name or name == "FOR_ITER"


def _user_line(error: BaseException, model: nn.Module) -> str:
    """The innermost line of the user's own code in a traceback, or else where forward begins."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THE_USERS):
            return f"{frame.filename}:{frame.lineno} ({frame.line})"
    code = inspect.unwrap(type(model).forward).__code__
    return f"{code.co_filename}:{code.co_firstlineno} (forward of {type(model).__name__})"


def user_frame(stack: str) -> str | None:
    """The innermost line of the user's own code in a node's recorded stack."""
    lines = stack.strip().splitlines()
    for index in range(len(lines) - 1, -1, -1):
        found = re.match(r'\s*File "(.+)", line (\d+)', lines[index])
        if found and not found[1].startswith(_NOT_THE_USERS):
            code = lines[index + 1].strip() if index + 1 < len(lines) else ""
            return f"{found[1]}:{found[2]} ({code})"
    return None


# -- torch's own transformer modules: their forwards, without the tests for its fast path, which
#    branch on values and sizes; layers inside them are called as there ---------------------------


def _encoder_layer(
    m: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:  # fmt: skip
    rest = (src_mask, src_key_padding_mask)
    if m.norm_first:
        x = src + m._sa_block(m.norm1(src), *rest, is_causal=is_causal)
        return x + m._ff_block(m.norm2(x))
    x = m.norm1(src + m._sa_block(src, *rest, is_causal=is_causal))
    return m.norm2(x + m._ff_block(x))


def _encoder(
    m: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
) -> Any:
    causal = bool(is_causal)  # a hint beside a mask
    for layer in m.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=causal)
    return src if m.norm is None else m.norm(src)


def _decoder(
    m: Any, tgt: Any, memory: Any, tgt_mask: Any = None, memory_mask: Any = None,
    tgt_key_padding_mask: Any = None, memory_key_padding_mask: Any = None,
    tgt_is_causal: Any = None, memory_is_causal: bool = False,
) -> Any:  # fmt: skip
    for layer in m.layers:
        tgt = layer(
            tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=bool(tgt_is_causal), memory_is_causal=memory_is_causal,
        )  # fmt: skip
    return tgt if m.norm is None else m.norm(tgt)


def _transformer(
    m: Any, src: Any, tgt: Any, src_mask: Any = None, tgt_mask: Any = None,
    memory_mask: Any = None, src_key_padding_mask: Any = None, tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None, src_is_causal: Any = None, tgt_is_causal: Any = None,
    memory_is_causal: bool = False,
) -> Any:  # fmt: skip
    memory = m.encoder(
        src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal
    )
    return m.decoder(
        tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        tgt_is_causal=tgt_is_causal, memory_is_causal=memory_is_causal,
    )  # fmt: skip


_FORWARDS: dict[type, Callable[..., Any]] = {
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoder: _decoder,
    nn.TransformerDecoderLayer: nn.TransformerDecoderLayer.forward,
    nn.Transformer: _transformer,
}
