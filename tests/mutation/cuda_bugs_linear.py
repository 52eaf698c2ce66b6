"""Planted bugs: the linear layer in CUDA C++ and the products that convolutions share with it."""

from __future__ import annotations

from . import Group, plant

TILES = "tests/gpusim_ops/test_linear_tiles.py"
FLOAT32 = f"{TILES} -k 'float32 or chained'"
BUILT = "linear.cu,linear_rules.cu"

ONE_PASS = plant(
    "csrc/cuda/linear_one_pass.cuh",
    ("barrier", "K::put(p, raw, shared);\n    __syncthreads();", "K::put(p, raw, shared);"),
    ("barrier", "    __syncthreads();  // everybody is done with the tile\n", ""),
    (
        "pipeline",
        "(!K::kFetchLate && more) K::fetch(p, row + K::kRows, col, raw);",
        "(!K::kFetchLate && more) K::fetch(p, row, col, raw);",
    ),
    (
        "pipeline",
        "(K::kFetchLate && more) K::fetch(p, row + K::kRows, col, raw);",
        "(K::kFetchLate && more) K::fetch(p, row, col, raw);",
    ),
    ("mask", "if (o >= p.w.rows || i >= p.w.cols) return;", "if (i >= p.w.cols) return;"),
    ("mask", "if (i + k < p.w.cols) {", "{"),
    ("mask", "if (m >= batch || i >= cols) return;", "if (i >= cols) return;"),
    ("offset", "(blockIdx.y * batch + m) * cols + i", "int64_t(m) * cols + i"),
    ("reduction", "for (int r = 0; r < ranges; ++r)", "for (int r = 1; r < ranges; ++r)"),
    ("mask", "p.weight.wants_row_sums && blockIdx.x == 0 &&", "p.weight.wants_row_sums &&"),
    (
        "mask",
        "threadIdx.x < K::kRows &&\n        row + threadIdx.x < p.w.rows",
        "threadIdx.x < K::kRows",
    ),
    ("offset", "return shared.w.at(col, row);", "return shared.w.at(row, col);"),
    ("offset", "p.x.fetch(n, col + at)", "p.x.fetch(n, at)"),
)

HOST = plant(
    "csrc/cuda/linear.cu",
    ("shared-memory opt-in", "  allow_shared(kernel, Kernel::kBytes);\n", ""),
    (
        "split",
        "const int64_t ranges = ceil_div(out, p.rows_per_range);",
        "const int64_t ranges = std::max<int64_t>(out / p.rows_per_range, 1);",
    ),
    ("launch", "ceil_div<int64_t>(n * in, 256)", "std::max<int64_t>(n * in / 256, 1)"),
    (
        "tail",
        "const int64_t strips = ceil_div<int64_t>(in, Kernel::kCols);",
        "const int64_t strips = std::max<int64_t>(in / Kernel::kCols, 1);",
    ),
    (
        "alignment",
        "p.weight = {weight, bias, in, rule, packs && weight.aligned(),",
        "p.weight = {weight, bias, in, rule, true,",
    ),
    ("limit", "if (n > kBatch) return false;", "if (n > 2 * kBatch) return false;"),
    (
        "argument",
        "p.s = signal_operand<T, true>(layer, rule);",
        "p.s = signal_operand<T, true>({layer.x, layer.weight, layer.reward, layer.z}, rule);",
    ),
)

OPERAND = plant(
    "csrc/cuda/operand.cuh",
    ("mask", "if (wide && row < rows && col < cols)", "if (wide && col < cols)"),
    ("mask", "row < rows && col + j < cols ?", "row < rows && col + j <= cols ?"),
    ("stride", "? p[row * cols + col + j]", "? p[row * cols + col]"),
    ("alignment", "return cols % kWide<T> == 0;", "return true;"),
    (
        "prologue",
        "out[j] = rule.signal_in ? r : rule.prologue(",
        "out[j] = rule.prologue(",
        "equivalent: RuleCall::prologue asks signal_in itself and returns r without looking at z",
    ),
    (
        "argument",
        "raw.z = fetch_pack<T, kWidth>(z, rows,",
        "raw.z = fetch_pack<T, kWidth>(reward, rows,",
    ),
    (
        "alignment",
        "return {p, rows, cols, allows_packs<T>(cols) && aligned16(p)};",
        "return {p, rows, cols, allows_packs<T>(cols)};",
    ),
)

EPILOGUE = plant(
    "csrc/cuda/epilogue.cuh",
    ("epilogue sign", "v[k] += b[k];", "v[k] -= b[k];"),
    ("offset", "load<V>(bias, n, b);", "load<V>(bias, m, b);"),
    ("NaN", "v[k] < A(0) ? A(0) : v[k];", "v[k] > A(0) ? v[k] : A(0);"),
    ("epilogue factor", "rule.input_epilogue(g[k], v[k])", "rule.input_epilogue(v[k], g[k])"),
    ("stride", "store<V>(reward, m * cols + n, g);", "store<V>(reward, m * (cols - 1) + n, g);"),
    ("stride", "weight(m * cols + n, f, rule);", "weight(n * cols + m, f, rule);"),
    ("argument", "bias(m, one, rule);", "weight(m, one, rule);"),
    ("mask", "if (wants_weight) weight(", "weight("),
)

RULE_CALL = plant(
    "csrc/cuda/rule_call.cuh",
    ("rule", "code.input == InputEpilogue::kTimesInput ? g * x : g, x", "g * x, x"),
    ("rule", "return code.weight == WeightEpilogue::kMagnitude ? f *", "return true ? f *"),
    ("chain", "if (signal_out) return chain_epilogue(g, x, params);", ""),
    ("chain", "signal_in((chain & kSignalIn)", "signal_in((chain & kSignalOut)"),
    ("state not written", "    if (optimizer != kSgd) store<V>(state_a, i, a);\n", ""),
    ("state not written", "    if (optimizer == kAdamW) store<V>(state_b, i, b);\n", ""),
    ("state not read", "    if (optimizer == kAdamW) load<V>(state_b, i, b);\n", ""),
    (
        "epilogue factor",
        "raw[k] = rule.weight_epilogue(raw[k], w[k]);",
        "raw[k] = rule.weight_epilogue(raw[k], raw[k]);",
    ),
    (
        "optimizer",
        "if (optimizer == kAdamW) AdamW<A>::apply",
        "if (optimizer != kSgd) AdamW<A>::apply",
    ),
    (
        "alignment",
        "return aligned16(param, feedback, state_a, state_b);",
        "return aligned16(param, feedback);",
    ),
    ("argument", "to.state_b = state<T>(states, 1);", "to.state_b = state<T>(states, 0);"),
)

PRODUCT = plant(
    "csrc/cuda/product.cuh",
    ("tile order", "tiles_m - first < kGroup ? tiles_m - first : kGroup", "kGroup"),
    ("pipeline", "k += Core::kTileK, now ^= 1)", "k += Core::kTileK)"),
    (
        "barrier",
        "    __syncthreads();\n  }\n  if constexpr (chain_of",
        "  }\n  if constexpr (chain_of",
    ),
    ("mask", "if (n + k < p.n) to[k] = sums[k];", "to[k] = sums[k];"),
    ("mask", "if (m >= p.m || n >= p.n) return;", "if (n >= p.n) return;"),
    ("mask", "      if (n + k < p.n) {\n        A one[1]", "      {\n        A one[1]"),
    ("reduction", "A sums[W] = {};\n    for (int s = 0;", "A sums[W] = {};\n    for (int s = 1;"),
    (
        "split",
        "ceil_div<int64_t>(ceil_div<int64_t>(k, wanted), Core::kTileK) * Core::kTileK;",
        "ceil_div<int64_t>(k, wanted);",
    ),
    ("offset", "p.partial_rows[slot * p.m + m] = row_sum;", "p.partial_rows[m] = row_sum;"),
    ("mask", "epilogue.wants_row_sums && tile.n == 0;", "epilogue.wants_row_sums;"),
    (
        "tail",
        "const bool more = k + Core::kTileK < end;",
        "const bool more = k + 2 * Core::kTileK <= end;",
    ),
)

SIMT = plant(
    "csrc/cuda/product_simt.cuh",
    ("offset", "at(outer + j, k) = v[j];", "at(outer, k) = v[j];"),
    ("offset", "at(outer, k + j) = v[j];", "at(outer, k) = v[j];"),
    ("stride", "(i / kRunM * kSimtSide + side) * kRunM", "(i * kSimtSide + side)"),
    ("reduction", "for (int k = 0; k < kK; ++k) total", "for (int k = 1; k < kK; ++k) total"),
    (
        "bound",
        "A value[kAlongK ? kOuter : kK][kStride];",
        "A value[(kAlongK ? kOuter : kK) - 1][kStride];",
    ),
    ("accumulation", "to[i][j] += left[i] * right[j];", "to[i][j] = left[i] * right[j];"),
    ("tail", "for (int k = 0; k < kTileK; ++k) {", "for (int k = 0; k < kTileK - 1; ++k) {"),
)

# Sums of more than one chain, on one processor.
CHAINS = (
    *plant(
        "csrc/cuda/product.cuh",
        ("accumulation", "k - begin == chain_of<Core>());", "true);"),
        ("reduction", "(end - begin > chain_of<Core>()) core.add(", "(false) core.add("),
        ("shared-memory opt-in", "    allow_shared(kernel, bytes);\n", ""),
        (
            "launch",
            "bytes = sizeof(Shared) + sizeof(typename Core::Totals);",
            "bytes = sizeof(typename Core::Totals);",
        ),
    ),
    *plant(
        "csrc/cuda/product_simt.cuh",
        ("accumulation", "kChainPerTile ? 0 : 256;", "kChainPerTile ? 0 : 4096;"),
        (
            "accumulation",
            "add_products(a, b, chain);\n      add(chain);",
            "add_products(a, b, sums);",
        ),
        ("accumulation", "          sum = A(0);\n", ""),
        (
            "offset",
            "kRun) + r][threadIdx.x];\n        Pack",
            "kRun) + r][threadIdx.x / 2];\n        Pack",
        ),
        ("accumulation", "sums[i][j] += chain[i][j];", "sums[i][j] = chain[i][j];"),
    ),
    *plant(
        "csrc/cuda/linear_one_pass.cuh",
        ("accumulation", "kChains = std::is_same_v<P, float>;", "kChains = false;"),
    ),
)

# Threads have several runs of a tile of 64 in float64 only.
SIMT_RUNS = plant(
    "csrc/cuda/product_simt.cuh",
    (
        "stride",
        "const int outer = (r * kSimtSide + side) * kRun;",
        "const int outer = (side * kRuns + r) * kRun;",
    ),
)

MMA = plant(
    "csrc/cuda/product_mma.cuh",
    (
        "fragment",
        "load_matrices<true>(out, &value[k + third + low][outer + second]);",
        "load_matrices<true>(out, &value[k + second + low][outer + third]);",
    ),
    (
        "fragment",
        "load_matrices<false>(out, &value[outer + third + low][k + second]);",
        "load_matrices<false>(out, &value[outer + second + low][k + third]);",
    ),
    (
        "barrier",
        "      if (i > 0) __syncthreads();  // the tiles, and then the rows before, have been"
        " read\n",
        "",
    ),
    ("barrier", "      __syncthreads();\n      for (int pack", "      for (int pack"),
    ("fragment", "= {sums[i][j][2], sums[i][j][3]};", "= {sums[i][j][0], sums[i][j][1]};"),
    ("stride", "row / 16 * kWarpM + i * 16 + row % 16", "row + i * 16"),
    (
        "tail",
        "for (int k = 0; k < kTileK; k += kStep) {",
        "for (int k = 0; k + kStep < kTileK; k += kStep) {",
    ),
    ("accumulation", "total += widen(at(outer, k));", "total = widen(at(outer, k));"),
    (
        "launch",
        "constexpr size_t kVisitBytes = sizeof(float) * kVisitRows * kVisitStride;",
        "constexpr size_t kVisitBytes = sizeof(float) * kVisitRows;",
    ),
)

TF32 = plant(
    "csrc/cuda/product_mma.cuh",
    (
        "fragment",
        "at(outer + group + j % 2 * 8, k + in_group + j / 2 * 4)",
        "at(outer + group + j / 2 * 8, k + in_group + j % 2 * 4)",
    ),
    (
        "fragment",
        "at(outer + group + j / 2 * 8, k + in_group + j % 2 * 4)",
        "at(outer + group + j / 2 * 8, k + in_group + j / 2 * 4)",
    ),
    ("offset", "&value[line][at + first]) = pack;", "&value[line][at]) = pack;"),
)

HOPPER = plant(
    "csrc/cuda/product_hopper.cuh",
    (
        "mbarrier",
        "      if (step >= kStages) barrier_wait(&shared.empty[s], (step / kStages - 1) % 2);\n",
        "",
    ),
    ("mbarrier", "(wants_z ? 6 : 4) * kBoxBytes", "4 * kBoxBytes"),
    (
        "mbarrier",
        "barrier_wait(&shared.full[s], step / kStages % 2);",
        "barrier_wait(&shared.full[s], 0);",
    ),
    (
        "mbarrier",
        "barrier_init(&shared.empty[s], kConsumers / 32);",
        "barrier_init(&shared.empty[s], 1);",
    ),
    (
        "box",
        "load_box(stage.a[half], maps.a, kAlongA ? k : m, kAlongA ? m : k,",
        "load_box(stage.a[half], maps.a, kAlongA ? m : k, kAlongA ? k : m,",
    ),
    ("descriptor", "b + j * (kAlongB ? 32 : 16 * 128)", "b + j * 32"),
    ("barrier", "  named_barrier(1, kConsumers);\n", ""),
    ("barrier", "  named_barrier(2 + group, 128);\n", ""),
    ("reduction", "row_sums[j % 2] +=", "row_sums[j / 2] +="),
    ("reduction", "      sum += __shfl_xor_sync(0xffffffffu, sum, 2);\n", ""),
    ("offset", "blockIdx.y, m0 + group * kBox + m, n0 + n, run", "blockIdx.y, m0 + m, n0 + n, run"),
    ("shared-memory opt-in", "  allow_shared(kernel, kHopperBytes);\n", ""),
    ("alignment", "aligned16(p) && cols % 8 == 0 &&", "aligned16(p) &&"),
)

HOPPER_INSTRUCTIONS = plant(
    "csrc/cuda/hopper.cuh",
    ("descriptor", '"n"(kAcross ? 1 : 0)', '"n"(0)'),
    (
        "descriptor",
        "static_cast<uint64_t>(1024 >> 4) << 32",
        "static_cast<uint64_t>(512 >> 4) << 32",
    ),
    ("descriptor", "static_cast<uint64_t>(leading >> 4) << 16", "static_cast<uint64_t>(0) << 16"),
    ("swizzle", "static_cast<uint64_t>(1) << 62", "static_cast<uint64_t>(0) << 62"),
    ("box", '"l"(&map), "r"(x), "r"(y)', '"l"(&map), "r"(y), "r"(x)'),
    ("mbarrier", '"mbarrier.arrive.shared::cta.b64 _, [%0];" ::', '"// %0" ::'),
    ("mbarrier", '"@!over bra AGAIN;\\n}"', '"}"'),
)

GROUPS = (
    # One simulated processor: blocks then go down several tiles of rows.
    Group(f"--processors 1 {FLOAT32}", ONE_PASS + HOST, BUILT, "Float"),
    Group(
        "--processors 1 tests/gpusim_ops/test_cuda_long_sums.py",
        CHAINS,
        BUILT,
        "Float",
    ),
    Group(FLOAT32, OPERAND + EPILOGUE + RULE_CALL + PRODUCT + SIMT, BUILT, "Float"),
    Group(f"{TILES} -k float64", SIMT_RUNS, BUILT, "Double"),
    Group(f"{TILES} -k bfloat16", MMA, BUILT, "BFloat16"),
    Group(f"{TILES} -k 'float16 and not bfloat16'", TF32, BUILT, "Half"),
    Group(
        "--capability 90 --processors 4 tests/gpusim_ops/test_cuda_hopper.py",
        HOPPER + HOPPER_INSTRUCTIONS,
        BUILT,
        "BFloat16",
    ),
)
