// One pass over W: the weight product of a block of W stays in registers, and the weight epilogue
// and the optimizer step follow at once. W and the optimizer's states are read once and written
// once; nothing of the size of W exists besides.
//
// For float32 on processors with AVX-512, up to batches of 512. Elsewhere, and for longer batches,
// the tiles of weight_tiles.h.
#pragma once

#include "panels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LFP_ONE_PASS 1
#define LFP_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#else
#define LFP_ONE_PASS 0
#endif

namespace lfp::cpu {

// Whether this processor runs what is marked LFP_V4.
inline bool has_wide_vectors() {
#if LFP_ONE_PASS
  static const bool wide = __builtin_cpu_supports("x86-64-v4");
  return wide;
#else
  return false;
#endif
}

constexpr int64_t kOnePassBatch = 512;        // beyond it x and s no longer stay in a core's cache
constexpr int64_t kOnePassWeights = 1 << 18;  // fewer are not worth packing x and s

inline bool one_pass_pays(int64_t n, int64_t in, int64_t out) {
  return has_wide_vectors() && n > 0 && n <= kOnePassBatch && in * out >= kOnePassWeights;
}

#if LFP_ONE_PASS

constexpr int64_t kRows = 8;     // rows of W in registers
constexpr int64_t kLanes = 16;   // floats of a vector
constexpr int64_t kVectors = 2;  // vectors of a row in registers: 8 x 2 accumulators
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int64_t kPanel = 8 * kBlock;      // columns whose packed x stays in the core's cache
constexpr int64_t kPackedSignal = 1 << 19;  // elements of s packed at a time

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// What a block's product brings into cache while it is computed: the next block's weights and
// states, a line per sample, since the misses would stall the product if they came all at once.
// Into the second-level cache: the first is full of x and s.
template <int64_t kArrays>
struct Ahead {
  const float* from[kArrays];
  int64_t stride;  // between rows
  static constexpr int64_t kEach = kRows * kVectors, kLines = kArrays * kEach;
  LFP_HD void fetch(int64_t line) const {
    const float* at = from[line / kEach] + line / kVectors % kRows * stride;
    __builtin_prefetch(at + line % kVectors * kLanes, 1, 2);
  }
};

// product[kRows][kBlock] = s^T x for packed s [n][kRows] and x [n][kBlock].
template <class Ahead>
LFP_V4 inline void block_product(const float* s, const float* x, int64_t n, float* product,
                                 Ahead ahead) {
  Vector sum[kRows][kVectors] = {};
  for (int64_t line = n; line < Ahead::kLines; ++line) ahead.fetch(line);
  for (int64_t k = 0; k < n; ++k, s += kRows, x += kBlock) {
    if (k < Ahead::kLines) ahead.fetch(k);
    Vector v[kVectors];
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVectors; ++j) v[j] = *reinterpret_cast<const Vector*>(x + j * kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int64_t j = 0; j < kVectors; ++j) sum[r][j] += s[r] * v[j];
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVectors; ++j)
      *reinterpret_cast<Vector*>(product + r * kBlock + j * kLanes) = sum[r][j];
}

// One optimizer step of `count` weights of a row, whose states are a and b.
template <class Rule, class Optimizer>
LFP_V4 inline void update_row(const float* product, float* w, float* a, float* b, int64_t count,
                              RuleParams<float> p, OptimizerParams<float> h) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    float weight = w[i], first = 0, second = 0;
    if constexpr (Optimizer::kStates > 0) first = a[i];
    if constexpr (Optimizer::kStates > 1) second = b[i];
    Optimizer::apply(Rule::weight_epilogue(product[i], weight, p), weight, first, second, h);
    w[i] = weight;
    if constexpr (Optimizer::kStates > 0) a[i] = first;
    if constexpr (Optimizer::kStates > 1) b[i] = second;
  }
}

// Rows [begin, end) of W[out, in] and its states, with scratch for them: s[n, out], x[n, in].
template <class Rule, class Optimizer>
LFP_V4 void one_pass_rows(const float* s, const float* x, float* w, float* a, float* b, int64_t n,
                          int64_t in, int64_t out, int64_t begin, int64_t end, RuleParams<float> p,
                          OptimizerParams<float> h, float* left, float* right) {
  alignas(64) float product[kRows * kBlock];
  pack_panels<kRows>(s + begin, out, n, end - begin, left);
  for (int64_t i0 = 0; i0 < in; i0 += kPanel) {
    const int64_t width = std::min(kPanel, in - i0);
    pack_panels<kBlock>(x + i0, in, n, width, right);
    for (int64_t o = begin; o < end; o += kRows) {
      const int64_t rows = std::min(kRows, end - o);
      const float* signal = left + packed_size<kRows>(n, o - begin);
      for (int64_t c = 0; c < width; c += kBlock) {
        const int64_t count = std::min(kBlock, width - c), at = o * in + i0 + c;
        const int64_t next = o + kRows < end ? at + kRows * in : at;
        Ahead<1 + Optimizer::kStates> ahead{{w + next}, in};
        if constexpr (Optimizer::kStates > 0) ahead.from[1] = a + next;
        if constexpr (Optimizer::kStates > 1) ahead.from[2] = b + next;
        block_product(signal, right + packed_size<kBlock>(n, c), n, product, ahead);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = at + r * in;
          update_row<Rule, Optimizer>(product + r * kBlock, w + row, a ? a + row : nullptr,
                                      b ? b + row : nullptr, count, p, h);
        }
      }
    }
  }
}

// All rows from `begin` to `end`, a few at a time: s is not held packed whole.
template <class Rule, class Optimizer>
void one_pass(const float* s, const float* x, float* w, float* a, float* b, int64_t n, int64_t in,
              int64_t out, int64_t begin, int64_t end, RuleParams<float> p,
              OptimizerParams<float> h) {
  const int64_t step = std::max(kRows, kPackedSignal / n / kRows * kRows);
  const auto left = scratch<float>(packed_size<kRows>(n, std::min(step, end - begin)));
  const auto right = scratch<float>(packed_size<kBlock>(n, std::min(kPanel, in)));
  for (int64_t o = begin; o < end; o += step)
    one_pass_rows<Rule, Optimizer>(s, x, w, a, b, n, in, out, o, std::min(end, o + step), p, h,
                                   left.get(), right.get());
}

#endif  // LFP_ONE_PASS

}  // namespace lfp::cpu
