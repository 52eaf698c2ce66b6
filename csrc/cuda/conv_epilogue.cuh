// What is done with the finished sums of the products of convolutions. The epilogues take whole
// runs of sums and see to ragged ends and scattered elements themselves: one copy of the rule's
// code per run.
#pragma once

#include "conv_window.cuh"
#include "run.cuh"

namespace lfp::cuda {

// Operands that look through windows keep places. With 32 of k on their way, the registers of three
// blocks do not hold them.
template <class Core>
inline constexpr int kConvBlocks = std::min(Core::kBlocksPerProcessor, Core::kTileK > 16 ? 2 : 3);

// Three blocks of the weight product would spill where the compiler needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostKernelBlocks = 2;
#else
constexpr int kMostKernelBlocks = 3;
#endif

// The sums at the positions of one side:
//   forward         z = sum + bias, relu
//   input product   r_in = input_epilogue(sum, x), or the signal of the layer below
template <class T>
struct PositionSums {
  T* to;
  const T* x;     // null: forward
  const T* bias;  // forward, may be null
  bool relu;
  RuleCall<Acc<T>> rule;

  template <int V>
  __device__ __forceinline__ void finish(const Run<V>& run, const Acc<T> (&add)[V],
                                         Acc<T> (&v)[V]) const {
    using A = Acc<T>;
    if (x) {
      A in[V];
      run.load_from(x, in);
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = rule.input_epilogue(v[k], in[k]);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        v[k] += add[k];
        if (relu) v[k] = v[k] < A(0) ? A(0) : v[k];  // NaN stays
      }
    }
    run.store_to(to, v);
  }
  bool aligned() const { return aligned16(to, x, bias); }
};

// Channels last: m is a position, n a channel of the group.
template <class T>
struct PixelEpilogue {
  using Element = T;
  static constexpr int kWidth = kWide<T>;
  static constexpr bool wants_row_sums = false, kTakesRuns = true;
  template <class Core>
  static constexpr int kBlocksPerProcessor = kConvBlocks<Core>;
  PositionSums<T> sums;
  Window window;
  Strides strides;
  int channels;   // of one group
  bool together;  // runs of channels are aligned and end with the group

  __device__ __forceinline__ void select(int64_t part) { window.select(part); }
  __device__ __forceinline__ int64_t depth() const {
    return int64_t(window.taps) * window.channels;
  }
  template <int V>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, Acc<T> (&v)[V]) const {
    const int64_t pixel = window.target_offset(window.positions(m), strides);
    if (pixel < 0) return;
    const int64_t channel = int64_t(window.group) * channels + n;
    Run<V> run{{}, together};
#pragma unroll
    for (int k = 0; k < V; ++k) run.at[k] = n + k < channels ? pixel + channel + k : -1;
    Acc<T> add[V] = {};
    if (sums.bias) {
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (n + k < channels) add[k] = load(sums.bias, channel + k);
    }
    sums.template finish<V>(run, add, v);
  }
  __device__ __forceinline__ void row_sum(int64_t, Acc<T>) const {}
};

// Plain layout: m is a channel of the group, n a position.
template <class T>
struct PlaneEpilogue {
  using Element = T;
  static constexpr int kWidth = kWide<T>;
  static constexpr bool wants_row_sums = false, kTakesRuns = true;
  template <class Core>
  static constexpr int kBlocksPerProcessor = kConvBlocks<Core>;
  PositionSums<T> sums;
  Window window;
  Strides strides;
  int channels;   // of one group
  bool together;  // runs of positions stay in a plane, are neighbours in memory and aligned

  __device__ __forceinline__ void select(int64_t part) { window.select(part); }
  __device__ __forceinline__ int64_t depth() const {
    return int64_t(window.taps) * window.channels;
  }
  template <int V>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, Acc<T> (&v)[V]) const {
    const int64_t channel = int64_t(window.group) * channels + m;
    Position q = window.positions(n);
    Run<V> run{{}, together};
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int64_t at = window.target_offset(q, strides);
      run.at[k] = at < 0 ? -1 : at + channel * strides.channel;
      if (together) break;
      window.positions.advance(q);
    }
    Acc<T> add[V] = {};
    if (sums.bias) {
      add[0] = load(sums.bias, channel);
#pragma unroll
      for (int k = 1; k < V; ++k) add[k] = add[0];
    }
    sums.template finish<V>(run, add, v);
  }
  __device__ __forceinline__ void row_sum(int64_t, Acc<T>) const {}
};

// m is a small channel of the group, n an index of the kernel: (large channel, tap), or with
// tap_major (tap, large channel). The row sums are those of the bias.
template <class T>
struct KernelEpilogue {
  using Element = T;
  static constexpr int kWidth = kWide<T>;
  static constexpr bool kTakesRuns = true;
  template <class Core>
  static constexpr int kBlocksPerProcessor = std::min(kConvBlocks<Core>, kMostKernelBlocks);
  ParameterUpdate<T> weight, bias;
  RuleCall<Acc<T>> rule;
  int rows, taps;          // small channels of one group
  FastDivide by_channels;  // large channels of one group
  bool tap_major;
  bool together;  // runs are aligned and end with the row
  bool wants_row_sums, wants_sums;
  int64_t group = 0;

  __device__ __forceinline__ void select(int64_t part) { group = part; }
  template <int V>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, Acc<T> (&f)[V]) const {
    update(weight, kernel_run<V>(*this, m, n), f);
  }
  __device__ __forceinline__ void row_sum(int64_t m, Acc<T> sum) const {
    Acc<T> one[1] = {sum};
    update(bias, Run<1>{{group * rows + m}, false}, one);
  }

 private:
  // ParameterUpdate, for a run.
  template <int V>
  __device__ __forceinline__ void update(const ParameterUpdate<T>& to, const Run<V>& run,
                                         Acc<T> (&raw)[V]) const {
    Acc<T> w[V];
    run.load_from(to.param, w);
#pragma unroll
    for (int k = 0; k < V; ++k) raw[k] = rule.weight_epilogue(raw[k], w[k]);
    take_feedback(to, run, raw, w);
  }
};

}  // namespace lfp::cuda
