// Convolution, rules beyond one product with W or B: kernels that are made on the way in
// (made_matrix.cuh) and rules with two signals (split.cuh). Implicit products of every geometry
// and layout, one tile, in the arithmetic type.
#include "conv_rules_operand.cuh"

namespace lfp::cuda {
namespace {

template <class T>
bool whole_runs(int64_t channels) {
  return channels % kRunOf<T> == 0;
}

// A product that makes one side from what the other side's windows see.
struct Direction {
  Window window;
  Strides strides;  // of the target
  int channels;     // of the target, of one group
  bool up, channels_last;

  Direction(const Shapes& shapes, bool to_large)
      : window(shapes.window(to_large)),
        strides(to_large ? shapes.large() : shapes.small()),
        channels(to_large ? shapes.large_channels() : shapes.small_channels()),
        up(to_large),
        channels_last(shapes.channels_last) {}

  int64_t positions() const { return window.positions.count(); }
  int64_t depth() const { return int64_t(window.most_taps()) * window.channels; }
  KernelPlace place() const { return {window, channels, channels_last, up}; }

  template <class Source>
  WindowOperand<Source, true> operand(const Source& source) const {
    const bool wide = channels_last && window.channels % Source::kWidth == 0 && source.aligned();
    return {source, window, channels_last, wide};
  }
  template <class T, class Finish>
  PositionPairs<T, Finish> epilogue(const Finish& finish, bool aligned) const {
    return {{finish, nullptr},
            window,
            strides,
            channels,
            channels_last && whole_runs<T>(channels) && aligned};
  }
};

// feedback of W: s is a factor on the side of z, x on the other one.
template <class T, class Small, class Large>
void kernel_pairs(const ConvLayer& layer, const Small& small, const Large& large,
                  const ParameterUpdate<T>& to, const PartFunction<Acc<T>>& w_parts,
                  bool second_small, bool second_large, bool wants_crossed, const Device& device) {
  const Shapes& shapes = layer.shapes;
  const int rows = shapes.small_channels(), channels = shapes.large_channels();
  const int64_t columns = int64_t(channels) * shapes.taps;
  const Window window = shapes.window(false), identity = shapes.identity(shapes.small());
  const bool tap_major = shapes.channels_last && shapes.taps > 1;
  const bool together = !tap_major && whole_runs<T>(columns) && to.aligned();
  const KernelPairs<T, WeightOfSums<T>> epilogue{{{to, w_parts}, nullptr}, rows,      shapes.taps,
                                                 FastDivide(channels),     tap_major, together};
  const WindowOperand<Small, false> left{small, identity, false, false};
  const WindowOperand<Large, false> right{large, window, tap_major, false};
  pair_product<T>(rows, columns, window.positions.count(), left, right, epilogue, second_small,
                  second_large, wants_crossed, as_sums(to.feedback), columns * rows * shapes.groups,
                  layer.x, device, shapes.groups);
}

}  // namespace

template <class T>
void input_through_made_kernel(const ConvLayer& layer, const Tensor& weight, const Tensor& given,
                               const RuleCall<Acc<T>>& rule, const Tensor& reward,
                               const Device& device) {
  const Direction to_x(layer.shapes, !layer.shapes.transposed);
  const T* x = data<T>(layer.x);
  T* to = data<T>(reward);
  const SignalSource<T> s{data<T>(layer.reward), data<T>(layer.z), rule};
  const MadeKernel<T> m{data<T>(weight), data<T>(given), to_x.place(), rule};
  const auto epilogue = to_x.epilogue<T>(InputOfSum<T>{x, to, rule}, aligned16(x, to));
  product<PlainCore<T>>(to_x.positions(), to_x.channels, to_x.depth(), to_x.operand(s), m, epilogue,
                        layer.x, device, to_x.window.parts());
}

template <class T>
void redistribute_split(const ConvLayer& layer, const Tensor& weight, const T* bias,
                        const RuleCall<Acc<T>>& rule, bool nonnegative, const Tensor* reward,
                        const ParameterUpdate<T>& to_weight, const ParameterUpdate<T>& to_bias,
                        const Device& device) {
  using A = Acc<T>;
  const Shapes& shapes = layer.shapes;
  const bool two_inputs = has_second_input(rule, nonnegative);
  const bool two_weights = has_second_weight(rule), two_signals = has_second_signal(rule);
  const auto x_parts = PartFunction<A>::of_input(rule), w_parts = PartFunction<A>::of_weight(rule);
  const T *x = data<T>(layer.x), *r = data<T>(layer.reward), *z = data<T>(layer.z);
  const T* w = data<T>(weight);
  const PartSource<T> parts_of_x{x, x_parts};

  // In the order of z's elements in memory.
  const int64_t outputs = layer.reward.numel();
  const Tensor u = torch::stable::new_empty(layer.x, {outputs}, sum_type<T>());
  Tensor v;
  if (two_signals) v = torch::stable::new_empty(layer.x, {outputs}, sum_type<T>());
  A *to_u = data<A>(u), *to_v = two_signals ? data<A>(v) : nullptr;
  const SidesSource<A> sides{to_u, to_v};
  {
    const Direction to_z(shapes, shapes.transposed);
    const auto epilogue = to_z.epilogue<T>(SignalsOfSums<T>{r, z, bias, to_u, to_v, rule},
                                           aligned16(r, z) && aligned16(to_u, to_v));
    pair_product<T>(to_z.positions(), to_z.channels, to_z.depth(), to_z.operand(parts_of_x),
                    KernelParts<T>{w, to_z.place(), w_parts}, epilogue, two_inputs, two_weights,
                    two_signals, to_u, 0, layer.x, device, to_z.window.parts());
  }
  if (reward) {
    const Direction to_x(shapes, !shapes.transposed);
    T* to = data<T>(*reward);
    const auto epilogue =
        to_x.epilogue<T>(InputOfSums<T>{x, to, x_parts, rule.below}, aligned16(x, to));
    pair_product<T>(to_x.positions(), to_x.channels, to_x.depth(), to_x.operand(sides),
                    KernelParts<T>{w, to_x.place(), w_parts}, epilogue, two_signals, two_weights,
                    two_inputs, as_sums(to), layer.x.numel(), layer.x, device, to_x.window.parts());
  }
  if (to_weight.param) {
    if (shapes.transposed)
      kernel_pairs<T>(layer, parts_of_x, sides, to_weight, w_parts, two_inputs, two_signals,
                      two_weights, device);
    else
      kernel_pairs<T>(layer, sides, parts_of_x, to_weight, w_parts, two_signals, two_inputs,
                      two_weights, device);
  }
  if (!to_bias.param) return;
  const int64_t samples = shapes.z.samples, plane = shapes.z.plane(), channels = shapes.z.channels;
  const bool last = shapes.channels_last;
  split_bias<T>(
      {to_u, to_v, last ? samples * plane : samples, channels, last ? 1 : plane, rule, to_bias},
      device);
}

#define LFP_INSTANTIATE(T)                                                                     \
  template void input_through_made_kernel<T>(const ConvLayer&, const Tensor&, const Tensor&,   \
                                             const RuleCall<Acc<T>>&, const Tensor&,           \
                                             const Device&);                                   \
  template void redistribute_split<T>(                                                         \
      const ConvLayer&, const Tensor&, const T*, const RuleCall<Acc<T>>&, bool, const Tensor*, \
      const ParameterUpdate<T>&, const ParameterUpdate<T>&, const Device&);
LFP_INSTANTIATE(double)
LFP_INSTANTIATE(float)
LFP_INSTANTIATE(BFloat16)
LFP_INSTANTIATE(Half)
#undef LFP_INSTANTIATE

}  // namespace lfp::cuda
