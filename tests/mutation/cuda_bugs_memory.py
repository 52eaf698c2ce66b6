"""Planted bugs: the memory-bound kernels in CUDA C++ (elementwise, rewards, updates, norms)."""

from __future__ import annotations

from . import Group, plant

EDGES = "tests/gpusim_ops/test_cuda_memory_bound.py"

ELEMENTWISE = plant(
    "csrc/cuda/elementwise.cuh",
    ("mask", "if (pack < packs) f", "if (pack <= packs) f"),
    ("tail", "if (i < n) f.template operator()<1>(i);", ""),
    ("stride", "first + k * kElementwiseThreads;", "first + k;"),
    (
        "launch",
        "ceil_div<int64_t>(n / V, kElementwiseThreads * kUnroll)",
        "n / V / (kElementwiseThreads * kUnroll)",
    ),
    (
        "offset",
        "* (kElementwiseThreads * kUnroll) + threadIdx.x",
        "* kElementwiseThreads + threadIdx.x",
    ),
    ("offset", "operator()<V>(pack * V);", "operator()<V>(pack);"),
    ("alignment", "if (aligned16(pointers...))", "if (true)"),
)

COMBINE = plant(
    "csrc/cuda/combine.cu",
    (
        "epilogue factor",
        "vb[k] = Rule::input_epilogue(s, vb[k], params);",
        "vb[k] = Rule::input_epilogue(s, va[k], params);",
    ),
    ("prologue sign", "va[k] + vb[k], params", "va[k] - vb[k], params"),
    ("chain", "signal_in ? r[k] : Rule::prologue(", "Rule::prologue("),
    ("output not written", "    store<V>(reward_b, i, vb);\n", ""),
    ("mask", "keep.value[k] ? r[k] * scale : Acc<T>(0);", "r[k] * scale * Acc<T>(keep.value[k]);"),
    ("factor", "? r[k] * scale :", "? r[k] :"),
    (
        "layout",
        "a = arranged_like(reward, a), b = arranged_like(reward, b);",
        "a = arranged_like(reward, a);",
    ),
    ("layout", "  mask = arranged_like(reward, mask);\n", ""),
    ("alignment", "f, f.reward, f.mask, f.out);", "f, f.reward, f.out);"),
)

ACTIVATION = plant(
    "csrc/cuda/activation.cu",
    ("comparison", "v[k] > Acc<T>(0) ?", "v[k] >= Acc<T>(0) ?"),
    (
        "NaN",
        "v[k] > Acc<T>(0) ? Acc<T>(1) : Acc<T>(0);",
        "v[k] <= Acc<T>(0) ? Acc<T>(0) : Acc<T>(1);",
    ),
    ("layout", "  x = dense_any_order(x);\n", ""),
    ("alignment", "device.stream, f, f.x, f.y);", "device.stream, f);"),
    ("bound", "x.numel(), device.stream", "x.numel() - 1, device.stream"),
    ("offset", "v[k] = v[k] >", "v[k] = v[0] >"),
)

COMMON = plant(
    "csrc/cuda/common.cuh",
    (
        "reduction",
        "for (int step = 16; step > 0; step /= 2) v +=",
        "for (int step = 8; step > 0; step /= 2) v +=",
    ),
    (
        "reduction",
        "for (int k = 1; k < kThreads / 32; ++k) sum",
        "for (int k = 2; k < kThreads / 32; ++k) sum",
    ),
    ("barrier", "  __syncthreads();\n  T sum = scratch[0];", "  T sum = scratch[0];"),
    (
        "alignment",
        "reinterpret_cast<uintptr_t>(pointers) % 16 == 0",
        "reinterpret_cast<uintptr_t>(pointers) % 8 == 0",
    ),
    (
        "offset",
        "out[k] = static_cast<Acc<T>>(pack.value[k]);",
        "out[k] = static_cast<Acc<T>>(pack.value[0]);",
    ),
    ("tail", "return (a + b - 1) / b;", "return a / b;"),
    (
        "offset",
        "if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;",
        "if (threadIdx.x % 32 == 1) scratch[threadIdx.x / 32 % 4] = v;",
    ),
)

OPT_IN = plant(
    "csrc/cuda/common.cuh",
    ("shared-memory opt-in", "if (bytes > 48 * 1024)", "if (bytes > 64 * 1024)"),
)

UPDATE = plant(
    "csrc/cuda/update.cu",
    ("search", "segments[middle].first_block <= block", "segments[middle].first_block < block"),
    ("state not written", "  if constexpr (Optimizer::kStates > 1) store<V>(b, i, second);\n", ""),
    ("state not read", "  if constexpr (Optimizer::kStates > 0) load<V>(a, i, first);\n", ""),
    ("bound", "min(begin + kUpdateChunk<T>, s.count);", "begin + kUpdateChunk<T>;"),
    ("tail", "s.wide ? end - (end - begin) % V : begin;\n  for", "s.wide ? end : begin;\n  for"),
    (
        "tail",
        "i < end; i += kThreads)\n    update_pack",
        "i < end - 1; i += kThreads)\n    update_pack",
    ),
    ("argument", "= batch.hyper[s.hyper];", "= batch.hyper[0];"),
    ("launch", "    if (find(item.hyper) < 0 && batch_.hypers == batch_.kHypers) launch();\n", ""),
    ("launch", "    hypers_.clear();\n", ""),
    (
        "offset",
        "hypers_.clear();\n    blocks_ = 0;",
        "hypers_.clear();",
        "speed only: the next launch has idle blocks in front of its first segment; their unsigned "
        "distance to it is near 2^32 chunks, which no tensor has, so their range is empty",
    ),
    ("count", "static_cast<int64_t>(*s.step) + 1;", "static_cast<int64_t>(*s.step);"),
    ("rounding", "factor = 1.0 - double(rest);", "factor = double(A(1) - rest);"),
    ("reduction", "if (n & 1) power *= factor;", "if (n & 1) power = factor;"),
    ("launch", "    if (rate != rate_) launch();\n", ""),
    ("offset", "        next += blocks;\n", ""),
    ("accumulation", "sum += double(v[k]) * double(v[k]);", "sum += double(v[k] * v[k]);"),
    (
        "reduction",
        "i < count; i += kThreads) sum += sums[i];",
        "i < min(count, int64_t(kThreads)); i += kThreads) sum += sums[i];",
    ),
)

REWARD = plant(
    "csrc/cuda/reward.cu",
    ("mask", "  if (n >= call.rows) return;", "  if (n > call.rows) return;"),
    ("barrier", "  __syncthreads();  // scratch is free again\n", ""),
    ("barrier", "  __syncthreads();\n  v = scratch[0];", "  v = scratch[0];"),
    ("tie", "tie ? a.index < b.index", "tie ? a.index > b.index"),
    ("NaN", ": a_nan || a.logit > b.logit;", ": a.logit > b.logit;"),
    ("offset", "(stage_bytes) + group * call.classes;", "(stage_bytes);"),
    (
        "launch",
        "staged ? rows_of_block * classes * sizeof(A) : 0",
        "staged ? classes * sizeof(A) : 0",
    ),
    (
        "launch",
        "rows_of_block * classes * sizeof(A) <= kStage;",
        "rows_of_block * classes * sizeof(A) <= 2 * kStage;",
    ),
    ("bound", "label >= call.classes ||", "label > call.classes ||"),
    ("reduction", "exponential(logit(k) - top);", "exponential(logit(k));"),
    ("factor", "half = A(steps / 2);", "half = A(steps) / 2;"),
    ("mask", "  if (j >= neurons) return;", "  if (j > neurons) return;"),
    ("stride", "if (staged) stage[t * blockDim.x] = s;", "if (staged) stage[t * 32] = s;"),
)

PASSES = plant(
    "csrc/cuda/channel_passes.cuh",
    ("stride", "      if (i >= cut.inner) i -= cut.inner, offset += cut.width - cut.inner;\n", ""),
    (
        "barrier",
        "  __syncthreads();\n  const typename Body::Channel channel",
        "  const typename Body::Channel channel",
    ),
    ("bound", "min((split + 1) * cut.chunk, cut.outer * cut.inner);", "(split + 1) * cut.chunk;"),
    ("offset", ": c * splits + k;", ": c + k;"),
    (
        "mask",
        "threadIdx.x < cut.lanes * V && first_column + threadIdx.x < cut.width",
        "threadIdx.x < cut.lanes * V",
    ),
    ("split", "min((split + 1) * cut.chunk, cut.outer) : 0;", "cut.outer : 0;"),
    ("reduction", "step >= cut.lanes; step /= 2", "step > cut.lanes; step /= 2"),
    ("barrier", "  __syncthreads();\n  const int64_t mine", "  const int64_t mine"),
    (
        "reduction",
        "for (int w = 0; w < kPassWarps; ++w) {",
        "for (int w = 1; w < kPassWarps; ++w) {",
    ),
    ("stride", "step / inner * width + step_inner;", "step / inner * width;"),
    ("alignment", "    if (!rows) chunk = ceil_div(chunk, V) * V;\n", ""),
    ("stride", "store(static_cast<T*>(data), c * stride,", "store(static_cast<T*>(data), c,"),
)

BATCH_NORM = plant(
    "csrc/cuda/batch_norm.cu",
    ("factor", "batch_variance * (s.count / (s.count - 1));", "batch_variance;"),
    ("accumulation", " + shift * (2 * sum + B * shift);", ";"),
    ("factor", "square_root(variance + s.eps)", "square_root(variance)"),
    ("state", "s.momentum * batch_mean + keep * mean", "keep * batch_mean + s.momentum * mean"),
    (
        "state not written",
        "    s.running_var.put(c, s.momentum * unbiased + keep * variance);\n",
        "",
    ),
    ("epilogue", "return y < low ? low : y;  // NaN passes", "return y;"),
    ("epilogue sign", "(e.s - k.mean_s - (e.x", "(e.s + k.mean_s - (e.x"),
    ("factor", "A(sums.second * invstd * invstd / f.count)", "A(sums.second * invstd / f.count)"),
    ("factor", "A(sums.second * invstd), gamma", "A(sums.second), gamma"),
    ("chain", "return signal_out ? chain_epilogue(dx, e.x, params) :", "return"),
    (
        "mask",
        "if (c >= cut.channels) return;\n  const Pair sums = channel_sums(cut, f.partial, c);",
        "const Pair sums = channel_sums(cut, f.partial, c);",
    ),
    ("launch", "const bool at_once = need_input && !training;", "const bool at_once = false;"),
)

LIF = plant(
    "csrc/cuda/lif.cu",
    ("stride", "f.current + (t + kAhead) * f.neurons + m", "f.current + (t + kAhead) * f.neurons"),
    ("mask", "if (t + kAhead < f.rows) ahead[s]", "if (t + kAhead <= f.rows) ahead[s]"),
    (
        "rounding",
        "u[k] = static_cast<A>(static_cast<T>(neuron.step",
        "u[k] = static_cast<A>((neuron.step",
    ),
    ("offset", "++channel == channels) channel = 0;", "++channel == channels) channel = 1;"),
    ("state not read", "else if (t == -1 && state)", "else if (false)"),
    ("tail", "      if (t > last) continue;\n", ""),
    ("bit", "first + kAheadBack > last)", "first + kAheadBack > last + kPlane)"),
)

SPIKES = plant(
    "csrc/cuda/spikes.cu",
    ("offset", "if (k % 4 == 0) block = philox(", "if (k == 0) block = philox("),
    ("offset", "noise.add(t * neurons + m, v);", "noise.add(t * neurons, v);"),
    ("bit", "(word >> (8 * k + shift)) & 1", "(word >> (8 * k)) & 1"),
    ("alignment", "aligned16(from, to) && index % 4 == 0", "aligned16(from, to)"),
)

OVER_TIME = plant(
    "csrc/cuda/over_time.cuh",
    ("alignment", "if (neurons % V == 0 && ", "if ("),
    (
        "launch",
        "ceil_div<int64_t>(neurons / V, kBlock);",
        "std::max<int64_t>(neurons / V / kBlock, 1);",
    ),
)

GROUPS = (
    Group(
        "tests/gpusim_ops/test_spiking_gpu.py -k 'not many_steps'",
        LIF + SPIKES + OVER_TIME,
        "lif.cu,spikes.cu",
    ),
    Group(
        f"tests/test_activation.py {EDGES} -k 'step_activation or unaligned_elementwise'",
        ACTIVATION,
        "activation.cu,combine.cu",
    ),
    Group(
        f"tests/test_sum_dropout.py {EDGES} -k '((test_sum or dropout) and not reference and "
        "not compiles and not opcheck and not float16) or unaligned_elementwise'",
        COMBINE + ELEMENTWISE,
        "combine.cu,activation.cu",
        "Float Double",
    ),
    Group(
        f"{EDGES} tests/test_update.py tests/test_optim.py tests/test_optim_live.py -k "
        "'(many_tensors or mixed_codes or global_norm or steps_like_torch or replay or corrections "
        "or own_rates) and not beyond and not reference'",
        UPDATE + COMMON,
        "update.cu",
    ),
    Group(
        "--processors 1 tests/gpusim_ops/test_linear_tiles.py -k float32",
        OPT_IN,
        "linear.cu,linear_rules.cu",
        "Float",
    ),
    Group(
        f"{EDGES} tests/test_rewards.py -k '(wide_rows or spikes or ties or (budget and dtype1))"
        " and not reference'",  # dtype1: float32
        REWARD,
        "reward.cu",
        "Float Double",
    ),
    Group(
        f"tests/test_batch_norm.py {EDGES} -k '(matches or chain_forms or running or cancel or "
        "batch_norm_edges) and not reference'",
        BATCH_NORM + PASSES,
        "batch_norm.cu",
        "Float Double",
    ),
)
