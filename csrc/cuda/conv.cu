// Convolution, 1 to 3 dimensions, transposed or not: z = conv(x, W) + b, J its Jacobians.
//   s        = prologue(r, z)                   [N, O, ...]
//   r_in     = input_epilogue(J_x^T s, x)       [N, C, ...]
//   feedback = weight_epilogue(J_W^T s, W),  bias: weight_epilogue(sum of s over N and space, b)
// Each is an implicit product: operands read x, r and z where the kernel's window lies, epilogues
// write the results; s, the raw products and unfolded tensors exist in no memory.
// Everything runs in channels last when x or the reward comes so, else in the plain layout.
#include "conv_direct.cuh"
#include "conv_rules.h"
#include "made_matrix.cuh"
#include "product_types.cuh"

namespace lfp::cuda {
namespace {

constexpr const char* kOp = "conv_redistribute";

bool is_direct(const Shapes& shapes) {
  return int64_t(shapes.large_channels()) * shapes.small_channels() <= kDirectPairs;
}

template <class T>
ElementSource<T> plain_source(const Tensor& t) {
  RuleCall<Acc<T>> as_it_is{};
  as_it_is.signal_in = true;
  return {data<T>(t), nullptr, as_it_is};
}

// Packs along the width: those of positions stay in a row and see neighbours of the source, whose
// rows are packs, too.
template <class T, bool kAlong>
PlaneOperand<T, kAlong> plane_operand(const ElementSource<T>& source, const Window& window) {
  const Axis& width = window.axis[2];
  const bool in_rows = width.move == 1 && allows_packs<T>(width.count());
  return {source, window, in_rows, allows_packs<T>(width.source) && source.aligned()};
}

// The kernel of a layer in the order that its operands want: taps before channels in channels
// last. That copy is one pass over W, which every tile of positions then reads by 16 bytes.
Tensor kernel_in_format(const Tensor& weight, const Shapes& shapes) {
  if (is_direct(shapes) || !shapes.channels_last) return dense(weight);
  return in_format(weight, format_of(weight, true));
}

// Sums at the positions of the small side (down) or the large one (up).
template <class T, class P>
void position_product(const Shapes& shapes, bool up, const ElementSource<T>& source,
                      const Tensor& weight, const PositionSums<T>& sums, const Device& device) {
  const Window window = shapes.window(up);
  const Side& target = up ? shapes.large() : shapes.small();
  const Strides strides(target);
  const int channels = target.channels / shapes.groups;
  const T* w = data<T>(weight);
  if (is_direct(shapes)) {
    const auto run = [&](auto pixels) {
      DirectSums<T, pixels> f{source, w, window, strides, target.channels};
      f.by_targets = FastDivide(channels);
      f.sums = sums;
      f.up = up;
      direct_sums<P>(f, device);
    };
    return shapes.channels_last ? run(std::true_type{}) : run(std::false_type{});
  }
  const int64_t n = window.positions.count(), k = int64_t(window.most_taps()) * window.channels;
  KernelOperand<T> kernel{w, window, channels, false, up};
  if (shapes.channels_last) {
    const bool reads = allows_packs<T>(window.channels) && source.aligned();
    const PixelOperand<T, true> left{source, window, reads};
    const bool writes = allows_packs<T>(channels) && sums.aligned();
    const PixelEpilogue<T> epilogue{sums, window, strides, channels, writes};
    if (up) {
      kernel.wide = allows_packs<T>(channels) && aligned16(w);
      tiled_product<P>(n, channels, k, left, KernelColumns<T>{kernel}, epilogue, weight, device,
                       window.parts());
    } else {
      kernel.wide = allows_packs<T>(k) && aligned16(w);
      tiled_product<P>(n, channels, k, left, KernelRows<T>{kernel}, epilogue, weight, device,
                       window.parts());
    }
    return;
  }
  kernel.wide = !up && allows_packs<T>(k) && aligned16(w);
  const auto right = plane_operand<T, false>(source, window);
  const bool writes =
      window.phases == 1 && allows_packs<T>(window.positions.plane) && aligned16(sums.to, sums.x);
  const PlaneEpilogue<T> epilogue{sums, window, strides, channels, writes};
  tiled_product<P>(channels, n, k, KernelRows<T>{kernel}, right, epilogue, weight, device,
                   window.parts());
}

// The sums of s alone, for the bias of a transposed convolution.
template <class T, class P>
void bias_sums(const Shapes& shapes, const ElementSource<T>& s, KernelEpilogue<T> epilogue,
               const Tensor& like, const Device& device) {
  const auto run = [&](auto pixels) {
    DirectKernelSums<T, pixels> f{s, s, shapes.identity(shapes.z), Strides(shapes.z)};
    f.by_rows = FastDivide(shapes.z.channels);
    f.pairs = shapes.z.channels, f.taps = 0;
    epilogue.wants_sums = false;
    epilogue.wants_row_sums = true;
    direct_kernel_sums<P>(f, epilogue, like, device);
  };
  shapes.channels_last ? run(std::true_type{}) : run(std::false_type{});
}

// The feedback of W and b goes where `to_weight` and `to_bias` say.
template <class T, class P>
void kernel_product(const Shapes& shapes, const ElementSource<T>& s, const ElementSource<T>& x,
                    const RuleCall<Acc<T>>& rule, const ParameterUpdate<T>& to_weight,
                    const ParameterUpdate<T>& to_bias, const Tensor& like, const Device& device) {
  const bool wants_weight = to_weight.param != nullptr, wants_bias = to_bias.param != nullptr;
  const int rows = shapes.small_channels(), channels = shapes.large_channels(), taps = shapes.taps;
  const bool tap_major = shapes.channels_last && taps > 1 && !is_direct(shapes);
  const bool together =
      !tap_major && allows_packs<T>(int64_t(channels) * taps) && to_weight.aligned();
  KernelEpilogue<T> epilogue{to_weight,   to_bias,  rule,
                             rows,        taps,     FastDivide(channels),
                             tap_major,   together, wants_bias && !shapes.transposed,
                             wants_weight};
  if (wants_bias && shapes.transposed) bias_sums<T, P>(shapes, s, epilogue, like, device);
  if (!wants_weight && !epilogue.wants_row_sums) return;

  const Window window = shapes.window(false);
  const auto &small = shapes.transposed ? x : s, &large = shapes.transposed ? s : x;
  if (is_direct(shapes)) {
    const auto run = [&](auto pixels) {
      DirectKernelSums<T, pixels> f{small, large, window, Strides(shapes.small())};
      f.by_channels = FastDivide(channels), f.by_rows = FastDivide(rows);
      f.pairs = int64_t(shapes.small().channels) * channels, f.taps = taps;
      direct_kernel_sums<P>(f, epilogue, like, device);
    };
    return shapes.channels_last ? run(std::true_type{}) : run(std::false_type{});
  }
  const Window identity = shapes.identity(shapes.small());
  const int64_t n = int64_t(channels) * taps, k = window.positions.count();
  if (shapes.channels_last) {
    const PixelOperand<T, false> left{small, identity, allows_packs<T>(rows) && small.aligned()};
    const bool reads = allows_packs<T>(channels) && large.aligned();
    const PixelOperand<T, false> right{large, window, reads};
    tiled_product<P>(rows, n, k, left, right, epilogue, like, device, shapes.groups);
    return;
  }
  const auto left = plane_operand<T, true>(small, identity);
  const auto right = plane_operand<T, true>(large, window);
  tiled_product<P>(rows, n, k, left, right, epilogue, like, device, shapes.groups);
}

Tensor empty(const Tensor& like, const Ints& sizes, bool channels_last) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format_of(like, channels_last));
}

Tensor input_reward_of(const ConvLayer& layer) {
  const auto sizes = layer.x.sizes();
  return empty(layer.x, Ints(sizes.begin(), sizes.end()), layer.channels_last);
}

template <class T, class P>
Tensor redistribute_input(const ConvLayer& layer, const Tensor& weight, const Tensor& matrix,
                          const RuleCall<Acc<T>>& rule, const Device& device) {
  const Tensor reward = input_reward_of(layer);
  if (is_made(rule.code)) {
    input_through_made_kernel<T>(layer, weight, dense(matrix), rule, reward, device);
    return reward;
  }
  const PositionSums<T> sums{data<T>(reward), data<T>(layer.x), nullptr, false, rule};
  const Tensor kernel = kernel_in_format(matrix, layer.shapes);
  position_product<T, P>(layer.shapes, !layer.shapes.transposed, layer.signal<T>(rule), kernel,
                         sums, device);
  return reward;
}

using Redistributed = std::tuple<Tensor, Tensor, Tensor>;

Redistributed conv_redistribute(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                Tensor reward, std::optional<Tensor> matrix, Ints stride,
                                Ints padding, Ints dilation, bool transposed, Ints output_padding,
                                int64_t groups, int64_t rule, Params params, bool need_input,
                                bool need_weight, bool need_bias, int64_t chain,
                                ScalarType product) {
  const Device device(x);
  const ConvLayer layer(x, weight, z, reward, {stride, padding, dilation, transposed, groups},
                        reads_output(RuleCode(rule), chain));
  Redistributed result{none_like(x), none_like(weight), none_like(weight)};
  dispatch_product(x.scalar_type(), product, kOp, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    const RuleCall<Acc<T>> call(rule, chain, params, kOp);
    ParameterUpdate<T> to_weight, to_bias;
    const Tensor w = dense(weight), b = bias.has_value() ? dense(*bias) : none_like(weight);
    Tensor& input_reward = std::get<0>(result);
    if (need_input && !call.code.split())
      input_reward =
          redistribute_input<T, P>(layer, w, matrix.has_value() ? *matrix : weight, call, device);
    if (need_weight) {
      std::get<1>(result) = torch::stable::empty_like(w);
      to_weight = feedback_into<T>(w, std::get<1>(result));
    }
    if (need_bias && bias.has_value()) {
      std::get<2>(result) = torch::stable::empty_like(b);
      to_bias = feedback_into<T>(b, std::get<2>(result));
    }
    if (call.code.split()) {
      if (need_input) input_reward = input_reward_of(layer);
      redistribute_split<T>(layer, w, bias.has_value() ? data<T>(b) : nullptr, call,
                            chain & kNonnegative, need_input ? &input_reward : nullptr, to_weight,
                            to_bias, device);
      return;
    }
    kernel_product<T, P>(layer.shapes, layer.signal<T>(call), plain_source<T>(layer.x), call,
                         to_weight, to_bias, layer.x, device);
  });
  return result;
}

Tensor conv_redistribute_update(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                Tensor reward, std::optional<Tensor> matrix,
                                std::vector<Tensor> weight_state, std::vector<Tensor> bias_state,
                                Ints stride, Ints padding, Ints dilation, bool transposed,
                                Ints output_padding, int64_t groups, int64_t rule, Params params,
                                int64_t optimizer, Params hyper, int64_t bias_optimizer,
                                Params bias_hyper, bool need_input, int64_t chain,
                                ScalarType product) {
  const char* op = "conv_redistribute_update";
  LFP_CHECK(weight.is_contiguous(), "conv_redistribute_update", "weight must be contiguous");
  const Device device(x);
  const ConvLayer layer(x, weight, z, reward, {stride, padding, dilation, transposed, groups},
                        reads_output(RuleCode(rule), chain));
  Tensor input_reward = none_like(x);
  dispatch_product(x.scalar_type(), product, op, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    const RuleCall<Acc<T>> call(rule, chain, params, op);
    const auto to_weight = update_in_place<T>(weight, weight_state, optimizer, hyper, op);
    ParameterUpdate<T> to_bias;
    if (bias.has_value() && bias_optimizer != kFrozen)
      to_bias = update_in_place<T>(*bias, bias_state, bias_optimizer, bias_hyper, op);
    if (call.code.split()) {
      if (need_input) input_reward = input_reward_of(layer);
      redistribute_split<T>(layer, weight, bias.has_value() ? data<T>(*bias) : nullptr, call,
                            chain & kNonnegative, need_input ? &input_reward : nullptr, to_weight,
                            to_bias, device);
      return;
    }
    if (need_input)  // reads W before the launch that changes it
      input_reward = redistribute_input<T, P>(layer, weight, matrix.has_value() ? *matrix : weight,
                                              call, device);
    kernel_product<T, P>(layer.shapes, layer.signal<T>(call), plain_source<T>(layer.x), call,
                         to_weight, to_bias, layer.x, device);
  });
  return input_reward;
}

Ints output_sizes(const Tensor& x, const Tensor& weight, const Geometry& g,
                  const Ints& output_padding) {
  Ints sizes{x.size(0), g.transposed ? weight.size(1) * g.groups : weight.size(0)};
  for (int64_t d = 0; d < x.dim() - 2; ++d) {
    const int64_t size = x.size(d + 2), reach = g.dilation[d] * (weight.size(d + 2) - 1);
    sizes.push_back(g.transposed ? (size - 1) * g.stride[d] - 2 * g.padding[d] + reach +
                                       output_padding[d] + 1
                                 : (size + 2 * g.padding[d] - reach - 1) / g.stride[d] + 1);
  }
  return sizes;
}

Tensor forward(Tensor x, const Tensor& weight, const std::optional<Tensor>& bias,
               const Geometry& geometry, const Ints& output_padding, bool relu,
               ScalarType product) {
  const Device device(x);
  const bool channels_last = strided_channels_last(x) || strided_channels_last(weight);
  x = in_format(x, format_of(x, channels_last));
  const Tensor z = empty(x, output_sizes(x, weight, geometry, output_padding), channels_last);
  const Shapes shapes(x, z, weight, geometry, channels_last);
  const Tensor kernel = kernel_in_format(weight, shapes);
  const Tensor b = bias.has_value() ? dense(*bias) : none_like(weight);
  dispatch_product(x.scalar_type(), product, "conv_forward", [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    const T* add = bias.has_value() ? data<T>(b) : nullptr;
    const PositionSums<T> sums{data<T>(z), nullptr, add, relu};
    position_product<T, P>(shapes, geometry.transposed, plain_source<T>(x), kernel, sums, device);
  });
  return z;
}

Tensor conv_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding,
                    Ints dilation, bool transposed, Ints output_padding, int64_t groups,
                    bool relu) {
  return forward(x, weight, bias, {stride, padding, dilation, transposed, groups}, output_padding,
                 relu, x.scalar_type());
}

// Of float32 tensors, whose product rounds to TF32.
Tensor conv_forward_tf32(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride,
                         Ints padding, Ints dilation, bool transposed, Ints output_padding,
                         int64_t groups, bool relu) {
  return forward(x, weight, bias, {stride, padding, dilation, transposed, groups}, output_padding,
                 relu, ScalarType::Half);
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("conv_forward", TORCH_BOX(&lfp::cuda::conv_forward));
  m.impl("conv_forward_tf32", TORCH_BOX(&lfp::cuda::conv_forward_tf32));
  m.impl("conv_redistribute", TORCH_BOX(&lfp::cuda::conv_redistribute));
  m.impl("conv_redistribute_update", TORCH_BOX(&lfp::cuda::conv_redistribute_update));
}
