// Operands of a product in the order in which it reads them: panels of a few columns, depth first.
// Rows of a matrix lie a power of two apart, and would fight for the sets of a cache.
#pragma once

#include "scratch.h"

namespace lfp::cpu {

// Elements that `count` columns of `depth` rows take.
template <int64_t kWidth>
constexpr int64_t packed_size(int64_t depth, int64_t count) {
  return (count + kWidth - 1) / kWidth * depth * kWidth;
}

constexpr int64_t kRowsAtOnce = 8;  // of a block that is packed: few places are written at once

// to[panel][k][kWidth] = from[k, panel * kWidth + j], zero beyond `count`.
template <int64_t kWidth, class T, class P>
LFP_CLONES void pack_panels(const T* from, int64_t stride, int64_t depth, int64_t count, P* to) {
  for (int64_t k0 = 0; k0 < depth; k0 += kRowsAtOnce) {
    const int64_t k1 = std::min(depth, k0 + kRowsAtOnce);
    int64_t c = 0;
    P* panel = to;
    for (; c + kWidth <= count; c += kWidth, panel += depth * kWidth)
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t j = 0; j < kWidth; ++j)
          panel[k * kWidth + j] = static_cast<P>(from[k * stride + c + j]);
    for (int64_t k = k0; c < count && k < k1; ++k)
      for (int64_t j = 0; j < kWidth; ++j)
        panel[k * kWidth + j] = c + j < count ? static_cast<P>(from[k * stride + c + j]) : P(0);
  }
}

// to[panel][k][kWidth] = from[panel * kWidth + r, k], zero beyond `count`: rows become the columns
// of panels.
template <int64_t kWidth, class T, class P>
LFP_CLONES void pack_row_panels(const T* from, int64_t stride, int64_t depth, int64_t count,
                                P* to) {
  for (int64_t c = 0; c < count; c += kWidth, to += depth * kWidth)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t r = 0; r < kWidth; ++r)
        to[k * kWidth + r] = c + r < count ? static_cast<P>(from[(c + r) * stride + k]) : P(0);
}

}  // namespace lfp::cpu
