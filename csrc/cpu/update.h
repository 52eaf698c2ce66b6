// Weight epilogue and optimizer step in one loop over a range of weights.
#pragma once

#include "loops.h"

namespace lfp::cpu {

template <class T>
T* state(const std::vector<Tensor>& states, size_t k, int64_t offset = 0) {
  return states.size() > k ? data<T>(states[k]) + offset : nullptr;
}

// w[i] and its states a[i], b[i] (null where the optimizer has none) take one optimizer step along
// weight_epilogue(raw, w).
template <class Rule, class Optimizer, class T>
LFP_HD void update_one(Acc<T> raw, T* w, T* a, T* b, int64_t i, RuleParams<Acc<T>> p,
                       OptimizerParams<Acc<T>> h) {
  using A = Acc<T>;
  A weight = load(w, i), first = A(0), second = A(0);
  if constexpr (Optimizer::kStates > 0) first = load(a, i);
  if constexpr (Optimizer::kStates > 1) second = load(b, i);
  Optimizer::apply(Rule::weight_epilogue(raw, weight, p), weight, first, second, h);
  store(w, i, weight);
  if constexpr (Optimizer::kStates > 0) store(a, i, first);
  if constexpr (Optimizer::kStates > 1) store(b, i, second);
}

template <class T, class Rule, class Optimizer, class Raw>
void update_range(const Raw* raw, T* w, T* a, T* b, int64_t count, RuleParams<Acc<T>> p,
                  OptimizerParams<Acc<T>> h) {
  serial_loop(0, count, [=](int64_t i) {
    update_one<Rule, Optimizer>(static_cast<Acc<T>>(raw[i]), w, a, b, i, p, h);
  });
}

// One optimizer's step of a parameter.
struct StepCall {
  int64_t optimizer;
  const Params& hyper;
  const std::vector<Tensor>& states;
};

// param[at : at + count] and its states take one step along finished feedback.
template <class T>
void step_range(const StepCall& call, T* param, int64_t at, int64_t count, const Acc<T>* feedback,
                const char* op) {
  using A = Acc<T>;
  dispatch_optimizer<A>(call.optimizer, op, [&](auto optimizer) {
    update_range<T, Gradient<A>, decltype(optimizer)>(
        feedback, param + at, state<T>(call.states, 0, at), state<T>(call.states, 1, at), count, {},
        optimizer_params<A>(call.hyper));
  });
}

}  // namespace lfp::cpu
