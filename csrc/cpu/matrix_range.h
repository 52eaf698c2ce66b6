// The feedback matrix M(W, B, draw) of csrc/rules.h over runs of the contiguous weight.
#pragma once

#include "../philox.h"
#include "loops.h"

namespace lfp::cpu {

constexpr int64_t kDraws = 4;      // of one Philox block
constexpr int64_t kDrawnRun = 32;  // elements drawn at a time

// draws[k] = the draw of element first + k, for k < count <= kDrawnRun.
template <class A>
LFP_HD void draw_run(int64_t first, int64_t count, uint64_t seed, A* draws) {
  constexpr int64_t kBlocks = kDrawnRun / kDraws;
  A words[(kBlocks + 1) * kDraws];
  const int64_t block = first / kDraws;
  const auto fill = [&](int64_t b) {
    const PhiloxBlock drawn = philox(static_cast<uint64_t>(block + b), seed);
    for (int64_t k = 0; k < kDraws; ++k) words[b * kDraws + k] = unit_interval<A>(drawn.word[k]);
  };
#pragma GCC ivdep
  for (int64_t b = 0; b < kBlocks; ++b) fill(b);
  if (first % kDraws) fill(kBlocks);  // a run that does not begin with a block
  for (int64_t k = 0; k < count; ++k) draws[k] = words[first - block * kDraws + k];
}

// to[k] = M[first + k] for k < count; W and B are given from their first element on.
template <Matrix kind, class T, class P>
LFP_HD void form_run(const T* w, const T* given, int64_t first, int64_t count, RuleParams<Acc<T>> p,
                     P* to) {
  using A = Acc<T>;
  constexpr bool kDrawn = kind == Matrix::kRandomSign || kind == Matrix::kNoisy;
  constexpr bool kReadsWeight = kind != Matrix::kNoisy;
  constexpr bool kReadsGiven = kind == Matrix::kGivenSign || kind == Matrix::kNoisy;
  A draws[kDrawnRun] = {};
  for (int64_t begin = 0; begin < count; begin += kDrawnRun) {
    const int64_t run = std::min(kDrawnRun, count - begin), at = first + begin;
    if constexpr (kDrawn) draw_run(at, run, p.seed, draws);
#pragma GCC ivdep
    for (int64_t k = 0; k < run; ++k)
      to[begin + k] =
          static_cast<P>(matrix<kind>(kReadsWeight ? load(w, at + k) : A(0),
                                      kReadsGiven ? load(given, at + k) : A(0), draws[k], p));
  }
}

// visit(std::integral_constant<Matrix, kind>) for the matrices that are formed.
template <class Visit>
void dispatch_formed_matrix(Matrix kind, Visit visit) {
  switch (kind) {
    case Matrix::kSign: return visit(std::integral_constant<Matrix, Matrix::kSign>{});
    case Matrix::kGivenSign: return visit(std::integral_constant<Matrix, Matrix::kGivenSign>{});
    case Matrix::kRandomSign: return visit(std::integral_constant<Matrix, Matrix::kRandomSign>{});
    case Matrix::kNoisy: return visit(std::integral_constant<Matrix, Matrix::kNoisy>{});
    default: LFP_CHECK(false, "redistribute", "unknown matrix code ", static_cast<int>(kind));
  }
}

template <Matrix kind, class T, class P>
LFP_CLONES void matrix_range(const T* w, const T* given, int64_t first, int64_t count,
                             RuleParams<Acc<T>> p, P* to) {
  form_run<kind>(w, given, first, count, p, to);
}

}  // namespace lfp::cpu
