// A convolution's rules with two signals (docs/math.md, section 3), by library products of parts:
//   P        = conv(x_a, Wp) + conv(x_b, Wn) + bias's positive part, N with the parts exchanged
//   r_in     = x_a * J_x^T(u; Wp, v; Wn) + x_b * J_x^T(u; Wn, v; Wp)
//   feedback = sign(W) * mapped(W) * (mapped(W) > 0 ? J_W^T(u; x_a, v; x_b) : J_W^T(u; x_b, v;
//   x_a))
// The parts of x exist for one chunk of samples, those of W one at a time.
#include <atomic>

#include "channel_sums.h"
#include "conv_layer.h"
#include "operands.h"
#include "update.h"

namespace lfp::cpu {
namespace {

constexpr const char* kOp = "conv_redistribute";

template <class T>
class ConvSplit {
  using A = Acc<T>;

 public:
  Tensor input_reward;  // [N, C, ...]

  ConvSplit(const ConvLayer& layer, const std::optional<Tensor>& bias, const ConvNeed& need)
      : input_reward(none_like(layer.x)),
        layer_(layer),
        need_(need),
        code_(layer.call.rule),
        p_(rule_params<A>(layer.call.params)),
        two_(code_.signals != Signals::kPlus),
        one_sign_(code_.map != Map::kValue),
        weight_part_(contiguous_like(layer.weight)),
        above_(layer.reward.size(1), A(0)),
        under_(above_),
        sums_{std::vector<double>(above_.size(), 0.0), std::vector<double>(above_.size(), 0.0)} {
    for (size_t o = 0; bias.has_value() && o < above_.size(); ++o) {
      const A mapped = mapped_bias(code_, load(data<T>(*bias), int64_t(o)));
      above_[o] = positive_part(mapped), under_[o] = negative_part(mapped);
    }
    if (need.weight)
      raw_ = torch::stable::new_zeros(layer.weight, layer.weight.sizes(), scalar_type_of<A>());
    if (need.input && layer.empty())
      input_reward = torch::stable::new_zeros(layer.x, layer.x.sizes());
    if (layer.empty()) return;
    if (need.input) input_reward = torch::stable::empty_like(layer.x);
    const int64_t n = layer.x.size(0), step = chunk_samples(layer);
    for (int64_t first = 0; first < n; first += step) chunk(first, std::min(step, n - first));
  }

  // raw sums -> feedback of the weight, in place; contiguous.
  const A* weight_feedback() {
    const T* w = data<T>(layer_.weight);
    A* raw = data<A>(*raw_);
    const Map map = code_.map;
    parallel_loop(raw_->numel(), [=](int64_t i) {
      const A weight = load(w, i);
      raw[i] *= sign(weight) * mapped(map, weight);
    });
    return raw;
  }

  std::vector<A> bias_feedback(const T* bias) const {
    std::vector<A> result(above_.size());
    for (size_t o = 0; o < result.size(); ++o)
      result[o] =
          sign(load(bias, int64_t(o))) * (above_[o] * A(sums_[0][o]) + under_[o] * A(sums_[1][o]));
    return result;
  }

 private:
  void chunk(int64_t first, int64_t count) {
    const auto cut = [&](const Tensor& t) { return samples(t, first, count, sizeof(T)); };
    const Tensor x = cut(layer_.x);
    const bool second = has_second(x);
    const Tensor x_a = input_part(x, true, second);
    const Tensor x_b = second ? input_part(x, false, second) : x_a;

    form_weight(true);
    const Tensor u = forward(x_a);
    std::optional<Tensor> v;
    if (two_ && second) v = forward(x_b);
    if (!one_sign_) {
      form_weight(false);
      if (second) add(u, forward(x_b));
      if (two_) add_or_set(v, forward(x_a));
    }
    if (two_ && !v.has_value()) v = torch::stable::new_zeros(u, u.sizes());
    signals(u, v, cut(layer_.reward), cut(layer_.z));
    if (need_.bias) {
      add_channel_sums<A>(u, layer_.format, sums_[0].data());
      if (two_) add_channel_sums<A>(*v, layer_.format, sums_[1].data());
    }
    if (need_.input) finish_input(u, v, x, x_a, second, cut(input_reward));
    if (!need_.weight) return;
    add_raw(u, x_a, true);
    if (two_ && second) add_raw(*v, x_b, true);
    if (one_sign_) return;
    if (second) add_raw(u, x_b, false);
    if (two_) add_raw(*v, x_a, false);
  }

  // Whether x_b may differ from 0 in a chunk.
  bool has_second(const Tensor& x) const {
    if (code_.parts != Parts::kSign) return code_.parts == Parts::kBox;
    if (layer_.call.chain & kNonnegative) return false;
    std::atomic<bool> found{false};
    const T* from = data<T>(x);
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      if (any_negative(from + begin, 0, 1, end - begin)) found = true;
    });
    return found;
  }

  // x_a or x_b of a chunk, in the arithmetic's type; x itself where it is its own positive part.
  Tensor input_part(const Tensor& x, bool first, bool second) const {
    if (std::is_same_v<T, A> && code_.parts == Parts::kSign && !second) return x;
    Tensor part = empty_like_as(x, scalar_type_of<A>());
    const T* from = data<T>(x);
    A* to = data<A>(part);
    with_input_parts<A>(code_.parts, p_, [&](auto f) {
      parallel_loop(x.numel(), [=](int64_t i) {
        const Parted<A> both = f(load(from, i));
        to[i] = first ? both.first : both.second;
      });
    });
    return part;
  }

  static Tensor contiguous_like(const Tensor& weight) {
    return torch::stable::new_empty(weight, weight.sizes(), scalar_type_of<A>());
  }

  // weight_part_ = Wp or Wn
  void form_weight(bool positive) const {
    const T* w = data<T>(layer_.weight);
    A* to = data<A>(weight_part_);
    with_weight_parts<A>(code_.map, [&](auto f) {
      parallel_loop(layer_.weight.numel(), [=](int64_t i) {
        const Parted<A> both = f(load(w, i));
        to[i] = positive ? both.first : both.second;
      });
    });
  }

  Tensor forward(const Tensor& x) const {
    return in_format(convolution(x, weight_part_, std::nullopt, layer_.geometry, false),
                     layer_.format);
  }

  static void add(const Tensor& to, const Tensor& part) {
    A* sum = data<A>(to);
    const A* from = data<A>(part);
    parallel_loop(part.numel(), [=](int64_t i) { sum[i] += from[i]; });
  }

  static void add_or_set(std::optional<Tensor>& to, const Tensor& part) {
    if (to.has_value()) return add(*to, part);
    to = part;
  }

  // P, N -> u, v in place
  void signals(const Tensor& u, const std::optional<Tensor>& v, const Tensor& reward,
               const Tensor& z) const {
    const ChannelView view = channel_view(u);
    const T *r = data<T>(reward), *zp = data<T>(z);
    const A *above = above_.data(), *under = under_.data();
    A *up = data<A>(u), *vp = v.has_value() ? data<A>(*v) : nullptr;
    const auto one = [=, kind = code_.signals, p = p_](int64_t i, A more, A less) {
      const Sides<A> s =
          lfp::signals(kind, load(r, i), load(zp, i), up[i] + more, vp ? vp[i] + less : A(0), p);
      up[i] = s.u;
      if (vp) vp[i] = s.v;
    };
    parallel_items(view.outer, view.channels * view.inner, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        const int64_t at = o * view.channels * view.inner, inner = view.inner;
        if (inner == 1)
          serial_loop(0, view.channels, [=](int64_t c) { one(at + c, above[c], under[c]); });
        else
          for (int64_t c = 0; c < view.channels; ++c)
            serial_loop(0, inner, [=](int64_t i) { one(at + c * inner + i, above[c], under[c]); });
      }
    });
  }

  // weight_part_ holds Wn, or Wp where the mapped weight has one sign.
  void finish_input(const Tensor& u, const std::optional<Tensor>& v, const Tensor& x,
                    const Tensor& like, bool second, const Tensor& to) const {
    const auto product = [&](const Tensor& s) {
      return input_product<A>(layer_, s, like, weight_part_);
    };
    std::optional<Tensor> of_a, of_b;
    if (!one_sign_) {
      if (two_) of_a = product(*v);
      if (second) of_b = product(u);
      form_weight(true);
    }
    add_or_set(of_a, product(u));
    if (two_ && second) add_or_set(of_b, product(*v));
    const T* from = data<T>(x);
    T* out = data<T>(to);
    const A *a = data<A>(*of_a), *b = of_b.has_value() ? data<A>(*of_b) : nullptr;
    with_input_parts<A>(code_.parts, p_, [&](auto f) {
      parallel_loop(x.numel(), [=, chain = layer_.call.chain](int64_t i) {
        const A value = load(from, i);
        const Parted<A> part = f(value);
        A reward = part.first * a[i];
        if (b) reward += part.second * b[i];
        store(out, i, derivative_below(reward, value, chain));
      });
    });
  }

  // raw += J_W^T(s; x) where the mapped weight has this sign
  void add_raw(const Tensor& s, const Tensor& x, bool positive) {
    const Tensor product = weight_product<A>(layer_, s, x, weight_part_);
    const A* from = data<A>(product);
    A* raw = data<A>(*raw_);
    const T* w = data<T>(layer_.weight);
    const Map map = code_.map;
    parallel_loop(product.numel(), [=](int64_t i) {
      const bool negative = mapped(map, load(w, i)) < A(0);
      raw[i] += negative != positive ? from[i] : A(0);
    });
  }

  const ConvLayer& layer_;
  const ConvNeed need_;
  const RuleCode code_;
  const RuleParams<A> p_;
  const bool two_;       // two signals that may differ from 0
  const bool one_sign_;  // the mapped weight is nowhere negative
  const Tensor weight_part_;
  std::vector<A> above_, under_;  // positive and negative part of the mapped bias
  std::vector<double> sums_[2];   // of u and v, per channel
  std::optional<Tensor> raw_;
};

}  // namespace

Redistributed conv_redistribute_split(const ConvLayer& layer, const std::optional<Tensor>& bias,
                                      const ConvNeed& need) {
  Redistributed result{none_like(layer.x), none_like(layer.weight), none_like(layer.weight)};
  dispatch_dtype(layer.x.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    const auto b = bias.has_value() ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
    ConvSplit<T> split(layer, b, need);
    std::get<0>(result) = split.input_reward;
    const auto stored = [](const Acc<T>* from, const Tensor& to) {
      T* out = data<T>(to);
      parallel_loop(to.numel(), [=](int64_t i) { store(out, i, from[i]); });
    };
    if (need.weight)
      stored(split.weight_feedback(),
             std::get<1>(result) = torch::stable::empty_like(layer.weight));
    if (need.bias)
      stored(split.bias_feedback(data<T>(*b)).data(),
             std::get<2>(result) = torch::stable::empty_like(*b));
  });
  return result;
}

Tensor conv_update_split(const ConvLayer& layer, const std::optional<Tensor>& bias, bool need_input,
                         const StepCall& weight_step, const StepCall& bias_step) {
  Tensor result = none_like(layer.x);
  dispatch_dtype(layer.x.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    const bool step_bias = bias.has_value() && bias_step.optimizer != kFrozen;
    // All products before the first update: they read W, and they are what can fail.
    ConvSplit<T> split(layer, bias, {need_input, true, step_bias});
    result = split.input_reward;
    const Acc<T>* feedback = split.weight_feedback();
    T* w = data<T>(layer.weight);
    torch::stable::parallel_for(0, layer.weight.numel(), kGrain, [&](int64_t begin, int64_t end) {
      step_range(weight_step, w, begin, end - begin, feedback + begin, kOp);
    });
    if (!step_bias) return;
    T* b = data<T>(*bias);
    const auto of_bias = split.bias_feedback(b);
    step_range(bias_step, b, 0, bias->numel(), of_bias.data(), kOp);
  });
  return result;
}

}  // namespace lfp::cpu
