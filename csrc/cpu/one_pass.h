// One pass over W for small batches: the weight product of a block of W stays in registers, and the
// weight epilogue and the optimizer step follow at once. W and the optimizer's states are read once
// and written once; nothing of the size of W exists besides.
//
// For float32 on processors with AVX-512. Elsewhere, and for large batches, the tiles of linear.cpp
// use the library's product.
#pragma once

#include "loops.h"

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

constexpr int64_t kOnePassBatch = 40;  // largest batch at which memory, not arithmetic, decides

inline bool one_pass_pays(int64_t n, int64_t in, int64_t out) {
  return has_wide_vectors() && n > 0 && n <= kOnePassBatch && in * out >= kProductGrain;
}

#if LFP_ONE_PASS

constexpr int64_t kRows = 4;     // rows of W in registers
constexpr int64_t kLanes = 16;   // floats of a vector
constexpr int64_t kVectors = 4;  // vectors of a row in registers: 4 x 4 accumulators
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int64_t kPanel = 4 * kBlock;  // columns whose part of x stays in the first-level cache

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// What a block's product brings into cache while it is computed: one line of the next block's
// weights, or of its first state, per sample. All at once, the misses would stall the product.
struct Ahead {
  const float *w, *a;
  int64_t stride;  // between rows
  static constexpr int64_t kLines = 2 * kRows * kVectors;
  LFP_HD void fetch(int64_t k) const {
    const float* base = k < kLines / 2 ? w : a;
    __builtin_prefetch(base + k / kVectors % kRows * stride + k % kVectors * kLanes, 1, 3);
  }
};

// product[kRows][kBlock] = s^T x for packed s [n][kRows] and x [n][kPanel].
LFP_V4 inline void block_product(const float* s, const float* x, int64_t n, float* product,
                                 Ahead ahead) {
  Vector sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < n; ++k, s += kRows, x += kPanel) {
    if (k < Ahead::kLines) ahead.fetch(k);
    Vector v[kVectors];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) v[j] = *reinterpret_cast<const Vector*>(x + j * kLanes);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) sum[r][j] += s[r] * v[j];
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
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

// Rows [begin, end) of W[out, in] and its states: s[n, out], x[n, in].
template <class Rule, class Optimizer>
LFP_V4 void one_pass_rows(const float* s, const float* x, float* w, float* a, float* b, int64_t n,
                          int64_t in, int64_t out, int64_t begin, int64_t end, RuleParams<float> p,
                          OptimizerParams<float> h) {
  const int64_t groups = (end - begin + kRows - 1) / kRows;
  // Packed, since rows of x and s lie a power of two apart and would fight for cache sets.
  std::vector<float> columns(groups * n * kRows, 0.0f), panel(n * kPanel);
  for (int64_t k = 0; k < n; ++k)
    for (int64_t o = begin; o < end; ++o)
      columns[((o - begin) / kRows * n + k) * kRows + (o - begin) % kRows] = s[k * out + o];
  alignas(64) float product[kRows * kBlock];
  for (int64_t left = 0; left < in; left += kPanel) {
    const int64_t width = std::min(kPanel, in - left);
    for (int64_t k = 0; k < n; ++k) {
      std::copy_n(x + k * in + left, width, panel.data() + k * kPanel);
      std::fill(panel.data() + k * kPanel + width, panel.data() + (k + 1) * kPanel, 0.0f);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = begin + g * kRows, rows = std::min(kRows, end - first);
      for (int64_t c = 0; c < width; c += kBlock) {
        const int64_t count = std::min(kBlock, width - c);
        const int64_t next = std::min(first + kRows, end - rows) * in + left + c;
        block_product(columns.data() + g * n * kRows, panel.data() + c, n, product,
                      {w + next, (Optimizer::kStates > 0 ? a : w) + next, in});
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = (first + r) * in + left + c;
          update_row<Rule, Optimizer>(product + r * kBlock, w + at, a ? a + at : nullptr,
                                      b ? b + at : nullptr, count, p, h);
        }
      }
    }
  }
}

#endif  // LFP_ONE_PASS

}  // namespace lfp::cpu
