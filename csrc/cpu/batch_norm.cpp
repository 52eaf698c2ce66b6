// Batch normalization over x [N, C, *], in any dense order of the axes.
//   xhat = (x - mean) * invstd,  out = gamma * xhat + beta
//   s    = prologue(r, z)
//   dx   = gamma * invstd * (s - mean(s) - xhat * mean(s * xhat))    batch statistics
//   dx   = gamma * invstd * s                                        running statistics
//   r_in = input_epilogue(dx, x);  feedback: weight_epilogue(sum s * xhat, gamma),
//                                            weight_epilogue(sum s, beta)
// Neither s nor xhat is stored: both passes make them in registers.
#include "channel_passes.h"

namespace lfp::cpu {
namespace {

using Doubles = std::vector<double>;
using Redistributed = std::tuple<Tensor, Tensor, Tensor>;

// A per-channel tensor of any supported dtype as float64; `absent` where there is none.
Doubles channel_values(const std::optional<Tensor>& t, int64_t channels, double absent) {
  Doubles values(channels, absent);
  if (!t.has_value()) return values;
  const Tensor d = dense(*t);
  dispatch_dtype(d.scalar_type(), "batch_norm", [&](auto element) {
    using T = decltype(element);
    for (int64_t c = 0; c < channels; ++c) values[c] = double(load(data<T>(d), c));
  });
  return values;
}

void store_channels(const Tensor& t, const Doubles& values) {
  const int64_t stride = t.stride(0);
  dispatch_dtype(t.scalar_type(), "batch_norm", [&](auto element) {
    using T = decltype(element);
    T* to = data<T>(t);
    for (size_t c = 0; c < values.size(); ++c) store(to, c * stride, Acc<T>(values[c]));
  });
}

// Every value `repeat` times: per column of a row, or (1) per channel.
template <class A>
std::vector<A> repeated(const Doubles& per_channel, int64_t repeat) {
  std::vector<A> result(per_channel.size() * repeat);
  for (size_t j = 0; j < result.size(); ++j) result[j] = A(per_channel[j / repeat]);
  return result;
}

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// One forward call. `mean` and `variance` [C] come in as the running statistics and leave as those
// that normalized x.
struct Forward {
  Cut cut;
  Tensor x, out;
  Doubles gamma, beta, mean, variance;
  bool training, relu;
  double eps;
};

// Merges the moments of a channel's parts.
void finish_moments(Forward& call, int64_t c, const Doubles& block_mean, const Doubles& block_m2) {
  const Cut& cut = call.cut;
  const int64_t repeat = cut.rows ? cut.inner : 1, parts = cut.rows ? cut.stride() : 1;
  const int64_t first = cut.rows ? c * cut.inner : c * cut.blocks;
  double mean = 0, m2 = 0, count = 0;
  for (int64_t b = 0; b < cut.blocks; ++b)
    for (int64_t j = 0; j < repeat; ++j) {
      const int64_t at = first + b * parts + j;
      const double more = double(cut.end(b) - cut.begin(b)) * (cut.rows ? 1.0 : cut.inner);
      merge_moments(mean, m2, count, block_mean[at], block_m2[at], more);
      count += more;
    }
  call.mean[c] = mean;
  call.variance[c] = m2 / count;
}

// running = momentum * batch + (1 - momentum) * running
void move_running(const std::optional<Tensor>& running, const Doubles& batch, double unbias,
                  double momentum) {
  if (!running.has_value()) return;
  Doubles values = channel_values(running, batch.size(), 0.0);
  for (size_t c = 0; c < values.size(); ++c)
    values[c] = momentum * (batch[c] * unbias) + (1 - momentum) * values[c];
  store_channels(*running, values);
}

template <class T>
void forward(Forward& call) {
  using A = Acc<T>;
  const Cut& cut = call.cut;
  const int64_t repeat = cut.rows ? cut.inner : 1, parts = cut.rows ? cut.stride() : 1;
  Doubles block_mean(call.training ? cut.groups * cut.blocks * parts : 0, 0.0);
  Doubles block_m2 = block_mean;
  std::vector<A> mean(cut.channels * repeat), scale(mean.size()), offset(mean.size());
  const T* x = data<T>(call.x);
  T* out = data<T>(call.out);
  const A low = call.relu ? A(0) : -std::numeric_limits<A>::infinity();
  // y = (x - mean) * scale + offset: what rounding takes from the mean goes into the offset.
  const auto value = [=](int64_t i, A m, A k, A o) {
    const A y = (load(x, i) - m) * k + o;
    store(out, i, y < low ? low : y);  // NaN passes
  };
  const auto finish_channel = [&](int64_t c) {
    if (call.training) finish_moments(call, c, block_mean, block_m2);
    const double center = call.mean[c];
    const double factor = call.gamma[c] / std::sqrt(call.variance[c] + call.eps);
    for (int64_t j = c * repeat; j < (c + 1) * repeat; ++j) {
      mean[j] = A(center);
      scale[j] = A(factor);
      offset[j] = A(call.beta[c] - (center - double(mean[j])) * factor);
    }
  };
  run_passes(
      cut,
      [&](int64_t g, int64_t b) {
        if (!call.training) return;
        const int64_t at = (g * cut.blocks + b) * parts;
        if (cut.rows)
          row_moments(x, cut.begin(b), cut.end(b), cut.width, &block_mean[at], &block_m2[at]);
        else
          plane_moments(x + g * cut.inner, cut.begin(b), cut.end(b), cut.stride(), cut.inner,
                        block_mean[at], block_m2[at]);
      },
      [&](int64_t g) {
        for (int64_t c = g; c < (cut.rows ? cut.channels : g + 1); ++c) finish_channel(c);
      },
      [&](int64_t g, int64_t b) {
        const A *m = mean.data(), *k = scale.data(), *o = offset.data();
        if (cut.rows)
          return write_rows(cut.begin(b), cut.end(b), cut.width,
                            [=](int64_t i, int64_t j) { value(i, m[j], k[j], o[j]); });
        const A m0 = m[g], k0 = k[g], o0 = o[g];
        const int64_t shift = g * cut.inner;
        write_planes(cut.begin(b), cut.end(b), cut.stride(), cut.inner,
                     [=](int64_t i) { value(shift + i, m0, k0, o0); });
      });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(Tensor x, std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias,
                                                      std::optional<Tensor> running_mean,
                                                      std::optional<Tensor> running_var,
                                                      bool training, double momentum, double eps,
                                                      bool relu) {
  const Tensor source = dense_any_order(x);
  const int64_t C = x.size(1);
  Tensor out = torch::stable::empty_like(source);
  Tensor mean = torch::stable::new_empty(x, {C}, statistics_type(x));
  Tensor invstd = torch::stable::new_empty(x, {C}, statistics_type(x));
  Forward call{Cut(channel_view(source)),
               source,
               out,
               channel_values(weight, C, 1.0),
               channel_values(bias, C, 0.0),
               channel_values(running_mean, C, 0.0),
               channel_values(running_var, C, 1.0),
               training,
               relu,
               eps};
  if (x.numel() != 0) {  // no values leave the running statistics alone
    dispatch_dtype(x.scalar_type(), "batch_norm_forward",
                   [&](auto element) { forward<decltype(element)>(call); });
    const double n = call.cut.count();
    if (training) {
      move_running(running_mean, call.mean, 1.0, momentum);
      move_running(running_var, call.variance, n / (n - 1), momentum);
    }
  }
  store_channels(mean, call.mean);
  for (double& v : call.variance) v = 1 / std::sqrt(v + eps);
  store_channels(invstd, call.variance);
  return {out, mean, invstd};
}

// One redistribute call, dense and arranged alike.
struct Layer {
  Cut cut;
  Tensor x, z, reward, input_reward;
  Doubles gamma, mean, invstd;
  bool batch_statistics, need_input, need_sums;
  Params params;
  Doubles sum_s, sum_sxhat;  // [C], results
};

// Coefficients of dx = scale * (s - mean_s - (x - mean) * slope), one per channel, or one per
// column of a row.
template <class A>
struct Coefficients {
  std::vector<A> mean, scale, mean_s, slope;
};

// The sums of s and s * (x - mean) over one block.
template <class T, class Prologue>
void sum_block(const Layer& layer, const Coefficients<Acc<T>>& k, int64_t group, int64_t block,
               double* sum_s, double* sum_sd) {
  using A = Acc<T>;
  const Cut& cut = layer.cut;
  const T *x = data<T>(layer.x), *z = data<T>(layer.z), *r = data<T>(layer.reward);
  const auto p = rule_params<A>(layer.params);
  const auto pair = [=](int64_t i, A mean) {
    const A s = Prologue::prologue(load(r, i), load(z, i), p);
    return Pair<A>{s, s * (load(x, i) - mean)};
  };
  const A* mean = k.mean.data();
  if (cut.rows)
    return sum_rows<A>(cut.begin(block), cut.end(block), cut.width, sum_s, sum_sd,
                       [=](int64_t i, int64_t column) { return pair(i, mean[column]); });
  const A m = mean[group];
  const int64_t shift = group * cut.inner;
  const auto total = sum_planes<A>(cut.begin(block), cut.end(block), cut.stride(), cut.inner,
                                   [=](int64_t i) { return pair(shift + i, m); });
  *sum_s = total.first;
  *sum_sd = total.second;
}

// r_in = finish(dx, x) over one block.
template <class T, class Prologue, class Finish>
void write_block(const Layer& layer, const Coefficients<Acc<T>>& k, int64_t group, int64_t block,
                 Finish finish) {
  using A = Acc<T>;
  const Cut& cut = layer.cut;
  const T *x = data<T>(layer.x), *z = data<T>(layer.z), *r = data<T>(layer.reward);
  T* out = data<T>(layer.input_reward);
  const auto p = rule_params<A>(layer.params);
  const auto value = [=](int64_t i, A mean, A scale, A mean_s, A slope) {
    const A s = Prologue::prologue(load(r, i), load(z, i), p), v = load(x, i);
    store(out, i, finish(scale * (s - mean_s - (v - mean) * slope), v));
  };
  const A *m = k.mean.data(), *scale = k.scale.data();
  const A *ms = k.mean_s.data(), *slope = k.slope.data();
  if (cut.rows)
    return write_rows(cut.begin(block), cut.end(block), cut.width,
                      [=](int64_t i, int64_t j) { value(i, m[j], scale[j], ms[j], slope[j]); });
  const A m0 = m[group], scale0 = scale[group], ms0 = ms[group], slope0 = slope[group];
  const int64_t shift = group * cut.inner;
  write_planes(cut.begin(block), cut.end(block), cut.stride(), cut.inner,
               [=](int64_t i) { value(shift + i, m0, scale0, ms0, slope0); });
}

// Prologue: s from (r, z).  finish: r_in from (dx, x).
template <class T, class Prologue, class Finish>
void redistribute(Layer& layer, Finish finish_input) {
  using A = Acc<T>;
  const Cut& cut = layer.cut;
  const int64_t repeat = cut.rows ? cut.inner : 1, parts = cut.rows ? cut.stride() : 1;
  const bool sums = layer.batch_statistics || layer.need_sums;
  Doubles block_s(sums ? cut.groups * cut.blocks * parts : 0, 0.0), block_sd = block_s;
  Coefficients<A> k;
  k.mean = repeated<A>(layer.mean, repeat);
  k.scale.resize(k.mean.size());
  k.mean_s.resize(k.mean.size());
  k.slope.resize(k.mean.size());
  const auto finish_channel = [&](int64_t c) {
    double s = 0, sd = 0;
    const int64_t first = cut.rows ? c * cut.inner : c * cut.blocks;
    for (int64_t b = 0; sums && b < cut.blocks; ++b)
      for (int64_t j = 0; j < repeat; ++j) {
        s += block_s[first + b * parts + j];
        sd += block_sd[first + b * parts + j];
      }
    const double invstd = layer.invstd[c], n = cut.count();
    layer.sum_s[c] = s;
    layer.sum_sxhat[c] = sd * invstd;
    for (int64_t j = c * repeat; j < (c + 1) * repeat; ++j) {
      k.scale[j] = A(layer.gamma[c] * invstd);
      k.mean_s[j] = layer.batch_statistics ? A(s / n) : A(0);
      k.slope[j] = layer.batch_statistics ? A(sd * invstd * invstd / n) : A(0);
    }
  };
  run_passes(
      cut,
      [&](int64_t g, int64_t b) {
        const int64_t at = (g * cut.blocks + b) * parts;
        if (sums) sum_block<T, Prologue>(layer, k, g, b, &block_s[at], &block_sd[at]);
      },
      [&](int64_t g) {
        for (int64_t c = g; c < (cut.rows ? cut.channels : g + 1); ++c) finish_channel(c);
      },
      [&](int64_t g, int64_t b) {
        if (layer.need_input) write_block<T, Prologue>(layer, k, g, b, finish_input);
      });
}

template <class T>
void dispatch_redistribute(Layer& layer, int64_t rule, int64_t chain) {
  using A = Acc<T>;
  const char* op = "batch_norm_redistribute";
  const auto p = rule_params<A>(layer.params);
  // A reward that is the signal already takes the gradient's prologue: the identity.
  dispatch_rule<A>((chain & kSignalIn) ? int64_t(kGradient) : rule, op, [&](auto prologue) {
    using Prologue = decltype(prologue);
    if (chain & kSignalOut)
      return redistribute<T, Prologue>(layer, [p](A g, A x) { return chain_epilogue(g, x, p); });
    dispatch_rule<A>(rule, op, [&](auto functor) {
      using Rule = decltype(functor);
      redistribute<T, Prologue>(layer, [p](A g, A x) { return Rule::input_epilogue(g, x, p); });
    });
  });
}

// weight_epilogue(raw, parameter) in the parameter's dtype.
Tensor channel_feedback(const Tensor& parameter, const Doubles& raw, int64_t rule,
                        const Params& params) {
  const Tensor w = dense(parameter);
  Tensor feedback = torch::stable::empty_like(w);
  dispatch_dtype(w.scalar_type(), "batch_norm_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const auto p = rule_params<A>(params);
    dispatch_rule<A>(rule, "batch_norm_redistribute", [&](auto functor) {
      using Rule = decltype(functor);
      for (size_t c = 0; c < raw.size(); ++c)
        store(data<T>(feedback), c, Rule::weight_epilogue(A(raw[c]), load(data<T>(w), c), p));
    });
  });
  return feedback;
}

Redistributed batch_norm_redistribute(Tensor x, std::optional<Tensor> weight,
                                      std::optional<Tensor> bias, Tensor z, Tensor reward,
                                      Tensor mean, Tensor invstd, bool training, int64_t rule,
                                      Params params, bool need_input, bool need_weight,
                                      bool need_bias, int64_t chain) {
  const Tensor source = dense_any_order(x);
  const int64_t C = x.size(1);
  need_weight = need_weight && weight.has_value();
  need_bias = need_bias && bias.has_value();
  Redistributed result{none_like(x), none_like(x), none_like(x)};
  if (need_input) std::get<0>(result) = torch::stable::empty_like(source);
  const Tensor r = arranged_like(source, reward);
  Layer layer{Cut(channel_view(source)),
              source,
              (chain & kSignalIn) ? r : arranged_like(source, z),
              r,
              std::get<0>(result),
              channel_values(weight, C, 1.0),
              channel_values(mean, C, 0.0),
              channel_values(invstd, C, 1.0),
              training,
              need_input,
              need_weight || need_bias,
              params,
              Doubles(C, 0.0),
              Doubles(C, 0.0)};
  if (x.numel() != 0)
    dispatch_dtype(x.scalar_type(), "batch_norm_redistribute", [&](auto element) {
      dispatch_redistribute<decltype(element)>(layer, rule, chain);
    });
  if (need_weight) std::get<1>(result) = channel_feedback(*weight, layer.sum_sxhat, rule, params);
  if (need_bias) std::get<2>(result) = channel_feedback(*bias, layer.sum_s, rule, params);
  return result;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&lfp::cpu::batch_norm_forward));
  m.impl("batch_norm_redistribute", TORCH_BOX(&lfp::cpu::batch_norm_redistribute));
}
