"""Planted bugs: layer and group norms, softmax and embeddings, in CUDA C++ and in Triton."""

from __future__ import annotations

from . import Group, plant

OPS = "lfp_kernels/ops"

EMBEDDING = plant(
    "csrc/cuda/embedding.cu",
    ("mask", "i < end && tokens[i] == token);", "tokens[i] == token);"),
    ("stride", "(found + threadIdx.x % 32) * stride", "found + threadIdx.x % 32"),
    (
        "reduction",
        "if (same != 0xffffffffu) return found + __popc(same);",
        "return found + __popc(same);",
    ),
    ("accumulation", "sum[k] += r[k];", "sum[k] = r[k];"),
    ("accumulation", "sum[j] += more[j];", "sum[j] = more[j];"),
    ("offset", "u.places[i] * u.width + column", "i * u.width + column"),
    ("offset", "u.carried, window * u.width + c", "u.carried, (window - 1) * u.width + c"),
    ("padding", "token == u.padding || (at > 0 &&", "(at > 0 &&"),
    (
        "first of a row",
        "(at > 0 && u.tokens[at - 1] == token)",
        "(at > 1 && u.tokens[at - 1] == token)",
    ),
    ("bound", "(token < 0 || token >= u.rows) __trap();", "(token < 0) __trap();"),
    (
        "epilogue factor",
        "magnitude(w[k]) / stabilize(w[k], u.eps)",
        "w[k] / stabilize(w[k], u.eps)",
    ),
    (
        "state not written",
        "    if constexpr (Optimizer::kStates > 1) store<V>(b, offset, second);\n",
        "",
    ),
    (
        "state not read",
        "    if constexpr (Optimizer::kStates > 0) load<V>(a, offset, first);\n",
        "",
    ),
    (
        "initial value",
        "cudaMemsetAsync(found.data_ptr(), 0,",
        "cudaMemsetAsync(found.data_ptr(), 1,",
    ),
    ("alignment", "width % kWide<T> == 0 &&", "true ||"),
    ("launch", "static_cast<unsigned>(windows - 1), threads", "1, threads"),
)

SOFTMAX = plant(
    "csrc/cuda/softmax.cu",
    ("mask", "if (row >= call.rows) return;  // a whole warp", "// a whole warp"),
    (
        "mask",
        "    if (c < call.count) load<V>(call.reward, row * call.count + c, r[k]);",
        "    load<V>(call.reward, row * call.count + c, r[k]);",
    ),
    (
        "reduction",
        "kBlock ? block_sum<kThreads>(total, scratch) : warp_sum(total);",
        "warp_sum(total);",
    ),
    ("epilogue", "magnitude(x[k]) == Acc<T>(INFINITY) ? Acc<T>(0) :", "false ? Acc<T>(0) :"),
    ("epilogue sign", "r[k] - p[k] * total", "r[k] + p[k] * total"),
    ("launch", "call.count <= kThreads * kHeld)", "call.count <= 2 * kThreads * kHeld)"),
    ("launch", "ceil_div<int64_t>(call.rows, kWarps)", "call.rows / kWarps + 0"),
    ("alignment", "call.count % kWide<T> == 0 &&", ""),
    ("accumulation", "  total = block_sum<kThreads>(total, scratch);\n  for", "  for"),
)

PASSES = plant(
    "csrc/cuda/layer_norm.cuh",
    ("reduction", "mean = block_sum<kNormThreads>(mean, scratch[0]) / count;", "mean /= count;"),
    (
        "barrier",
        "block_sum<kNormThreads>(shift, scratch[3])",
        "block_sum<kNormThreads>(shift, scratch[2])",
    ),
    ("epilogue factor", "(x[k] - mean) * (x[k] - mean);", "(x[k] - mean) * x[k];"),
    ("offset", "% f.groups * (f.channels / f.groups);", "% f.groups;"),
    ("offset", "const int64_t group = c / length;", "const int64_t group = 0;"),
    ("mask", "  if (c >= width) return;\n", ""),
    (
        "launch",
        "f.batch * (blockIdx.y + 1) / gridDim.y;",
        "f.batch * (blockIdx.y + 1) / gridDim.y - 1;",
    ),
    (
        "offset",
        "store<V>(sums, (gridDim.y + blockIdx.y) * width + c, of_bias);",
        "store<V>(sums, (1 + blockIdx.y) * width + c, of_bias);",
    ),
    ("chain", "if (!hands_on) r[k] =", "r[k] ="),
    (
        "barrier",
        "  scratch[slice][lane] = total;\n  __syncthreads();",
        "  scratch[slice][lane] = total;",
    ),
    ("accumulation", "total += scratch[k][lane];", "total = scratch[k][lane];"),
    ("alignment", "return f.length() % kWide<T> == 0 &&", "return"),
)

GROUP_NORM = plant(
    "csrc/cuda/group_norm.cu",
    ("layout", "x = dense(x), reward = dense(reward);", "x = dense(x);"),
    ("layout", "  if (bias) bias = dense(*bias);\n", ""),
    (
        "initial value",
        "torch::stable::zero_(weight_sum), torch::stable::zero_(bias_sum);",
        "torch::stable::zero_(weight_sum);",
    ),
    ("argument", "x.size(2),", "1,"),
    ("argument", "                    true,\n", "                    false,\n"),
    ("alignment", "if (is_wide(f))", "if (true)"),
)

LAYER_NORM = plant(
    "csrc/cuda/layer_norm.cu",
    ("barrier", "scratches[row % 2]", "scratches[0]"),
    ("mask", "if (column + p * kGroup * V < n) square += d * d;", "square += d * d;"),
    ("stride", "row += kBlock ? 1 : kNormWarps)", "row += 1)"),
    (
        "reduction",
        "row_total<kBlock>(square, scratch[1]);",
        "row_total<false>(square, scratch[1]);",
    ),
    (
        "accumulation",
        "of_weight[p][k] += s * h, of_bias[p][k] += s;",
        "of_weight[p][k] = s * h, of_bias[p][k] = s;",
    ),
    ("barrier", "          }\n      __syncthreads();\n", "          }\n"),
    (
        "reduction",
        "for (int warp = 0; warp < kNormWarps; ++warp)",
        "for (int warp = 0; warp < kNormWarps - 1; ++warp)",
    ),
    ("chain", "    if (hands_on) continue;\n", ""),
    (
        "epilogue",
        "shift = f.centred ? row_total<kBlock>(shift, scratch[3]) / count : A(0);",
        "shift = row_total<kBlock>(shift, scratch[3]) / count;",
    ),
    ("epilogue", "along = f.identity ? A(0) : row_total", "along = row_total"),
    ("alignment", "is_wide(f) && aligned16(f.weight, f.bias)", "is_wide(f) || true"),
    ("offset", "const int64_t bias_sums = int64_t(gridDim.x) * n;", "const int64_t bias_sums = n;"),
    ("launch", "if (f.channels > kBlockRow<T>)", "if (f.channels > 2 * kBlockRow<T>)"),
)

TRITON_NORM = plant(
    f"{OPS}/layer_norm/triton.py",
    (
        "mask",
        "d = tl.where(mask, load(x_ptr + start + at + k, mask) - mean[:, None], 0.0)",
        "d = load(x_ptr + start + at + k, mask) - mean[:, None]",
    ),
    ("rounding", '{"enable_fp_fusion": False, "num_warps": 4}', '{"num_warps": 4}'),
    (
        "offset",
        "first_channel = (row % groups * (channels // groups))[:, None]",
        "first_channel = (row * (channels // groups))[:, None]",
    ),
    ("offset", "row = n * groups + c // length", "row = n * groups"),
    (
        "mask",
        "(n < batch) & (first + tl.arange(0, SAMPLES)[:, None] < step) & (c < width)",
        "(n < batch) & (c < width)",
    ),
    ("chain", "        if not HANDS_ON:\n            slope", "        if True:\n            slope"),
    ("epilogue", "    if not CENTRED:\n        shift", "    if CENTRED:\n        shift"),
    ("offset", "at + tl.cast(parts, tl.int64) * width, of_bias", "at + width, of_bias"),
    ("split", "parts = blocks(batch, step)", "parts = max(batch // step, 1)"),
    ("layout", "    x, reward = x.contiguous(), reward.contiguous()\n", ""),
    ("accumulation", "        along += tl.sum(g * h, 1)", "        along = tl.sum(g * h, 1)"),
)

TRITON_SOFTMAX = plant(
    f"{OPS}/softmax/triton.py",
    ("mask", "inside = (row < rows)[:, None]", "inside = (row <= rows)[:, None]"),
    ("epilogue", 'tl.where(tl.abs(x) == float("inf"), tl.zeros_like(found), found)', "found"),
    (
        "epilogue sign",
        "found = x * (r - p * total[:, None])",
        "found = x * (r + p * total[:, None])",
    ),
    ("accumulation", "            total += tl.sum(load", "            total = tl.sum(load"),
    (
        "tail",
        "range(0, 1 if WHOLE else count, BLOCK)",
        "range(0, 1 if WHOLE else count - BLOCK, BLOCK)",
    ),
    (
        "layout",
        "p, reward = x.contiguous(), p.contiguous(), reward.contiguous()",
        "p, reward = x.contiguous(), p, reward.contiguous()",
    ),
)

TRITON_EMBEDDING = plant(
    f"{OPS}/embedding/triton.py",
    ("reduction", "        more = count == WINDOW\n", "        more = count > WINDOW\n"),
    ("stride", "(found + tl.arange(0, WINDOW)) * stride", "found + tl.arange(0, WINDOW)"),
    ("padding", "if (token != padding) & (token != before) &", "if (token != before) &"),
    ("first of a row", "(token != padding) & (token != before) &", "(token != padding) &"),
    (
        "offset",
        "load(r_ptr + place * width + column, column < width)",
        "load(r_ptr + (first + i) * width + column, column < width)",
    ),
    ("mask", "        mask = column < width\n", "        mask = column <= width\n"),
    ("offset", "(following // WINDOW + k) * width", "(following // WINDOW) * width"),
    ("epilogue factor", "divide(tl.abs(w), stabilize", "divide(w, stabilize"),
    ("initial value", "out = torch.zeros_like(weight)", "out = torch.ones_like(weight)"),
    ("argument", "*states_of(update, weight), count", "*states_of(None, weight), count"),
)

# Shapes that a warp, a block and a loop have; a few seconds each.
NORMS = "tests/test_norms.py -k 'float32 or not_contiguous or several'"
CUDA_GROUPS = (
    Group(
        "tests/test_embedding.py tests/gpusim_ops/test_cuda_norms.py -k '((float32 or padding or "
        "not_contiguous) and not reference and not rows_are) or bad_token'",
        EMBEDDING,
        "embedding.cu",
        "Float Double",
    ),
    Group(
        "tests/test_norms.py -k '(softmax and float32) or not_contiguous'",
        SOFTMAX,
        "softmax.cu,layer_norm.cu,group_norm.cu",
        "Float Double",
    ),
    Group(
        NORMS,
        PASSES + LAYER_NORM + GROUP_NORM,
        "layer_norm.cu,group_norm.cu,softmax.cu",
        "Float Double",
    ),
)
TRITON_GROUPS = (
    Group(NORMS, TRITON_NORM),
    Group("tests/test_norms.py -k '(softmax and float32) or not_contiguous'", TRITON_SOFTMAX),
    Group(
        "tests/test_embedding.py -k '(float32 or padding or not_contiguous) and not reference'",
        TRITON_EMBEDDING,
    ),
)
