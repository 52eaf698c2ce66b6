// What conv.cu leaves to conv_rules.cu.
#pragma once

#include "conv_shapes.cuh"

namespace lfp::cuda {

// r_in = input_epilogue(J_x^T s, x) with a kernel that is made from W, B or random numbers. Both
// are contiguous.
template <class T>
void input_through_made_kernel(const ConvLayer& layer, const Tensor& weight, const Tensor& given,
                               const RuleCall<Acc<T>>& rule, const Tensor& reward,
                               const Device& device);

// A rule with two signals. What is null is not wanted; `bias` may be null without being unwanted.
template <class T>
void redistribute_split(const ConvLayer& layer, const Tensor& weight, const T* bias,
                        const RuleCall<Acc<T>>& rule, bool nonnegative, const Tensor* reward,
                        const ParameterUpdate<T>& to_weight, const ParameterUpdate<T>& to_bias,
                        const Device& device);

}  // namespace lfp::cuda
