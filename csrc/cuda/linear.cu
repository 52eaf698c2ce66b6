// Linear layer: z = x W^T + b.
//   s        = prologue(r, z)                 [N, O]
//   r_in     = input_epilogue(s W, x)         [N, I]
//   feedback = weight_epilogue(s^T x, W)      [O, I],  bias: weight_epilogue(sum_n s, b)
// s exists only inside the operands, the feedback of an update only inside the epilogue.
#include "epilogue.cuh"
#include "linear_one_pass.cuh"
#include "linear_rules.h"
#include "made_matrix.cuh"
#include "operand.cuh"
#include "product_hopper.cuh"
#include "product_types.cuh"

namespace lfp::cuda {
namespace {

constexpr const char* kOp = "linear_redistribute";

template <class P, class OperandA, class OperandB, class Epilogue>
void matrix_product(int64_t m, int64_t n, int64_t k, const OperandA& a, const OperandB& b,
                    const Epilogue& epilogue, const Tensor& like, const Device& device) {
  if constexpr (std::is_same_v<P, BFloat16> && std::is_same_v<typename Epilogue::Element, P>)
    if (hopper_product(m, n, k, a, b, epilogue, like, device)) return;
  tiled_product<P>(m, n, k, a, b, epilogue, like, device);
}

template <class T, bool kAlong>
SignalOperand<T, kAlong> signal_operand(const LinearLayer& layer, const RuleCall<Acc<T>>& rule) {
  const T *r = data<T>(layer.reward), *z = data<T>(layer.z);
  const int64_t out = layer.out();
  return {r, z, layer.n(), out, allows_packs<T>(out) && aligned16(r, z), rule};
}

// reward[N,I]
template <class T, class P>
void redistribute_input(const LinearLayer& layer, const RuleCall<Acc<T>>& rule, Tensor& reward,
                        const Device& device) {
  if (is_made(rule.code)) return input_through_made_matrix<T>(layer, rule, reward, device);
  const auto s = signal_operand<T, true>(layer, rule);
  const auto w = matrix_operand<T, false>(layer.matrix, layer.out(), layer.in());
  const T* x = data<T>(layer.x);
  T* to = data<T>(reward);
  const bool wide = allows_packs<T>(layer.in()) && aligned16(x, to);
  const InputEpilogue<T> epilogue{x, to, layer.in(), rule, wide};
  matrix_product<P>(layer.n(), layer.in(), layer.out(), s, w, epilogue, layer.x, device);
}

// The feedback of W and b goes where `weight` and `bias` say.
template <class T, class P>
void redistribute_weight(const LinearLayer& layer, const RuleCall<Acc<T>>& rule,
                         const ParameterUpdate<T>& weight, const ParameterUpdate<T>& bias,
                         const Device& device) {
  const auto s = signal_operand<T, false>(layer, rule);
  const auto x = matrix_operand<T, false>(layer.x, layer.n(), layer.in());
  const bool wants_weight = weight.param != nullptr, wants_bias = bias.param != nullptr;
  const bool wide = allows_packs<T>(layer.in()) && weight.aligned();
  const WeightEpilogue<T> epilogue{weight, bias, layer.in(), rule, wide, wants_bias, wants_weight};
  // Without columns there is no tile, yet the bias has its sums: one column outside of x.
  const int64_t in = wants_weight && layer.in() > 0 ? layer.in() : wants_bias;
  matrix_product<P>(layer.out(), in, layer.n(), s, x, epilogue, layer.x, device);
}

template <class T, class P, int kBatch>
bool one_pass(const LinearLayer& layer, const RuleCall<Acc<T>>& rule, Tensor* reward,
              const ParameterUpdate<T>& weight, const ParameterUpdate<T>& bias,
              const Device& device) {
  using Kernel = OnePassKernel<T, P, kBatch>;
  const int64_t n = layer.n(), in = layer.in(), out = layer.out();
  if (n > kBatch) return false;
  OnePass<T> p{};
  p.x = matrix_operand<T, false>(layer.x, n, in);
  p.s = signal_operand<T, true>(layer, rule);
  p.w = matrix_operand<T, false>(layer.weight, out, in);
  const bool packs = allows_packs<T>(in);
  p.weight = {weight, bias, in, rule, packs && weight.aligned(), bias.param != nullptr, true};
  if ((p.wants_input = reward != nullptr)) {
    const T* x = data<T>(layer.x);
    T* to = data<T>(*reward);
    p.input = {x, to, in, rule, packs && aligned16(x, to)};
  }
  const int64_t strips = ceil_div<int64_t>(in, Kernel::kCols);
  const int64_t tiles = ceil_div<int64_t>(out, Kernel::kRows);
  const int64_t wanted = ceil_div<int64_t>(Kernel::kPerProcessor * device.processors(), strips);
  p.rows_per_range = ceil_div(tiles, std::clamp<int64_t>(wanted, 1, tiles)) * Kernel::kRows;
  const int64_t ranges = ceil_div(out, p.rows_per_range);
  Tensor partial;
  if (ranges > 1 && p.wants_input) {
    const auto type = sizeof(Acc<T>) == 8 ? ScalarType::Double : ScalarType::Float;
    partial = torch::stable::new_empty(layer.x, {ranges, n, in}, type);
    p.partial = data<Acc<T>>(partial);
  }
  auto* kernel = one_pass_kernel<T, P, kBatch>;
  allow_shared(kernel, Kernel::kBytes);
  const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(ranges));
  kernel<<<grid, Kernel::kThreads, Kernel::kBytes, device.stream>>>(p);
  check_launch();
  if (p.partial) {
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(n * in, 256));
    add_ranges_kernel<T><<<blocks, 256, 0, device.stream>>>(p, static_cast<int>(ranges));
    check_launch();
  }
  return true;
}

// Both in one launch over W, for small batches; false where that does not apply.
template <class T, class P>
bool redistribute_one_pass(const LinearLayer& layer, const RuleCall<Acc<T>>& rule, Tensor* reward,
                           const ParameterUpdate<T>& weight, const ParameterUpdate<T>& bias,
                           const Device& device) {
  if (layer.n() == 0 || layer.in() == 0 || layer.out() == 0 || !weight.param) return false;
  // W is here for both products: with another matrix in one of them there is nothing to share.
  if (reward && rule.code.matrix != Matrix::kWeight) return false;
  return [&]<int... kBatch>(std::integer_sequence<int, kBatch...>) {
    return (one_pass<T, P, kBatch>(layer, rule, reward, weight, bias, device) || ...);
  }(typename OnePassBatches<P>::Sizes{});
}

LinearLayer layer_of(const Tensor& x, const Tensor& weight, const Tensor& z, const Tensor& reward,
                     const std::optional<Tensor>& matrix) {
  return {dense(x), weight, dense(z), dense(reward), matrix.has_value() ? dense(*matrix) : weight};
}

using Redistributed = std::tuple<Tensor, Tensor, Tensor>;

Redistributed linear_redistribute(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                  Tensor reward, std::optional<Tensor> matrix, int64_t rule,
                                  Params params, bool need_input, bool need_weight, bool need_bias,
                                  int64_t chain, ScalarType product) {
  const Device device(x);
  const LinearLayer layer = layer_of(x, dense(weight), z, reward, matrix);
  Redistributed result{none_like(x), none_like(weight), none_like(weight)};
  dispatch_product(x.scalar_type(), product, kOp, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    const RuleCall<Acc<T>> call(rule, chain, params, kOp);
    if (need_input) std::get<0>(result) = torch::stable::empty_like(layer.x);
    Tensor* input_reward = need_input ? &std::get<0>(result) : nullptr;
    ParameterUpdate<T> to_weight, to_bias;
    const Tensor b = bias.has_value() ? dense(*bias) : none_like(weight);
    if (need_weight) {
      std::get<1>(result) = torch::stable::empty_like(layer.weight);
      to_weight = feedback_into<T>(layer.weight, std::get<1>(result));
    }
    if (need_bias && bias.has_value()) {
      std::get<2>(result) = torch::stable::empty_like(b);
      to_bias = feedback_into<T>(b, std::get<2>(result));
    }
    if (call.code.split())
      return redistribute_split<T>(layer, bias.has_value() ? data<T>(b) : nullptr, call,
                                   chain & kNonnegative, input_reward, to_weight, to_bias, device);
    if (redistribute_one_pass<T, P>(layer, call, input_reward, to_weight, to_bias, device)) return;
    if (need_input) redistribute_input<T, P>(layer, call, *input_reward, device);
    if (to_weight.param || to_bias.param)
      redistribute_weight<T, P>(layer, call, to_weight, to_bias, device);
  });
  return result;
}

Tensor linear_redistribute_update(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                  Tensor reward, std::optional<Tensor> matrix,
                                  std::vector<Tensor> weight_state, std::vector<Tensor> bias_state,
                                  int64_t rule, Params params, int64_t optimizer, Params hyper,
                                  int64_t bias_optimizer, Params bias_hyper, bool need_input,
                                  int64_t chain, ScalarType product) {
  const char* op = "linear_redistribute_update";
  LFP_CHECK(weight.is_contiguous(), "linear_redistribute_update", "weight must be contiguous");
  const Device device(x);
  const LinearLayer layer = layer_of(x, weight, z, reward, matrix);
  Tensor input_reward = none_like(x);
  dispatch_product(x.scalar_type(), product, op, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    const RuleCall<Acc<T>> call(rule, chain, params, op);
    const auto to_weight = update_in_place<T>(weight, weight_state, optimizer, hyper, op);
    ParameterUpdate<T> to_bias;
    if (bias.has_value() && bias_optimizer != kFrozen)
      to_bias = update_in_place<T>(*bias, bias_state, bias_optimizer, bias_hyper, op);
    if (need_input) input_reward = torch::stable::empty_like(layer.x);
    Tensor* reward_to = need_input ? &input_reward : nullptr;
    if (call.code.split())
      return redistribute_split<T>(layer, bias.has_value() ? data<T>(*bias) : nullptr, call,
                                   chain & kNonnegative, reward_to, to_weight, to_bias, device);
    if (redistribute_one_pass<T, P>(layer, call, reward_to, to_weight, to_bias, device)) return;
    // The input product reads W before the launch that changes it.
    if (need_input) redistribute_input<T, P>(layer, call, input_reward, device);
    redistribute_weight<T, P>(layer, call, to_weight, to_bias, device);
  });
  return input_reward;
}

Tensor forward(Tensor x, Tensor weight, const std::optional<Tensor>& bias, bool relu,
               ScalarType product) {
  const Device device(x);
  const int64_t in = weight.size(1), out = weight.size(0);
  x = dense(x), weight = dense(weight);
  const auto sizes = x.sizes();
  Ints shape(sizes.begin(), sizes.end());
  shape.back() = out;
  int64_t n = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) n *= shape[d];
  Tensor z = empty_like(x, shape);
  const Tensor b = bias.has_value() ? dense(*bias) : none_like(weight);
  dispatch_product(x.scalar_type(), product, "linear_forward", [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    const auto left = matrix_operand<T, true>(x, n, in);
    const auto right = matrix_operand<T, true>(weight, out, in);
    const T* add = bias.has_value() ? data<T>(b) : nullptr;
    const bool wide = allows_packs<T>(out) && aligned16(data<T>(z), add);
    const ForwardEpilogue<T> epilogue{data<T>(z), add, out, relu, wide};
    matrix_product<P>(n, out, in, left, right, epilogue, x, device);
  });
  return z;
}

Tensor linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu) {
  return forward(x, weight, bias, relu, x.scalar_type());
}

// Of float32 tensors, whose product rounds to TF32.
Tensor linear_forward_tf32(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu) {
  return forward(x, weight, bias, relu, ScalarType::Half);
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("linear_forward", TORCH_BOX(&lfp::cuda::linear_forward));
  m.impl("linear_forward_tf32", TORCH_BOX(&lfp::cuda::linear_forward_tf32));
  m.impl("linear_redistribute", TORCH_BOX(&lfp::cuda::linear_redistribute));
  m.impl("linear_redistribute_update", TORCH_BOX(&lfp::cuda::linear_redistribute_update));
}
