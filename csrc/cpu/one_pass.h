// One pass over W: the weight product of a block of W stays in registers, and what is done with it
// (the weight epilogue, and an optimizer step or a store) follows at once. W and the optimizer's
// states are read once and written once; nothing of the size of W exists besides.
//
// For processors with AVX-512, up to batches of 512 samples (1024 in bfloat16). Elsewhere, and for
// longer batches, the tiles of weight_tiles.h.
#pragma once

#include "wide_product.h"

namespace lfp::cpu {

constexpr int64_t kOnePassSteps = 512;  // beyond them x and s no longer stay in a core's cache
constexpr int64_t kOnePassWeights = 1 << 18;  // fewer are not worth packing x and s

// P: the type of the products.
template <class P>
bool one_pass_pays(int64_t n, int64_t in, int64_t out) {
  constexpr bool pairs = std::is_same_v<P, BFloat16>;
  if (!(std::is_same_v<P, float> ? has_wide_vectors() : pairs && has_wide_pairs())) return false;
  return n > 0 && n <= kOnePassSteps * (pairs ? 2 : 1) && in * out >= kOnePassWeights;
}

#if LFP_WIDE

constexpr int64_t kPanel = 8 * kBlock;      // columns whose packed x stays in the core's cache
constexpr int64_t kPackedSignal = 1 << 19;  // elements of s packed at a time

// What a block's product brings into cache while it is computed: the next block of the arrays that
// finish.read() names, a line per step, since the misses would stall the product if they came all
// at once. Into the second-level cache: the first is full of x and s.
template <class Finish>
struct NextBlock {
  using T = typename Finish::Element;
  static constexpr int64_t kLine = 64 / sizeof(T), kOfRow = kBlock / kLine;  // of a cache line
  static constexpr int64_t kEach = kRows * kOfRow, kLines = Finish::kArrays * kEach;
  const T* first[kLines];  // the lines of the first block
  int64_t at = 0;          // of this one
  NextBlock(const Finish& finish, int64_t stride) {
    const auto arrays = finish.read();
    for (int64_t i = 0; i < kLines; ++i)
      first[i] = arrays[i / kEach] + i / kOfRow % kRows * stride + i % kOfRow * kLine;
  }
  LFP_HD static int64_t lines() { return kLines; }
  LFP_HD void fetch(int64_t line) const { __builtin_prefetch(first[line] + at, 1, 2); }
};

// finish(raw, i) for the elements i of rows [begin, end) of W[out, in], with scratch for them:
// s[n, out], x[n, in].
template <class Factors, class S, class X, class Finish>
LFP_V4 void one_pass_rows(const S* s, const X* x, Finish finish, int64_t n, int64_t in, int64_t out,
                          int64_t begin, int64_t end, typename Factors::Packed* left,
                          typename Factors::Packed* right) {
  alignas(64) float product[kRows * kBlock];
  const int64_t steps = Factors::steps(n);
  NextBlock<Finish> next(finish, in);
  pack_panels<kRows>(s + begin, out, n, end - begin, left);
  for (int64_t i0 = 0; i0 < in; i0 += kPanel) {
    const int64_t width = std::min(kPanel, in - i0);
    pack_panels<kBlock>(x + i0, in, n, width, right);
    for (int64_t o = begin; o < end; o += kRows) {
      const int64_t rows = std::min(kRows, end - o);
      const auto* signal = left + packed_size<kRows>(steps, o - begin);
      for (int64_t c = 0; c < width; c += kBlock) {
        const int64_t count = std::min(kBlock, width - c), at = o * in + i0 + c;
        next.at = o + kRows < end ? at + kRows * in : at;
        block_product<Factors, false>(signal, right + packed_size<kBlock>(steps, c), steps, product,
                                      kBlock, next);
        for (int64_t r = 0; r < rows; ++r)
#pragma GCC ivdep
          for (int64_t i = 0; i < count; ++i) finish(product[r * kBlock + i], at + r * in + i);
      }
    }
  }
}

// All of W, spread over the threads; s is packed a few rows of W at a time, not whole.
template <class P, class S, class X, class Finish>
void one_pass(const S* s, const X* x, Finish finish, int64_t n, int64_t in, int64_t out) {
  using Factors = FactorsOf<P>;
  using Packed = typename Factors::Packed;
  const int64_t groups = (out + kRows - 1) / kRows;
  const int64_t grain = std::max<int64_t>(1, kProductGrain / (n * in * kRows));
  torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kRows, end = std::min(out, last * kRows);
    const int64_t steps = Factors::steps(n);
    const int64_t most = std::max(kRows, kPackedSignal / n / kRows * kRows);
    const auto left = scratch<Packed>(packed_size<kRows>(steps, std::min(most, end - begin)));
    const auto right = scratch<Packed>(packed_size<kBlock>(steps, std::min(kPanel, in)));
    for (int64_t o = begin; o < end; o += most)
      one_pass_rows<Factors>(s, x, finish, n, in, out, o, std::min(end, o + most), left.get(),
                             right.get());
  });
}

#endif  // LFP_WIDE

}  // namespace lfp::cpu
