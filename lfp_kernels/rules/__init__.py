"""Every learning rule, as data (see :mod:`lfp_kernels.rules.base`)."""

from .base import (
    DERIVATIVE_BITS,
    DERIVATIVES,
    NONNEGATIVE,
    SIGNAL_IN,
    SIGNAL_OUT,
    Derivative,
    InputEpilogue,
    Map,
    Matrix,
    Parts,
    Prologue,
    Rule,
    RuleCall,
    Signals,
    WeightEpilogue,
    accumulate_dtype,
    finish_below,
    finish_input,
    philox,
    run_params,
    stabilize,
    uniform,
)  # fmt: skip
from .feedback import (
    FixedFeedback,
    FixedSignFeedback,
    NoisyFeedback,
    RandomSignFeedback,
    SignFeedback,
)  # fmt: skip
from .relevance import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    Hebbian,
    Oja,
    ReverseNegative,
    ReversePositive,
    Separate,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
)  # fmt: skip

# Rules of one kernel call each. Oja and Separate are made of several.
REGISTRY: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Epsilon, Gradient, Zero, ZPlus, AlphaBeta, Gamma, WSquare, Flat, ZBox, Hebbian,
        ReversePositive, ReverseNegative, FixedFeedback, SignFeedback, FixedSignFeedback,
        RandomSignFeedback, NoisyFeedback,
    )
}  # fmt: skip


def get(name: str, **parameters: float) -> Rule:
    """The rule called ``name`` (a key of REGISTRY, "oja" or "separate") with its parameters.

    Raises:
        ValueError: no such rule; the message lists them. TypeError: a parameter it does not have.
    """
    known = {**REGISTRY, Oja.name: Oja, Separate.name: Separate}
    if name not in known:
        raise ValueError(f"rules: expected one of {', '.join(sorted(known))}, got {name!r}")
    return known[name](**parameters)


__all__ = [
    "DERIVATIVES", "DERIVATIVE_BITS", "NONNEGATIVE", "REGISTRY", "SIGNAL_IN", "SIGNAL_OUT",
    "AlphaBeta", "Derivative", "Epsilon", "FixedFeedback", "FixedSignFeedback", "Flat", "Gamma",
    "Gradient", "Hebbian", "InputEpilogue", "Map", "Matrix", "NoisyFeedback", "Oja", "Parts",
    "Prologue", "RandomSignFeedback", "ReverseNegative", "ReversePositive", "Rule", "RuleCall",
    "Separate", "SignFeedback", "Signals", "WSquare", "WeightEpilogue", "ZBox", "ZPlus", "Zero",
    "accumulate_dtype", "finish_below", "finish_input", "get", "philox",
    "run_params", "stabilize",
    "uniform",
]  # fmt: skip
