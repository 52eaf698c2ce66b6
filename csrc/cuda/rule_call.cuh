// The rule and the optimizer of one call, chosen at run time by a branch that a whole launch takes
// the same way: compiled once, whatever the number of rules.
#pragma once

#include "common.cuh"

namespace lfp::cuda {

// f(Rule<A>{}) on the device; the code was checked on the host.
template <class A, class F>
__device__ __forceinline__ auto with_rule(int rule, F&& f) {
  switch (rule) {
    case kGradient: return f(Gradient<A>{});
    default: return f(Epsilon<A>{});
  }
}

template <class A>
struct RuleCall {
  RuleParams<A> params;
  int rule;
  bool signal_in, signal_out;

  RuleCall() = default;
  RuleCall(int64_t code, int64_t chain, const Params& values, const char* op)
      : params(rule_params<A>(values)),
        rule(static_cast<int>(code)),
        signal_in(chain & kSignalIn),
        signal_out(chain & kSignalOut) {
    dispatch_rule<A>(code, op, [](auto) {});
  }

  // s from the reward and the layer's output; a chained layer is handed s itself.
  __device__ __forceinline__ A prologue(A r, A z) const {
    if (signal_in) return r;
    return with_rule<A>(rule, [&](auto f) { return f.prologue(r, z, params); });
  }
  __device__ __forceinline__ A matrix(A w) const {
    return with_rule<A>(rule, [&](auto f) { return f.matrix(w); });
  }
  __device__ __forceinline__ A input_epilogue(A g, A x) const {
    if (signal_out) return chain_epilogue(g, x, params);
    return with_rule<A>(rule, [&](auto f) { return f.input_epilogue(g, x, params); });
  }
  __device__ __forceinline__ A weight_epilogue(A f, A w) const {
    return with_rule<A>(rule, [&](auto functor) { return functor.weight_epilogue(f, w, params); });
  }
};

// Where the feedback of one parameter goes: to `feedback`, or into the parameter itself.
template <class T>
struct ParameterUpdate {
  T* param = nullptr;
  T* feedback = nullptr;  // null: update in place
  T *state_a = nullptr, *state_b = nullptr;
  OptimizerParams<Acc<T>> hyper = {};
  int optimizer = kSgd;

  template <int V>
  __device__ __forceinline__ void operator()(int64_t i, Acc<T> (&raw)[V],
                                             const RuleCall<Acc<T>>& rule) const {
    Acc<T> w[V];
    load<V>(param, i, w);
    apply(i, raw, w, rule);
  }

  // The same for who has the values w of the parameter already.
  template <int V>
  __device__ __forceinline__ void apply(int64_t i, Acc<T> (&raw)[V], Acc<T> (&w)[V],
                                        const RuleCall<Acc<T>>& rule) const {
    using A = Acc<T>;
#pragma unroll
    for (int k = 0; k < V; ++k) raw[k] = rule.weight_epilogue(raw[k], w[k]);
    if (feedback) return store<V>(feedback, i, raw);
    A a[V] = {}, b[V] = {};
    if (optimizer != kSgd) load<V>(state_a, i, a);
    if (optimizer == kAdamW) load<V>(state_b, i, b);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (optimizer == kSgd) Sgd<A>::apply(raw[k], w[k], a[k], b[k], hyper);
      if (optimizer == kSgdMomentum) SgdMomentum<A>::apply(raw[k], w[k], a[k], b[k], hyper);
      if (optimizer == kAdamW) AdamW<A>::apply(raw[k], w[k], a[k], b[k], hyper);
    }
    store<V>(param, i, w);
    if (optimizer != kSgd) store<V>(state_a, i, a);
    if (optimizer == kAdamW) store<V>(state_b, i, b);
  }

  bool aligned() const { return aligned16(param, feedback, state_a, state_b); }
};

template <class T>
ParameterUpdate<T> feedback_into(const Tensor& param, const Tensor& feedback) {
  ParameterUpdate<T> to;
  to.param = data<T>(param);
  to.feedback = data<T>(feedback);
  return to;
}

template <class T>
ParameterUpdate<T> update_in_place(const Tensor& param, const std::vector<Tensor>& states,
                                   int64_t optimizer, const Params& hyper, const char* op) {
  dispatch_optimizer<Acc<T>>(optimizer, op, [](auto) {});
  ParameterUpdate<T> to;
  to.param = data<T>(param);
  to.state_a = state<T>(states, 0);
  to.state_b = state<T>(states, 1);
  to.hyper = optimizer_params<Acc<T>>(hyper);
  to.optimizer = static_cast<int>(optimizer);
  return to;
}

}  // namespace lfp::cuda
