"""The bugs planted in the Triton kernels, by file."""

from __future__ import annotations

from . import Group, attention_bugs, norms_bugs, plant, triton_bugs_rules, triton_bugs_spatial

SUMS = "tests/gpusim_ops/test_split_sums.py"
SUMMED = "linear_redistribute or linear_update or dense_tensors"
TILES = "tests/gpusim_ops/test_linear_tiles.py"
OPS = "lfp_kernels/ops"

SHARED = plant(
    f"{OPS}/_triton.py",
    ("prologue sign", "z + tl.where(z < 0, -eps, eps)", "z + tl.where(z < 0, eps, -eps)"),
    ("epilogue factor", "return f * tl.abs(w)", "return f * w"),
    ("epilogue", "        return divide(g * x, stabilize(x, below))", "        return g * x"),
    ("accumulation", "for part in range(1, parts):", "for part in range(2, parts):"),
    ("offset", "tl.cast(part, tl.int64) * count + offset", "tl.cast(part, tl.int64) + offset"),
    ("state not written", "            store(b_ptr + offset, b, mask)", "            pass"),
    ("state not read", "            a = load(a_ptr + offset, mask)", "            pass"),
    ("optimizer", "tl.where(nesterov != 0, d + momentum * a, a)", "a"),
    (
        "mask",
        "offset, offset < count, count, parts, hyper,\n            RULE",
        "offset, None, count, parts, hyper,\n            RULE",
    ),
    ("launch", "return -(-count // block)", "return max(count // block, 1)"),
)

PRODUCT = plant(
    f"{OPS}/_triton_product.py",
    ("tile order", "height = tl.minimum(tiles_m - first, GROUP)", "height = GROUP"),
    (
        "tile order",
        "first + program % width % height, program % width // height",
        "first + program % width % height, program % tiles_n",
    ),
    (
        "split",
        "split = program // (tiles_m * tiles_n)",
        "split = program // (tiles_m * tiles_n) * 0",
    ),
    (
        "split",
        "return blocks(k, self.splits * self.k) * self.k",
        "return blocks(k, self.splits)",
        "speed and rounding only: the parts cover k as before, cut elsewhere, and the kernels mask "
        "the end of a part that is no whole number of blocks",
    ),
    ("accumulation", "return total + a.to(operand)", "return a.to(operand)"),
    (
        "rounding",
        'types = {"fp64": tl.float64, "fp16": tl.float16, "bf16": tl.bfloat16}',
        'types = {"fp64": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}',
    ),
    (
        "epilogue sign",
        "total += load(bias_ptr + offset // inner % channels, mask)",
        "total -= load(bias_ptr + offset // inner % channels, mask)",
    ),
    (
        "epilogue",
        "    result = input_epilogue(total, x, below.to(total.dtype), RULE, SIGNAL_OUT)\n",
        "    result = input_epilogue(total, x, below.to(total.dtype), RULE, False)\n",
    ),
    (
        "mask",
        "total = sum_of_parts(raw_ptr, offset, count, parts, mask)\n    x = load",
        "total = sum_of_parts(raw_ptr, offset, count, parts, None)\n    x = load",
    ),
)

LINEAR = plant(
    f"{OPS}/linear/triton_kernels.py",
    (
        "mask",
        "x = tl.load(x_at, mask=(row < rows) & inside, other=0.0)",
        "x = tl.load(x_at, mask=inside, other=0.0)",
    ),
    ("stride", "w_at += w_step\n    output =", "w_at += x_step\n    output ="),
    (
        "mask",
        "(row < rows) & (k[None, :] < end - first), eps",
        "(row < rows) & (k[None, :] < K), eps",
    ),
    (
        "offset",
        "store(out_ptr + split * rows * inputs + offset, total, inside)",
        "store(out_ptr + split * rows + offset, total, inside)",
    ),
    ("stride", "w_step = K * tl.cast(w_row, tl.int64)\n    total", "w_step = K\n    total"),
    (
        "mask",
        "if BIAS and n == 0:",
        "if BIAS and n <= 1:",
        "speed only: the second column of tiles has the same sums, and stores the same bits",
    ),
    ("reduction", "            sums += s\n", "            sums = s\n"),
    ("offset", "at = bias_sums_ptr + split * outputs + output", "at = bias_sums_ptr + output"),
    (
        "barrier",
        "        tl.debug_barrier()  # every thread has read the tile of W\n",
        "",
        "equivalent as compiled: between the loads of W and the stores the PTX of every mode has "
        "the barriers with which tl.dot shares W among the warps; the source must not rely on them",
    ),
    (
        "mask",
        "        if BIAS and tl.program_id(0) % strips == 0:",
        "        if BIAS:",
        "speed only: every strip of inputs has the same sums, and stores the same bits",
    ),
    (
        "offset",
        "partial_ptr + (split * rows + row) * inputs + column",
        "partial_ptr + row * inputs + column",
    ),
    (
        "mask",
        "inside = (output[:, None] < outputs) & (column < inputs)\n        w = load",
        "inside = (output[:, None] < outputs) | (column < inputs)\n        w = load",
    ),
)

LINEAR_HOST = plant(
    f"{OPS}/linear/triton.py",
    ("split", "BIAS=bias is not None and not split", "BIAS=bias is not None"),
    (
        "launch",
        "launch(\n            input_kernel, tile.programs(rows, inputs),",
        "launch(\n            input_kernel, tile.programs(rows, inputs) - 1,",
    ),
    (
        "stride",
        "x.contiguous(), out, rule, below)\n    if bias",
        "x, out, rule, None)\n    if bias",
    ),
    ("order", "    part = blocks(outputs, parts * k) * k\n", "    part = blocks(outputs, parts)\n"),
    (
        "argument",
        "finish(sums, bias, rule.code, bias_update, None, parts)",
        "finish(sums, bias, rule.code, bias_update, None)",
    ),
    (
        "epilogue",
        "        finish_forward(target, bias, z, relu, outputs, 1)",
        "        finish_forward(target, bias, z, relu, 1, 1)",
    ),
    (
        "chain",
        "PROLOGUE=prologue_code(rule, signal_in), RULE=rule.code, OPTIMIZER=code,",
        "PROLOGUE=rule.code, RULE=rule.code, OPTIMIZER=code,",
    ),
)

ACTIVATION = plant(
    f"{OPS}/activation/triton.py",
    ("comparison", "load(x_ptr + offset, mask) > 0, mask", "load(x_ptr + offset, mask) >= 0, mask"),
    ("mask", "offset, offset < count)", "offset, None)"),
    ("mask", "offset, offset < count)", "offset, offset < count - 1)"),
    ("layout", "    x = arranged_like(y, x)\n", ""),
    (
        "offset",
        "tl.program_id(0).to(tl.int64) * BLOCK",
        "tl.program_id(0).to(tl.int64) * (BLOCK // 2)",
    ),
    (
        "launch",
        "blocks(y.numel()), y, x",
        "y.numel() // BLOCK + 1, y, x.t() if x.dim() == 2 else x",
        "equivalent: a kernel gets the address of x, which its transposed view shares, and one "
        "program more than needed has nothing inside its mask",
    ),
)

COMBINE = plant(
    f"{OPS}/combine/triton.py",
    ("prologue sign", "a + b, eps.to", "a - b, eps.to"),
    (
        "epilogue factor",
        "input_epilogue(s, b, eps, RULE, False)",
        "input_epilogue(s, a, eps, RULE, False)",
    ),
    ("mask", "tl.where(kept, r * scale.to(r.dtype), 0.0)", "r * scale.to(r.dtype) * kept"),
    ("factor", "tl.where(kept, r * scale.to(r.dtype), 0.0)", "tl.where(kept, r, 0.0)"),
    (
        "layout",
        "arranged_like(out, reward), arranged_like(out, mask)",
        "arranged_like(out, reward), mask",
    ),
    ("chain", "PROLOGUE=prologue_code(rule, signal_in)", "PROLOGUE=rule.code"),
    (
        "bound",
        "_dropout_block(r_ptr, mask_ptr, out_ptr, offset, offset < count, scale)",
        "_dropout_block(r_ptr, mask_ptr, out_ptr, offset, None, scale)",
    ),
)

UPDATE = plant(
    f"{OPS}/update/triton.py",
    ("mask", "_squares(x_ptr, offset, offset < count)", "_squares(x_ptr, offset, None)"),
    ("accumulation", "total += _squares(x_ptr, start + at", "total = _squares(x_ptr, start + at"),
    (
        "offset",
        "x = load(x_ptr + offset, mask).to(tl.float64)\n    return x * x",
        "x = load(x_ptr + offset, mask)\n    return (x * x).to(tl.float64)",
    ),
    ("offset", "        at += count\n", ""),
    ("mask", "mask=offset < count, other=0.0)", "mask=offset < count - 1, other=0.0)"),
    ("layout", "finish(fb.contiguous(), param", "finish(fb, param"),
    ("factor", "fb * scale.to(fb.dtype)", "fb / scale.to(fb.dtype)"),
    ("tail", "for at in range(0, count, TILE):", "for at in range(0, count - TILE, TILE):"),
)

REWARD = plant(
    f"{OPS}/reward/triton.py",
    (
        "mask",
        "o = tl.load(o_ptr + start + k, mask=inside[:, None] & (k < classes), other=-INFINITY)",
        "o = tl.load(o_ptr + start + k, mask=inside[:, None] & (k < classes), other=0.0)",
    ),
    ("accumulation", "b = b * tl.exp(a - base) + tl.sum(add, 1)", "b = b + tl.sum(add, 1)"),
    (
        "tie",
        "place = tl.min(tl.where((o == top[:, None]) & (k < classes), k, classes), 1)",
        "place = tl.max(tl.where((o == top[:, None]) & (k < classes), k, -1), 1)",
    ),
    ("tie", "tl.where((top > a) | (b >= classes), place, b)", "tl.where(top >= a, place, b)"),
    ("NaN", "winner = tl.where(c < classes, c, b)", "winner = b"),
    (
        "bound",
        "valid = (label >= 0) & (label < classes)",
        "valid = (label >= 0) & (label <= classes)",
    ),
    ("mask", "inside = j < neurons", "inside = j <= neurons"),
    ("factor", "tl.cast(steps // 2, acc)", "tl.cast(steps, acc) / 2"),
    ("accumulation", "            fired += tl.sum(", "            fired = tl.sum("),
    ("offset", "start + at + k, tl.where(valid", "start + k, tl.where(valid"),
)

SPIKING = plant(
    f"{OPS}/spiking/triton_kernels.py",
    (
        "rounding",
        "return tl.fma(a, b, tl.zeros_like(a) + minus_zero.to(a.dtype))",
        "return a * b",
    ),
    ("mask", "offset, mask & (a >= 0) & (a < rows), 0.0)", "offset, mask & (a >= 0), 0.0)"),
    ("tail", "((fires & live).to(tl.int32) << shift)", "(fires.to(tl.int32) << shift)"),
    ("state", "before = tl.where(t == s, first, before)", "before = first"),
    (
        "tail",
        "carry = tl.where(live, times(decayed, n, minus_zero), carry)",
        "carry = times(decayed, n, minus_zero)",
    ),
    (
        "order",
        "tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))",
        "tl.interleave(tl.interleave(n0, n1), tl.interleave(n2, n3))",
    ),
)

GROUPS = (
    Group(f"{TILES} {SUMS} -k 'float32 or chained or {SUMMED}'", LINEAR + LINEAR_HOST + SHARED),
    Group(f"{TILES} {SUMS} -k 'float32 or float64 or chained or {SUMMED}'", PRODUCT),
    Group("tests/test_activation.py -k step_activation", ACTIVATION),
    Group(
        "tests/test_sum_dropout.py -k '(test_sum or dropout) and not reference and not compiles'",
        COMBINE,
    ),
    Group("tests/test_update.py -k 'not reference and not beyond'", UPDATE),
    Group(
        "tests/gpusim_ops/test_reward_rows.py tests/test_rewards.py -k '(formula or ties or nan or "
        "out_of_range or rows or spike or checked) and not reference'",
        REWARD,
    ),
    Group("tests/gpusim_ops/test_spiking_gpu.py -k 'float32 and not many_steps'", SPIKING),
    *triton_bugs_spatial.GROUPS,
    *triton_bugs_rules.GROUPS,
    *norms_bugs.TRITON_GROUPS,
    *attention_bugs.TRITON_GROUPS,
)
