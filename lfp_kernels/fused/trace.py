"""A model as a list of stages: symbolic trace, and one builder per kind of traced call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn

from .. import calls
from .. import nn as lfp_nn
from ..composites import Composite, LayerRule
from . import layer_calls, transformer_calls
from . import neurons as N
from . import routes as R
from . import stages as S
from . import structure as M
from .modules import ADAPTIVE, avg_settings, conv_form, dims_of, flattens_all, out_of_place
from .spiking import Spiking
from .tracer import DROP_IN, left_as_it_was, traced, user_frame

_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous")
_SIZES = ("size", "dim", "numel", "shape", "device", "dtype", "ndim")  # methods and attributes
_ADDS = (operator.add, operator.iadd, torch.add)


def trace(
    model: nn.Module, composite: Composite, given: Collection[str] = (), *, time: str | None = None
) -> tuple[list[S.Stage], int, int]:
    """(stages in forward order, slot of the input, slot of the output).

    Args:
        given: names of the arguments of forward after the first that every step gives.
        time: of the chain inside a spiking network, its name as a prefix of its layers' names.

    Raises:
        ValueError: the model cannot be traced, or a call in it has no stage; names the line.
    """
    if isinstance(model, lfp_nn.Spiking):
        stage = Spiking(model, composite, "")
        stage.inputs, stage.reads, stage.output, stage.label = [0], [0], 1, "model"
        return [stage], 0, 1
    with left_as_it_was(model):
        return _Builder(model, composite, time).build(traced(model, composite, given), given)


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
        self.taken_apart: set[fx.Node] = set()
        self.tuples: dict[fx.Node, tuple[int, ...]] = {}  # modules that return several values
        # Slots that a reward may reach: something trainable lies below. ``learned``: parameters
        # and parts of them.
        self.active_slots: set[int] = set() if time is None else {0}
        self.learned_slots: set[int] = set()
        self.signed_slots: dict[int, int] = {}
        self.linear = composite.begins_linear(None)
        self.owners = {
            id(parameter): (name, module)
            for name, module in self.modules.items()
            for parameter in module.parameters(recurse=False)
        }

    def build(self, graph: fx.Graph, given: Collection[str]) -> tuple[list[S.Stage], int, int]:
        inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
        first = [node for node in inputs if node.target not in given]
        if len(first) != 1:
            raise ValueError(f"fuse: model: expected forward to read its first argument{DROP_IN}")
        output = -1
        for node in graph.nodes:
            if node.op == "placeholder":
                if node in first:
                    self.slots[node] = 0
                elif node in inputs:
                    self.emit_for(node, M.Given(str(node.target)), [])
            elif node.op == "get_attr":
                self.attributes[node] = operator.attrgetter(str(node.target))(self.model)
            elif node.op == "output":
                result = node.args[0]
                if not isinstance(result, fx.Node) or result not in self.slots:
                    raise ValueError(
                        f"fuse: model: expected one tensor as result, got {result}{DROP_IN}"
                    )
                output = self.slots[result]
            else:
                self.call(node)
        return self.stages, 0, output

    def call(self, node: fx.Node) -> None:
        if node.meta.get("no_grad") and self._trains(node):
            raise self.refuse(node, "a call under torch.no_grad()")
        try:
            if node.op == "call_module":
                self.module(node)
            else:
                self.function(node)
        except (IndexError, KeyError, TypeError) as error:  # arguments no stage is made for
            raise self.refuse(node, f"this form of {node.target}") from error

    def _trains(self, node: fx.Node) -> bool:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        within = module is not None and any(p.requires_grad for p in module.parameters())
        return within or any(self.active(n) for n in node.all_input_nodes)

    # -- one node -> one stage ---------------------------------------------------------------

    def add(self, node: fx.Node, stage: S.Stage, *inputs: fx.Node) -> None:
        self.emit_for(node, stage, [self.slot(i) for i in inputs])

    def emit_for(self, node: fx.Node, stage: S.Stage, inputs: list[int]) -> None:
        """Appends the stage whose output is ``node``."""
        reads = [self.slots[i] for i in node.all_input_nodes if i in self.slots]
        label = str(node.target) if node.op == "call_module" else node.name
        self.slots[node] = self.emit(stage, inputs, label, reads)

    def emit(self, stage: S.Stage, inputs: list[int], label: str, reads: Any = ()) -> int:
        """Appends a stage; its output slot. ``inputs`` take rewards; ``reads``: others."""
        if not stage.views and not isinstance(stage, R.Signed):
            inputs = [self.signed(slot) for slot in inputs]
        stage.inputs, stage.label = inputs, label
        stage.reads = list(dict.fromkeys([*inputs, *reads]))
        stage.output = 1 + max([0, *(s.output for s in self.stages)])
        active = any(p.requires_grad for p in stage.parameters)
        if active or not self.active_slots.isdisjoint(inputs):
            self.active_slots.add(stage.output)
        learned = isinstance(stage, R.Parameter)
        if learned or (stage.views and self.learned_slots.issuperset(inputs)):
            self.learned_slots.add(stage.output)
        self.stages.append(stage)
        return stage.output

    def signed(self, slot: int) -> int:
        """The slot; of a parameter or a part of one, that of the stage that signs its feedback."""
        part = slot in self.learned_slots and slot in self.active_slots
        if self.composite.plain or not part:  # plain: gradients, and no relevance
            return slot
        if slot not in self.signed_slots:
            self.signed_slots[slot] = self.emit(R.Signed(), [slot], f"value {slot}, signed")
        return self.signed_slots[slot]

    # -- what a node of the trace is -----------------------------------------------------------

    def slot(self, node: fx.Node) -> int:
        """The slot of a value; parameters and buffers get one when they are first read as such."""
        if node not in self.slots and node in self.attributes:
            value = self.attributes[node]
            is_learned = isinstance(value, nn.Parameter)
            stage = R.Parameter(value) if is_learned else M.Host(self.getter(node))
            self.slots[node] = self.emit(stage, [], node.name)
        return self.slots[node]

    def active(self, value: Any) -> bool:
        """Whether rewards are wanted at a value: what requires_grad says in the drop-in way."""
        if not isinstance(value, fx.Node):
            return False
        if value in self.attributes:
            return bool(getattr(self.attributes[value], "requires_grad", False))
        if value in self.tuples:
            return any(slot in self.active_slots for slot in self.tuples[value])
        return self.slots[value] in self.active_slots

    def learned(self, value: Any) -> bool:
        """A trainable parameter or a part of one."""
        if not self.active(value):
            return False
        return isinstance(self.attributes.get(value), nn.Parameter) or (
            self.slots.get(value) in self.learned_slots
        )

    def getter(self, value: Any) -> Callable[[Any], Any]:
        """values -> that of a node, or the constant itself."""
        if not isinstance(value, fx.Node):
            return lambda values: value
        if value in self.attributes:
            held = self.attributes[value]
            return lambda values: held
        return operator.itemgetter(self.slots[value])

    def resolver(self, node: fx.Node) -> M.Resolver:
        return M.Resolver(node, self.slots, self.attributes)

    def reshaper(self, node: fx.Node) -> M.Reshaper:
        return M.Reshaper(self.resolver(node))

    def maker(self, node: fx.Node) -> S.Stage | None:
        return next((s for s in self.stages if s.output == self.slots.get(node)), None)

    def alias(self, node: fx.Node, source: fx.Node) -> None:
        self.slots[node] = self.slots[source]

    def overwrite(self, node: fx.Node, target: fx.Node) -> None:
        """After an in-place call, later readers of ``target`` see the result. Views of the same
        memory would see it too, and have no stage for that."""
        slot, memory = self.slots[target], self._memory(self.slots[target])
        for other, held in self.slots.items():
            if other is node:
                continue
            if held == slot:
                self.slots[other] = self.slots[node]
            elif self._memory(held) == memory and any(node < user for user in other.users):
                raise self.refuse(node, f"an in-place call on what {other.name} shares")

    def _memory(self, slot: int) -> int:
        """The slot whose memory a slot is a view of."""
        made = {stage.output: stage for stage in self.stages}
        while slot in made and made[slot].views:
            slot = made[slot].inputs[0]
        return slot

    def refuse(self, node: fx.Node, what: str) -> ValueError:
        where = user_frame(node.stack_trace or "") or f"node {node.name}"
        return ValueError(f"fuse: {what} has no stage, at {where}{DROP_IN}")

    def module(self, node: fx.Node) -> None:
        module = self.modules[str(node.target)]
        name = (self.time or "") + str(node.target)
        x: Any = node.args[0] if node.args else None
        rule = self.composite.rule_of(name, module)
        function_rule = self.composite.function_rule
        if transformer_calls.module_stage(self, node, module):
            return
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
        if self._size(node):
            return self._compute(node)
        if transformer_calls.function_stage(self, node):
            return
        if node.op == "call_method":
            name = str(target)
            if name in _RESHAPES:
                return self.add(node, M.Reshape(self.reshaper(node)), x)
            if name in ("permute", "transpose"):
                return self._permute(node)
            if name in ("add", "add_"):
                return self._sum(node, in_place=name == "add_")
            target = getattr(Tensor, name, None)
            if target not in calls.ACTIVATIONS:
                return self._compute(node)
        if target in (torch.flatten, torch.reshape, torch.unsqueeze, torch.squeeze):
            return self.add(node, M.Reshape(self.reshaper(node)), x)
        if target in (torch.permute, torch.transpose):
            return self._permute(node)
        if target in _ADDS:
            return self._sum(node, in_place=target is operator.iadd)
        if target in (torch.cat, torch.concat):
            tensors: Any = node.args[0]
            if isinstance(tensors, fx.Node):
                raise self.refuse(node, "cat of a tuple that was computed")
            dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            return self.add(node, M.Cat(int(dim)), *tensors)
        if target in calls.ACTIVATIONS:
            return self._activation(node, target)
        if not layer_calls.layer_call(self, node):
            self._compute(node)

    def constant(self, value: Any) -> Any:
        """A parameter or buffer that forward reads, in place of its node."""
        return self.attributes.get(value, value) if isinstance(value, fx.Node) else value

    def layer_of(self, weight: Tensor) -> LayerRule:
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
        if not any(self.active(v) for v in (a, b)):
            return self._compute(node)
        tensors: Any = [v for v in (a, b) if isinstance(v, fx.Node) and v in self.slots]
        if len(tensors) != 2 or node.kwargs.get("alpha", 1) != 1:
            raise self.refuse(node, "a sum with a constant or a parameter")
        self.add(node, S.Sum(self.composite.function_rule), *tensors)
        if in_place:
            self.overwrite(node, tensors[0])

    def _permute(self, node: fx.Node) -> None:
        x: Any
        dims: Any
        x, *dims = node.args
        if str(node.target).endswith("transpose") or node.target is torch.transpose:
            self.add(node, M.Permute((), tuple(dims)), x)
        else:
            order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
            self.add(node, M.Permute(tuple(order), ()), x)

    # -- what no reward reaches ----------------------------------------------------------------

    def _size(self, node: fx.Node) -> bool:
        name = node.args[1] if node.target is getattr else node.target
        return name in _SIZES

    def _compute(self, node: fx.Node) -> None:
        """A call without a stage is run as it stands where no reward is lost by that."""
        if not self._size(node) and any(self.active(n) for n in node.all_input_nodes):
            kind = "Tensor." if node.op == "call_method" else "function "
            raise self.refuse(node, kind + str(getattr(node.target, "__name__", node.target)))
        self.emit_for(node, M.Host(self.reshaper(node)), [])
