// One call of the linear layer's redistribution, and its parts that live in files of their own.
#pragma once

#include "signal.h"
#include "update.h"

namespace lfp::cpu {

using Redistributed = std::tuple<Tensor, Tensor, Tensor>;

// Arguments checked in Python and dense.
struct LinearLayer {
  Tensor x, weight, z, reward;   // [N, I], [O, I], [N, O], [N, O]
  std::optional<Tensor> bias;    // [O]
  std::optional<Tensor> matrix;  // [O, I], the feedback matrix B
  RuleCall call;
  int64_t n() const { return x.size(0); }
  int64_t in() const { return weight.size(1); }
  int64_t out() const { return weight.size(0); }
};

// linear_split.cpp: the rules with two signals.
Redistributed linear_redistribute_split(const LinearLayer& layer, bool need_input, bool need_weight,
                                        bool need_bias);
Tensor linear_update_split(const LinearLayer& layer, bool need_input, const StepCall& weight,
                           const StepCall& bias);

// linear_matrix.cpp: r_in[N,I] with a matrix that is formed on the way; s [N, O] in the product
// type.
Tensor linear_formed_input(const LinearLayer& layer, const Tensor& s);

}  // namespace lfp::cpu
