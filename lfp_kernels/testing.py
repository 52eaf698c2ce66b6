"""Oracles and checks for tests of kernels, the package's own and yours.

The rule for accuracy is an error budget instead of a tolerance tuned by hand: an implementation may
be as wrong as twice the plain PyTorch reference in the same dtype, plus one rounding, both measured
against a float64 oracle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .rules import stabilize

__all__ = [
    "absorbed",
    "assert_conserved",
    "assert_within_budget",
    "linear_oracle",
    "poisoned_empty",
]


def assert_within_budget(
    actual: Tensor, same_dtype_reference: Tensor, oracle64: Tensor, name: str = "result"
) -> None:
    """``|actual - oracle| <= 2 * (max|reference - oracle| + eps(dtype) * max|oracle|)``.

    Non-finite values must agree with the oracle in kind and place; values that overflow the dtype
    must do so as in the reference.

    Args:
        actual: what is tested. same_dtype_reference: the reference on the same inputs, of the same
            shape and dtype. oracle64: the float64 truth for the same inputs.
    """
    reference, oracle = same_dtype_reference, oracle64
    assert actual.dtype == reference.dtype, f"{name}: {actual.dtype}, expected {reference.dtype}"
    assert actual.shape == reference.shape == oracle.shape, (
        f"{name}: shape {tuple(actual.shape)}, reference {tuple(reference.shape)}, "
        f"oracle {tuple(oracle.shape)}"
    )
    assert oracle.dtype == torch.float64, f"{name}: oracle is {oracle.dtype}, expected float64"
    if actual.numel() == 0:
        return
    got, want = actual.double().cpu(), reference.double().cpu()
    truth = oracle.cpu()
    regular = truth.isfinite() & want.isfinite()
    limit = torch.finfo(actual.dtype)
    rest = torch.where(truth.abs() > limit.max, want, truth)[~regular]
    torch.testing.assert_close(
        got[~regular], rest, rtol=0, atol=0, equal_nan=True, msg=f"{name}: non-finite values differ"
    )
    if not regular.any():
        return
    got, want, truth = got[regular], want[regular], truth[regular]
    budget = 2 * ((want - truth).abs().max() + limit.eps * truth.abs().max())
    error = (got - truth).abs()
    # A NaN in `got` fails the comparison.
    worst = int(torch.where(error.isnan(), torch.inf, error).argmax())
    assert bool((error <= budget).all()), (
        f"{name}: error {float(error[worst]):.3e} exceeds the budget {float(budget):.3e}: got "
        f"{float(got[worst])!r}, oracle {float(truth[worst])!r}, reference {float(want[worst])!r}"
    )


def linear_oracle(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, reward: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor | None]:
    """LFP-epsilon of a linear layer in float64, message by message instead of by products.

    The relevance that flows from output o to input i is ``m[n,o,i] = x[n,i] W[o,i] r[n,o] /
    stab(z[n,o])``. The input reward gathers it over o, the feedback of a weight is
    ``sign(w) * sum_n m``: an independent statement of the rule.

    Args:
        x: [N, I]. weight: [O, I]. bias: [O] or None. z, reward: [N, O].

    Returns:
        input reward [N, I], weight feedback [O, I], bias feedback [O] or None.
    """
    x, weight, z, reward = (t.detach().double() for t in (x, weight, z, reward))
    signal = reward / stabilize(z, eps)
    messages = x[:, None, :] * weight[None, :, :] * signal[:, :, None]
    weight_feedback = weight.sign() * messages.sum(0)
    bias_feedback = None
    if bias is not None:
        bias = bias.detach().double()
        bias_feedback = bias.sign() * (bias * signal).sum(0)
    return messages.sum(1), weight_feedback, bias_feedback


def absorbed(z: Tensor, reward: Tensor, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Reward that a layer keeps: the share of its biases and of the stabilizer.

    Args:
        z, reward: [..., O]. bias: [O] or None.

    Returns:
        0-dim float64: ``sum s * (b + eps * sgn(z))`` with ``s = r / stab(z)``.
    """
    z, reward = z.detach().double(), reward.detach().double()
    kept = stabilize(z, eps) - z
    if bias is not None:
        kept = kept + bias.detach().double()
    return (reward / stabilize(z, eps) * kept).sum()


def assert_conserved(
    reward: Tensor,
    input_reward: Tensor,
    absorbed: Tensor | float = 0.0,
    *,
    flow: Tensor | float | None = None,
) -> None:
    """``sum r_in + absorbed = sum r``, up to the rounding of all that flowed.

    Args:
        reward: at the output. input_reward: at the input, any shape. absorbed: what the layers in
            between kept, such as :func:`absorbed` gives.
        flow: sum of the magnitudes of everything that was added up; by default
            ``sum|r| + sum|r_in| + |absorbed|``, too small where large messages cancel.
    """
    into, out = reward.detach().double(), input_reward.detach().double()
    kept = float(absorbed)
    if flow is None:
        flow = into.abs().sum() + out.abs().sum() + abs(kept)
    gap = abs(float(into.sum()) - float(out.sum()) - kept)
    # Rounding errors of n independent additions grow as sqrt(n).
    terms = max(1, reward.numel() + input_reward.numel())
    bound = 2 * torch.finfo(input_reward.dtype).eps * terms**0.5 * float(flow)
    assert gap <= bound, (
        f"reward is not conserved: {float(into.sum())!r} in, {float(out.sum())!r} out, {kept!r} "
        f"absorbed: {gap:.3e} are missing, rounding explains {bound:.3e}"
    )


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Memory that torch allocates without filling it holds NaN (floating) or the largest integer.

    Reaches ``torch.empty`` and its kin, in compiled kernels too: an output element that a kernel
    forgets to write becomes visible.
    """
    mode = torch.get_deterministic_debug_mode()
    # Seen by a type checker as a plain module; it is one with a property of that name.
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        switch.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)
