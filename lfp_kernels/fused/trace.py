"""A model as a list of stages: symbolic trace, and one builder per kind of traced call."""

from __future__ import annotations

import inspect
import operator
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn

from .. import calls
from .. import nn as lfp_nn
from ..composites import Composite, LayerRule
from . import neurons as N
from . import stages as S
from . import structure as M
from . import transformer_calls
from .modules import ADAPTIVE, avg_settings, conv_form, dims_of, flattens_all, out_of_place
from .spiking import Spiking

DROP_IN = "; use the drop-in way for this model: with composite.context(model): ..."

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous")
_HOST_METHODS = ("size", "dim", "numel")
_HOST_FUNCTIONS = (
    getattr, operator.getitem, operator.mul, operator.floordiv, operator.add, operator.sub,
)  # fmt: skip
_ADDS = (operator.add, operator.iadd, torch.add)


class _Tracer(fx.Tracer):
    record_stack_traces = True

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, (lfp_nn.Step, lfp_nn.Sum, lfp_nn.LIF, lfp_nn.Spiking)):
            return True
        return super().is_leaf_module(module, qualified_name)


def trace(
    model: nn.Module, composite: Composite, *, time: str | None = None
) -> tuple[list[S.Stage], int, int]:
    """(stages in forward order, slot of the input, slot of the output).

    Args:
        time: of the chain inside a spiking network, its name as a prefix of its layers' names.

    Raises:
        ValueError: the model cannot be traced, or a call in it has no stage; names the line.
    """
    if isinstance(model, lfp_nn.Spiking):
        stage = Spiking(model, composite, "")
        stage.inputs, stage.reads, stage.output, stage.label = [0], [0], 1, "model"
        return [stage], 0, 1
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"fuse: model: cannot be traced at {_user_line(error)}: {error}{DROP_IN}"
        ) from error
    return _Builder(model, composite, time).build(graph)


def _user_line(error: BaseException) -> str:
    """The innermost line of the user's own code in a traceback."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THE_USERS):
            return f"{frame.filename}:{frame.lineno} ({frame.line})"
    return "an unknown line"


def _user_frame(stack: str) -> str | None:
    """The innermost line of the user's own code in a node's recorded stack."""
    lines = stack.strip().splitlines()
    for index in range(len(lines) - 1, -1, -1):
        found = re.match(r'\s*File "(.+)", line (\d+)', lines[index])
        if found and not found[1].startswith(_NOT_THE_USERS):
            code = lines[index + 1].strip() if index + 1 < len(lines) else ""
            return f"{found[1]}:{found[2]} ({code})"
    return None


class _Builder:
    def __init__(self, model: nn.Module, composite: Composite, time: str | None) -> None:
        self.model = model
        self.time = time
        self.layers: Any = S if time is None else N
        self.composite = composite
        self.modules = dict(model.named_modules())
        self.stages: list[S.Stage] = []
        self.slots: dict[fx.Node, int] = {}
        self.attributes: dict[fx.Node, Tensor] = {}
        self.host: set[fx.Node] = set()
        self.taken_apart: set[fx.Node] = set()
        self.linear = composite.begins_linear(None)
        self.owners = {
            id(parameter): (name, module)
            for name, module in self.modules.items()
            for parameter in module.parameters(recurse=False)
        }

    def build(self, graph: fx.Graph) -> tuple[list[S.Stage], int, int]:
        inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
        if len(inputs) != 1:
            raise ValueError(
                f"fuse: model: expected one tensor argument to forward, got {len(inputs)}{DROP_IN}"
            )
        output = -1
        for node in graph.nodes:
            if node.op == "placeholder":
                if node in inputs:
                    self.slots[node] = 0
            elif node.op == "get_attr":
                self.attributes[node] = operator.attrgetter(str(node.target))(self.model)
            elif node.op == "output":
                result = node.args[0]
                if not isinstance(result, fx.Node) or result not in self.slots:
                    raise ValueError(
                        f"fuse: model: expected one tensor as result, got {result}{DROP_IN}"
                    )
                output = self.slots[result]
            elif node.op == "call_module":
                self.module(node)
            else:
                self.function(node)
        return self.stages, 0, output

    # -- one node -> one stage ---------------------------------------------------------------

    def add(self, node: fx.Node, stage: S.Stage, *inputs: fx.Node) -> None:
        stage.inputs = [self.slots[i] for i in inputs]
        stage.reads = [self.slots[i] for i in node.all_input_nodes if i in self.slots]
        stage.output = 1 + max([0, *(s.output for s in self.stages)])
        stage.label = str(node.target) if node.op == "call_module" else node.name
        self.slots[node] = stage.output
        self.stages.append(stage)

    def alias(self, node: fx.Node, source: fx.Node) -> None:
        self.slots[node] = self.slots[source]

    def overwrite(self, node: fx.Node, target: fx.Node) -> None:
        """After an in-place call, later readers of ``target`` see the result."""
        slot = self.slots[target]
        for other, held in self.slots.items():
            if held == slot and other is not node:
                self.slots[other] = self.slots[node]

    def refuse(self, node: fx.Node, what: str) -> ValueError:
        where = _user_frame(node.stack_trace or "") or f"node {node.name}"
        return ValueError(f"fuse: {what} has no stage, at {where}{DROP_IN}")

    def module(self, node: fx.Node) -> None:
        module = self.modules[str(node.target)]
        name = (self.time or "") + str(node.target)
        x: Any = node.args[0]
        rule = self.composite.rule_of(name, module)
        function_rule = self.composite.function_rule
        if not isinstance(x, fx.Node) or x not in self.slots:
            raise self.refuse(node, f"{name} ({type(module).__name__}) on {x}")
        if isinstance(module, nn.Linear):
            layer = self._layer(name, module)
            stage: S.Stage = self.layers.Linear(module.weight, module.bias, layer, self.composite)
        elif (form := conv_form(module)) is not None:
            stage = self._conv_module(module, self._layer(name, module), form)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            stage = S.BatchNorm(module, rule)
        elif isinstance(module, calls.ACTIVATION_MODULES):
            kind = type(module).__name__.lower()
            stage = M.Activation(out_of_place(module), kind, derivative=not self.linear)
        elif isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            if type(module) is not nn.Dropout:
                raise self.refuse(node, f"{name} ({type(module).__name__})")
            stage = M.Dropout(module, self.composite.dropout == "conserving")
        elif isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
            stage = S.AvgPool(avg_settings(module), function_rule)
        elif isinstance(module, ADAPTIVE):
            pool = getattr(TF, f"adaptive_avg_pool{dims_of(module)}d")
            stage = S.AdaptiveAvgPool(pool, module.output_size, function_rule)
        elif isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
            if module.return_indices:
                raise self.refuse(node, f"{name} (max pool with return_indices=True)")
            stage = (M if self.time is None else N).MaxPool(
                calls.max_pool_settings(
                    dims_of(module), module.kernel_size, module.stride, module.padding,
                    module.dilation, module.ceil_mode,
                )
            )  # fmt: skip
        elif isinstance(module, (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)):
            stage = M.Pad(tuple(module.padding))
        elif isinstance(module, lfp_nn.LIF):
            if self.time is None:
                raise self.refuse(node, f"{name} (LIF outside lfp_kernels.nn.Spiking)")
            stage = N.Lif(module, self.composite)
        elif isinstance(module, lfp_nn.Spiking):
            stage = Spiking(module, self.composite, name)
        elif self.time is not None and flattens_all(module):
            stage = N.Flatten(module)
        elif (found := transformer_calls.module_stage(self, node, module)) is not None:
            self.add(node, found, x)
            found.inputs = [] if isinstance(module, nn.Embedding) else found.inputs
            return
        elif isinstance(module, (nn.Flatten, nn.Unflatten)):
            stage = M.Reshape(module)
        elif isinstance(module, nn.Identity):
            return self.alias(node, x)
        elif isinstance(module, lfp_nn.Sum):
            operands: Any = node.args
            return self.add(node, S.Sum(function_rule), *operands)
        else:
            raise self.refuse(node, f"layer {name!r} ({type(module).__name__})")
        self.add(node, stage, x)
        if getattr(module, "inplace", False):
            self.overwrite(node, x)

    def _conv_module(self, module: Any, layer: Any, form: tuple[int, bool]) -> S.Stage:
        if module.padding_mode != "zeros":
            raise ValueError(f"fuse: padding_mode={module.padding_mode!r} has no stage{DROP_IN}")
        arguments = [None, module.weight, module.bias, module.stride, module.padding]
        if form[1]:
            arguments += [module.output_padding, module.groups, module.dilation]
        else:
            arguments += [module.dilation, module.groups]
        geometry = calls.conv_geometry(*form, *arguments)[3]
        return self.layers.Conv(module.weight, module.bias, geometry, layer, self.composite)

    def function(self, node: fx.Node) -> None:
        target: Any = node.target
        x: Any = node.args[0] if node.args else None
        if transformer_calls.function_stage(self, node):
            return
        if self._host(node):
            return self.add(node, M.Host(target, node.op == "call_method", self._resolver(node)))
        if node.op == "call_method":
            name = str(target)
            if name in _RESHAPES:
                return self.add(node, M.Reshape(self._reshaper(node)), x)
            if name in ("permute", "transpose"):
                return self._permute(node)
            if name in ("add", "add_"):
                return self._sum(node, in_place=name == "add_")
            target = getattr(Tensor, name, None)
            if target not in calls.ACTIVATIONS:
                raise self.refuse(node, f"Tensor.{name}")
        if target in (torch.flatten, torch.reshape, torch.unsqueeze, torch.squeeze):
            return self.add(node, M.Reshape(self._reshaper(node)), x)
        if target in (torch.permute, torch.transpose):
            return self._permute(node)
        if target in _ADDS:
            return self._sum(node, in_place=target is operator.iadd)
        if target in (torch.cat, torch.concat):
            tensors: Any = node.args[0]
            dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            return self.add(node, M.Cat(int(dim)), *tensors)
        if target in calls.ACTIVATIONS:
            return self._activation(node, target)
        if target is TF.pad:
            return self._pad(node)
        self._layer_function(node, target)

    def _layer_function(self, node: fx.Node, target: Any) -> None:
        """F.linear, F.conv2d, F.max_pool2d, ...: layers written as functions."""
        args: list[Any] = [self._constant(a) for a in node.args]
        kwargs: dict[str, Any] = {k: self._constant(v) for k, v in node.kwargs.items()}
        x = args[0]
        rule = self.composite.function_rule
        if target is TF.linear:
            weight, bias = _signature(lambda input, weight, bias=None: (weight, bias), args, kwargs)
            return self.add(node, S.Linear(weight, bias, self._layer_of(weight), self.composite), x)
        for form, functions in calls.CONVS.items():
            if target in functions:
                _, weight, bias, geometry = calls.conv_geometry(*form, *args, **kwargs)
                stage = S.Conv(weight, bias, geometry, self._layer_of(weight), self.composite)
                return self.add(node, stage, x)
        for dims in (1, 2, 3):
            if target in (getattr(TF, f"max_pool{dims}d"), getattr(torch, f"max_pool{dims}d")):
                if kwargs.pop("return_indices", False):
                    raise self.refuse(node, f"max_pool{dims}d with return_indices=True")
                settings = calls.max_pool_settings(dims, *args[1:], **kwargs)
                return self.add(node, M.MaxPool(settings), x)
            if target is getattr(TF, f"avg_pool{dims}d"):
                return self.add(
                    node, S.AvgPool(calls.pool_settings(dims, *args[1:], **kwargs), rule), x
                )
            if target is getattr(TF, f"adaptive_avg_pool{dims}d"):
                size = args[1] if len(args) > 1 else kwargs["output_size"]
                return self.add(node, S.AdaptiveAvgPool(target, size, rule), x)
        raise self.refuse(node, f"function {getattr(target, '__name__', target)}")

    def _constant(self, value: Any) -> Any:
        """A parameter or buffer that forward reads, in place of its node."""
        return self.attributes.get(value, value) if isinstance(value, fx.Node) else value

    def _layer_of(self, weight: Tensor) -> LayerRule:
        return self._layer(*self.owners.get(id(weight), ("", self.model)))

    def _layer(self, name: str, module: nn.Module) -> LayerRule:
        self.linear = self.linear or self.composite.begins_linear(name)
        return self.composite.layer(name, module)

    def _activation(self, node: fx.Node, target: Any) -> None:
        x: Any = node.args[0]
        kwargs = dict(node.kwargs)
        name = target.__name__
        in_place = bool(kwargs.pop("inplace", False))
        if name.endswith("_"):
            in_place, name = True, name[:-1]
            target = getattr(torch, name, None) or getattr(TF, name)
        rest = node.args[1:]
        self.add(
            node,
            M.Activation(lambda v: target(v, *rest, **kwargs), name, derivative=not self.linear),
            x,
        )
        if in_place:
            self.overwrite(node, x)

    def _sum(self, node: fx.Node, *, in_place: bool) -> None:
        a, b = node.args[:2]
        tensors: Any = [v for v in (a, b) if isinstance(v, fx.Node) and v in self.slots]
        if len(tensors) != 2 or node.kwargs.get("alpha", 1) != 1:
            raise self.refuse(node, "a sum with a constant or a parameter")
        self.add(node, S.Sum(self.composite.function_rule), *tensors)
        if in_place:
            self.overwrite(node, tensors[0])

    def _pad(self, node: fx.Node) -> None:
        form = lambda input, pad, mode="constant", value=0: (input, pad, mode, value or 0)  # noqa: E731
        x, amounts, *how = _signature(form, node.args, node.kwargs)
        if how != ["constant", 0] or not all(isinstance(a, int) and a >= 0 for a in amounts):
            raise self.refuse(node, f"F.pad({amounts}, {how})")
        self.add(node, M.Pad(tuple(amounts)), x)

    def _permute(self, node: fx.Node) -> None:
        x: Any
        dims: Any
        x, *dims = node.args
        if str(node.target).endswith("transpose") or node.target is torch.transpose:
            self.add(node, M.Permute((), tuple(dims)), x)
        else:
            order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
            self.add(node, M.Permute(tuple(order), ()), x)

    # -- sizes and other numbers that forward computes on the way ------------------------------

    def _host(self, node: fx.Node) -> bool:
        first = node.args[0] if node.args else None
        if node.op == "call_method":
            is_host = node.target in _HOST_METHODS
        elif node.target is getattr:
            is_host = node.args[1] in ("shape", "device", "dtype")
        else:
            is_host = node.target in (*_HOST_FUNCTIONS, torch.arange) and any(
                isinstance(a, fx.Node) and a in self.host for a in node.args
            )
        if is_host and isinstance(first, fx.Node):
            self.host.add(node)
        return is_host

    def _resolver(self, node: fx.Node) -> Callable[[list[Any]], tuple[list[Any], dict[str, Any]]]:
        """A function that fills the slots' values into the node's arguments."""
        slots = self.slots

        def resolve(values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
            def value_of(n: fx.Node) -> Any:
                return values[slots[n]]

            args = fx.map_arg(node.args, value_of)
            return list(args), dict(fx.map_arg(node.kwargs, value_of))

        return resolve

    def _reshaper(self, node: fx.Node) -> M.Reshaper:
        return M.Reshaper(node.target, node.op == "call_method", self._resolver(node))


def _signature(form: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    bound = inspect.signature(form).bind(*args, **kwargs)
    bound.apply_defaults()
    return form(*bound.args, **bound.kwargs)
