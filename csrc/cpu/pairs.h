// Pairs of bfloat16 numbers, which AVX-512 multiplies two at a time into float32 sums, packed in
// the order in which a product reads them (panels.h). Numbers too small to be normal count as zero,
// as they do in the product.
#pragma once

#include "panels.h"
#include "wide.h"

#if LFP_WIDE

namespace lfp::cpu {

// Two bfloat16 numbers side by side, the first in the lower half: what AVX-512 multiplies.
using Pair = uint32_t;

typedef Pair PairVector __attribute__((vector_size(64), aligned(4), may_alias));

template <class T>
LFP_HD Pair pair_of(T first, T second) {
  return static_cast<BFloat16>(first).x | Pair(static_cast<BFloat16>(second).x) << 16;
}

// The pairs of 16 columns of two rows. An instruction of its own rather than the compiler's: it
// would want every function around it for the processors that have it.
LFP_HD PairVector pairs_of(const float* first, const float* second) {
  typedef float Floats __attribute__((vector_size(64), aligned(4)));
  typedef uint16_t Halves __attribute__((vector_size(64)));
  constexpr Halves kMixed = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const Floats low = *reinterpret_cast<const Floats*>(first);
  const Floats high = *reinterpret_cast<const Floats*>(second);
  Halves both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
  return reinterpret_cast<PairVector>(__builtin_shuffle(both, kMixed));
}

LFP_HD PairVector pairs_of(const BFloat16* first, const BFloat16* second) {
  typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
  const auto low = *reinterpret_cast<const Halves*>(first);
  const auto high = *reinterpret_cast<const Halves*>(second);
  return __builtin_convertvector(low, PairVector) | __builtin_convertvector(high, PairVector) << 16;
}

// to[panel][k][kWidth] = from[2 k, ...] and from[2 k + 1, ...] of column panel * kWidth + j, zero
// beyond `count` and `depth`; `to` has (depth + 1) / 2 rows.
template <int64_t kWidth, class T>
LFP_V4 void pack_panels(const T* from, int64_t stride, int64_t depth, int64_t count, Pair* to) {
  constexpr int64_t kPairs = sizeof(PairVector) / sizeof(Pair);
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t k0 = 0; k0 < pairs; k0 += kRowsAtOnce) {
    const int64_t k1 = std::min(pairs, k0 + kRowsAtOnce);
    Pair* panel = to;
    for (int64_t c = 0; c < count; c += kWidth, panel += pairs * kWidth)
      for (int64_t k = k0; k < k1; ++k) {
        const T *first = from + 2 * k * stride + c, *second = first + stride;
        const bool whole = c + kWidth <= count && 2 * k + 1 < depth;
        if (whole && kWidth % kPairs == 0)
          for (int64_t j = 0; j < kWidth; j += kPairs)
            *reinterpret_cast<PairVector*>(panel + k * kWidth + j) =
                pairs_of(first + j, second + j);
        else
          for (int64_t j = 0; j < kWidth; ++j)
            panel[k * kWidth + j] =
                c + j < count ? pair_of(first[j], 2 * k + 1 < depth ? second[j] : T(0)) : 0;
      }
  }
}

// to[panel][k][kWidth] = from[panel * kWidth + r, 2 k] and the element right of it, zero beyond
// `count` and `depth`: rows become the columns of panels.
template <int64_t kWidth, class T>
LFP_V4 void pack_row_panels(const T* from, int64_t stride, int64_t depth, int64_t count, Pair* to) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t c = 0; c < count; c += kWidth, to += pairs * kWidth)
    for (int64_t k = 0; k < pairs; ++k)
      for (int64_t r = 0; r < kWidth; ++r) {
        const T* at = from + (c + r) * stride + 2 * k;
        to[k * kWidth + r] = c + r < count ? pair_of(at[0], 2 * k + 1 < depth ? at[1] : T(0)) : 0;
      }
}

}  // namespace lfp::cpu

#endif  // LFP_WIDE
