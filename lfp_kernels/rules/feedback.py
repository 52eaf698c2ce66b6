"""Rules of the feedback-alignment family: the gradient's two products with another matrix M in the
input product (Lillicrap 2016, Xiao 2018, arXiv 2304.01406; docs/math.md, section 4).

M is a saved matrix B, or is made from W or from a counter-based generator inside the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import InputEpilogue, Matrix, Prologue, Rule, WeightEpilogue, check_number


@dataclass(frozen=True)
class _Feedback(Rule):
    prologue_code = Prologue.IDENTITY
    input_code = InputEpilogue.IDENTITY
    weight_code = WeightEpilogue.IDENTITY


@dataclass(frozen=True)
class FixedFeedback(_Feedback):
    """Feedback alignment: ``M = B``, a fixed random matrix of W's shape (Kolen-Pollack and the
    weight mirror learn it)."""

    name = "feedback"
    matrix_code = Matrix.GIVEN


@dataclass(frozen=True)
class SignFeedback(_Feedback):
    """uSF, uniform sign-concordant feedback: ``M = scale * sign(W)``.

    Args:
        scale: magnitude of every element, > 0; the standard deviation of W's initial law, usually.
    """

    scale: float = 1.0

    name = "sign_feedback"
    matrix_code = Matrix.SIGN

    def __post_init__(self) -> None:
        check_number("SignFeedback", "scale", self.scale, 0, above=True)

    @property
    def first(self) -> float:
        return float(self.scale)


@dataclass(frozen=True)
class FixedSignFeedback(_Feedback):
    """frSF: ``M = |B| * sign(W)``, B fixed."""

    name = "fixed_sign_feedback"
    matrix_code = Matrix.GIVEN_SIGN


@dataclass(frozen=True)
class RandomSignFeedback(_Feedback):
    """brSF: ``M = |R| * sign(W)``, R drawn from ``U(-bound, bound)`` inside the kernel for every
    ``seed`` and never stored.

    Args:
        bound: of the uniform law, > 0. seed: key of the generator, in [0, 2^53).
    """

    bound: float = 1.0
    seed: int = 0

    name = "random_sign_feedback"
    matrix_code = Matrix.RANDOM_SIGN

    def __post_init__(self) -> None:
        check_number("RandomSignFeedback", "bound", self.bound, 0, above=True)
        _check_seed("RandomSignFeedback", self.seed)

    @property
    def first(self) -> float:
        return float(self.bound)

    @property
    def random_seed(self) -> int:
        return self.seed


@dataclass(frozen=True)
class NoisyFeedback(_Feedback):
    """NFA: ``M = B + amplitude * (U[0,1) - 0.5)``, fresh noise for every ``seed``.

    Args:
        amplitude: width of the noise, >= 0. seed: key of the generator, in [0, 2^53).
    """

    amplitude: float = 1e-3
    seed: int = 0

    name = "noisy_feedback"
    matrix_code = Matrix.NOISY

    def __post_init__(self) -> None:
        check_number("NoisyFeedback", "amplitude", self.amplitude, 0)
        _check_seed("NoisyFeedback", self.seed)

    @property
    def first(self) -> float:
        return float(self.amplitude)

    @property
    def random_seed(self) -> int:
        return self.seed


def _check_seed(owner: str, seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{owner}: seed: expected an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**53:
        raise ValueError(f"{owner}: seed: expected 0 <= seed < 2^53, got {seed}")
