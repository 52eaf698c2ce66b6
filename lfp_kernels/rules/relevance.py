"""Rules of layer-wise relevance propagation and of LFP: each is a few lines of data.

Definitions: Bach 2015, Montavon 2019, and as zennit states them; LFP: arXiv 2308.12053. The weight
feedback of every rule is ``sign(w)`` times the relevance that flowed through the connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .base import (
    InputEpilogue,
    Map,
    Parts,
    Prologue,
    Rule,
    Signals,
    WeightEpilogue,
    check_number,
)  # fmt: skip


@dataclass(frozen=True)
class _Stabilized(Rule):
    eps: float = 1e-6

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_number(owner, "eps", self.eps, 0, above=True)


@dataclass(frozen=True)
class Epsilon(_Stabilized):
    """LFP-epsilon (arXiv 2308.12053): ``s = r / stab(z)``, ``r_in = x * (s W)``,
    ``feedback = |W| * (s^T x)``, ``bias feedback = |b| * sum_n s``.

    Args:
        eps: stabilizer, > 0, in units of z; relative to nothing.
    """

    name = "epsilon"


@dataclass(frozen=True)
class Gradient(Rule):
    """The plain gradient through the same two products: every function is the identity."""

    name = "gradient"
    prologue_code = Prologue.IDENTITY
    input_code = InputEpilogue.IDENTITY
    weight_code = WeightEpilogue.IDENTITY


@dataclass(frozen=True)
class Zero(Rule):
    """LRP-0: epsilon without a stabilizer, ``0 / 0 := 0``."""

    name = "zero"
    prologue_code = Prologue.ZERO


@dataclass(frozen=True)
class ZPlus(_Stabilized):
    """z+: positive contributions alone, ``u = r / stab(P)``, ``v = 0``.

    Args:
        eps: stabilizer of the denominator, > 0.
    """

    name = "zplus"
    signals_code = Signals.PLUS


@dataclass(frozen=True)
class AlphaBeta(_Stabilized):
    """alpha-beta: ``u = alpha r / stab(P)``, ``v = -beta r / stab(N)``, ``alpha - beta = 1``.

    Args:
        eps: stabilizer of both denominators, > 0. alpha: >= 1. beta: alpha - 1.
    """

    alpha: float = 2.0
    beta: float = 1.0

    name = "alpha_beta"
    signals_code = Signals.ALPHA_BETA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("AlphaBeta", "alpha", self.alpha, 0)
        check_number("AlphaBeta", "beta", self.beta, 0)
        if abs(self.alpha - self.beta - 1) > 1e-12:
            raise ValueError(
                f"AlphaBeta: alpha, beta: expected alpha - beta = 1, got {self.alpha} - "
                f"{self.beta}; relevance would not be conserved"
            )

    @property
    def first(self) -> float:
        return float(self.alpha)

    @property
    def second(self) -> float:
        return float(self.beta)


@dataclass(frozen=True)
class Gamma(_Stabilized):
    """gamma, for inputs and outputs of both signs: contributions of z's own sign count 1 + gamma.

    ``z > 0``: ``s = r / stab((1 + gamma) P + N)``, ``u = (1 + gamma) s``, ``v = s``; ``z < 0``: the
    same with P and N, u and v exchanged; ``z = 0`` passes nothing on.

    Args:
        eps: stabilizer, > 0. gamma: >= 0; 0 is epsilon.
    """

    gamma: float = 0.25

    name = "gamma"
    signals_code = Signals.GAMMA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Gamma", "gamma", self.gamma, 0)

    @property
    def first(self) -> float:
        return float(self.gamma)


@dataclass(frozen=True)
class WSquare(_Stabilized):
    """w-square: reward in proportion to W^2, whatever the input: ``x -> 1``, ``W -> W^2``.

    Args:
        eps: stabilizer, > 0.
    """

    name = "wsquare"
    signals_code = Signals.PLUS
    parts_code = Parts.ONES
    map_code = Map.SQUARE


@dataclass(frozen=True)
class Flat(_Stabilized):
    """flat: equal shares for all inputs of an output: ``x -> 1``, ``W -> 1``, no bias.

    Args:
        eps: stabilizer, > 0.
    """

    name = "flat"
    signals_code = Signals.PLUS
    parts_code = Parts.ONES
    map_code = Map.ONES


@dataclass(frozen=True)
class ZBox(_Stabilized):
    """z-box, for inputs within [low, high]: contributions ``(x - low) W+ + (x - high) W-``, all of
    them positive.

    Args:
        eps: stabilizer, > 0. low, high: bounds of the input, low < high.
    """

    low: float = 0.0
    high: float = 1.0

    name = "zbox"
    signals_code = Signals.PLUS
    parts_code = Parts.BOX

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ZBox", "low", self.low, float("-inf"))
        check_number("ZBox", "high", self.high, float("-inf"))
        if not self.low < self.high:
            raise ValueError(f"ZBox: low, high: expected low < high, got {self.low}, {self.high}")

    @property
    def first(self) -> float:
        return float(self.low)

    @property
    def second(self) -> float:
        return float(self.high)


@dataclass(frozen=True)
class Hebbian(Rule):
    """Feedback ``|W| * ((r z)^T x)``: what fires together and is rewarded is strengthened.

    A rule of weights; the input reward follows another one (:class:`Separate`).
    """

    name = "hebbian"
    prologue_code = Prologue.TIMES_OUTPUT
    has_input = False


@dataclass(frozen=True)
class ReversePositive(_Stabilized):
    """Epsilon with the reward of positive outputs reversed: ``r -> -r`` where ``z > 0``."""

    name = "reverse_pos"
    prologue_code = Prologue.REVERSE_POSITIVE


@dataclass(frozen=True)
class ReverseNegative(_Stabilized):
    """Epsilon with the reward of negative outputs reversed: ``r -> -r`` where ``z < 0``."""

    name = "reverse_neg"
    prologue_code = Prologue.REVERSE_NEGATIVE


@dataclass(frozen=True)
class Oja(Rule):
    """Hebbian with Oja's decay: feedback ``|W| * ((r z)^T x - W * N / D)``, ``N = (z^3)^T x``,
    ``D = z^T x``, N where ``D = 0``. A rule of weights, made of three Hebbian products."""

    name = "oja"
    prologue_code = Prologue.TIMES_OUTPUT
    has_input = False

    @property
    def relu_output_is_enough(self) -> bool:
        return False  # N and D sum over outputs that took no reward, too


@dataclass(frozen=True)
class Separate(Rule):
    """The input reward by one rule, the feedback of weight and bias by another.

    Args:
        input: rule of the input reward. weight: rule of the feedback.
    """

    input: Rule = field(default_factory=Gradient)
    weight: Rule = field(default_factory=Epsilon)

    name = "separate"

    @property
    def chains(self) -> bool:
        return False

    @property
    def reads_output(self) -> bool:
        return self.input.reads_output or self.weight.reads_output

    @property
    def multiplies_by_input(self) -> bool:
        return self.input.multiplies_by_input

    @property
    def relu_output_is_enough(self) -> bool:
        return self.input.relu_output_is_enough and self.weight.relu_output_is_enough

    @property
    def takes_matrix(self) -> bool:
        return self.input.takes_matrix

    @property
    def has_plain_form(self) -> bool:
        return False

    def __post_init__(self) -> None:
        for part in ("input", "weight"):
            rule = getattr(self, part)
            if not isinstance(rule, Rule) or isinstance(rule, Separate):
                raise TypeError(
                    f"Separate: {part}: expected a rule such as Epsilon(), got {rule!r}"
                )
        if not self.input.has_input:
            raise ValueError(
                f"Separate: input: {type(self.input).__name__} is a rule of weights; choose "
                "another one for the input, e.g. Epsilon()"
            )
