// Elementwise loops over contiguous memory: parallel over chunks, one clone per instruction set.
#pragma once

#include <algorithm>

#include "../common.h"

// The loader picks the widest clone the processor has; other architectures get one build.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LFP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LFP_CLONES
#endif

namespace lfp::cpu {

// Elements of elementwise work, and multiply-adds of a product, that a thread must have before a
// second one pays for waking it.
constexpr int64_t kGrain = 32768;
constexpr int64_t kProductGrain = 1 << 21;

// A vector of the compiler's, that may lie anywhere.
template <class A, int64_t kBytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(kBytes), aligned(sizeof(A)), may_alias));
};

template <class T>
LFP_HD Acc<T> load(const T* p, int64_t i) {
  return static_cast<Acc<T>>(p[i]);
}

template <class T>
LFP_HD void store(T* p, int64_t i, Acc<T> v) {
  p[i] = static_cast<T>(v);
}

// for i in [begin, end): f(i), in the widest vector the processor has.
template <class F>
LFP_CLONES void serial_loop(int64_t begin, int64_t end, F f) {
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) f(i);
}

template <class F>
void parallel_loop(int64_t n, F f) {
  if (n <= kGrain) return serial_loop(0, n, f);
  torch::stable::parallel_for(0, n, kGrain,
                              [&](int64_t begin, int64_t end) { serial_loop(begin, end, f); });
}

// parallel_for over items of `elements` elements each, serial when the whole is small.
template <class F>
void parallel_items(int64_t items, int64_t elements, F f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  if (items <= grain) {
    if (items > 0) f(int64_t(0), items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, f);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace lfp::cpu
