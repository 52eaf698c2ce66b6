"""The rule registry: every rule is four small functions, the same in Python and in C++."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from linear_cases import options_of

from lfp_kernels import composites, rules, use_backend
from lfp_kernels import functional as F
from lfp_kernels.rules import Epsilon, Rule, accumulate_dtype, run_params, stabilize

ONE_SIGNAL = [  # test_split_rules.py has the others
    pytest.param(cls, id=name) for name, cls in rules.REGISTRY.items() if not cls().split
]
ALL = [pytest.param(cls, id=name) for name, cls in rules.REGISTRY.items()]
HEADER = Path(__file__).resolve().parents[1] / "csrc" / "rules.h"


# ---- stab


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stab(dtype):
    tiny = torch.finfo(dtype).tiny
    z = torch.tensor([0.0, -0.0, tiny, -tiny, 2.0, -2.0, math.inf, -math.inf], dtype=dtype)
    want = torch.tensor([0.5, 0.5, 0.5, -0.5, 2.5, -2.5, math.inf, -math.inf], dtype=dtype)
    assert torch.equal(stabilize(z, 0.5), want)
    assert stabilize(torch.tensor(math.nan, dtype=dtype), 0.5).isnan()


def test_stab_never_divides_by_zero():
    z = torch.linspace(-1e-5, 1e-5, 2001, dtype=torch.float64)
    assert (stabilize(z, 1e-6).abs() >= 1e-6).all()


def test_stab_keeps_the_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert stabilize(torch.ones(2, dtype=dtype), 0.5).dtype == dtype


def test_16_bit_is_computed_in_float32():
    assert accumulate_dtype(torch.float16) == accumulate_dtype(torch.bfloat16) == torch.float32
    assert accumulate_dtype(torch.float64) == torch.float64
    # 1 / 1e-6 overflows float16; the feedback 1e6 * 1e-3 * 1 does not.
    x, weight = torch.full((1, 1), 2e-3).half(), torch.full((1, 1), 0.5).half()
    z, reward = torch.zeros(1, 1).half(), torch.ones(1, 1).half()
    for backend in ("native", "reference"):
        with use_backend(backend):
            got = F.linear_redistribute(x, weight, None, z, reward)
        assert torch.allclose(got.weight.float(), x.float() * 0.5e6, rtol=2e-3)


# ---- the registry


def test_codes_are_distinct():
    codes = {cls.code: name for name, cls in rules.REGISTRY.items()}
    assert len(codes) == len(rules.REGISTRY)


CODES = [
    rules.Prologue, rules.Matrix, rules.InputEpilogue, rules.WeightEpilogue, rules.Signals,
    rules.Parts, rules.Map,
]  # fmt: skip


@pytest.mark.parametrize("codes", CODES, ids=lambda c: c.__name__)
def test_function_codes_are_those_of_the_header(codes):
    text = re.sub(r"//.*", "", HEADER.read_text())
    body = re.search(rf"enum class {codes.__name__} \{{([^}}]*)\}}", text).group(1)
    header = [name.lower() for name in re.findall(r"k(\w+)", body)]
    assert header == [code.name.replace("_", "").lower() for code in codes]
    assert [int(code) for code in codes] == list(range(len(codes)))


@pytest.mark.parametrize("cls", ALL)
def test_a_code_packs_its_functions_in_four_bits_each(cls):
    functions = (
        cls.prologue_code, cls.matrix_code, cls.input_code, cls.weight_code, cls.signals_code,
        cls.parts_code, cls.map_code,
    )  # fmt: skip
    assert [cls.code >> 4 * place & 15 for place in range(8)] == [*functions, 0]


@pytest.mark.parametrize("cls", ALL)
def test_is_frozen_data_with_defaults(cls):
    rule = cls()
    assert isinstance(rule, Rule) and rules.REGISTRY[rule.name] is cls
    assert rule == cls() and hash(rule) == hash(cls())
    assert cls.__doc__
    for field in dataclasses.fields(rule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, field.name, 1.0)


@pytest.mark.parametrize("cls", ONE_SIGNAL)
def test_native_functions_are_the_python_functions(cls):
    """Each of the four functions alone: the other factors of the linear layer are 1."""
    rule = cls()
    g = torch.Generator().manual_seed(0)
    n = 64
    x = torch.randn(1, n, generator=g, dtype=torch.float64)
    z = torch.randn(1, n, generator=g, dtype=torch.float64)
    r = torch.randn(1, n, generator=g, dtype=torch.float64)
    z[0, :2] = torch.tensor([0.0, -0.0])
    weight = torch.randn(n, n, generator=g, dtype=torch.float64)
    bias = torch.randn(n, generator=g, dtype=torch.float64)
    options = options_of(rule, weight)
    with use_backend("native"):
        got = F.linear_redistribute(x, weight, bias, z, r, rule, **options)
    s = rule.prologue(r, z)
    # One sample: the bias feedback is weight_epilogue(s, b), the weight's that of an outer product.
    torch.testing.assert_close(got.bias, rule.weight_epilogue(s[0], bias), rtol=1e-14, atol=0)
    outer = rule.weight_epilogue(s[0][:, None] * x, weight)
    torch.testing.assert_close(got.weight, outer, rtol=1e-14, atol=0)
    if not rule.has_input:
        return
    matrix = rule.matrix(weight, options["matrix"])
    product = rule.input_epilogue(s @ matrix, x)
    scale = float((s.abs() @ matrix.abs()).max())
    torch.testing.assert_close(got.input, product, rtol=1e-12, atol=1e-14 * scale)


@pytest.mark.parametrize("cls", ALL)
def test_functions_are_linear_in_the_reward(cls):
    rule = cls()
    g = torch.Generator().manual_seed(1)
    a, b, z, w = (torch.randn(50, generator=g, dtype=torch.float64) for _ in range(4))
    for f in (rule.prologue, rule.input_epilogue, rule.weight_epilogue):
        torch.testing.assert_close(f(a + 3 * b, z), f(a, z) + 3 * f(b, z))
    assert torch.equal(rule.weight_epilogue(torch.zeros(50), w), torch.zeros(50))


@pytest.mark.parametrize("cls", ALL)
def test_chaining_is_announced_only_where_the_prologue_divides(cls):
    rule = cls()
    z = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    divides = torch.equal(rule.prologue(torch.ones_like(z), z), 1 / stabilize(z, rule.stabilizer))
    assert rule.chains == (divides and not rule.split)
    own = [rule.first, rule.second, float(rule.random_seed)]
    assert run_params(rule) == [rule.stabilizer, 1.0, *own]
    assert run_params(rule, Epsilon(0.25)) == [rule.stabilizer, 0.25, *own]


def test_epsilon_functions():
    rule = Epsilon(0.5)
    t = torch.tensor
    assert torch.equal(rule.prologue(t([6.0, 6.0]), t([1.0, -1.0])), t([4.0, -4.0]))
    assert torch.equal(rule.matrix(t([-3.0])), t([-3.0]))
    assert torch.equal(rule.input_epilogue(t([2.0]), t([-3.0])), t([-6.0]))
    assert torch.equal(rule.weight_epilogue(t([2.0, -2.0]), t([-3.0, 0.0])), t([6.0, -0.0]))


# ---- parameters


@pytest.mark.parametrize("eps", [0, 0.0, -1e-6, math.inf, math.nan])
def test_epsilon_refuses_values_that_do_not_stabilize(eps):
    with pytest.raises(ValueError, match=r"Epsilon: eps: expected a finite number > 0, got"):
        Epsilon(eps)


@pytest.mark.parametrize("eps", [None, "1e-6", True, torch.tensor(1e-6), [1e-6]])
def test_epsilon_refuses_other_types(eps):
    with pytest.raises(TypeError, match=r"Epsilon: eps: expected a number, got"):
        Epsilon(eps)


def test_eps_is_a_run_time_value():
    """Two eps, two results, from the same compiled kernel."""
    x, weight = torch.ones(1, 1), torch.ones(1, 1)
    z, reward = torch.ones(1, 1), torch.ones(1, 1)
    for eps in (1e-6, 0.25, 1.0):
        got = F.linear_redistribute(x, weight, None, z, reward, Epsilon(eps))
        assert float(got.input) == pytest.approx(1 / (1 + eps), rel=1e-6)


def test_rules_by_name():
    assert rules.get("gamma", gamma=0.5) == rules.Gamma(gamma=0.5)
    assert rules.get("oja") == rules.Oja()
    with pytest.raises(ValueError, match=r"expected one of alpha_beta, .*zplus, got 'z\+'"):
        rules.get("z+")
    with pytest.raises(TypeError, match="gamma"):
        rules.get("epsilon", gamma=1.0)
    with pytest.raises(ValueError, match=r"expected one of alpha_beta, .*got 'zpls'"):
        composites.Composite("epsilon", layers=[("0", "zpls")])
