"""Planted bugs: rules with two signals and made matrices in CUDA C++."""

from __future__ import annotations

from . import Group, plant

RULES = "tests/gpusim_ops/test_rules_cuda.py"

LINEAR = plant(
    "csrc/cuda/linear_rules.cu",
    ("stride", "draw(row * cols + col, rule", "draw(row * rows + col, rule"),
    (
        "mask",
        "          j < raw.inside ? function(static_cast<Acc<T>>(raw.value.value[j]), raw.part) : "
        "Acc<T>(0);",
        "          function(static_cast<Acc<T>>(raw.value.value[j]), raw.part);",
    ),
    ("argument", "fetch_pack(part == 0 ? u : v,", "fetch_pack(u,"),
    ("mask", "n + k < cols ? m * cols + n + k : -1;", "m * cols + n + k;"),
    ("alignment", "out, runs_out && aligned16(r, z)};", "out, true};"),
    (
        "terms",
        "two_signals, two_inputs, two_weights, as_sums(to_weight.feedback)",
        "two_signals, two_inputs, false, as_sums(to_weight.feedback)",
    ),
    ("epilogue", "finish{x, to, x_parts, rule.below};", "finish{x, to, w_parts, rule.below};"),
)

SPLIT = plant(
    "csrc/cuda/split.cuh",
    ("terms", "if (k & kSpan) part = second;", "if (k & kSpan) part = first;"),
    ("offset", "* kSpan + (k & (kSpan - 1));", "* kSpan;"),
    ("terms", "const int r = crossed ? 1 - l : l;", "const int r = l;"),
    ("parts", "v -= part == 0 ? shift_a : shift_b;", "v -= shift_a;"),
    ("bias", "n[k] + negative_part(b), rule", "n[k] + positive_part(b), rule"),
    ("argument", "if (v) run.store_to(v, n);", "if (v) run.store_to(v, p);"),
    ("launch", "if (pass == Pass::kFirst) return run.store_to(first, sums);", ""),
    ("epilogue sign", "first[k] = sign(w[k]) * (part", "first[k] = (part"),
    ("barrier", "    shared[side][warp][lane] = across ? sum[side] : warp_sum(sum[side]);\n"
     "  __syncthreads();",
     "    shared[side][warp][lane] = across ? sum[side] : warp_sum(sum[side]);"),
    ("accumulation", "if (f.v) sum[1] += f.v[at];", "if (f.v) sum[1] = f.v[at];"),
)  # fmt: skip

MADE = plant(
    "csrc/cuda/made_matrix.cuh",
    (
        "offset",
        "PhiloxBlock block = philox(static_cast<uint64_t>(index) >> 2, seed);",
        "PhiloxBlock block = philox(static_cast<uint64_t>(index) >> 1, seed);",
    ),
    (
        "tail",
        "if (k > 0 && word == 0) block = philox(static_cast<uint64_t>(index + k) >> 2, seed);",
        "",
    ),
    ("order", "word & 2 ? high : low", "word & 2 ? low : high"),
    ("order", "word & 1 ? block.word[1] : block.word[0];", "block.word[0];"),
    ("argument", "matrix<Matrix::kGivenSign>(w, given,", "matrix<Matrix::kGivenSign>(w, w,"),
    ("argument", "matrix<Matrix::kNoisy>(w, given, u,", "matrix<Matrix::kNoisy>(w, given, given,"),
)

CONV = plant(
    "csrc/cuda/conv_rules.cu",
    ("alignment", "channels_last && window.channels % Source::kWidth == 0 &&", "channels_last &&"),
    ("alignment", "channels_last && whole_runs<T>(channels) && aligned}", "channels_last}"),
    ("layout", "right{large, window, tap_major, false}", "right{large, window, false, false}"),
    (
        "launch",
        "epilogue,\n                        layer.x, device, to_x.window.parts());",
        "epilogue,\n                        layer.x, device, layer.shapes.groups);",
    ),
    ("stride", "last ? samples * plane : samples, channels", "samples, channels"),
    ("terms", "two_inputs, as_sums(to), layer.x.numel()", "false, as_sums(to), layer.x.numel()"),
    ("launch", "layer.x, device, shapes.groups);", "layer.x, device, 1);"),
)  # fmt: skip

CONV_OPERAND = plant(
    "csrc/cuda/conv_rules_operand.cuh",
    ("padding", "out[j] = raw.inside >> j & 1 ? v : Value(0);", "out[j] = v;"),
    ("argument", "(raw.part == 0 ? u : v)[offset];", "u[offset];"),
    ("stride", "up ? source * targets + row\n", "up ? row * targets + source\n"),
    (
        "mask",
        "n + k < channels ? pixel + (channel + k) * strides.channel : -1;",
        "pixel + (channel + k) * strides.channel;",
    ),
    ("mask", "return tap.valid && row < targets ? line", "return tap.valid ? line"),
    ("padding", "raw.z.value[j] = T(1.f);", "raw.reward.value[j] = raw.z.value[j] = T(1.f);"),
    ("offset", "draw(at, rule.params.seed, one);", "draw(at + 1, rule.params.seed, one);"),
)  # fmt: skip

GROUPS = (
    Group(
        f"{RULES} -k 'linear and float32 and not bfloat16'",
        LINEAR + SPLIT + MADE,
        "linear.cu,linear_rules.cu,update.cu",
        "Float",
    ),
    Group(
        f"{RULES} -k 'every_kind or convolution_update or (test_convolution and float64)'",
        CONV + CONV_OPERAND,
        "conv.cu,conv_rules.cu,update.cu",
        "Double",
    ),
)
