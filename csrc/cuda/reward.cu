// Initial rewards at the logits o[N,C]: one read of each row, one write.
//   reward             labels[N], target values of o's shape, or no target at all
//   reward_spike_rate  spikes[T,N,C], rate coded
// A label outside [0, C) makes its row NaN: no memory is misread, and nothing has to be read back.
#include <limits>

#include "../reward_dispatch.h"
#include "elementwise.cuh"

namespace lfp::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kWideRow = 256;  // from so many classes on, a block works on a row, else a warp
constexpr size_t kStage = 48 * 1024;  // bytes of shared memory that hold what is read twice

template <class A>
__device__ __forceinline__ A not_a_number() {
  return static_cast<A>(NAN);
}

// ---- reductions over the threads of a row: one warp, or all warps of the block

// combine(a, b) over the row's threads, in a fixed order; every thread gets it. T is trivially
// copyable, made of 4-byte words.
template <class T, class Combine>
__device__ T reduce_row(T v, bool whole_block, T* scratch, Combine combine) {
  constexpr int kWords = sizeof(T) / 4;
  union Words {
    T value;
    int word[kWords];
    __device__ Words() {}
  };
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Words mine, other;
    mine.value = v;
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      other.word[k] = __shfl_xor_sync(0xffffffffu, mine.word[k], step);
    v = combine(v, other.value);
  }
  if (!whole_block) return v;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[0];
#pragma unroll
  for (int k = 1; k < kWarps; ++k) v = combine(v, scratch[k]);
  __syncthreads();  // scratch is free again
  return v;
}

template <class A>
struct Winner {
  A logit;
  int index;
};

// The first of the largest logits; a NaN counts as the largest, as in torch.argmax.
template <class A>
__device__ __forceinline__ Winner<A> better(Winner<A> a, Winner<A> b) {
  const bool a_nan = a.logit != a.logit, b_nan = b.logit != b.logit;
  const bool tie = (a_nan && b_nan) || a.logit == b.logit;
  const bool first = tie ? a.index < b.index : a_nan || a.logit > b.logit;
  return first ? a : b;
}

// ---- rows

template <class A>
struct RowCall {
  const int64_t* labels;  // null: every row targets `neuron`, or with -1 every neuron
  int64_t neuron, rows;
  int classes;
  bool whole_block, staged;
  RewardParams<A> params;
};

// r[n, k] = Reward::value(o[n, k], y[n, k], q[n, k])
template <class T, class Reward>
__global__ void __launch_bounds__(kThreads, 3)
    rows_kernel(const T* out, T* result, const RowCall<Acc<T>> call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char stage_bytes[];
  __shared__ Winner<A> winner_scratch[kWarps];
  __shared__ A scratch[kWarps];
  const int group = call.whole_block ? 0 : threadIdx.x / 32;
  const int thread = call.whole_block ? threadIdx.x : threadIdx.x % 32;
  const int step = call.whole_block ? kThreads : 32;
  const int64_t n = int64_t(blockIdx.x) * (call.whole_block ? 1 : kWarps) + group;
  if (n >= call.rows) return;  // a whole warp; with whole_block there is no such row
  const T* o = out + n * call.classes;
  T* to = result + n * call.classes;
  int64_t label = call.neuron;
  if (call.labels) {  // read once for the warp
    if (threadIdx.x % 32 == 0) label = call.labels[n];
    label = __shfl_sync(0xffffffffu, label, 0);
  }
  const bool invalid = label >= call.classes || (call.labels && label < 0);

  // A thread meets its own logits again only, so the stage needs no barrier.
  A* stage = reinterpret_cast<A*>(stage_bytes) + group * call.classes;
  const auto logit = [&](int k) { return call.staged ? stage[k] : load(o, k); };
  A top = -static_cast<A>(INFINITY), total = A(0);
  Winner<A> best{-static_cast<A>(INFINITY), INT_MAX};
  if constexpr (Reward::kRow == RowQuantity::kProbability ||
                Reward::kRow == RowQuantity::kIsWinner) {
    for (int k = thread; k < call.classes; k += step) {
      const A v = load(o, k);
      if (call.staged) stage[k] = v;
      top = v > top ? v : top;
      best = better(best, Winner<A>{v, k});
    }
  }
  if constexpr (Reward::kRow == RowQuantity::kProbability) {
    top = reduce_row(top, call.whole_block, scratch, [](A a, A b) { return a > b ? a : b; });
    for (int k = thread; k < call.classes; k += step) total += exponential(logit(k) - top);
    total = reduce_row(total, call.whole_block, scratch, [](A a, A b) { return a + b; });
  }
  if constexpr (Reward::kRow == RowQuantity::kIsWinner)
    best = reduce_row(best, call.whole_block, winner_scratch,
                      [](Winner<A> a, Winner<A> b) { return better(a, b); });
  A at_label = A(0);
  if constexpr (Reward::kRow == RowQuantity::kLabelLogit)
    at_label = invalid || label < 0 ? A(0) : load(o, label);

  constexpr bool kStages =
      Reward::kRow == RowQuantity::kProbability || Reward::kRow == RowQuantity::kIsWinner;
  for (int k = thread; k < call.classes; k += step) {
    const A v = kStages ? logit(k) : load(o, k);
    const A y = label < 0 || k == label ? A(1) : A(0);
    A q = A(0);
    if constexpr (Reward::kRow == RowQuantity::kProbability) q = exponential(v - top) / total;
    if constexpr (Reward::kRow == RowQuantity::kIsWinner) q = k == best.index ? A(1) : A(0);
    if constexpr (Reward::kRow == RowQuantity::kLabelLogit) q = at_label;
    store(to, k, invalid ? not_a_number<A>() : Reward::value(v, y, q, call.params));
  }
}

template <class T>
void launch_rows(const Tensor& out, const int64_t* labels, int64_t neuron, const Tensor& result,
                 int64_t kind, RewardParams<Acc<T>> params, cudaStream_t stream) {
  using A = Acc<T>;
  const int64_t classes = out.size(out.dim() - 1), rows = out.numel() / classes;
  const bool whole_block = classes >= kWideRow;
  const int64_t rows_of_block = whole_block ? 1 : kWarps, blocks = ceil_div(rows, rows_of_block);
  LFP_CHECK(classes < INT_MAX - kThreads && blocks <= INT_MAX, "reward", "tensor too large");
  const bool staged = rows_of_block * classes * sizeof(A) <= kStage;
  const RowCall<A> call{labels,      neuron, rows,  static_cast<int>(classes),
                        whole_block, staged, params};
  dispatch_row_reward<A>(kind, [&](auto functor) {
    rows_kernel<T, decltype(functor)><<<static_cast<unsigned>(blocks), kThreads,
                                        staged ? rows_of_block * classes * sizeof(A) : 0, stream>>>(
        data<T>(out), data<T>(result), call);
    check_launch();
  });
}

// ---- one target value per output

template <class T, class Reward>
struct ValueReward {
  const T *o, *target;
  T* result;
  template <int V>
  __device__ void operator()(int64_t i) const {
    using A = Acc<T>;
    A v[V], t[V];
    load<V>(o, i, v);
    load<V>(target, i, t);
#pragma unroll
    for (int k = 0; k < V; ++k) v[k] = Reward::value(v[k], t[k], A(0), RewardParams<A>{});
    store<V>(result, i, v);
  }
};

// params = [low, high, sign, neuron]
Tensor reward(Tensor out, std::optional<Tensor> target, int64_t kind, Params params) {
  const Device device(out);
  const Tensor o = dense(out);
  Tensor result = empty_like(o, Ints(o.sizes().begin(), o.sizes().end()));
  if (o.numel() == 0) return result;
  dispatch_dtype(o.scalar_type(), "reward", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    if (kind == kBinarySigmoid || kind == kRegression) {
      LFP_CHECK(target.has_value() && target->numel() == o.numel(), "reward",
                "expected one target per output");
      const Tensor t = dense(*target);
      const auto run = [&](auto functor) {
        const ValueReward<T, decltype(functor)> f{data<T>(o), data<T>(t), data<T>(result)};
        elementwise_wide<T>(o.numel(), device.stream, f, f.o, f.target, f.result);
      };
      if (kind == kRegression) return run(RegressionReward<A>{});
      return run(SigmoidReward<A>{});
    }
    const RewardParams<A> p{A(params.at(0)), A(params.at(1)), A(params.at(2))};
    if (!target.has_value()) {
      LFP_CHECK(kind == kMaximize || kind == kMinimize, "reward", "expected labels");
      return launch_rows<T>(o, nullptr, static_cast<int64_t>(params.at(3)), result, kind, p,
                            device.stream);
    }
    LFP_CHECK(target->numel() * o.size(o.dim() - 1) == o.numel(), "reward",
              "expected one label per row");
    const Tensor labels = dense(*target);
    launch_rows<T>(o, data<int64_t>(labels), -1, result, kind, p, device.stream);
  });
  return result;
}

// ---- spike rate

// Rewards at every step are constant + factor * spike, with one constant and factor per neuron:
//   true class  1 - sigma(sum_t s - T/2);   others  -s * (1 - sigma(sum_t (1 - s) - T/2))
// A thread owns a neuron. Its spikes wait in shared memory for the second pass over the steps where
// they fit (`staged`), else they are read again.
template <class T>
__global__ void __launch_bounds__(kThreads)
    spike_rate_kernel(const T* spikes, const int64_t* labels, T* result, int64_t steps,
                      int64_t neurons, int64_t classes, bool staged) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char stage_bytes[];
  T* stage = reinterpret_cast<T*>(stage_bytes) + threadIdx.x;
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  // The first neuron of a row among those of the warp reads the row's label for the others.
  const int lane = threadIdx.x % 32;
  const int reader = lane - static_cast<int>(min(int64_t(lane), j % classes));
  int64_t label = lane == reader && j < neurons ? labels[j / classes] : 0;
  label = __shfl_sync(0xffffffffu, label, reader);
  if (j >= neurons) return;
  A fired = A(0);
#pragma unroll 8
  for (int64_t t = 0; t < steps; ++t) {
    const T s = spikes[t * neurons + j];
    if (staged) stage[t * blockDim.x] = s;
    fired += static_cast<A>(s);
  }
  const A silent = A(steps) - fired, half = A(steps / 2);
  const bool is_true = j % classes == label;
  A constant = is_true ? A(1) - sigmoid(fired - half) : A(0);
  const A factor = is_true ? A(0) : sigmoid(silent - half) - A(1);
  if (label < 0 || label >= classes) constant = not_a_number<A>();
#pragma unroll 8
  for (int64_t t = 0; t < steps; ++t) {
    const T s = staged ? stage[t * blockDim.x] : spikes[t * neurons + j];
    store(result, t * neurons + j, constant + factor * static_cast<A>(s));
  }
}

Tensor reward_spike_rate(Tensor spikes, Tensor labels) {
  const Device device(spikes);
  const Tensor s = dense(spikes), y = dense(labels);
  Tensor result = empty_like(s, Ints(s.sizes().begin(), s.sizes().end()));
  if (s.numel() == 0) return result;
  const int64_t steps = s.size(0), neurons = s.numel() / steps, classes = s.size(s.dim() - 1);
  LFP_CHECK(y.numel() * classes == neurons, "reward_spike_rate", "expected one label per row");
  dispatch_dtype(s.scalar_type(), "reward_spike_rate", [&](auto element) {
    using T = decltype(element);
    int64_t threads = kThreads;
    while (threads > 32 && threads * steps * sizeof(T) > kStage) threads /= 2;
    const bool staged = threads * steps * sizeof(T) <= kStage;
    if (!staged) threads = kThreads;
    const int64_t blocks = ceil_div(neurons, threads);
    LFP_CHECK(blocks <= INT_MAX, "reward_spike_rate", "tensor too large");
    spike_rate_kernel<T><<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                           staged ? threads * steps * sizeof(T) : 0, device.stream>>>(
        data<T>(s), data<int64_t>(y), data<T>(result), steps, neurons, classes, staged);
    check_launch();
  });
  return result;
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("reward", TORCH_BOX(&lfp::cuda::reward));
  m.impl("reward_spike_rate", TORCH_BOX(&lfp::cuda::reward_spike_rate));
}
