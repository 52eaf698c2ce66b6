// Runs of elements, as epilogues write them.
#pragma once

#include "rule_call.cuh"

namespace lfp::cuda {

// V elements: neighbours from at[0] on that may be accessed together, or each at its own offset,
// those at -1 left out.
template <int V>
struct Run {
  int64_t at[V];
  bool together;

  __device__ __forceinline__ bool has(int k) const { return together || at[k] >= 0; }

  template <class T>
  __device__ __forceinline__ void load_from(const T* p, Acc<T> (&out)[V]) const {
    if (together) return load<V>(p, at[0], out);
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = at[k] >= 0 ? load(p, at[k]) : Acc<T>(0);
  }
  template <class T>
  __device__ __forceinline__ void store_to(T* p, const Acc<T> (&v)[V]) const {
    if (together) return store<V>(p, at[0], v);
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (at[k] >= 0) store(p, at[k], v[k]);
  }
};

// Finished feedback f of the parameter w: stored, or applied.
template <int V, class T>
__device__ __forceinline__ void take_feedback(const ParameterUpdate<T>& to, const Run<V>& run,
                                              Acc<T> (&f)[V], Acc<T> (&w)[V]) {
  using A = Acc<T>;
  if (to.feedback) return run.store_to(to.feedback, f);
  A a[V] = {}, b[V] = {};
  if (to.optimizer != kSgd) run.load_from(to.state_a, a);
  if (to.optimizer == kAdamW) run.load_from(to.state_b, b);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (to.optimizer == kSgd) Sgd<A>::apply(f[k], w[k], a[k], b[k], to.hyper);
    if (to.optimizer == kSgdMomentum) SgdMomentum<A>::apply(f[k], w[k], a[k], b[k], to.hyper);
    if (to.optimizer == kAdamW) AdamW<A>::apply(f[k], w[k], a[k], b[k], to.hyper);
  }
  run.store_to(to.param, w);
  if (to.optimizer != kSgd) run.store_to(to.state_a, a);
  if (to.optimizer == kAdamW) run.store_to(to.state_b, b);
}

// The weights of small channel m of f's group from index n on: (large channel, tap), or with
// tap_major (tap, large channel).
template <int V, class F>
__device__ __forceinline__ Run<V> kernel_run(const F& f, int64_t m, int64_t n) {
  const int64_t columns = int64_t(f.taps) * f.by_channels.divisor;
  const int64_t line = (f.group * f.rows + m) * columns;
  Run<V> run{{}, f.together};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    int64_t at = n + k;
    if (f.tap_major) {
      const uint32_t tap = f.by_channels.divide(static_cast<uint32_t>(at));
      at = (at - int64_t(tap) * f.by_channels.divisor) * f.taps + tap;
    }
    run.at[k] = n + k < columns ? line + at : -1;
  }
  return run;
}

}  // namespace lfp::cuda
