"""Planted bugs: the convolutions in CUDA C++."""

from __future__ import annotations

from . import Group, plant

INDEX = plant(
    "csrc/cuda/conv_index.cuh",
    (
        "division",
        "(uint64_t(1) << shift) + divisor - 1) / divisor",
        "(uint64_t(1) << shift)) / divisor",
    ),
    ("division", "(power + divisor - 1) / divisor", "power / divisor"),
    ("axes", "plane *= sizes[d];", "plane += sizes[d];"),
    ("offset", "p.sample = first + rest;", "p.sample = first;"),
    (
        "order",
        "for (int d = kAxes - 1; d >= 0; --d) {\n      const uint32_t quotient = by_size",
        "for (int d = 0; d < kAxes; ++d) {\n      const uint32_t quotient = by_size",
    ),
    ("stride", "    p.at[2] = 0;\n", ""),
    ("offset", "    p.at[0] = 0;\n    ++p.sample;", "    p.at[0] = 0;"),
)

OPERAND = plant(
    "csrc/cuda/conv_operand.cuh",
    ("padding", "raw.z.value[j] = T(1.f);", "raw.value.value[j] = T(1.f);"),
    ("prologue", "return rule.signal_in ? v : rule.prologue(v, load(z, offset));", "return v;"),
    ("offset", "window.tap_major(col + j));", "window.tap_major(col));"),
    (
        "mask",
        "        if (uint32_t(first + j) < end) source.read(",
        "        if (first + j < int(end)) source.read(",
    ),
    ("alignment", "if (wide && first % kWidth == 0) {", "if (wide) {"),
    (
        "stride",
        "      window.positions.advance(q);\n    }\n    return raw;",
        "    }\n    return raw;",
    ),
    ("mask", "if (tap.valid && row < this->targets)", "if (row < this->targets)"),
    ("offset", "this->p + w.group * this->targets * cols, this->targets", "this->p, this->targets"),
    (
        "mask",
        "line * this->targets, tap.valid, this->targets",
        "line * this->targets, 1, this->targets",
    ),
    ("mask", "        if (uint32_t(first) < end) source.read_wide", "        source.read_wide"),
)

EPILOGUE = plant(
    "csrc/cuda/conv_epilogue.cuh",
    ("epilogue sign", "v[k] += add[k];", "v[k] -= add[k];"),
    ("epilogue", "v[k] = rule.input_epilogue(v[k], in[k]);", "v[k] = v[k];"),
    ("mask", "n + k < channels ? pixel + channel + k : -1;", "pixel + channel + k;"),
    (
        "stride",
        "at < 0 ? -1 : at + channel * strides.channel;",
        "at < 0 ? -1 : at + m * strides.channel;",
    ),
    ("offset", "{{group * rows + m}, false}", "{{m}, false}"),
    (
        "epilogue factor",
        "raw[k] = rule.weight_epilogue(raw[k], w[k]);",
        "raw[k] = rule.weight_epilogue(w[k], raw[k]);",
    ),
    ("layout", "      if (together) break;\n", ""),
)

RUN = plant(
    "csrc/cuda/run.cuh",
    ("mask", "if (at[k] >= 0) store(p, at[k], v[k]);", "store(p, at[k] < 0 ? 0 : at[k], v[k]);"),
    ("layout", "if (together) return store<V>(p, at[0], v);", "return store<V>(p, at[0], v);"),
    ("state not read", "  if (to.optimizer == kAdamW) run.load_from(to.state_b, b);\n", ""),
    ("state not written", "  if (to.optimizer == kAdamW) run.store_to(to.state_b, b);\n", ""),
    ("state not written", "  if (to.optimizer != kSgd) run.store_to(to.state_a, a);\n", ""),
    ("stride", "by_channels.divisor) * f.taps + tap;", "by_channels.divisor) * f.taps;"),
    ("mask", "n + k < columns ? line + at : -1;", "line + at;"),
)

DIRECT = plant(
    "csrc/cuda/conv_direct.cuh",
    ("mask", "  if (item >= items) return;", "  if (item > items) return;"),
    (
        "offset",
        "f.up ? source * targets + channel - int64_t(window.group) * targets",
        "f.up ? source * targets + channel",
    ),
    ("stride", "rounded<P>(load(w, v * taps))", "rounded<P>(load(w, v))"),
    ("mask", "          if (from < 0) continue;\n", ""),
    ("reduction", "row_sum += s;", "row_sum = s;"),
    ("barrier", "    __syncthreads();  // the sums before have been read\n", ""),
    ("barrier", "    shared[warp][lane] = v;\n    __syncthreads();", "    shared[warp][lane] = v;"),
    ("offset", "(blockIdx.z * f.pairs + pair) * f.taps", "pair * f.taps"),
    (
        "split",
        "min(window.positions.count(), begin + f.positions_per_split);",
        "window.positions.count();",
    ),
    ("mask", "if (writes && channel == 0)", "if (writes)"),
    (
        "launch",
        "const int64_t items = std::max(rows * ceil_div<int64_t>(columns, kWide<T>), rows);",
        "const int64_t items = rows;",
    ),
    ("alignment", "f.source.aligned() && f.sums.aligned())", "f.source.aligned())"),
)

WINDOW = plant(
    "csrc/cuda/conv_window.cuh",
    (
        "mask",
        "inside = inside && uint32_t(at) < uint32_t(axis[d].source);",
        "inside = inside && at < axis[d].source;",
    ),
    ("mask", "inside = inside && at < axis[d].target;", "inside = inside && at <= axis[d].target;"),
    ("offset", "    a.origin = -padding;\n", ""),
    ("stride", "a.reach = -(dilation / common);", "a.reach = -dilation;"),
    ("stride", "    a.step = stride / common;\n", ""),
    (
        "offset",
        "origin = (phase + padding - first * dilation) / phases;",
        "origin = (phase + padding) / phases;",
    ),
    (
        "stride",
        "index = index * axis[d].kernel + axis[d].first + tap.at[d] * axis[d].step;",
        "index = index * axis[d].kernel + axis[d].first + tap.at[d];",
    ),
    ("bound", "tap.valid = j < uint32_t(taps);", "tap.valid = true;"),
    ("bound", "tap.valid = tap.channel < channels;", "tap.valid = true;"),
    (
        "offset",
        "(int64_t(group) * channels + tap.channel) * strides.channel",
        "int64_t(tap.channel) * strides.channel",
    ),
    ("phase", "      rest /= axis[d].phases;\n", ""),
    (
        "axes",
        "axis[2].source = axis[2].target = static_cast<int>(source.plane());",
        "axis[2].source = axis[2].target = source.size[2];",
    ),
)

HOST = plant(
    "csrc/cuda/conv.cu",
    (
        "alignment",
        "const bool in_rows = width.move == 1 && allows_packs<T>(width.count());",
        "const bool in_rows = width.move == 1;",
    ),
    (
        "alignment",
        "const bool writes = allows_packs<T>(channels) && sums.aligned();",
        "const bool writes = sums.aligned();",
    ),
    ("argument", "      f.up = up;\n", ""),
    (
        "layout",
        "if (is_direct(shapes) || !shapes.channels_last) return dense(weight);",
        "return dense(weight);",
    ),
    (
        "launch",
        "epilogue, weight, device,\n                   window.parts());\n}",
        "epilogue, weight, device,\n                   window.groups);\n}",
    ),
    (
        "argument",
        "f.pairs = shapes.z.channels, f.taps = 0;",
        "f.pairs = shapes.small_channels(), f.taps = 0;",
    ),
    ("argument", "large = shapes.transposed ? s : x;", "large = x;"),
    (
        "alignment",
        "window.phases == 1 && allows_packs<T>(window.positions.plane)",
        "allows_packs<T>(window.positions.plane)",
    ),
    (
        "order",
        "? (size - 1) * g.stride[d] - 2 * g.padding[d]",
        "? (size - 1) * g.stride[d] - g.padding[d]",
    ),
)

GROUPS = (
    Group(
        "tests/gpusim_ops/test_conv_edges.py tests/test_conv.py "
        "tests/gpusim_ops/test_conv_tiles.py "
        "-k 'edges or (float32 and not opcheck and not reference)'",
        HOST + WINDOW + DIRECT + EPILOGUE + RUN + OPERAND + INDEX,
        "conv.cu,conv_rules.cu",
        "Float",
    ),
)
