"""Planted bugs: batch norm, pools and convolutions in Triton."""

from __future__ import annotations

from . import Group, plant

OPS = "lfp_kernels/ops"

BATCH_NORM = plant(
    f"{OPS}/batch_norm/triton_kernels.py",
    ("mask", "(line < lines) & (column < columns)", "(column < columns)"),
    ("mask", "(line < lines) & (at < inner)", "(line < lines)"),
    (
        "stride",
        "(line // pieces * channels + group) * inner + at",
        "(line // pieces + group) * inner + at",
    ),
    ("accumulation", "delta * delta * (count * more / both)", "delta * delta * (more / both)"),
    ("accumulation", "        d = tl.where(mask, x - center, 0.0)", "        d = x - center"),
    ("reduction", "weight * delta * delta", "delta * delta"),
    (
        "barrier",
        "        tl.debug_barrier()  # every thread has read what one of them writes\n",
        "",
        "equivalent as compiled: the PTX has the barriers of the sums over 128 parts by four warps "
        "between the loads and the stores; the source must not rely on them",
    ),
    ("state", "(1 - momentum) * old_mean", "old_mean"),
    ("factor", "momentum * (var * unbias)", "momentum * var"),
    ("factor", "sum_sd * invstd * invstd / count", "sum_sd * invstd / count"),
    ("epilogue sign", "        dx = scale * (s - mean_s - ", "        dx = scale * (s + mean_s - "),
    (
        "epilogue",
        "            y = tl.where(y < 0, 0.0, y)",
        "            y = tl.where(y > 0, 0.0, y)",
    ),
)

BATCH_NORM_HOST = plant(
    f"{OPS}/batch_norm/triton.py",
    ("split", "parts = blocks(lines, step)", "parts = max(lines // step, 1)"),
    (
        "tail",
        "lines, groups = outer, blocks(channels * inner, width)",
        "lines, groups = outer, max(channels * inner // width, 1)",
    ),
    ("stride", "0 if running_mean is None else running_mean.stride(0),", "1,"),
    (
        "argument",
        "repeat = cut.inner if cut.rows else 1\n    if training",
        "repeat = 1\n    if training",
    ),
    ("factor", "count / max(count - 1, 1), momentum", "1.0, momentum"),
    ("layout", "    x = arranged_like(out, x)\n", ""),
    ("launch", "normalize_kernel, cut.groups * cut.parts,", "normalize_kernel, cut.groups,"),
)

POOL = plant(
    f"{OPS}/pool/triton_kernels.py",
    (
        "bound",
        "return first, tl.minimum((i + padding) // stride + 1, outputs)",
        "return first, (i + padding) // stride + 1",
    ),
    (
        "stride",
        "tl.maximum(i + padding - kernel + stride, 0) // stride",
        "tl.maximum(i + padding - kernel, 0) // stride",
    ),
    ("factor", "stop = tl.minimum(start + kernel, size + padding)", "stop = start + kernel"),
    ("factor", "            start = tl.maximum(start, 0)\n", ""),
    ("accumulation", "dx += tl.where(mask, divide", "dx = tl.where(mask, divide"),
    ("tie", "take = mask & ((v > best) | (v != v)", "take = mask & ((v >= best) | (v != v)"),
    ("NaN", "((v > best) | (v != v) | (winner < 0))", "((v > best) | (winner < 0))"),
    ("mask", "mask = mask & (w >= 0) & (w < width)", "mask = mask & (w < width)"),
    ("offset", "label = (j_d * k_h + j_h) * k_w + j_w", "label = (j_d * k_w + j_h) * k_h + j_w"),
    (
        "bound",
        "first = (tl.maximum(p - up, 0) * outputs + size - 1) // size",
        "first = (tl.maximum(p - up + 1, 0) * outputs + size - 1) // size",
    ),
    ("bound", "last = (tl.maximum(p + down + 1, 0)", "last = (tl.maximum(p + down, 0)"),
    ("mask", "winner.to(tl.int32) == place)", "winner.to(tl.int32) <= place)"),
)

POOL_HOST = plant(
    f"{OPS}/pool/triton.py",
    (
        "tail",
        "covers = axes([(k - 1) // s + 1 for k, s in zip(kernel, stride)])",
        "covers = axes([max(k // s, 1) for k, s in zip(kernel, stride)])",
    ),
    (
        "tail",
        "return outputs // size if outputs % size == 0 else outputs // size + 2",
        "return outputs // size if outputs % size == 0 else outputs // size + 1",
    ),
    (
        "argument",
        "*axes(stride), *axes(padding, 0))\n    covers",
        "*axes(stride), *axes(padding))\n    covers",
    ),
    ("layout", "arranged_like(out, x), z, reward, out, count,", "x, z, reward, out, count,"),
    (
        "launch",
        "blocks(count, _BLOCK), out, indices, reach",
        "count // _BLOCK, out, indices, reach",
    ),
    ("chain", "PROLOGUE=prologue_code(rule, signal_in)", "PROLOGUE=rule.code"),
    ("state", "torch.full((6,), -(2**31 - 1), dtype", "torch.full((6,), 2**20, dtype"),
)

VOLUME = plant(
    f"{OPS}/_triton_volume.py",
    ("stride", "        i = i // channels\n    w = i % width", "    w = i % width"),
    ("offset", "    h = i % height\n", "    h = i % width\n"),
    ("offset", "        + h.to(tl.int64) * s_h\n", "        + h.to(tl.int64) * s_w\n"),
    ("offset", "        + c.to(tl.int64) * s_c\n", ""),
    ("offset", "    d = i % depth\n    i = i // depth\n", "    d = i % depth\n"),
    (
        "argument",
        "t.stride(0), t.stride(1), *axes(t.stride()[2:], 0)",
        "t.stride(1), t.stride(0), *axes(t.stride()[2:], 0)",
    ),
)

CONV = plant(
    f"{OPS}/conv/triton_kernels.py",
    (
        "mask",
        "return at, (far >= 0) & (at * stride == far) & (at < size)",
        "return at, (far >= 0) & (at < size)",
    ),
    ("mask", "return at, (at >= 0) & (at < size)", "return at, (at < size)"),
    ("offset", "at = p * stride - padding + t * dilation", "at = p * stride - padding + t"),
    ("offset", "tap // k_w % k_h, in_h", "tap // k_h % k_h, in_h"),
    ("mask", "mask = inside & (row < rows) & along(k_inside, O)", "mask = inside & (row < rows)"),
    (
        "stride",
        "src_at = src_ptr + batch * src_n + group * inputs * src_c",
        "src_at = src_ptr + batch * src_n",
    ),
    ("offset", "        offset += split * out_count\n", ""),
    ("mask", "small_mask = (q < end) & (along(output, C) < outputs)", "small_mask = (q < end)"),
    ("mask", "    if BIAS and n == 0:", "    if BIAS and n == 1:"),
    ("split", "store(out_ptr + split * w_count + offset", "store(out_ptr + offset"),
    ("reduction", "            sums += a\n", "            sums = a\n"),
    (
        "stride",
        "place = channel * taps + column // tl.maximum(inputs, 1) if LAST else column",
        "place = column",
    ),
)

CONV_HOST = plant(
    f"{OPS}/conv/triton.py",
    (
        "stride",
        "(second * taps, taps) if scatter else (taps, second * taps)",
        "(second * taps, taps) if scatter else (taps, first * taps)",
    ),
    (
        "split",
        "blocks(steps, tile.splits), seed,",
        "steps // tile.splits, seed,",
    ),
    ("argument", "weight.numel() // groups,\n", "weight.numel(),\n"),
    ("layout", "    x = arranged_like(out, x)\n", ""),
    (
        "epilogue",
        "finish_input(partial, x, out, rule, below)",
        "finish_input(partial, x, out, rule, None)",
    ),
    (
        "argument",
        'small, large, signal = x, reward, "large"',
        'small, large, signal = x, reward, "small"',
    ),
    ("argument", "inner = 1 if last else z.shape[2:].numel()", "inner = 1"),
)


GROUPS = (
    Group(
        "tests/test_batch_norm.py tests/gpusim_ops/test_split_sums.py -k '(matches or chain_forms "
        "or running or cancel or dense_tensors) and not reference'",
        BATCH_NORM + BATCH_NORM_HOST,
    ),
    Group(
        "tests/test_pool.py tests/test_max_pool.py -k 'not reference and not opcheck and not "
        "compiles'",
        POOL + POOL_HOST + VOLUME,
    ),
    Group(
        "tests/gpusim_ops/test_conv_edges.py tests/gpusim_ops/test_split_sums.py "
        "tests/test_conv.py -k '(edges or test_convolution or float32 or non_contiguous) and not "
        "opcheck and not reference'",
        CONV + CONV_HOST,
    ),
)
