// What linear.cu leaves to linear_rules.cu.
#pragma once

#include "rule_call.cuh"

namespace lfp::cuda {

// One call's arguments, checked in Python and dense.
struct LinearLayer {
  Tensor x, weight, z, reward;  // [N, I], [O, I], [N, O], [N, O]
  Tensor matrix;                // B [O, I] of rules that take one, else W
  int64_t n() const { return x.size(0); }
  int64_t in() const { return weight.size(1); }
  int64_t out() const { return weight.size(0); }
};

// r_in = input_epilogue(s M, x) for a matrix M that is made from W, B or random numbers.
template <class T>
void input_through_made_matrix(const LinearLayer& layer, const RuleCall<Acc<T>>& rule,
                               Tensor& reward, const Device& device);

// A rule with two signals. What is null is not wanted; `bias` may be null without being unwanted.
template <class T>
void redistribute_split(const LinearLayer& layer, const T* bias, const RuleCall<Acc<T>>& rule,
                        bool nonnegative, Tensor* reward, const ParameterUpdate<T>& to_weight,
                        const ParameterUpdate<T>& to_bias, const Device& device);

}  // namespace lfp::cuda
