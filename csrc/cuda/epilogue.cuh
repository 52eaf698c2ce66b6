// What is done with the finished sums of a product, written to row-major matrices.
#pragma once

#include "rule_call.cuh"

namespace lfp::cuda {

// z = sum + bias, relu
template <class T>
struct ForwardEpilogue {
  using Element = T;
  static constexpr int kWidth = kWide<T>;
  static constexpr bool wants_row_sums = false;
  T* z;
  const T* bias;
  int64_t cols;
  bool relu, wide;

  template <int V>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, Acc<T> (&v)[V]) const {
    using A = Acc<T>;
    A b[V] = {};
    if (bias) load<V>(bias, n, b);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      v[k] += b[k];
      if (relu) v[k] = v[k] < A(0) ? A(0) : v[k];  // NaN stays
    }
    store<V>(z, m * cols + n, v);
  }
  __device__ __forceinline__ void row_sum(int64_t, Acc<T>) const {}
};

// r_in = input_epilogue(g, x), or the signal of the layer below; runs of W
template <class T, int W = kWide<T>>
struct InputEpilogue {
  using Element = T;
  static constexpr int kWidth = W;
  static constexpr bool wants_row_sums = false;
  const T* x;
  T* reward;
  int64_t cols;
  RuleCall<Acc<T>> rule;
  bool wide;

  template <int V>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, Acc<T> (&g)[V]) const {
    Acc<T> v[V];
    load<V>(x, m * cols + n, v);
#pragma unroll
    for (int k = 0; k < V; ++k) g[k] = rule.input_epilogue(g[k], v[k]);
    store<V>(reward, m * cols + n, g);
  }
  __device__ __forceinline__ void row_sum(int64_t, Acc<T>) const {}
};

// feedback = weight_epilogue(sum, W), stored or applied; the bias by its row sum
template <class T>
struct WeightEpilogue {
  using Element = T;
  static constexpr int kWidth = kWide<T>;
  ParameterUpdate<T> weight, bias;
  int64_t cols;
  RuleCall<Acc<T>> rule;
  bool wide, wants_row_sums;
  bool wants_weight = true;

  template <int V>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, Acc<T> (&f)[V]) const {
    if (wants_weight) weight(m * cols + n, f, rule);
  }
  __device__ __forceinline__ void row_sum(int64_t m, Acc<T> sum) const {
    Acc<T> one[1] = {sum};
    bias(m, one, rule);
  }
};

}  // namespace lfp::cuda
