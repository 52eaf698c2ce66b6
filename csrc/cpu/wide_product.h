// The product of two packed operands in the registers of AVX-512, in float32 or from pairs of
// bfloat16 numbers; sums are float32 in both.
#pragma once

#include "pairs.h"

#if LFP_WIDE

namespace lfp::cpu {

constexpr int64_t kRows = 8;     // rows of the result in registers
constexpr int64_t kLanes = 16;   // floats of a vector
constexpr int64_t kVectors = 2;  // vectors of a row in registers: 8 x 2 accumulators
constexpr int64_t kBlock = kVectors * kLanes;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// How operands are packed and multiplied. `steps`: rows of a packed panel.
struct Floats {
  using Packed = float;
  static constexpr int64_t steps(int64_t depth) { return depth; }
  LFP_HD static void add(Vector& sum, Packed a, const Packed* b) {
    sum += a * *reinterpret_cast<const Vector*>(b);
  }
};

struct Pairs {
  using Packed = Pair;
  static constexpr int64_t steps(int64_t depth) { return (depth + 1) / 2; }
  LFP_HD static void add(Vector& sum, Packed a, const Packed* b) {
    const PairVector left = PairVector{} + a, right = *reinterpret_cast<const PairVector*>(b);
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
  }
};

// c[kRows][kBlock] (+)= a^T b for packed a [steps][kRows] and b [steps][kBlock]; rows of c lie
// `stride` apart. Brings ahead.lines() cache lines nearer meanwhile, one a step: ahead.fetch(line).
template <class Factors, bool kAdd, class Packed, class Ahead>
LFP_V4 inline void block_product(const Packed* a, const Packed* b, int64_t steps, float* c,
                                 int64_t stride, const Ahead& ahead) {
  Vector sum[kRows][kVectors] = {};
  const int64_t lines = ahead.lines();
  for (int64_t line = steps; line < lines; ++line) ahead.fetch(line);
  for (int64_t k = 0; k < steps; ++k, a += kRows, b += kBlock) {
    if (k < lines) ahead.fetch(k);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int64_t j = 0; j < kVectors; ++j) Factors::add(sum[r][j], a[r], b + j * kLanes);
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVectors; ++j) {
      Vector& to = *reinterpret_cast<Vector*>(c + r * stride + j * kLanes);
      to = kAdd ? to + sum[r][j] : sum[r][j];
    }
}

// P: the type of the products.
template <class P>
using FactorsOf = std::conditional_t<std::is_same_v<P, float>, Floats, Pairs>;

}  // namespace lfp::cpu

#endif  // LFP_WIDE
