// Products of a block of attention, tiles in shared memory. A block owns kOwn rows of one side
// (queries or keys) and meets kOther rows of the other side at a time; rows have kWidth elements:
//   logits      [own, other] = a[own, width] b[other, width]^T
//   accumulate  [own, width] += p[own, other] b[other, width]
// Two cores: tensor cores for 16-bit tensors (product_mma.cuh), ordinary units for the others.
#pragma once

#include "product_mma.cuh"

namespace lfp::cuda {

// The type that products take, from the type of the tensors. TF32 holds float16 exactly, and
// r / stab(z) does not overflow in it.
template <class T>
struct OperandOf {
  using type = T;
};
template <>
struct OperandOf<Half> {
  using type = Tf32;
};

template <class A>
__device__ __forceinline__ void round_to(A v, A& out) {
  out = v;
}
template <class A>
__device__ __forceinline__ A widened(A v) {
  return v;
}
__device__ __forceinline__ float widened(Tf32 v) { return widen(v); }
__device__ __forceinline__ float widened(BFloat16 v) { return widen(v); }

// kRows x kColumns in shared memory; rows are 16 bytes longer, against bank conflicts.
template <class P, int kRows_, int kColumns_>
struct alignas(16) Rows {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kPad = 16 / sizeof(P);
  P value[kRows][kColumns + kPad];

  // The same memory as an operand of tensor cores that sums along the rows, or across them.
  using Along = MmaTile<P, kRows, kColumns, true, kPad>;
  using Across = MmaTile<P, kColumns, kRows, false, kPad>;
  __device__ __forceinline__ const Along& along() const {
    return *reinterpret_cast<const Along*>(this);
  }
  __device__ __forceinline__ const Across& across() const {
    return *reinterpret_cast<const Across*>(this);
  }
};

// P: BFloat16 or Tf32. Warps stand kOwn / 16 high; the rest of them share the columns.
template <class P, int kOwn_, int kOther_, int kWidth_>
struct MmaAttention {
  using Operand = P;
  using A = float;
  static constexpr int kOwn = kOwn_, kOther = kOther_, kWidth = kWidth_, kThreads = 128;
  static constexpr int kHigh = kOwn / 16, kAcross = 4 / kHigh;
  // With few columns some warps have none of them.
  static constexpr int kColumns = kOther / kAcross < 16 ? 16 : kOther / kAcross;
  static constexpr int kWide = kWidth / kAcross;
  static_assert(kOwn % 16 == 0 && 4 % kHigh == 0 && kOther % 16 == 0 && kWide % 16 == 0);

  using Logits = float[kColumns / 8][4];
  using Sums = float[kWide / 8][4];

  static __device__ __forceinline__ int row() { return threadIdx.x / 32 % kHigh * 16; }
  static __device__ __forceinline__ int side() { return threadIdx.x / 32 / kHigh; }
  static __device__ __forceinline__ bool has_logits() {
    return kColumns * kAcross == kOther || side() * kColumns < kOther;
  }

  // `width` elements of the rows are not zero.
  static __device__ __forceinline__ void logits(Logits& sums, const Rows<P, kOwn, kWidth>& a,
                                                const Rows<P, kOther, kWidth>& b, int width) {
    if (!has_logits()) return;
#pragma unroll 4
    for (int k = 0; k < width; k += kMmaStep<P>) {
      uint32_t left[4], right[4];
      a.along().left(row(), k, left);
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j) {
        b.along().right(side() * kColumns + j * 16, k, right);
        mma(sums[2 * j], left, {right[0], right[1]}, P{});
        mma(sums[2 * j + 1], left, {right[2], right[3]}, P{});
      }
    }
  }

  static __device__ __forceinline__ void accumulate(Sums& sums, const Rows<P, kOwn, kOther>& p,
                                                    const Rows<P, kOther, kWidth>& b) {
#pragma unroll
    for (int k = 0; k < kOther; k += kMmaStep<P>) {
      uint32_t left[4], right[4];
      p.along().left(row(), k, left);
#pragma unroll
      for (int j = 0; j < kWide / 16; ++j) {
        b.across().right(side() * kWide + j * 16, k, right);
        mma(sums[2 * j], left, {right[0], right[1]}, P{});
        mma(sums[2 * j + 1], left, {right[2], right[3]}, P{});
      }
    }
  }

  // use(m, n, sum) for every sum of this thread; of pairs use(m, n, sum, second sum).
  template <class Use>
  static __device__ __forceinline__ void each_logit(Logits& sums, Use use) {
    if (has_logits()) each<kColumns>(sums, use);
  }
  template <class Use>
  static __device__ __forceinline__ void each_pair(Logits& sums, const Logits& second, Use use) {
    if (!has_logits()) return;
    const int lane = threadIdx.x % 32;
    const int m = row() + lane / 4, n = side() * kColumns + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) use(m + c / 2 * 8, n + j * 8 + c % 2, sums[j][c], second[j][c]);
  }
  template <class Use>
  static __device__ __forceinline__ void each_sum(Sums& sums, Use use) {
    each<kWide>(sums, use);
  }

 private:
  template <int kRun, class Use>
  static __device__ __forceinline__ void each(float (&sums)[kRun / 8][4], Use use) {
    const int lane = threadIdx.x % 32;
    const int m = row() + lane / 4, n = side() * kRun + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kRun / 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) use(m + c / 2 * 8, n + j * 8 + c % 2, sums[j][c]);
  }
};

// 16 x 16 threads; each has every sixteenth row and, of logits, every sixteenth column, of sums
// runs of 16 bytes.
template <class T, int kOwn_, int kOther_, int kWidth_>
struct SimtAttention {
  using Operand = T;
  using A = T;
  static constexpr int kOwn = kOwn_, kOther = kOther_, kWidth = kWidth_, kThreads = 256;
  static constexpr int kSide = 16, kRun = 16 / sizeof(T);
  static constexpr int kHigh = kOwn / kSide, kColumns = kOther / kSide;
  static constexpr int kRuns = kWidth / (kSide * kRun);

  using Logits = T[kHigh][kColumns];
  using Sums = T[kHigh][kRuns * kRun];

  static __device__ __forceinline__ int down() { return threadIdx.x / kSide; }
  static __device__ __forceinline__ int right() { return threadIdx.x % kSide; }

  static __device__ __forceinline__ void logits(Logits& sums, const Rows<T, kOwn, kWidth>& a,
                                                const Rows<T, kOther, kWidth>& b, int width) {
    using Run = Pack<T, kRun>;
#pragma unroll 2
    for (int k = 0; k < width; k += kRun) {
      Run left[kHigh], across[kColumns];
#pragma unroll
      for (int i = 0; i < kHigh; ++i)
        left[i] = *reinterpret_cast<const Run*>(&a.value[down() + i * kSide][k]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        across[j] = *reinterpret_cast<const Run*>(&b.value[right() + j * kSide][k]);
#pragma unroll
      for (int i = 0; i < kHigh; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int c = 0; c < kRun; ++c) sums[i][j] += left[i].value[c] * across[j].value[c];
    }
  }

  static __device__ __forceinline__ void accumulate(Sums& sums, const Rows<T, kOwn, kOther>& p,
                                                    const Rows<T, kOther, kWidth>& b) {
    using Run = Pack<T, kRun>;
#pragma unroll 4
    for (int k = 0; k < kOther; ++k) {
      T left[kHigh];
#pragma unroll
      for (int i = 0; i < kHigh; ++i) left[i] = p.value[down() + i * kSide][k];
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        const auto run = *reinterpret_cast<const Run*>(&b.value[k][(r * kSide + right()) * kRun]);
#pragma unroll
        for (int i = 0; i < kHigh; ++i)
#pragma unroll
          for (int c = 0; c < kRun; ++c) sums[i][r * kRun + c] += left[i] * run.value[c];
      }
    }
  }

  template <class Use>
  static __device__ __forceinline__ void each_logit(Logits& sums, Use use) {
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) use(down() + i * kSide, right() + j * kSide, sums[i][j]);
  }
  template <class Use>
  static __device__ __forceinline__ void each_pair(Logits& sums, const Logits& second, Use use) {
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        use(down() + i * kSide, right() + j * kSide, sums[i][j], second[i][j]);
  }
  template <class Use>
  static __device__ __forceinline__ void each_sum(Sums& sums, Use use) {
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int c = 0; c < kRuns * kRun; ++c)
        use(down() + i * kSide, (c / kRun * kSide + right()) * kRun + c % kRun, sums[i][c]);
  }
};

// The block of heads of up to W elements. Rows of 256 elements of 8 bytes need 133 KB of shared
// memory, all others less than the 99 KB that every device has.
template <class P, int W>
struct AttentionOf;
template <>
struct AttentionOf<BFloat16, 64> : MmaAttention<BFloat16, 64, 64, 64> {};
template <>
struct AttentionOf<BFloat16, 128> : MmaAttention<BFloat16, 64, 32, 128> {};
template <>
struct AttentionOf<BFloat16, 256> : MmaAttention<BFloat16, 32, 32, 256> {};
template <>
struct AttentionOf<Tf32, 64> : MmaAttention<Tf32, 64, 32, 64> {};
template <>
struct AttentionOf<Tf32, 128> : MmaAttention<Tf32, 32, 32, 128> {};
template <>
struct AttentionOf<Tf32, 256> : MmaAttention<Tf32, 16, 16, 256> {};
template <>
struct AttentionOf<float, 64> : SimtAttention<float, 64, 32, 64> {};
template <>
struct AttentionOf<float, 128> : SimtAttention<float, 32, 32, 128> {};
template <>
struct AttentionOf<float, 256> : SimtAttention<float, 16, 16, 256> {};
template <>
struct AttentionOf<double, 64> : SimtAttention<double, 32, 32, 64> {};
template <>
struct AttentionOf<double, 128> : SimtAttention<double, 16, 16, 128> {};
template <>
struct AttentionOf<double, 256> : SimtAttention<double, 16, 16, 256> {};

}  // namespace lfp::cuda
