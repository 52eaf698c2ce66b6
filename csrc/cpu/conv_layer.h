// One call of a convolution's redistribution: its arguments, how they are cut into chunks of
// samples, and its library products.
#pragma once

#include "../layout.h"
#include "signal.h"
#include "update.h"

namespace lfp::cpu {

using Redistributed = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kChunkElements = 1 << 19;  // signal elements per thread that stay in its cache
constexpr int64_t kVectorChannels = 16;      // channels of one vector of the plain-layout kernels

// One call's arguments, checked in Python, dense, and in one format.
struct ConvLayer {
  MemoryFormat format;
  Tensor x, weight, z, reward;   // [N, C, ...], kernel, [N, O, ...] twice
  std::optional<Tensor> matrix;  // the feedback matrix B, shaped like the kernel
  ConvGeometry geometry;
  RuleCall call;
  bool empty() const { return x.numel() == 0 || reward.numel() == 0; }
};

inline ConvLayer layer_of(const Tensor& x, const Tensor& weight, const Tensor& z,
                          const Tensor& reward, const std::optional<Tensor>& matrix,
                          const ConvGeometry& geometry, const RuleCall& call) {
  const auto format =
      channels_last_or_plain(x, strided_channels_last(x) || strided_channels_last(reward));
  const Tensor r = in_format(reward, format);
  const bool reads_z = !(call.chain & kSignalIn);
  return {format,
          in_format(x, format),
          dense(weight),
          reads_z ? in_format(z, format) : r,
          r,
          matrix.has_value() ? std::optional<Tensor>(dense(*matrix)) : std::nullopt,
          geometry,
          call};
}

// Samples per chunk. Chunks keep the signal and the raw input product in cache and out of freshly
// mapped memory; a chunk is worth its own pass over the weights, and feeds every thread.
inline int64_t chunk_samples(const ConvLayer& layer) {
  const int64_t n = layer.x.size(0), threads = torch::stable::get_num_threads();
  const int64_t sample = std::max(layer.x.numel(), layer.reward.numel()) / n;
  const int64_t elements = threads * std::max(kChunkElements, 16 * layer.weight.numel());
  const int64_t most = std::max(elements / sample / threads, int64_t(1)) * threads;
  const int64_t chunks = (n + most - 1) / most;
  const int64_t even = (n + chunks - 1) / chunks;
  return (even + threads - 1) / threads * threads;
}

// Samples [first, first + count) of a dense t, the layer's own.
inline Tensor samples(const Tensor& t, int64_t first, int64_t count, int64_t itemsize) {
  Ints sizes(t.sizes().begin(), t.sizes().end());
  const Ints strides(t.strides().begin(), t.strides().end());
  sizes[0] = count;
  char* base = static_cast<char*>(t.data_ptr()) + first * strides[0] * itemsize;
  return torch::stable::from_blob(base, sizes, strides, t.device(), t.scalar_type());
}

inline bool all_equal(const Ints& values, int64_t value) {
  return std::all_of(values.begin(), values.end(), [=](int64_t v) { return v == value; });
}

// J_x^T s of a depthwise convolution with stride 1 is a depthwise convolution with the reversed
// kernel, which oneDNN runs twice as fast in channels last. Nothing where that does not apply.
template <class P>
std::optional<Tensor> depthwise_input(const ConvLayer& layer, const Tensor& s,
                                      const Tensor& weight) {
  const ConvGeometry& g = layer.geometry;
  const int64_t channels = weight.size(0), taps = weight.numel() / channels;
  if (std::is_same_v<P, double> || layer.format == MemoryFormat::Contiguous || g.transposed ||
      g.groups != channels || weight.size(1) != 1 || !all_equal(g.stride, 1))
    return std::nullopt;
  ConvGeometry reversed = g;
  for (size_t d = 0; d < g.padding.size(); ++d) {
    reversed.padding[d] = g.dilation[d] * (weight.size(d + 2) - 1) - g.padding[d];
    if (reversed.padding[d] < 0) return std::nullopt;
  }
  const Tensor kernel = torch::stable::empty_like(weight);
  const P* from = data<P>(weight);
  P* to = data<P>(kernel);
  for (int64_t c = 0; c < channels; ++c)
    std::reverse_copy(from + c * taps, from + (c + 1) * taps, to + c * taps);
  return convolution(s, kernel, std::nullopt, reversed, false);
}

template <class P>
Tensor input_product(const ConvLayer& layer, const Tensor& s, const Tensor& x,
                     const Tensor& weight) {
  const auto depthwise = depthwise_input<P>(layer, s, weight);
  return in_format(
      depthwise.has_value() ? *depthwise : convolution_input(s, x, weight, layer.geometry),
      layer.format);
}

// J_W^T s, contiguous. In the plain layout oneDNN fills channels up to a whole vector; channels
// last does not, and repays the two copies.
template <class P>
Tensor weight_product(const ConvLayer& layer, const Tensor& s, const Tensor& x,
                      const Tensor& weight) {
  const int64_t channels = x.size(1);
  const bool convert = !std::is_same_v<P, double> && layer.format == MemoryFormat::Contiguous &&
                       x.dim() == 4 && layer.geometry.groups == 1 && !layer.geometry.transposed &&
                       channels > 3 && channels % kVectorChannels != 0;
  const auto format = convert ? MemoryFormat::ChannelsLast : layer.format;
  return in_format(
      convolution_weight(in_format(s, format), in_format(x, format), weight, layer.geometry),
      MemoryFormat::Contiguous);
}

struct ConvNeed {
  bool input, weight, bias;
};

// conv_split.cpp: the rules with two signals.
Redistributed conv_redistribute_split(const ConvLayer& layer, const std::optional<Tensor>& bias,
                                      const ConvNeed& need);
Tensor conv_update_split(const ConvLayer& layer, const std::optional<Tensor>& bias, bool need_input,
                         const StepCall& weight_step, const StepCall& bias_step);

}  // namespace lfp::cpu
