"""Planted bugs: the pools in CUDA C++."""

from __future__ import annotations

from . import Group, plant

EDGES = "tests/gpusim_ops/test_cuda_memory_bound.py"

AVERAGE = plant(
    "csrc/cuda/pool.cu",
    (
        "barrier",
        "    __syncthreads();\n  }\n  for_region<V, kLast>(region, region.count(call.in)",
        "  }\n  for_region<V, kLast>(region, region.count(call.in)",
    ),
    ("factor", "s[k] *= A(1) / A(places);", "s[k] *= A(1);"),
    ("factor", "? min(kernel, limit - o * stride)", "? kernel"),
    (
        "bound",
        "Cover(in, out, 1, padding - kernel + stride, padding + stride, stride)",
        "Cover(in, out, 1, padding - kernel, padding + stride, stride)",
    ),
    ("bound", "Cover(in, out, out, 0, out + in - 1, in)", "Cover(in, out, out, 0, out, in)"),
    ("accumulation", "g[k + c] += s[c];", "g[k + c] = s[c];"),
    (
        "offset",
        "stage[position * slab.width + channel + k] = s[k];",
        "stage[position * slab.width + channel] = s[k];",
    ),
    ("shared-memory opt-in", "  allow_shared(kernel, shared);\n", ""),
    ("chain", "if (!call.signal_in) s[k] = Rule::prologue(", "s[k] = Rule::prologue("),
    ("alignment", "const bool packed = aligned16(xp, zp, rp, to) &&", "const bool packed ="),
    ("offset", "                           if (!kLast) region.next(call.in, at);\n", ""),
)

TILES = plant(
    "csrc/cuda/pool_tiles.cuh",
    ("offset", "((at.plane * (end - begin) + at.a - begin)", "((at.plane * (end - begin) + at.a)"),
    ("alignment", "region.first % V == 0 ? count - count % V : 0;", "count - count % V;"),
    ("mask", "      if (channel < slab.size)\n", ""),
    (
        "bound",
        "last[k] = min(cover[k].quotient<kNarrow>(axis[k], high[k]), cover[k].out);",
        "last[k] = cover[k].quotient<kNarrow>(axis[k], high[k]);",
    ),
    ("tail", "static_cast<int>(min(int64_t(planes), outer - first_plane()));", "planes;"),
    ("bound", "min(begin + step, own.size[0]))", "begin + step)"),
    ("launch", "high - low) / divisor + 1, out)", "high - low) / divisor, out)"),
    ("launch", "groups = ceil_div<int64_t>(outer, planes);", "groups = outer / planes;"),
    ("offset", "    if (++at.p < plane.size[1]) return;\n", ""),
    (
        "mask",
        "max(i * static_cast<int>(scale) + static_cast<int>(add), 0)",
        "i * static_cast<int>(scale) + static_cast<int>(add)",
    ),
    (
        "tail",
        "i < count; i += kPoolThreads)\n      f",
        "i < count - 1; i += kPoolThreads)\n      f",
    ),
)

MAX = plant(
    "csrc/cuda/max_pool.cu",
    ("tie", "v[c] > best[c] ||", "v[c] >= best[c] ||"),
    ("NaN", " || v[c] != v[c];", ";"),
    (
        "mask",
        "if (static_cast<unsigned>(q0 + dq) >= call.in.size[2])",
        "if (q0 + dq >= call.in.size[2])",
    ),
    ("barrier", "    __syncthreads();\n", ""),
    ("bound", "  if (ceil_mode && (out - 1) * stride >= in + padding) --out;\n", ""),
    ("offset", "winner[k + c] = begin_of_window + place[c];", "winner[k + c] = place[c];"),
    (
        "bound",
        "const int begin = max(call.window.begin(0, region.begin), 0);",
        "const int begin = call.window.begin(0, region.begin);",
    ),
    (
        "bound",
        "call.window.begin(0, region.end - 1) + call.window.extent(0)",
        "call.window.begin(0, region.end - 1) + int64_t(1)",
    ),
    ("shared-memory opt-in", "  allow_shared(kernel, shared);\n", ""),
    (
        "stride",
        "(da * call.in.size[1] + dp) * call.in.size[2] + dq;",
        "(da * call.in.size[1] + dp) * call.out.size[2] + dq;",
    ),
)

WINNERS = plant(
    "csrc/cuda/max_pool.cuh",
    ("mask", "yes = yes && in[k] == out[k] * kernel[k] && stride", "yes = yes && stride"),
    ("offset", "out[k] = pack.value[k];", "out[k] = pack.value[0];"),
    ("offset", "static_cast<Index>(v[k]);", "static_cast<Index>(v[0]);"),
    (
        "axes",
        "return {values[order[0]], values[order[1]], values[order[2]]};",
        "return {values[0], values[1], values[2]};",
    ),
    ("alignment", "% (N * winner.element_size()) == 0;", "% winner.element_size() == 0;"),
    ("layout", "size.size() < 4 || !channels_last", "size.size() < 4 || channels_last"),
    (
        "bound",
        "kernel[0] * kernel[1] * kernel[2] <= kMaxPlaces;",
        "kernel[0] * kernel[1] * kernel[2] <= 4 * kMaxPlaces;",
    ),
)

GIVE = plant(
    "csrc/cuda/max_pool_redistribute.cu",
    ("accumulation", "if (winner == place) sum[k + c] +=", "if (winner == place) sum[k + c] ="),
    ("barrier", "  outside = __syncthreads_or(outside);\n", ""),
    (
        "barrier",
        "divisor - int64_t(least);\n    }\n    __syncthreads();",
        "divisor - int64_t(least);\n    }",
    ),
    ("bound", "cover[k].divisor - 1 - int64_t(most);", "cover[k].divisor - int64_t(most);"),
    ("bound", ": cover[k].divisor - int64_t(least);", ": cover[k].divisor - 1 - int64_t(least);"),
    ("mask", "if (place < 0 || place >= call.in.positions())", "if (place >= call.in.positions())"),
    ("width", "kNarrowPositions = 1 << 16;", "kNarrowPositions = 1 << 20;"),
    ("launch", "call.tiling.shared + 16 : 0;", "call.tiling.shared : 0;"),
    ("shared-memory opt-in", "  allow_shared(kernel, shared);\n", ""),
    ("offset", "                             if (!kLast) windows.next(call.out, at);\n", ""),
    ("output not written", "        if (outside) {", "        if (false) {"),
)

GROUPS = (
    Group(
        f"{EDGES} tests/test_pool.py -k '((avg_pool or chain_forms) and not bfloat16 and not "
        "float16 and not reference and not errors) or unaligned_pools'",
        AVERAGE + TILES,
        "pool.cu,max_pool.cu,max_pool_redistribute.cu",
    ),
    Group(
        f"{EDGES} tests/test_max_pool.py -k '(max_pool or winners or indices) and not bfloat16 "
        "and not torch.float16 and not reference or unaligned_pools'",
        MAX + WINNERS + GIVE,
        "max_pool.cu,max_pool_redistribute.cu,pool.cu",
        "Float Double BFloat16",
    ),
)
