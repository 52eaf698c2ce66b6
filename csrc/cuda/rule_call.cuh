// The rule and the optimizer of one call, chosen at run time by a branch that a whole launch takes
// the same way: compiled once, whatever the number of rules.
#pragma once

#include "common.cuh"

namespace lfp::cuda {

// Codes of another version of the package would compute something else: refused.
inline void check_codes(RuleCode c, const char* op) {
  const bool known = c.prologue <= Prologue::kReverseNegative && c.matrix <= Matrix::kNoisy &&
                     c.input <= InputEpilogue::kIdentity && c.weight <= WeightEpilogue::kIdentity &&
                     c.signals <= Signals::kGamma && c.parts <= Parts::kBox && c.map <= Map::kOnes;
  STD_TORCH_CHECK(known, "lfp_kernels::", op, ": rule: a code that has no CUDA kernel");
}

inline bool reads_output(RuleCode code, int64_t chain) {
  if (code.split()) return code.signals == Signals::kGamma;
  return !(chain & kSignalIn) && code.prologue != Prologue::kIdentity;
}

// derivative_below with selects: the compiler copies whole epilogues for every branch of it.
template <class A>
__device__ __forceinline__ A derivative(A g, A x, int below) {
  const A slope = below & kTanhBelow ? A(1) - x * x : x * (A(1) - x);
  const A sloped = below & (kTanhBelow | kSigmoidBelow) ? g * slope : g;
  return (below & kReluBelow) && !(x > A(0)) ? A(0) : sloped;
}

template <class A>
struct RuleCall {
  RuleParams<A> params;
  RuleCode code;
  int below;  // chain bits of the derivative of the activation below
  // The reward is the signal already, and z is not read: handed over by the layer above, or equal.
  bool signal_in;
  bool signal_out;

  RuleCall() = default;
  RuleCall(int64_t rule, int64_t chain, const Params& values, const char* op)
      : params(rule_params<A>(values)),
        code(rule),
        below(static_cast<int>(chain & (kReluBelow | kTanhBelow | kSigmoidBelow))),
        signal_in((chain & kSignalIn) || code.prologue == Prologue::kIdentity),
        signal_out(chain & kSignalOut) {
    check_codes(code, op);
  }

  // s from the reward and the layer's output.
  __device__ __forceinline__ A prologue(A r, A z) const {
    if (signal_in) return r;
    switch (code.prologue) {
      case Prologue::kZero: return lfp::prologue<Prologue::kZero>(r, z, params);
      case Prologue::kTimesOutput: return r * z;
      case Prologue::kReversePositive: r = z > A(0) ? -r : r; break;
      case Prologue::kReverseNegative: r = z < A(0) ? -r : r; break;
      default: break;
    }
    return lfp::prologue<Prologue::kDivide>(r, z, params);
  }
  __device__ __forceinline__ A input_epilogue(A g, A x) const {
    if (signal_out) return chain_epilogue(g, x, params);
    return derivative(code.input == InputEpilogue::kTimesInput ? g * x : g, x, below);
  }
  __device__ __forceinline__ A weight_epilogue(A f, A w) const {
    return code.weight == WeightEpilogue::kMagnitude ? f * magnitude(w) : f;
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
