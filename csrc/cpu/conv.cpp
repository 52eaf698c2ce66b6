// Convolution, 1 to 3 dimensions, transposed or not: z = conv(x, W) + b, J its Jacobians.
//   s        = prologue(r, z)                   [N, O, ...]
//   r_in     = input_epilogue(J_x^T s, x)       [N, C, ...]
//   feedback = weight_epilogue(J_W^T s, W),  bias: weight_epilogue(sum of s over N and space, b)
// Everything runs in channels last when x or the reward comes so, else in the plain layout.
#include "../layout.h"
#include "signal.h"
#include "update.h"

namespace lfp::cpu {
namespace {

constexpr const char* kOp = "conv_redistribute";
constexpr int64_t kLanes = 32;               // partial sums, enough for every vector width
constexpr int64_t kPiece = 512;              // values added up before float64 takes over
constexpr int64_t kChunkElements = 1 << 19;  // signal elements per thread that stay in its cache
constexpr int64_t kVectorChannels = 16;      // channels of one vector of the plain-layout kernels

using Redistributed = std::tuple<Tensor, Tensor, Tensor>;

// One call's arguments, checked in Python, dense, and in one format.
struct Layer {
  MemoryFormat format;
  Tensor x, weight, z, reward;  // [N, C, ...], kernel, [N, O, ...] twice
  ConvGeometry geometry;
  RuleCall call;
  bool empty() const { return x.numel() == 0 || reward.numel() == 0; }
};

Layer layer_of(const Tensor& x, const Tensor& weight, const Tensor& z, const Tensor& reward,
               const ConvGeometry& geometry, const RuleCall& call) {
  const auto format =
      channels_last_or_plain(x, strided_channels_last(x) || strided_channels_last(reward));
  const Tensor r = in_format(reward, format);
  const bool reads_z = !(call.chain & kSignalIn);
  return {
      format, in_format(x, format), dense(weight), reads_z ? in_format(z, format) : r, r, geometry,
      call};
}

// Samples per chunk. Chunks keep the signal and the raw input product in cache and out of freshly
// mapped memory; a chunk is worth its own pass over the weights, and feeds every thread.
int64_t chunk_samples(const Layer& layer) {
  const int64_t n = layer.x.size(0), threads = torch::stable::get_num_threads();
  const int64_t sample = std::max(layer.x.numel(), layer.reward.numel()) / n;
  const int64_t elements = threads * std::max(kChunkElements, 16 * layer.weight.numel());
  const int64_t most = std::max(elements / sample / threads, int64_t(1)) * threads;
  const int64_t chunks = (n + most - 1) / most;
  const int64_t even = (n + chunks - 1) / chunks;
  return (even + threads - 1) / threads * threads;
}

// Samples [first, first + count) of a dense t, the layer's own.
Tensor samples(const Tensor& t, int64_t first, int64_t count, int64_t itemsize) {
  Ints sizes(t.sizes().begin(), t.sizes().end());
  const Ints strides(t.strides().begin(), t.strides().end());
  sizes[0] = count;
  char* base = static_cast<char*>(t.data_ptr()) + first * strides[0] * itemsize;
  return torch::stable::from_blob(base, sizes, strides, t.device(), t.scalar_type());
}

bool all_equal(const Ints& values, int64_t value) {
  return std::all_of(values.begin(), values.end(), [=](int64_t v) { return v == value; });
}

// J_x^T s of a depthwise convolution with stride 1 is a depthwise convolution with the reversed
// kernel, which oneDNN runs twice as fast in channels last. Nothing where that does not apply.
template <class P>
std::optional<Tensor> depthwise_input(const Layer& layer, const Tensor& s, const Tensor& weight) {
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
Tensor input_product(const Layer& layer, const Tensor& s, const Tensor& x, const Tensor& weight) {
  const auto depthwise = depthwise_input<P>(layer, s, weight);
  return in_format(
      depthwise.has_value() ? *depthwise : convolution_input(s, x, weight, layer.geometry),
      layer.format);
}

// J_W^T s, contiguous. In the plain layout oneDNN fills channels up to a whole vector; channels
// last does not, and repays the two copies.
template <class P>
Tensor weight_product(const Layer& layer, const Tensor& s, const Tensor& x, const Tensor& weight) {
  const int64_t channels = x.size(1);
  const bool convert = !std::is_same_v<P, double> && layer.format == MemoryFormat::Contiguous &&
                       x.dim() == 4 && layer.geometry.groups == 1 && !layer.geometry.transposed &&
                       channels > 3 && channels % kVectorChannels != 0;
  const auto format = convert ? MemoryFormat::ChannelsLast : layer.format;
  return in_format(
      convolution_weight(in_format(s, format), in_format(x, format), weight, layer.geometry),
      MemoryFormat::Contiguous);
}

// sums[k] = sum of s[k, :], for k < rows.
template <class P>
LFP_CLONES void row_sums(const P* s, int64_t rows, int64_t width, double* sums) {
  for (int64_t k = 0; k < rows; ++k, s += width) {
    sums[k] = 0;
    for (int64_t begin = 0; begin < width; begin += kPiece * kLanes) {
      const int64_t end = std::min(width, begin + kPiece * kLanes);
      const int64_t whole = end - (end - begin) % kLanes;
      Acc<P> lanes[kLanes] = {};
      for (int64_t i = begin; i < whole; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += load(s, i + j);
      for (int64_t i = whole; i < end; ++i) lanes[i - whole] += load(s, i);
      Acc<P> sum(0);
      for (int64_t j = 0; j < kLanes; ++j) sum += lanes[j];
      sums[k] += sum;
    }
  }
}

// sums[j] += sum of s[:, j], for j < width.
template <class P>
LFP_CLONES void column_sums(const P* s, int64_t rows, int64_t width, Acc<P>* sums) {
  for (int64_t k = 0; k < rows; ++k, s += width)
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) sums[j] += load(s, j);
}

// sums[k, O] = sums over the k-th piece of `pixels` pixels of s[pixels, O]. Few channels: several
// pixels make one row, so that rows fill the vector units.
template <class P>
void pixel_sums(const P* s, int64_t first, int64_t last, int64_t pixels, int64_t total,
                int64_t channels, double* sums) {
  const int64_t pack = (kLanes + channels - 1) / channels, width = pack * channels;
  std::vector<Acc<P>> lanes(width);
  for (int64_t k = first; k < last; ++k) {
    const int64_t begin = k * pixels, count = std::min(pixels, total - begin);
    const int64_t rows = count / pack;
    std::fill(lanes.begin(), lanes.end(), Acc<P>(0));
    column_sums(s + begin * channels, rows, width, lanes.data());
    column_sums(s + (begin + rows * pack) * channels, 1, (count - rows * pack) * channels,
                lanes.data());
    for (int64_t j = 0; j < width; ++j) sums[k * channels + j % channels] += lanes[j];
  }
}

// sums[O] += sum over batch and space of s[N,O,...]. Plain: the sums of all planes first. Channels
// last: the sums of pieces of pixels first. Neither depends on the number of threads.
template <class P>
void add_channel_sums(const Tensor& s, MemoryFormat format, double* sums) {
  const int64_t channels = s.size(1), total = s.numel() / channels;
  const bool plain = format == MemoryFormat::Contiguous;
  const int64_t pixels = plain ? total / s.size(0) : kPiece;
  const int64_t pieces = (total + pixels - 1) / pixels;
  std::vector<double> partial(pieces * channels, 0.0);
  const P* from = data<P>(s);
  const int64_t grain = std::max<int64_t>(kGrain / (pixels * channels), 1);
  torch::stable::parallel_for(0, pieces, grain, [&](int64_t first, int64_t last) {
    if (plain)
      return row_sums(from + first * channels * pixels, (last - first) * channels, pixels,
                      partial.data() + first * channels);
    pixel_sums(from, first, last, pixels, total, channels, partial.data());
  });
  for (int64_t k = 0; k < pieces; ++k)
    for (int64_t c = 0; c < channels; ++c) sums[c] += partial[k * channels + c];
}

// to[i] = finish(g[i], x[i])
template <class T, class P>
void finish_input(const Layer& layer, const Tensor& g, const Tensor& x, const Tensor& to) {
  const P* gp = data<P>(g);
  const T* xp = data<T>(x);
  T* out = data<T>(to);
  with_input_epilogue<T>(layer.call, kOp, [&](auto finish) {
    parallel_loop(g.numel(), [=](int64_t i) {
      store(out, i, finish(static_cast<Acc<T>>(gp[i]), load(xp, i)));
    });
  });
}

struct Need {
  bool input, weight, bias;
};

// What the two products and the bias sum make of the reward, before the weight epilogues.
template <class T, class P>
struct Products {
  Tensor input_reward;           // [N, C, ...]
  std::optional<Tensor> weight;  // J_W^T s, contiguous, Acc<P>
  std::vector<double> bias;      // [O]

  Products(const Layer& layer, const Need& need)
      : input_reward(none_like(layer.x)), bias(layer.reward.size(1), 0.0) {
    if (layer.empty()) {  // feedback is zero; weight decay and momentum still act
      if (need.input) input_reward = torch::stable::new_zeros(layer.x, layer.x.sizes());
      if (need.weight) weight = zeros(layer.weight);
      return;
    }
    const int64_t n = layer.x.size(0), step = chunk_samples(layer);
    const Tensor w = as_product_type<T, P>(layer.weight);
    // One chunk gets its epilogue in place.
    const bool in_place = step >= n && std::is_same_v<T, P>;
    if (need.input && !in_place) input_reward = torch::stable::empty_like(layer.x);
    for (int64_t first = 0; first < n; first += step) {
      const int64_t count = std::min(step, n - first);
      const auto cut = [&](const Tensor& t) { return samples(t, first, count, sizeof(T)); };
      const Tensor x = cut(layer.x);
      const Tensor s = signal<T, P>(cut(layer.reward), cut(layer.z), layer.call, kOp);
      const Tensor factor = as_product_type<T, P>(x);
      if (need.bias) add_channel_sums<P>(s, layer.format, bias.data());
      if (need.input) {
        const Tensor g = input_product<P>(layer, s, factor, w);
        if (in_place) input_reward = g;
        finish_input<T, P>(layer, g, x, in_place ? g : cut(input_reward));
      }
      if (need.weight) add_weight(layer, weight_product<P>(layer, s, factor, w));
    }
  }

 private:
  static Tensor zeros(const Tensor& like) {
    return torch::stable::new_zeros(like, like.sizes(), scalar_type_of<Acc<P>>());
  }

  void add_weight(const Layer& layer, const Tensor& part) {
    if (std::is_same_v<P, Acc<P>> && !weight.has_value()) {
      weight = part;
      return;
    }
    if (!weight.has_value()) weight = zeros(layer.weight);
    Acc<P>* to = data<Acc<P>>(*weight);
    const P* from = data<P>(part);
    parallel_loop(part.numel(), [=](int64_t i) { to[i] += load(from, i); });
  }
};

// weight_epilogue(raw, param), shaped like param; in raw's own memory where the types allow it.
template <class T, class Raw>
void feedback(const Raw* raw, const T* w, T* to, int64_t n, const RuleCall& call) {
  using A = Acc<T>;
  const auto p = rule_params<A>(call.params);
  dispatch_rule<A>(call.rule, kOp, [&](auto functor) {
    using Rule = decltype(functor);
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      feedback_range<T, Rule>(raw + begin, w + begin, to + begin, end - begin, p);
    });
  });
}

Redistributed conv_redistribute(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                Tensor reward, Ints stride, Ints padding, Ints dilation,
                                bool transposed, Ints output_padding, int64_t groups, int64_t rule,
                                Params params, bool need_input, bool need_weight, bool need_bias,
                                int64_t chain, ScalarType product) {
  const Layer layer = layer_of(x, weight, z, reward,
                               {stride, padding, dilation, transposed, output_padding, groups},
                               {rule, chain, params});
  const Need need{need_input, need_weight, need_bias && bias.has_value()};
  Redistributed result{none_like(x), none_like(weight), none_like(weight)};
  dispatch_types(x.scalar_type(), product, kOp, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    const Products<T, P> products(layer, need);
    std::get<0>(result) = products.input_reward;
    if (need.weight) {
      const Tensor& raw = *products.weight;
      Tensor& to = std::get<1>(result) = raw;
      if constexpr (!std::is_same_v<T, Acc<P>>) to = torch::stable::empty_like(layer.weight);
      feedback(data<Acc<P>>(raw), data<T>(layer.weight), data<T>(to), raw.numel(), layer.call);
    }
    if (need.bias) {
      const Tensor b = dense(*bias);
      Tensor& to = std::get<2>(result) = torch::stable::empty_like(b);
      feedback(products.bias.data(), data<T>(b), data<T>(to), b.numel(), layer.call);
    }
  });
  return result;
}

// param and its states take one optimizer step along weight_epilogue(raw, param).
template <class T, class Raw>
void update(const Raw* raw, const Tensor& param, const std::vector<Tensor>& states,
            const RuleCall& call, int64_t optimizer, const Params& hyper) {
  using A = Acc<T>;
  const auto p = rule_params<A>(call.params);
  const auto h = optimizer_params<A>(hyper);
  T* w = data<T>(param);
  dispatch_rule<A>(call.rule, kOp, [&](auto functor) {
    dispatch_optimizer<A>(optimizer, kOp, [&](auto step) {
      using Rule = decltype(functor);
      using Optimizer = decltype(step);
      torch::stable::parallel_for(0, param.numel(), kGrain, [&](int64_t begin, int64_t end) {
        update_range<T, Rule, Optimizer>(raw + begin, w + begin, state<T>(states, 0, begin),
                                         state<T>(states, 1, begin), end - begin, p, h);
      });
    });
  });
}

Tensor conv_redistribute_update(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                Tensor reward, std::vector<Tensor> weight_state,
                                std::vector<Tensor> bias_state, Ints stride, Ints padding,
                                Ints dilation, bool transposed, Ints output_padding, int64_t groups,
                                int64_t rule, Params params, int64_t optimizer, Params hyper,
                                int64_t bias_optimizer, Params bias_hyper, bool need_input,
                                int64_t chain, ScalarType product) {
  LFP_CHECK(weight.is_contiguous(), "conv_redistribute_update", "weight must be contiguous");
  const Layer layer = layer_of(x, weight, z, reward,
                               {stride, padding, dilation, transposed, output_padding, groups},
                               {rule, chain, params});
  Tensor input_reward = none_like(x);
  dispatch_types(x.scalar_type(), product, kOp, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    // All products before the first update: they read W, and they are what can fail.
    const Products<T, P> products(layer, {need_input, true, bias.has_value()});
    const Tensor& raw = *products.weight;
    update<T>(data<Acc<P>>(raw), weight, weight_state, layer.call, optimizer, hyper);
    if (bias.has_value())
      update<T>(products.bias.data(), *bias, bias_state, layer.call, bias_optimizer, bias_hyper);
    input_reward = products.input_reward;
  });
  return input_reward;
}

Tensor conv_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding,
                    Ints dilation, bool transposed, Ints output_padding, int64_t groups,
                    bool relu) {
  const ConvGeometry geometry{stride, padding, dilation, transposed, output_padding, groups};
  const auto format =
      channels_last_or_plain(x, strided_channels_last(x) || strided_channels_last(weight));
  const auto run = [&](const Tensor& a, const Tensor& w, const std::optional<Tensor>& b) {
    return in_format(convolution(in_format(a, format), w, b, geometry, relu), format);
  };
  if (x.scalar_type() != ScalarType::Half) return run(x, weight, bias);
  const auto wide = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
  const auto wide_bias = bias.has_value() ? std::optional<Tensor>(wide(*bias)) : std::nullopt;
  return torch::stable::to(run(wide(x), wide(weight), wide_bias), ScalarType::Half);
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&lfp::cpu::conv_forward));
  m.impl("conv_redistribute", TORCH_BOX(&lfp::cpu::conv_redistribute));
  m.impl("conv_redistribute_update", TORCH_BOX(&lfp::cpu::conv_redistribute_update));
}
