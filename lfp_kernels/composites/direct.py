"""Composites whose layers hear from the output directly: no input product, no path back.

A layer's input reward is made by a *teacher* from the signal at the model's output (DFA, sDFA,
DRTP, TF) or, for NF, from the reward at the last layer. Sources: Nokland 2016 (DFA), Frenkel 2021
(sDFA, DRTP); TF and NF follow the published code of the first author of arXiv 2304.01406, since
that paper's text was not at hand.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..rules import Gradient
from .base import WEIGHTED
from .feedback import BUFFER, AlignmentComposite

VARIANTS = ("dfa", "sdfa", "drtp")
CONVS = ("flat", "broadcast")


class Signals:
    """What one pass shares: the output, the signal at it, and the labels."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.error: Tensor | None = None
        self.labels: Tensor | None = None

    def one_hot(self, who: str) -> Tensor:
        if self.labels is None or self.out is None:
            raise ValueError(
                f"{who}: expected labels before the backward pass; call composite.target(y)"
            )
        return nn.functional.one_hot(self.labels, self.out.shape[-1]).to(self.out.dtype)


class OutputSignal(torch.autograd.Function):
    """The identity; backward notes the signal that arrives at the output."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, signals: Signals):
        ctx.signals = signals
        signals.out = out.data
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, error: Tensor):
        ctx.signals.error = error
        return error, None


class Teacher:
    """Makes the reward of a layer's input x from the reward at its output: ``teacher(reward, x)``.

    ``taught(reward)`` is the signal [N, C] whose product with ``matrix`` [C, I] that is.
    """

    def __init__(self, composite: DirectComposite, module: nn.Module) -> None:
        self.composite, self.module = composite, module

    @property
    def matrix(self) -> Tensor:
        return getattr(self.module, BUFFER)

    def taught(self, reward: Tensor) -> Tensor:
        return self.composite.signal(reward)

    def __call__(self, reward: Tensor, x: Tensor) -> Tensor:
        return (self.taught(reward) @ self.matrix).view(x.shape)


class BroadcastTeacher(Teacher):
    """Of a convolution: the signal at every output position, through the transposed convolution
    with D [C, C_in, *kernel]."""

    def __call__(self, reward: Tensor, x: Tensor) -> Tensor:
        space = reward.shape[2:]
        signal = self.taught(reward).reshape(*reward.shape[:1], -1, *(1 for _ in space))
        signal = signal.expand(*signal.shape[:2], *space).contiguous()
        geometry = F.ConvGeometry.of(self.module)._replace(groups=1)
        found = F.conv_redistribute(
            x, self.matrix, None, signal, signal, geometry, Gradient(), need=(True, False, False)
        )
        assert found.input is not None
        return found.input


class DirectComposite(AlignmentComposite):
    """Base of composites with teachers.

    Args: as for ``feedback.AlignmentComposite``.
    """

    shape_is_weight = False

    def __init__(self, **options: Any) -> None:
        super().__init__(Gradient(), **options)
        self.signals = Signals()
        self.uphill = False  # whether signals are rewards (fused) or gradients (drop-in)

    @property
    def needs_buffer(self) -> bool:
        return True

    def target(self, y: Tensor) -> None:
        """Labels [N] of the batch, for variants that are taught by them.

        The fused step sets them itself.
        """
        self.signals.labels = y

    def signal(self, reward: Tensor) -> Tensor:
        """The signal [N, C] that is sent down, in the sense of ``reward`` (uphill or downhill)."""
        raise NotImplementedError

    def teacher_of(self, name: str, module: nn.Module) -> Any:
        return Teacher(self, module) if id(module) in self._chosen else None

    def begin(self, out: Tensor, labels: Any, reward: Tensor) -> None:
        self.uphill = True
        self.signals.out, self.signals.error, self.signals.labels = out, reward, labels

    def finish(self, out: Any) -> Any:
        if isinstance(out, Tensor) and out.requires_grad:
            self.uphill = False
            return OutputSignal.apply(out, self.signals)
        return out

    def prepare(self, model: nn.Module, x: Tensor | None = None) -> None:
        """Register the feedback matrices [C, inputs of the layer] that ``model`` does not have yet.

        Args:
            model: on its final device, in its final dtype; its last layer has C outputs.
            x: an input [N, ...] of the model; needed when there are convolutions, whose number of
                inputs depends on it. Matrices of one input size serve no other.
        """
        chosen = self.layers_of(model)
        outputs = self._outputs(model)
        sizes = self._sizes(model, chosen, x)
        generator = torch.Generator().manual_seed(self.seed)
        for name, module in chosen:
            self._chosen[id(module)] = name
            held = getattr(module, BUFFER, None)
            if self._broadcasts(module):
                shape = (outputs, module.in_channels, *module.kernel_size)
                self.register(module, shape, generator)
                continue
            size = sizes.get(id(module), 0 if held is None else held.shape[-1])
            if not size:
                raise ValueError(
                    f"{type(self).__name__}: layer {name!r} ({type(module).__name__}): its number "
                    "of inputs is not known; call composite.prepare(model, x) with an input first"
                )
            self.register(module, (outputs, size), generator)

    def _broadcasts(self, module: nn.Module) -> bool:
        return False

    def _outputs(self, model: nn.Module) -> int:
        last: Any = [m for m in model.modules() if isinstance(m, WEIGHTED)][-1]
        return last.out_features if isinstance(last, nn.Linear) else last.out_channels

    def _sizes(
        self, model: nn.Module, chosen: list[tuple[str, Any]], x: Tensor | None
    ) -> dict[int, int]:
        sizes = {id(m): m.in_features for _, m in chosen if isinstance(m, nn.Linear)}
        if x is None:
            return sizes

        def note(module: nn.Module, args: Any) -> None:
            sizes[id(module)] = args[0][0].numel()

        hooks = [m.register_forward_pre_hook(note) for _, m in chosen]
        training = {m: m.training for m in model.modules()}
        try:
            with torch.no_grad():
                model.eval()(x)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in training.items():
                module.training = mode
        return sizes


class DirectFeedbackAlignment(DirectComposite):
    """DFA: the error at the output reaches the input of every layer through one random matrix
    D [C, inputs], whatever lies between (Nokland 2016).

    Args:
        variant: "dfa" sends the error e down, "sdfa" its sign, "drtp" the one-hot labels, which
            are there before the output is (Frenkel 2021); these two divided by N, to go with a
            loss that is a mean.
        conv: "flat" (the default) gives a convolution D [C, C_in H W], one value per input element,
            as TinyDFA and DRTP do; "broadcast" sends the signal from every output position
            through D [C, C_in, *kernel] by the transposed convolution, as BioTorch does. It serves
            every input size, and not transposed convolutions.
        init, seed, feedback_dtype: as for ``feedback.AlignmentComposite``.
    """

    def __init__(self, variant: str = "dfa", *, conv: str = "flat", **options: Any) -> None:
        if conv not in CONVS:
            raise ValueError(
                f"DirectFeedbackAlignment: conv: expected one of {CONVS}, got {conv!r}"
            )
        if variant not in VARIANTS:
            raise ValueError(
                f"DirectFeedbackAlignment: variant: expected one of {VARIANTS}, got {variant!r}"
            )
        super().__init__(**options)
        self.variant, self.conv = variant, conv

    def _broadcasts(self, module: nn.Module) -> bool:
        return self.conv == "broadcast" and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def teacher_of(self, name: str, module: nn.Module) -> Any:
        if id(module) in self._chosen and self._broadcasts(module):
            return BroadcastTeacher(self, module)
        return super().teacher_of(name, module)

    def signal(self, reward: Tensor) -> Tensor:
        error = self.signals.error
        if error is None:
            raise ValueError(
                "DirectFeedbackAlignment: the signal at the output is not known; run backward from "
                "the output of the model that ran inside composite.context(model)"
            )
        if self.variant == "dfa":
            return error
        if self.variant == "sdfa":
            return error.sign() / len(error)
        one_hot = self.signals.one_hot("DirectFeedbackAlignment") / len(error)
        return one_hot if self.uphill else -one_hot


class TargetFeedback(DirectComposite):
    """TF: the layers below the last one are taught by the target, not by the error:
    ``d = scale (1 - accuracy) y``, sent through B and centred over the batch; plain backpropagation
    below (arXiv 2304.01406, from its first author's code).

    Args:
        scale: of the target. init, seed, feedback_dtype: as for the others.
    """

    def __init__(self, scale: float = 1e-2, **options: Any) -> None:
        super().__init__(scope="last", **options)
        self.scale = float(scale)

    def signal(self, reward: Tensor) -> Tensor:
        one_hot = self.signals.one_hot("TargetFeedback")
        assert self.signals.out is not None and self.signals.labels is not None
        hits = self.signals.out.argmax(-1) == self.signals.labels
        metric = hits.to(one_hot.dtype).mean()
        taught = self.scale * (1 - metric) * one_hot
        # mean(d B) = mean(d) B: centring the [N, C] signal centres what arrives below.
        taught = taught - taught.mean(0, keepdim=True)
        return taught if self.uphill else -taught


class NonlinearFeedback(DirectComposite):
    """NF: ``tanh(delta F1) F2`` with two fixed random matrices in place of the last layer's input
    product; plain backpropagation below (arXiv 2304.01406, from its first author's code).

    Args:
        width: of the layer between F1 [C, width] and F2 [width, I].
        scope, init, seed, feedback_dtype: as for the others; ``scope="all"`` for every layer.
    """

    def __init__(self, width: int = 50, *, scope: str = "last", **options: Any) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"NonlinearFeedback: width: expected an int >= 1, got {width!r}")
        super().__init__(scope=scope, **options)
        self.width = width

    def finish(self, out: Any) -> Any:
        return out

    def teacher_of(self, name: str, module: nn.Module) -> Any:
        return _NonlinearTeacher(self, module) if id(module) in self._chosen else None

    def prepare(self, model: nn.Module, x: Tensor | None = None) -> None:
        """Register F1 and F2 of the chosen layers; linear layers only.

        Args: see :meth:`DirectComposite.prepare`.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for name, module in self.layers_of(model):
            if not isinstance(module, nn.Linear):
                raise ValueError(
                    f"NonlinearFeedback: layer {name!r}: expected an nn.Linear, got "
                    f"{type(module).__name__}; use scope='last' or another composite"
                )
            self._chosen[id(module)] = name
            outputs, inputs = module.weight.shape
            # Kaiming's normal law, as in the code it follows.
            for buffer, shape in (
                (BUFFER + "_1", (outputs, self.width)),
                (BUFFER + "_2", (self.width, inputs)),
            ):
                if getattr(module, buffer, None) is None:
                    values = torch.randn(shape, generator=generator) * math.sqrt(2 / shape[0])
                    module.register_buffer(
                        buffer, values.to(module.weight.device, module.weight.dtype)
                    )

    def remove(self, model: nn.Module) -> None:
        for module in model.modules():
            for buffer in (BUFFER + "_1", BUFFER + "_2"):
                if isinstance(module, WEIGHTED) and hasattr(module, buffer):
                    delattr(module, buffer)


class _NonlinearTeacher:
    def __init__(self, composite: NonlinearFeedback, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, reward: Tensor, x: Tensor) -> Tensor:
        first, second = (getattr(self.module, f"{BUFFER}_{k}") for k in (1, 2))
        return ((reward @ first).tanh() @ second).view(x.shape)
