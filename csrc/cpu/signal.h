// The elementwise passes around the two products of a layer, for tensors of one dense layout.
//   s        = prologue(r, z)
//   r_in     = input_epilogue(g, x)
//   feedback = weight_epilogue(raw, W)
//
// T is the element type of the tensors, P that of the two products: P = T, except float for fp16
// (1/eps overflows it) and bfloat16 for float tensors when asked for.
#pragma once

#include "aten.h"
#include "loops.h"

namespace lfp::cpu {

// The rule of one call, its run-time parameters, and its chain bits.
struct RuleCall {
  int64_t rule, chain;
  Params params;
};

// f(T{}, P{}) for the element type and the product type.
template <class F>
void dispatch_types(ScalarType dtype, ScalarType product, const char* op, F&& f) {
  if (dtype == ScalarType::Half) return f(Half{}, float{});
  if (dtype == ScalarType::Float && product == ScalarType::BFloat16) return f(float{}, BFloat16{});
  dispatch_dtype(dtype, op, [&](auto element) { f(element, element); });
}

template <class P>
ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<P, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<P, double>) return ScalarType::Double;
  return ScalarType::BFloat16;
}

// t in the product type, its strides kept.
template <class T, class P>
Tensor as_product_type(const Tensor& t) {
  if constexpr (std::is_same_v<T, P>) return t;
  Tensor out = empty_like_as(t, scalar_type_of<P>());
  const T* from = data<T>(t);
  P* to = data<P>(out);
  parallel_loop(t.numel(), [=](int64_t i) { to[i] = static_cast<P>(load(from, i)); });
  return out;
}

// s[n] = prologue(r, z)
template <class T, class P>
void signal_range(const T* r, const T* z, P* s, int64_t n, const RuleCall& call, const char* op) {
  using A = Acc<T>;
  const auto p = rule_params<A>(call.params);
  if (call.chain & kSignalIn)
    return parallel_loop(n, [=](int64_t i) { s[i] = static_cast<P>(load(r, i)); });
  dispatch_prologue(RuleCode(call.rule).prologue, op, [&](auto prologue) {
    parallel_loop(n,
                  [=](int64_t i) { s[i] = static_cast<P>(prologue(load(r, i), load(z, i), p)); });
  });
}

// s = prologue(r, z), with the strides of r; r itself where it is the signal in the product type.
template <class T, class P>
Tensor signal(const Tensor& reward, const Tensor& z, const RuleCall& call, const char* op) {
  if (std::is_same_v<T, P> && (call.chain & kSignalIn)) return reward;
  Tensor s = empty_like_as(reward, scalar_type_of<P>());
  signal_range(data<T>(reward), data<T>(z), data<P>(s), s.numel(), call, op);
  return s;
}

// visit(finish) with finish(g, x): the input epilogue, and what the layer below wants of it.
template <class T, class Visit>
void with_input_epilogue(const RuleCall& call, Visit visit) {
  using A = Acc<T>;
  const auto p = rule_params<A>(call.params);
  if (call.chain & kSignalOut) return visit([p](A g, A x) { return chain_epilogue(g, x, p); });
  const int64_t below = call.chain & (kReluBelow | kTanhBelow | kSigmoidBelow);
  if (RuleCode(call.rule).input == InputEpilogue::kTimesInput)
    return visit([below](A g, A x) { return derivative_below(g * x, x, below); });
  switch (below) {
    case 0: return visit([](A g, A) { return g; });
    case kReluBelow: return visit([](A g, A x) { return derivative_below(g, x, kReluBelow); });
    case kTanhBelow: return visit([](A g, A x) { return derivative_below(g, x, kTanhBelow); });
    default: return visit([](A g, A x) { return derivative_below(g, x, kSigmoidBelow); });
  }
}

// feedback[count] = weight_epilogue(raw, w)
template <class T, class Rule, class Raw>
void feedback_range(const Raw* raw, const T* w, T* feedback, int64_t count, RuleParams<Acc<T>> p) {
  serial_loop(0, count, [=](int64_t i) {
    store(feedback, i, Rule::weight_epilogue(static_cast<Acc<T>>(raw[i]), load(w, i), p));
  });
}

}  // namespace lfp::cpu
