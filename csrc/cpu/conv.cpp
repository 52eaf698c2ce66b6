// Convolution, 1 to 3 dimensions, transposed or not: z = conv(x, W) + b, J its Jacobians.
//   s        = prologue(r, z)                   [N, O, ...]
//   r_in     = input_epilogue(J_x^T s, x)       [N, C, ...]
//   feedback = weight_epilogue(J_W^T s, W),  bias: weight_epilogue(sum of s over N and space, b)
// Everything runs in channels last when x or the reward comes so, else in the plain layout.
#include "channel_sums.h"
#include "conv_layer.h"
#include "matrix_range.h"
#include "update.h"

namespace lfp::cpu {
namespace {

constexpr const char* kOp = "conv_redistribute";

using Layer = ConvLayer;
using Need = ConvNeed;

// M of the input product, in the product type: the weight itself where a rule has no other.
template <class T, class P>
Tensor feedback_matrix(const Layer& layer) {
  const Matrix kind = RuleCode(layer.call.rule).matrix;
  if (kind == Matrix::kWeight) return as_product_type<T, P>(layer.weight);
  if (kind == Matrix::kGiven) return as_product_type<T, P>(*layer.matrix);
  const Tensor result =
      torch::stable::new_empty(layer.weight, layer.weight.sizes(), scalar_type_of<P>());
  const T* w = data<T>(layer.weight);
  const T* given = layer.matrix.has_value() ? data<T>(*layer.matrix) : nullptr;
  P* to = data<P>(result);
  const auto p = rule_params<Acc<T>>(layer.call.params);
  dispatch_formed_matrix(kind, [&](auto constant) {
    torch::stable::parallel_for(0, result.numel(), kGrain, [=](int64_t begin, int64_t end) {
      matrix_range<decltype(constant)::value>(w, given, begin, end - begin, p, to + begin);
    });
  });
  return result;
}

// to[i] = finish(g[i], x[i])
template <class T, class P>
void finish_input(const Layer& layer, const Tensor& g, const Tensor& x, const Tensor& to) {
  const P* gp = data<P>(g);
  const T* xp = data<T>(x);
  T* out = data<T>(to);
  with_input_epilogue<T>(layer.call, [&](auto finish) {
    parallel_loop(g.numel(), [=](int64_t i) {
      store(out, i, finish(static_cast<Acc<T>>(gp[i]), load(xp, i)));
    });
  });
}

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
    const Tensor w =
        need.input ? feedback_matrix<T, P>(layer) : as_product_type<T, P>(layer.weight);
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
  dispatch_weight_epilogue<A>(RuleCode(call.rule).weight, kOp, [&](auto functor) {
    using Rule = decltype(functor);
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      feedback_range<T, Rule>(raw + begin, w + begin, to + begin, end - begin, p);
    });
  });
}

Redistributed conv_redistribute(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                Tensor reward, std::optional<Tensor> matrix, Ints stride,
                                Ints padding, Ints dilation, bool transposed, Ints output_padding,
                                int64_t groups, int64_t rule, Params params, bool need_input,
                                bool need_weight, bool need_bias, int64_t chain,
                                ScalarType product) {
  const Layer layer = layer_of(x, weight, z, reward, matrix,
                               {stride, padding, dilation, transposed, output_padding, groups},
                               {rule, chain, params});
  const Need need{need_input, need_weight, need_bias && bias.has_value()};
  if (RuleCode(rule).split()) return conv_redistribute_split(layer, bias, need);
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
  dispatch_weight_epilogue<A>(RuleCode(call.rule).weight, kOp, [&](auto functor) {
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
                                Tensor reward, std::optional<Tensor> matrix,
                                std::vector<Tensor> weight_state, std::vector<Tensor> bias_state,
                                Ints stride, Ints padding, Ints dilation, bool transposed,
                                Ints output_padding, int64_t groups, int64_t rule, Params params,
                                int64_t optimizer, Params hyper, int64_t bias_optimizer,
                                Params bias_hyper, bool need_input, int64_t chain,
                                ScalarType product) {
  LFP_CHECK(weight.is_contiguous(), "conv_redistribute_update", "weight must be contiguous");
  const Layer layer = layer_of(x, weight, z, reward, matrix,
                               {stride, padding, dilation, transposed, output_padding, groups},
                               {rule, chain, params});
  if (RuleCode(rule).split())
    return conv_update_split(layer, bias, need_input, {optimizer, hyper, weight_state},
                             {bias_optimizer, bias_hyper, bias_state});
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
