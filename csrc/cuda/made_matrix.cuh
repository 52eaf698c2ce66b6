// Feedback matrices that are made on the way into a product and never stored: a sign(W),
// |B| sign(W), a U[0,1) sign(W), B + a (U[0,1) - 0.5).
#pragma once

#include "../philox.h"
#include "rule_call.cuh"

namespace lfp::cuda {

// Draws of neighbouring elements: one block of four words, rarely two.
template <int V, class A>
__device__ __forceinline__ void draw(int64_t index, uint64_t seed, A (&out)[V]) {
  PhiloxBlock block = philox(static_cast<uint64_t>(index) >> 2, seed);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int word = static_cast<int>((index + k) & 3);
    if (k > 0 && word == 0) block = philox(static_cast<uint64_t>(index + k) >> 2, seed);
    // Selected, not indexed: an array with a run-time index would live in local memory.
    const uint32_t low = word & 1 ? block.word[1] : block.word[0];
    const uint32_t high = word & 1 ? block.word[3] : block.word[2];
    out[k] = unit_interval<A>(word & 2 ? high : low);
  }
}

// One element from the weight, the given matrix and a draw.
template <class A>
__device__ __forceinline__ A made(const RuleCall<A>& rule, A w, A given, A u) {
  switch (rule.code.matrix) {
    case Matrix::kGiven: return given;
    case Matrix::kSign: return matrix<Matrix::kSign>(w, given, u, rule.params);
    case Matrix::kGivenSign: return matrix<Matrix::kGivenSign>(w, given, u, rule.params);
    case Matrix::kRandomSign: return matrix<Matrix::kRandomSign>(w, given, u, rule.params);
    case Matrix::kNoisy: return matrix<Matrix::kNoisy>(w, given, u, rule.params);
    default: return w;
  }
}

// Whether the input product needs more than one matrix that is there already, W or B.
inline bool is_made(RuleCode code) {
  return code.matrix != Matrix::kWeight && code.matrix != Matrix::kGiven;
}

}  // namespace lfp::cuda
