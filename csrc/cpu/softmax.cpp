// Relevance through softmax by AttnLRP's rule, row by row: r_x = x * (r - p * sum r), 0 where x is
// infinite (masked out).
#include <limits>

#include "loops.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kLanes = 64;  // partial sums of a row, more than the compiler unrolls

template <class T>
LFP_CLONES void softmax_row(const T* x, const T* p, const T* reward, int64_t count, T* found) {
  using A = Acc<T>;
  A lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += load(reward, i + j);
  for (int64_t j = 0; j < count - whole; ++j) lanes[j] += load(reward, whole + j);
  A sums[16];
  for (int64_t j = 0; j < 16; ++j)
    sums[j] = (lanes[j] + lanes[j + 16]) + (lanes[j + 32] + lanes[j + 48]);
  for (int64_t j = 0; j < 8; ++j) sums[j] += sums[j + 8];
  for (int64_t j = 0; j < 4; ++j) sums[j] += sums[j + 4];
  const A total = (sums[0] + sums[2]) + (sums[1] + sums[3]);
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const A v = load(x, i), r = v * (load(reward, i) - load(p, i) * total);
    store(found, i, magnitude(v) == std::numeric_limits<A>::infinity() ? A(0) : r);
  }
}

// All [M, N].
Tensor softmax_redistribute(Tensor x, Tensor p, Tensor reward) {
  x = dense(x), p = dense(p), reward = dense(reward);
  const int64_t rows = x.size(0), count = x.size(1);
  Tensor found = empty_like(x, {rows, count});
  dispatch_dtype(x.scalar_type(), "softmax_redistribute", [&](auto element) {
    using T = decltype(element);
    const T *from = data<T>(x), *probability = data<T>(p), *rewards = data<T>(reward);
    T* to = data<T>(found);
    parallel_items(rows, count, [=](int64_t first, int64_t last) {
      for (int64_t at = first * count; at < last * count; at += count)
        softmax_row(from + at, probability + at, rewards + at, count, to + at);
    });
  });
  return found;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("softmax_redistribute", TORCH_BOX(&lfp::cpu::softmax_redistribute));
}
