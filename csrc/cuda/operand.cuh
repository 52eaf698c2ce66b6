// Operands of a product that lie in memory as row-major matrices [rows, cols].
#pragma once

#include "rule_call.cuh"

namespace lfp::cuda {

// Where the packs of a matrix may be read as such: rows start aligned and end on a full pack.
template <class T>
bool allows_packs(int64_t cols) {
  return cols % kWide<T> == 0;
}

// Elements (row, col) .. (row, col + V - 1), zeros outside of the matrix.
template <class T, int V = kWide<T>>
__device__ __forceinline__ Pack<T, V> fetch_pack(const T* p, int64_t rows, int64_t cols,
                                                 int64_t row, int64_t col, bool wide) {
  if (wide && row < rows && col < cols)
    return *reinterpret_cast<const Pack<T, V>*>(p + row * cols + col);
  Pack<T, V> pack;
#pragma unroll
  for (int j = 0; j < V; ++j)
    pack.value[j] = !wide && row < rows && col + j < cols ? p[row * cols + col + j] : T(0.f);
  return pack;
}

// A matrix as it is.
template <class T, bool kAlong>
struct MatrixOperand {
  static constexpr bool kAlongK = kAlong;
  static constexpr int kWidth = kWide<T>;
  using Raw = Pack<T, kWidth>;
  const T* p;
  int64_t rows, cols;
  bool wide;
  RuleCall<Acc<T>> rule = {};  // the left operand of every product has one

  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    return fetch_pack(p, rows, cols, row, col, wide);
  }
  __device__ __forceinline__ void convert(const Raw& raw, Acc<T> (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[j] = static_cast<Acc<T>>(raw.value[j]);
  }
};

// s = prologue(r, z), formed on the way into shared memory and never stored. Outside of the matrix
// r is 0, and so is s: stab(0) = eps > 0. kPack: elements read together.
template <class T, bool kAlong, int kPack = kWide<T>>
struct SignalOperand {
  static constexpr bool kAlongK = kAlong;
  static constexpr int kWidth = kPack;
  struct Raw {
    Pack<T, kWidth> reward, z;
  };
  const T *reward, *z;
  int64_t rows, cols;
  bool wide;
  RuleCall<Acc<T>> rule;

  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    Raw raw;
    raw.reward = fetch_pack<T, kWidth>(reward, rows, cols, row, col, wide);
    if (!rule.signal_in) raw.z = fetch_pack<T, kWidth>(z, rows, cols, row, col, wide);
    return raw;
  }
  __device__ __forceinline__ void convert(const Raw& raw, Acc<T> (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const auto r = static_cast<Acc<T>>(raw.reward.value[j]);
      out[j] = rule.signal_in ? r : rule.prologue(r, static_cast<Acc<T>>(raw.z.value[j]));
    }
  }
};

template <class T, bool kAlong>
MatrixOperand<T, kAlong> matrix_operand(const Tensor& t, int64_t rows, int64_t cols) {
  const T* p = data<T>(t);
  return {p, rows, cols, allows_packs<T>(cols) && aligned16(p)};
}

}  // namespace lfp::cuda
