"""The feedback-alignment family: everything is what backpropagation does, except what makes the
reward of a layer's input.

    composite = composites.FeedbackAlignment(seed=0)
    composite.prepare(model)             # registers the feedback matrices as buffers of the layers
    with composite.context(model):
        loss = F.cross_entropy(model(x), y)
        loss.backward()                  # or lfp_kernels.backward(out, reward)
    optimizer.step()

The matrices are buffers called ``feedback_weight``: they are saved with the model. Sources:
Lillicrap 2016 (FA), Nokland 2016 (DFA), Liao 2016 and Xiao 2018 (sign symmetry), Akrout 2019
(Kolen-Pollack, weight mirror), Frenkel 2021 (DRTP); TF, NF and NFA follow the published code of the
first author of arXiv 2304.01406, since that paper's text was not at hand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..rules import (
    FixedFeedback,
    FixedSignFeedback,
    Gradient,
    NoisyFeedback,
    RandomSignFeedback,
    Rule,
    SignFeedback,
)  # fmt: skip
from .base import WEIGHTED, Composite

BUFFER = "feedback_weight"
SCOPES = ("all", "last")
Init = Callable[[Tensor], object]


def fan_in(weight: Tensor) -> int:
    return max(1, weight[0].numel())


class AlignmentComposite(Composite):
    """Base: which layers take a feedback matrix, and where it is kept.

    Args:
        rule: rule of the layers that take one; the others follow the plain gradient.
        scope: "all" layers, or the "last" one alone with true backpropagation below it (what the
            code of arXiv 2304.01406 does).
        init: fills a feedback matrix in place, e.g. ``torch.nn.init.xavier_uniform_``; None: the
            law of W, ``U(-1, 1) / sqrt(fan_in)`` (torch's default for linear and conv layers).
        seed: of the matrices and of what is drawn anew in every pass.
        feedback_dtype: see :class:`Composite`.
    """

    plain = True
    shape_is_weight = True  # the matrix has the weight's shape

    def __init__(
        self,
        rule: Rule,
        *,
        scope: str = "all",
        init: Init | None = None,
        seed: int = 0,
        feedback_dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        if scope not in SCOPES:
            raise ValueError(f"{owner}: scope: expected one of {SCOPES}, got {scope!r}")
        super().__init__(Gradient(), default="gradient", feedback_dtype=feedback_dtype)
        self.layer_rule, self.scope, self.init, self.seed = rule, scope, init, seed
        self._draws = 0
        self._chosen: dict[int, str] = {}

    def layers_of(self, model: nn.Module) -> list[tuple[str, Any]]:
        """The layers whose input reward does not come from the transposed weight."""
        found: list[tuple[str, Any]] = [
            (n, m) for n, m in model.named_modules() if isinstance(m, WEIGHTED)
        ]
        if not found:
            raise ValueError(
                f"{type(self).__name__}: model: expected a linear or convolutional layer, got none"
            )
        return found if self.scope == "all" else found[-1:]

    def prepare(self, model: nn.Module, x: Tensor | None = None) -> None:
        """Register the feedback matrices that ``model`` does not have yet, as buffers.

        Args:
            model: on its final device, in its final dtype. x: an input; not needed here.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for name, module in self.layers_of(model):
            self._chosen[id(module)] = name
            if self.needs_buffer:
                self.register(module, module.weight.shape, generator)

    @property
    def needs_buffer(self) -> bool:
        return self.layer_rule.takes_matrix

    def register(self, module: Any, shape: Sequence[int], generator: torch.Generator) -> None:
        """Draw a matrix of that shape for ``module``; one that it has already stays."""
        weight: Tensor = module.weight
        values = torch.empty(*shape, dtype=torch.float32)
        if self.init is None:
            bound = 1 / math.sqrt(fan_in(weight))
            values.uniform_(-bound, bound, generator=generator)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
                self.init(values)
        if getattr(module, BUFFER, None) is None:
            module.register_buffer(BUFFER, values.to(weight.device, weight.dtype))

    def remove(self, model: nn.Module) -> None:
        """Take the feedback matrices off ``model`` again."""
        for module in model.modules():
            if isinstance(module, WEIGHTED) and hasattr(module, BUFFER):
                delattr(module, BUFFER)

    def rule_of(self, name: str, module: nn.Module) -> Rule:
        return self.layer_rule if id(module) in self._chosen else self.rule

    def matrix_of(self, name: str, module: nn.Module) -> Tensor | None:
        if self.shape_is_weight and id(module) in self._chosen:
            return getattr(module, BUFFER, None)
        return None

    def rule_now(self, rule: Rule) -> Rule:
        if isinstance(rule, (RandomSignFeedback, NoisyFeedback)):
            return dataclasses.replace(rule, seed=self.next_seed())
        return rule

    def next_seed(self) -> int:
        """A key that no earlier pass of this composite had."""
        self._draws += 1
        return (self.seed << 32 | self._draws) % 2**53


class FeedbackAlignment(AlignmentComposite):
    """FA: fixed random feedback matrices in place of the transposed weights (Lillicrap 2016).

    Args: see :class:`AlignmentComposite`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(FixedFeedback(), **options)


class UniformSignSymmetry(AlignmentComposite):
    """uSF: ``c sign(W)``, recomputed from W in the kernel; c is the standard deviation of the
    weight's initial law, ``1 / sqrt(3 fan_in)``, unless ``scale`` gives it.

    Args:
        scale: c for every layer. The others: see :class:`AlignmentComposite`.
    """

    def __init__(self, scale: float | None = None, **options: Any) -> None:
        super().__init__(SignFeedback(1.0 if scale is None else scale), **options)
        self.scale = scale

    def rule_of(self, name: str, module: nn.Module) -> Rule:
        rule = super().rule_of(name, module)
        if self.scale is None and isinstance(rule, SignFeedback):
            weight: Any = module.weight
            return SignFeedback(1 / math.sqrt(3 * fan_in(weight)))
        return rule


class FixedSignSymmetry(AlignmentComposite):
    """frSF: ``|B| sign(W)`` with fixed random magnitudes.

    Args: see :class:`AlignmentComposite`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(FixedSignFeedback(), **options)


class BatchSignSymmetry(AlignmentComposite):
    """brSF: ``|R| sign(W)``, R redrawn for every batch inside the kernel and never stored, from
    ``U(-1, 1) / sqrt(fan_in)`` unless ``bound`` gives its bound.

    Args:
        bound: of the uniform law. The others: see :class:`AlignmentComposite`.
    """

    def __init__(self, bound: float | None = None, **options: Any) -> None:
        super().__init__(RandomSignFeedback(1.0 if bound is None else bound), **options)
        self.bound = bound

    def rule_of(self, name: str, module: nn.Module) -> Rule:
        rule = super().rule_of(name, module)
        if self.bound is None and isinstance(rule, RandomSignFeedback):
            weight: Any = module.weight
            return RandomSignFeedback(1 / math.sqrt(fan_in(weight)))
        return rule


class NoisyFeedbackAlignment(AlignmentComposite):
    """NFA: fixed B plus fresh uniform noise in every backward pass (arXiv 2304.01406, from its
    first author's code).

    Args:
        amplitude: width of the noise, 1e-3 .. 1e-4 there. The others: see
            :class:`AlignmentComposite`; ``scope="last"`` is what that code does.
    """

    def __init__(self, amplitude: float = 1e-3, *, scope: str = "last", **options: Any) -> None:
        super().__init__(NoisyFeedback(amplitude), scope=scope, **options)


class KolenPollack(AlignmentComposite):
    """Kolen-Pollack: B is learned: it takes the weight's own feedback, and with the same weight
    decay on both they become equal (Akrout 2019).

    B is a parameter of the layer (``feedback_weight``): call :meth:`prepare` before the optimizer
    is made, and give the optimizer a weight decay.

    Args: see :class:`AlignmentComposite`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(FixedFeedback(), **options)

    def register(self, module: Any, shape: Sequence[int], generator: torch.Generator) -> None:
        super().register(module, shape, generator)
        held = getattr(module, BUFFER)
        if not isinstance(held, nn.Parameter):
            delattr(module, BUFFER)
            module.register_parameter(BUFFER, nn.Parameter(held))


class WeightMirror(FeedbackAlignment):
    """FA whose matrices are turned towards the weights by a noise phase (Akrout 2019).

    Call :meth:`mirror` between training steps.
    """

    @torch.no_grad()
    def mirror(
        self, model: nn.Module, *, lr: float = 1e-3, decay: float = 0.0, samples: int = 128
    ) -> None:
        """``B += lr * y^T xi / samples - decay * B`` with unit noise ``xi`` and ``y = xi W^T``:
        on average B moves along W.

        Args:
            lr: step. decay: share of B that is forgotten. samples: rows of noise per layer.
        """
        generator = torch.Generator().manual_seed(self.next_seed() % 2**31)
        for _, layer in self.layers_of(model):
            weight = layer.weight.flatten(1)  # a convolution mirrors each window's weights
            noise = torch.randn(samples, weight.shape[1], generator=generator)
            noise = noise.to(weight.device, weight.dtype)
            y = F.linear(noise, weight)
            found = F.linear_redistribute(
                noise, weight, None, y, y, Gradient(), need=(False, True, False)
            )
            assert found.weight is not None
            matrix = getattr(layer, BUFFER)
            matrix.mul_(1 - decay).add_(found.weight.view_as(matrix), alpha=lr / samples)


class LinBP(AlignmentComposite):
    """LinBP (arXiv 2112.11018): activations count as the identity on the way back, from the layer
    ``start`` upward; below it, and for every weight, plain backpropagation.

    Args:
        start: name of the first layer behind which activations pass gradients unchanged; None: all.
    """

    def __init__(self, start: str | None = None, **options: Any) -> None:
        super().__init__(Gradient(), **options)
        self.start = start

    def prepare(self, model: nn.Module, x: Tensor | None = None) -> None:
        names = [n for n, m in model.named_modules() if isinstance(m, WEIGHTED)]
        if self.start is not None and self.start not in names:
            raise ValueError(
                f"LinBP: start: expected the name of a layer, got {self.start!r}; there are {names}"
            )
        super().prepare(model, x)

    def begins_linear(self, name: str | None) -> bool:
        return self.start == name
