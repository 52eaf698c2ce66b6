"""Planted bugs: rules with two signals and made matrices in Triton."""

from __future__ import annotations

from . import Group, plant

RULES = "tests/gpusim_ops/test_rules_triton.py"
SUMS = "tests/gpusim_ops/test_split_sums.py"
OPS = "lfp_kernels/ops"

SPLIT = plant(
    f"{OPS}/_triton_split.py",
    ("padding", "return tl.where(inside, x - a, 0.0), tl", "return x - a, tl"),
    ("parts", "tl.where(inside, x - b, 0.0)", "tl.where(inside, x - a, 0.0)"),
    ("bias", "        negative += tl.where(bias > 0, 0.0, bias)\n", ""),
    ("epilogue", "        reward += x_b * g2\n", "        reward += x_a * g2\n"),
    ("epilogue sign", "feedback = sign * (w_p", "feedback = (w_p"),
    ("argument", "raw += under * v.sum(summed)", "raw += above * v.sum(summed)"),
)

CONV = plant(
    f"{OPS}/conv/triton_split.py",
    ("argument", "return first, load(second_ptr + offset, inside)", "return first, first"),
    (
        "terms",
        "crossed, c_rest = _add(two, w_p, crossed,",
        "crossed, c_rest = _add(two, w_n, crossed,",
    ),
    ("offset", "(group * inputs + along(channel, O)) * src_c", "along(channel, O) * src_c"),
    ("mask", "mask = inside & (row < rows) & along(k_inside, O)", "mask = inside & (row < rows)"),
    ("layout", "place = channel * taps + tap if LAST else column", "place = column"),
    (
        "terms",
        "f2 = add_product(small2, large, f2, MODE)",
        "f2 = add_product(small2, large2, f2, MODE)",
    ),
    ("layout", "    reward = arranged_like(u, reward)\n", ""),
)

LONG_SUMS = plant(
    f"{OPS}/_triton_split.py",
    ("rounding", "return after, (after - total) - more", "return after, more - more"),
    ("rounding", "tl.zeros_like(total), MODE) - rest", "tl.zeros_like(total), MODE) + rest"),
) + plant(
    f"{OPS}/linear/triton_split.py",
    ("layout", "    bias = None if bias is None else bias.contiguous()\n", ""),
)

TF32 = (
    plant(
        f"{OPS}/_triton_product.py",
        ("rounding", "tl.dot(to_tf32(a), to_tf32(b)", "tl.dot(a.to(operand), to_tf32(b)"),
        ("rounding", "tl.dot(to_tf32(a), to_tf32(b)", "tl.dot(to_tf32(a), b.to(operand)"),
        ("argument", "    if in_tf32:\n", "    if False:\n"),
    )
    + plant(
        f"{OPS}/linear/triton.py",
        ("argument", "forward_mode(x.dtype, _cuda.linear_in_tf32(x))", "forward_mode(x.dtype)"),
    )
    + plant(
        f"{OPS}/conv/triton.py",
        ("argument", "_cuda.conv_in_tf32(x)), last", "_cuda.linear_in_tf32(x)), last"),
    )
)

WINDOW = plant(
    f"{OPS}/conv/triton_launch.py",
    ("argument", "*axes(geometry.padding, 0),", "*axes(geometry.padding),"),
)

GROUPS = (
    Group(
        f"{RULES} {SUMS} -k 'every_kind or convolution_update or (test_rules_triton and "
        "test_convolution and not many) or no_dense or (test_rules_triton and test_linear_update) "
        "or (float64 and test_linear)'",
        SPLIT + CONV + WINDOW,
    ),
    Group(
        "tests/test_split_rules.py -k 'layouts or (error_budget and shape2 and dtype1 and gamma)'",
        LONG_SUMS,
    ),
    Group("tests/gpusim_ops/test_tf32.py -k 'not other_types'", TF32),
)
