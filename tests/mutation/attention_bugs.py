"""Planted bugs: attention and relevance through it, CUDA C++ and Triton."""

from __future__ import annotations

from . import Group, plant

OPS = "lfp_kernels/ops/attention"
TESTS = "tests/test_attention.py tests/gpusim_ops/test_attention_gpu.py"
SOURCES = "attention.cu,attention_redistribute.cu"

CORE = plant(
    "csrc/cuda/attention_core.cuh",
    ("offset", "return threadIdx.x / 32 % kHigh * 16; }", "return threadIdx.x / 32 * 16; }"),
    (
        "columns",
        "b.along().right(side() * kColumns + j * 16, k, right);",
        "b.along().right(j * 16, k, right);",
    ),
    (
        "columns",
        "b.across().right(side() * kWide + j * 16, k, right);",
        "b.across().right(j * 16, k, right);",
    ),
    (
        "tail",
        "for (int k = 0; k < width; k += kRun) {",
        "for (int k = kRun; k < width; k += kRun) {",
    ),
    (
        "accumulation",
        "for (int c = 0; c < kRun; ++c) sums[i][r * kRun + c] += left[i] * run.value[c];",
        "for (int c = 0; c < kRun; ++c) sums[i][r * kRun + c] = left[i] * run.value[c];",
    ),
    (
        "second part",
        "use(down() + i * kSide, right() + j * kSide, sums[i][j], second[i][j]);",
        "use(down() + i * kSide, right() + j * kSide, sums[i][j], sums[i][j]);",
    ),
)

SHARED = plant(
    "csrc/cuda/attention.cuh",
    ("mask", "(causal && j > i)) return", "(causal && j >= i)) return"),
    ("mask", "i >= queries || j >= keys ||", "i >= queries ||"),
    ("stride", "h * mask_h + i * mask_i", "i * mask_i"),
    ("offset", "((b * heads + h) * queries + i) * keys + j;", "(h * queries + i) * keys + j;"),
    ("order", "index & 2 ? high : low", "index & 2 ? low : high"),
    ("visited", "return causal && last < keys ? last : keys;", "return causal ? keys : last;"),
    ("tail", "if (first + row < count && column < width) {", "if (column < width) {"),
    ("epilogue", "if (own) run[c] *= times[c];", ""),
    ("barrier", "  __syncthreads();  // the memory has been read\n", ""),
    ("alignment", "const bool wide = width % V == 0 &&", "const bool wide = width % V == 0 ||"),
    ("alignment", "(t.size(2) < 2 || t.stride(2) % V == 0) && aligned16(start);",
     "(t.size(2) < 2 || t.stride(2) % V == 0);"),
    ("argument", "a.keep = A(1 / (1 - rate))", "a.keep = A(1)"),
)  # fmt: skip

FORWARD = plant(
    "csrc/cuda/attention.cu",
    ("accumulation", "total = total * fade + sum;", "total = total + sum;"),
    ("order", "const A fade = exp(most - shift);\n    most = highest;",
     "most = highest;\n    const A fade = exp(most - shift);"),
    ("no key", "highest == A(-INFINITY) ? A(0) : highest;", "highest;"),
    ("no key", "seen ? most + log(total) : A(INFINITY);", "most + log(total);"),
    ("rounding", "    if constexpr (!kExact<B>) B::accumulate(sums, s.rest, s.v);\n", ""),
    ("barrier", "B::accumulate(sums, s.rest, s.v);\n    __syncthreads();",
     "B::accumulate(sums, s.rest, s.v);"),
    ("heads", "kv = h / f.shared;", "kv = h;"),
    ("reduction", "    for (int step = kPart / 2; step > 0; step /= 2) sum +=",
     "    for (int step = kPart / 2; step > 1; step /= 2) sum +="),
    ("launch", "      allow_shared(attention_kernel<T, B>, bytes);\n", ""),
)  # fmt: skip

BACKWARD = plant(
    "csrc/cuda/attention_redistribute.cu",
    ("formula", "sum = p * (c * to_p - delta_i);", "sum = p * (to_p - delta_i);"),
    ("formula", "return p * c;", "return p;"),
    ("formula", "sum *= z / (2 * stabilize(z, eps));", "sum *= z / stabilize(z, eps);"),
    ("prologue", "signal = signal / (2 * stabilize(out, f.eps));",
     "signal = signal / (2 * out);"),
    ("terms", "delta += signal * out;", "delta = signal * out;"),
    ("statistics", "s.lse[row] = inside ? f.lse[statistics + i] : A(INFINITY);",
     "s.lse[row] = f.lse[statistics + i];"),
    ("visited", "place.first / B::kOther * B::kOther : 0;", "place.first + B::kOther : 0;"),
    ("heads", "h < (kv + 1) * f.shared; ++h)", "h < kv * f.shared + 1; ++h)"),
    ("barrier", "      B::accumulate(to_v, s.p, s.other_values);\n      __syncthreads();",
     "      B::accumulate(to_v, s.p, s.other_values);"),
    ("barrier", "    __syncthreads();\n    B::accumulate(sums, s.to_z, s.other);",
     "    B::accumulate(sums, s.to_z, s.other);"),
    ("transposed", "s.lse[n], s.delta[n], b, h, first + n, place.first + m);",
     "s.lse[n], s.delta[n], b, h, first + m, place.first + n);"),
    ("argument", "f.attnlrp ? f.k.of(b, kv) : nullptr", "f.k.of(b, kv)"),
    ("launch", "grid_of(f.keys, B::kOwn, batch, f.heads / f.shared, op);",
     "grid_of(f.keys, B::kOwn, batch, 1, op);"),
)  # fmt: skip

TRITON = plant(
    f"{OPS}/triton_kernels.py",
    ("mask", "inside = inside & (j <= i)", "inside = inside & (j < i)"),
    ("mask", "    inside = (i < queries) & (j < keys)\n", "    inside = i < queries + j * 0\n"),
    ("stride", "mask_ptr += b * mask_b + h * mask_h\n    row = (b * heads + h) * queries\n"
     "    q_ptr", "mask_ptr += b * mask_b\n    row = (b * heads + h) * queries\n    q_ptr"),
    ("order", "tl.interleave(tl.interleave(a, c), tl.interleave(b, d))",
     "tl.interleave(tl.interleave(a, b), tl.interleave(c, d))"),
    ("order", "tl.where(upper, c, a), tl.where(upper, d, b)",
     "tl.where(upper, d, b), tl.where(upper, c, a)"),
    ("formula", "dz = p * (to_p - delta)", "dz = p * to_p"),
    ("formula", "dz *= z / (2 * stabilize(z, eps))", "dz *= z / (2 * z)"),
    ("accumulation", "total = total * fade + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
    ("no key", 'tl.where(most == -float("inf"), 0.0, most)', "most"),
    ("no key", 'tl.where(seen, most + tl.log(tl.where(seen, total, 1.0)), float("inf"))',
     "most + tl.log(tl.where(seen, total, 1.0))"),
    ("rounding", "            out = multiply(p - rounded.to(acc), v, out, MODE)\n", ""),
    ("prologue", "s = s.to(acc) / (2 * stabilize(out, eps.to(acc)))", "s = s.to(acc) / (2 * out)"),
    ("barrier", "tl.debug_barrier()  # s is read again, by other threads", "pass",
     "equivalent as compiled: in the PTX for sm_80 of float32 and float64 (the types that read s "
     "again there), at every pair of padded head widths and for aligned and other strides, one of "
     "the barriers with which Triton sums delta or changes its layout stands between the store of "
     "s and the store of delta, so before s is read; the source must not rely on it"),
    ("fused", "tl.sum(tl.where(inside, s.to(acc) * out, 0.0), 1)", "tl.sum(s.to(acc) * out, 1)"),
    ("visited", "        first = start // M * M\n", "        first = start + M\n"),
    ("heads", "range(kv * shared, kv * shared + shared)", "range(kv * shared, kv * shared + 1)"),
    ("epilogue", "        to_v *= load_rows(v_ptr, j, v_l, keys, values, F).to(acc)\n", ""),
    ("tail", "some_b = load_rows(b_ptr + first, j, b_stride, b_rows, width - first, COLUMNS)",
     "some_b = load_rows(b_ptr + first, j, b_stride, b_rows, width, COLUMNS)"),
)  # fmt: skip

TRITON_HOST = plant(
    f"{OPS}/triton.py",
    ("launch", "blocks(k.shape[2], tiles.own) * k.shape[0] * k.shape[1]",
     "blocks(k.shape[2], tiles.own) * k.shape[0]"),
    ("launch", "        forward_kernel, blocks(q.shape[2], tiles.own)",
     "        forward_kernel, blocks(k.shape[2], tiles.own)"),
    ("argument", 'dtype = acc if q.dtype == torch.float16 else q.dtype', "dtype = q.dtype"),
    ("argument", "1 / (1 - dropout), seed, CAUSAL", "1.0, seed, CAUSAL"),
    ("layout", "return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()", "return t"),
    ("alignment", '"FOURS": k.shape[2] % 4 == 0', '"FOURS": True'),
    ("argument", "(HIDES if mask.dtype == torch.bool else ADDS).value", "HIDES.value"),
)  # fmt: skip

ONE_TYPE = "(float32 or formulas or views or dropout or bits or masks_that or same_bits)"
CUDA_GROUPS = (
    Group(
        f"{TESTS} -k '{ONE_TYPE} and not (reference or compiles or wide_heads or bytes)'",
        SHARED + FORWARD[:4] + BACKWARD,
        SOURCES,
        "Float Double",
    ),
    Group(
        f"{TESTS} -k 'float16 and (oracle or layouts or wide_heads)'",
        CORE[:3] + FORWARD[4:],
        SOURCES,
        "BFloat16 Half",
    ),
    Group(
        f"{TESTS} -k 'float32 and oracle'", CORE[3:], SOURCES, "Float"
    ),
)  # fmt: skip
TRITON_GROUPS = (
    Group(
        f"{TESTS} -k '(float32 or views or masks_that or (float16 and (oracle or layouts))) and "
        "not reference and not compiles and not wide_heads and not bytes'",
        TRITON + TRITON_HOST,
    ),
)
