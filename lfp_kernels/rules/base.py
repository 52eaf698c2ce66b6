"""Learning rules as data: which small functions stand around the two products of a layer.

    s        = prologue(r, z)                  signal
    r_in     = input_epilogue(s . M, x)        input reward, M made from the weight on the way
    feedback = weight_epilogue(s^T . x, W)     weight feedback; bias feedback from sum_n s

A rule that treats what strengthens and what weakens an output differently has two signals, u for
the positive contributions ``x_i w_ij > 0`` and v for the negative ones (docs/math.md, section 3):

    P = x_a Wp^T + x_b Wn^T                    positive contributions    N = x_b Wp^T + x_a Wn^T
    u, v     = signals(r, z, P, N)
    r_in     = x_a * (u Wp + v Wn) + x_b * (u Wn + v Wp)
    feedback = sign(W) * (Wp * (u^T x_a + v^T x_b) + Wn * (u^T x_b + v^T x_a))

with the parts ``x_a, x_b`` of the input (its positive and negative values, as a rule) and the
positive and negative parts ``Wp, Wn`` of a map of the weight. None of them is ever stored.

Every function has a code, and a rule is a frozen dataclass that names its functions and parameters.
``csrc/rules.h`` and ``ops/_triton.py`` hold the same functions under the same codes: a rule made of
functions that exist costs nothing there. Tests and benchmarks walk ``rules.REGISTRY``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Prologue(IntEnum):
    DIVIDE = 0  # r / stab(z)
    IDENTITY = 1  # r
    ZERO = 2  # r / z, 0 where z = 0
    TIMES_OUTPUT = 3  # r * z
    REVERSE_POSITIVE = 4  # -r / stab(z) where z > 0
    REVERSE_NEGATIVE = 5  # -r / stab(z) where z < 0


class Matrix(IntEnum):
    WEIGHT = 0  # W
    GIVEN = 1  # B, a tensor of W's shape
    SIGN = 2  # a * sign(W)
    GIVEN_SIGN = 3  # |B| * sign(W)
    RANDOM_SIGN = 4  # a * U[0,1) * sign(W), drawn anew for every seed
    NOISY = 5  # B + a * (U[0,1) - 0.5), drawn anew for every seed


class InputEpilogue(IntEnum):
    TIMES_INPUT = 0  # g * x
    IDENTITY = 1  # g


class WeightEpilogue(IntEnum):
    MAGNITUDE = 0  # f * |W|
    IDENTITY = 1  # f


class Signals(IntEnum):
    ONE = 0  # one signal: the prologue
    PLUS = 1  # r / stab(P), 0
    ALPHA_BETA = 2  # a r / stab(P), -b r / stab(N)
    GAMMA = 3  # the sign of z decides which side is raised by 1 + a


class Parts(IntEnum):
    SIGN = 0  # max(x, 0), min(x, 0)
    ONES = 1  # 1, 0
    BOX = 2  # x - a, x - b


class Map(IntEnum):
    VALUE = 0  # W
    SQUARE = 1  # W^2
    ONES = 2  # 1


def stabilize(z: Tensor, eps: float) -> Tensor:
    """``z + eps * sgn(z)`` with ``sgn = +1`` at both zeros; NaN and inf stay what they are."""
    return z + eps * torch.where(z < 0, -1.0, 1.0).to(z.dtype)


def check_number(owner: str, name: str, value: Any, least: float, *, above: bool = False) -> None:
    """Raise for a rule parameter that is no finite number >= (or >) ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name}: expected a number, got {type(value).__name__}")
    sign = ">" if above else ">="
    if not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(f"{owner}: {name}: expected a finite number {sign} {least}, got {value}")


@dataclass(frozen=True)
class Rule:
    """Base of all rules: names the functions, and is them in plain PyTorch (the oracle)."""

    name: ClassVar[str]
    prologue_code: ClassVar[Prologue] = Prologue.DIVIDE
    matrix_code: ClassVar[Matrix] = Matrix.WEIGHT
    input_code: ClassVar[InputEpilogue] = InputEpilogue.TIMES_INPUT
    weight_code: ClassVar[WeightEpilogue] = WeightEpilogue.MAGNITUDE
    signals_code: ClassVar[Signals] = Signals.ONE
    parts_code: ClassVar[Parts] = Parts.SIGN
    map_code: ClassVar[Map] = Map.VALUE
    # Whether it may redistribute the reward of a layer's input, not its weights alone.
    has_input: ClassVar[bool] = True
    code: ClassVar[int] = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields = (
            cls.prologue_code, cls.matrix_code, cls.input_code, cls.weight_code,
            cls.signals_code, cls.parts_code, cls.map_code,
        )  # fmt: skip
        cls.code = sum(int(value) << (4 * place) for place, value in enumerate(fields))

    # -- what the planner asks

    @property
    def split(self) -> bool:
        """Two signals instead of one."""
        return self.signals_code != Signals.ONE

    @property
    def chains(self) -> bool:
        """The prologue is r / stab(z), so the layer above may hand over the finished signal."""
        return not self.split and self.prologue_code == Prologue.DIVIDE

    @property
    def reads_output(self) -> bool:
        """Whether redistribution reads z."""
        if self.split:
            return self.signals_code == Signals.GAMMA
        return self.prologue_code != Prologue.IDENTITY

    @property
    def multiplies_by_input(self) -> bool:
        """The input reward is 0 where the input is 0."""
        if self.split:
            return self.parts_code == Parts.SIGN
        return self.input_code == InputEpilogue.TIMES_INPUT

    @property
    def relu_output_is_enough(self) -> bool:
        """Where this layer's activation is 0 the rule may read z = 0: its reward is 0 there."""
        return self.reads_output or self.split

    @property
    def has_plain_form(self) -> bool:
        """Whether functions without a weight matrix (norms, pools, sums) have this rule."""
        functions = (self.prologue_code, self.input_code, self.weight_code)
        own = self.split or self.matrix_code != Matrix.WEIGHT
        return not own and functions in (
            (Prologue.DIVIDE, InputEpilogue.TIMES_INPUT, WeightEpilogue.MAGNITUDE),
            (Prologue.ZERO, InputEpilogue.TIMES_INPUT, WeightEpilogue.MAGNITUDE),
            (Prologue.IDENTITY, InputEpilogue.IDENTITY, WeightEpilogue.IDENTITY),
        )

    @property
    def is_epsilon_but_for_its_prologue(self) -> bool:
        return not self.split and self.code < 16

    @property
    def draws(self) -> bool:
        """Whether the matrix is drawn anew for every seed."""
        return self.matrix_code in (Matrix.RANDOM_SIGN, Matrix.NOISY)

    @property
    def takes_matrix(self) -> bool:
        """Whether the input product needs a feedback matrix besides the weight."""
        return self.matrix_code in (Matrix.GIVEN, Matrix.GIVEN_SIGN, Matrix.NOISY)

    # -- parameters

    @property
    def stabilizer(self) -> float:
        """The eps of the denominators; 1 for rules that do not divide."""
        return float(getattr(self, "eps", 1.0))

    @property
    def first(self) -> float:
        """Parameter ``a`` of the functions."""
        return 0.0

    @property
    def second(self) -> float:
        """Parameter ``b`` of the functions."""
        return 0.0

    @property
    def random_seed(self) -> int:
        """Key of the random matrices, in [0, 2^53)."""
        return 0

    # -- the functions

    def prologue(self, reward: Tensor, z: Tensor) -> Tensor:
        """The signal s of a rule with one signal."""
        match self.prologue_code:
            case Prologue.IDENTITY:
                return reward
            case Prologue.ZERO:
                return torch.where(z == 0, 0.0, reward / torch.where(z == 0, 1.0, z))
            case Prologue.TIMES_OUTPUT:
                return reward * z
            case Prologue.REVERSE_POSITIVE:
                reward = torch.where(z > 0, -reward, reward)
            case Prologue.REVERSE_NEGATIVE:
                reward = torch.where(z < 0, -reward, reward)
        return reward / stabilize(z, self.stabilizer)

    def matrix(self, weight: Tensor, given: Tensor | None = None) -> Tensor:
        """M of the input product; ``given`` is the feedback matrix B of rules that take one."""
        match self.matrix_code:
            case Matrix.GIVEN if given is not None:
                return given
            case Matrix.SIGN:
                return self.first * weight.sign()
            case Matrix.GIVEN_SIGN if given is not None:
                return given.abs() * weight.sign()
            case Matrix.RANDOM_SIGN:
                return self.first * uniform(weight, self.random_seed) * weight.sign()
            case Matrix.NOISY if given is not None:
                return given + self.first * (uniform(weight, self.random_seed) - 0.5)
        return weight

    def input_epilogue(self, g: Tensor, x: Tensor) -> Tensor:
        return g * x if self.input_code == InputEpilogue.TIMES_INPUT else g

    def weight_epilogue(self, f: Tensor, weight: Tensor) -> Tensor:
        return f * weight.abs() if self.weight_code == WeightEpilogue.MAGNITUDE else f

    # -- rules with two signals

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x_a, x_b"""
        if self.parts_code == Parts.ONES:
            return torch.ones_like(x), torch.zeros_like(x)
        if self.parts_code == Parts.BOX:
            return x - self.first, x - self.second
        return x.clamp(min=0), x.clamp(max=0)

    def mapped(self, weight: Tensor) -> Tensor:
        """The map of the weight whose signs part it into Wp and Wn."""
        if self.map_code == Map.SQUARE:
            return weight * weight
        return torch.ones_like(weight) if self.map_code == Map.ONES else weight

    def bias_parts(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What the bias adds to P and to N: it is a weight whose input is 1. None counts with box
        and flat (zennit's definition of these rules cancels it)."""
        if self.parts_code == Parts.BOX or self.map_code == Map.ONES:
            return torch.zeros_like(bias), torch.zeros_like(bias)
        mapped = self.mapped(bias)
        return mapped.clamp(min=0), mapped.clamp(max=0)

    def signals(self, r: Tensor, z: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """u, v of a rule with two signals; z = 0 takes no reward with gamma."""
        eps, a, b = self.stabilizer, self.first, self.second
        if self.signals_code == Signals.ALPHA_BETA:
            return a * r / stabilize(p, eps), -b * r / stabilize(n, eps)
        if self.signals_code == Signals.GAMMA:
            up = torch.where(z > 0, 1 + a, 1.0).to(r.dtype)
            down = torch.where(z > 0, 1.0, 1 + a).to(r.dtype)
            s = torch.where(z == 0, 0.0, r / stabilize(up * p + down * n, eps))
            return up * s, down * s
        s = r / stabilize(p, eps)
        return s, torch.zeros_like(s)


@dataclass(frozen=True)
class Derivative:
    """What follows the input epilogue when an activation with a derivative lies below: ``x`` is its
    output, and g becomes ``g * f'`` (relu ``x > 0``, tanh ``1 - x^2``, sigmoid ``x (1 - x)``)."""

    function: str

    def __call__(self, g: Tensor, x: Tensor) -> Tensor:
        if self.function == "relu":
            return torch.where(x > 0, g, torch.zeros_like(g))
        return g * (1 - x * x) if self.function == "tanh" else g * (x * (1 - x))


DERIVATIVES = {name: Derivative(name) for name in ("relu", "tanh", "sigmoid")}

# Chain bits of csrc/rules.h: the reward that arrives is already this layer's signal / hand the
# layer below its signal x / stab(x) * g instead of its reward / the input is nowhere negative (so
# that x_b = 0 with Parts.SIGN) / multiply by the derivative of the activation below.
SIGNAL_IN = 1
SIGNAL_OUT = 2
NONNEGATIVE = 4
DERIVATIVE_BITS = {"relu": 8, "tanh": 16, "sigmoid": 32}


def run_params(rule: Rule, below: Rule | Derivative | None = None) -> list[float]:
    """Run-time parameters for the kernels: [eps, eps of the layer below, a, b, seed]."""
    other = below.stabilizer if isinstance(below, Rule) else 1.0
    return [rule.stabilizer, other, rule.first, rule.second, float(rule.random_seed)]


class RuleCall(NamedTuple):
    """How one call of a layer's redistribution runs: what the backends take besides tensors."""

    rule: Rule
    matrix: Tensor | None = None  # B of rules that take a feedback matrix, shaped like the weight
    below: Rule | Derivative | None = None
    signal_in: bool = False
    nonnegative: bool = False
    product_dtype: torch.dtype = torch.float32

    @property
    def chain(self) -> int:
        """The bits of csrc/rules.h."""
        bits = (SIGNAL_IN if self.signal_in else 0) | (NONNEGATIVE if self.nonnegative else 0)
        if isinstance(self.below, Derivative):
            return bits | DERIVATIVE_BITS[self.below.function]
        return bits | (0 if self.below is None else SIGNAL_OUT)

    @property
    def params(self) -> list[float]:
        return run_params(self.rule, self.below)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic dtype inside an op: 16-bit inputs are computed in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def finish_input(rule: Rule, below: Rule | Derivative | None, g: Tensor, x: Tensor) -> Tensor:
    """Input epilogue, followed by what the layer below wants of it."""
    return finish_below(rule.input_epilogue(g, x), below, g, x)


def finish_below(reward: Tensor, below: Rule | Derivative | None, g: Tensor, x: Tensor) -> Tensor:
    if below is None:
        return reward
    if isinstance(below, Derivative):
        return below(reward, x)
    return g * x / stabilize(x, below.stabilizer)


_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(block: Tensor, seed: int) -> Tensor:
    """Four 32-bit words [len(block), 4] for each counter, as int64: Philox4x32-10 (Salmon et al.
    2011). Key = the two halves of ``seed``; counter = (the two halves of the block, 0, 0)."""
    c = [block & _MASK, block >> 32, torch.zeros_like(block), torch.zeros_like(block)]
    key = [seed & _MASK, (seed >> 32) & _MASK]

    def product(m: int, v: Tensor) -> tuple[Tensor, Tensor]:
        # 32 x 32 -> 64 bits in two steps: int64 has no unsigned product.
        low, high = (v & 0xFFFF) * m, (v >> 16) * m
        middle = high + (low >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(10):
        high0, low0 = product(_MULTIPLIERS[0], c[0])
        high1, low1 = product(_MULTIPLIERS[1], c[2])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL)]
    return torch.stack(c, 1)


def uniform(like: Tensor, seed: int) -> Tensor:
    """U[0,1) of the shape of ``like``, one draw per element of the contiguous tensor: the upper 24
    bits of word ``index % 4`` of :func:`philox` block ``index / 4``."""
    words = philox(torch.arange(-(-like.numel() // 4)), seed).flatten()[: like.numel()]
    draws = (words >> 8).to(torch.float64) * 2.0**-24
    return draws.to(device=like.device, dtype=accumulate_dtype(like.dtype)).reshape(like.shape)
