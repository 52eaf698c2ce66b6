"""nn.MultiheadAttention as stages: projections, attention over heads, the output's projection."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx, nn

from ..attention_masks import module_mask
from ..composites import Transformer
from . import stages as S
from . import transformer as T
from .linear_views import LinearOfViews, rows

_FORM = inspect.signature(nn.MultiheadAttention.forward)


class HeadsAttention(T.Attention):
    """Attention between the projections of nn.MultiheadAttention, whose heads are parts of rows.

    ``mask``: values -> the module's two masks. ``name``: of the module.
    """

    def __init__(
        self, module: nn.MultiheadAttention, composite: Transformer, mask: Any, causal: bool,
        name: str,
    ) -> None:  # fmt: skip
        super().__init__(composite, mask, {"causal": causal, "dropout": 0.0})
        self.module, self.name = module, name

    def forward(self, run: S.Run) -> Tensor:
        self.options["dropout"] = self.module.dropout if self.module.training else 0.0
        return super().forward(run)

    def mask_of(self, values: Any, q: Tensor, k: Tensor) -> Any:
        mask, padding = self.mask(values)
        batched = values[self.inputs[0]].dim() == 3
        return module_mask(f"fuse: {self.name}", mask, padding, q, k, batched=batched)

    def heads(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.module.num_heads, -1))
        if x.dim() == 3:  # one sequence
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.module.batch_first else x.permute(1, 2, 0, 3)

    def merged(self, x: Tensor, like: Tensor) -> Tensor:
        if like.dim() == 2:
            return x[0].transpose(0, 1).flatten(-2)
        return (x.transpose(1, 2) if self.module.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)


def multi_head(builder: Any, node: fx.Node, module: nn.MultiheadAttention) -> None:
    """Adds the stages of one call. What it returns beside the output, the probabilities, is never
    made: whatever reads them is refused (need_weights=True is torch's default)."""
    bound = _FORM.bind(module, *node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    name = f"{node.target} (MultiheadAttention"
    if module.bias_k is not None or module.add_zero_attn:
        raise builder.refuse(node, f"{name} with appended keys)")
    if isinstance(given["is_causal"], fx.Node):
        raise builder.refuse(node, f"{name} whose is_causal is computed)")
    masks = [given[k] for k in ("attn_mask", "key_padding_mask")]
    if any(builder.active(mask) for mask in masks):
        raise builder.refuse(node, f"{name} with a learned mask)")
    q, k, v = _projections(builder, node, module, [given[k] for k in ("query", "key", "value")])
    reads = [builder.slot(mask) for mask in masks if isinstance(mask, fx.Node)]
    read = [builder.getter(mask) for mask in masks]
    causal = bool(given["is_causal"]) and masks[0] is None  # beside a mask it is a hint
    both = lambda values: [r(values) for r in read]  # noqa: E731
    stage = HeadsAttention(module, builder.composite, both, causal, str(node.target))
    y = builder.emit(stage, [q, k, v], f"{node.target}.heads", reads)
    out = module.out_proj
    layer = builder.layer_of(out.weight)
    last = builder.layers.Linear(out.weight, out.bias, layer, builder.composite)
    builder.tuples[node] = (builder.emit(last, [y], f"{node.target}.out_proj"),)


def _projections(
    builder: Any, node: fx.Node, module: nn.MultiheadAttention, operands: list[fx.Node]
) -> list[int]:
    """Slots of the projected query, key and value; one product for neighbours of one origin."""
    composite, width, bias = builder.composite, module.embed_dim, module.in_proj_bias
    packed: Any = module.in_proj_weight
    slots: list[int] = []
    while len(slots) < 3:
        first = len(slots)
        count = 1
        if packed is not None:
            while first + count < 3 and operands[first + count] is operands[first]:
                count += 1
        x = builder.slot(operands[first])
        part = None if count == 3 else slice(first * width, (first + count) * width)
        if packed is None:
            separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            weight, of_weight = separate[first], None
        else:
            weight, of_weight = packed, part
        layer = builder.layer_of(packed if packed is not None else module.q_proj_weight)
        stage: S.Stage
        if part is None:
            stage = S.Linear(weight, bias, layer, composite)
        else:
            views = (rows(of_weight), rows(part))
            stage = LinearOfViews(weight, bias, views, layer, composite)
        z = builder.emit(stage, [x], f"{node.target}.in_proj")
        if count == 1:
            slots.append(z)
            continue
        parts = builder.emit(T.TakeApart("chunk", (count, -1)), [z], f"{node.target}.chunk")
        slots += [builder.emit(T.Item(i), [parts], f"{node.target}.{i}") for i in range(count)]
    return slots
