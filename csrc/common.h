// What every operator file needs: stable-ABI tensors, dtype dispatch, rule dispatch, checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <tuple>
#include <vector>

#include "rules.h"

namespace lfp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;
using Params = std::vector<double>;
using Ints = std::vector<int64_t>;

#define LFP_CHECK(cond, op, ...) STD_TORCH_CHECK(cond, "lfp_kernels::" op ": ", __VA_ARGS__)

// Arithmetic type: 16-bit inputs are computed in float32 (1/eps overflows fp16).
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulateOf<T>::type;

// f(T{}) for the element type of the tensors.
template <class F>
void dispatch_dtype(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default:
      STD_TORCH_CHECK(false, "lfp_kernels::", op,
                      ": expected float64, float32, bfloat16 or float16");
  }
}

// f(Rule<A>{}) for the code of a rule that operators without a weight matrix have.
template <class A, class F>
void dispatch_rule(int64_t rule, const char* op, F&& f) {
  switch (rule) {
    case kEpsilon: return f(Epsilon<A>{});
    case kZero: return f(Zero<A>{});
    case kGradient: return f(Gradient<A>{});
    default: STD_TORCH_CHECK(false, "lfp_kernels::", op, ": unknown rule code ", rule);
  }
}

// f(functor) with the prologue or the weight epilogue of a rule.
template <Prologue kind>
struct PrologueOf {
  template <class A>
  LFP_HD A operator()(A r, A z, RuleParams<A> p) const {
    return prologue<kind>(r, z, p);
  }
};

template <class F>
void dispatch_prologue(Prologue kind, const char* op, F&& f) {
  switch (kind) {
    case Prologue::kDivide: return f(PrologueOf<Prologue::kDivide>{});
    case Prologue::kIdentity: return f(PrologueOf<Prologue::kIdentity>{});
    case Prologue::kZero: return f(PrologueOf<Prologue::kZero>{});
    case Prologue::kTimesOutput: return f(PrologueOf<Prologue::kTimesOutput>{});
    case Prologue::kReversePositive: return f(PrologueOf<Prologue::kReversePositive>{});
    case Prologue::kReverseNegative: return f(PrologueOf<Prologue::kReverseNegative>{});
  }
  STD_TORCH_CHECK(false, "lfp_kernels::", op, ": unknown prologue code ", static_cast<int>(kind));
}

template <class A, class F>
void dispatch_weight_epilogue(WeightEpilogue kind, const char* op, F&& f) {
  switch (kind) {
    case WeightEpilogue::kMagnitude: return f(Epsilon<A>{});
    case WeightEpilogue::kIdentity: return f(Gradient<A>{});
  }
  STD_TORCH_CHECK(false, "lfp_kernels::", op, ": unknown weight code ", static_cast<int>(kind));
}

// f(Optimizer<A>{}) for an optimizer code.
template <class A, class F>
void dispatch_optimizer(int64_t optimizer, const char* op, F&& f) {
  switch (optimizer) {
    case kSgd: return f(Sgd<A>{});
    case kSgdMomentum: return f(SgdMomentum<A>{});
    case kAdamW: return f(AdamW<A>{});
    default: STD_TORCH_CHECK(false, "lfp_kernels::", op, ": unknown optimizer code ", optimizer);
  }
}

// params = [eps, eps of the layer below, a, b, seed]
template <class A>
RuleParams<A> rule_params(const Params& p) {
  return {A(p.at(0)), A(p.at(1)), A(p.at(2)), A(p.at(3)), static_cast<uint64_t>(p.at(4))};
}

// hyper = [lr, weight_decay, scale, momentum, nesterov, beta1, beta2, eps, correction1,
//          correction2, 1 - beta1, 1 - beta2]
template <class A>
OptimizerParams<A> optimizer_params(const Params& h) {
  return {A(h.at(0)), A(h.at(1)), A(h.at(2)), A(h.at(3)), A(h.at(4)),  A(h.at(5)),
          A(h.at(6)), A(h.at(7)), A(h.at(8)), A(h.at(9)), A(h.at(10)), A(h.at(11))};
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor empty_like(const Tensor& t, const Ints& size) {
  return torch::stable::new_empty(t, size);
}

// What an operator returns for an output that was switched off: a tensor without elements.
inline Tensor none_like(const Tensor& t) { return empty_like(t, {0}); }

}  // namespace lfp
