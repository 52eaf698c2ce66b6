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
        "crossed = product(two, w_p, crossed, MODE) if",
        "crossed = product(two, w_n, crossed, MODE) if",
    ),
    ("offset", "(group * inputs + along(channel, O)) * src_c", "along(channel, O) * src_c"),
    ("mask", "mask = inside & (row < rows) & along(k_inside, O)", "mask = inside & (row < rows)"),
    ("layout", "place = channel * taps + tap if LAST else column", "place = column"),
    ("terms", "f2 = product(small2, large, f2, MODE)", "f2 = product(small2, large2, f2, MODE)"),
    ("layout", "    reward = arranged_like(u, reward)\n", ""),
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
)
