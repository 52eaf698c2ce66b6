// Batch normalization over x [N, C, *], in any dense order of the axes.
//   xhat = (x - mean) * invstd,  out = gamma * xhat + beta
//   s    = prologue(r, z)
//   dx   = gamma * invstd * (s - mean(s) - xhat * mean(s * xhat))    batch statistics
//   dx   = gamma * invstd * s                                        running statistics
//   r_in = input_epilogue(dx, x);  feedback: weight_epilogue(sum s * xhat, gamma),
//                                            weight_epilogue(sum s, beta)
// Neither s nor xhat is stored. With batch statistics every value depends on sums over all others
// of its channel, so the operands are read twice: once to sum, once to write. With running
// statistics one pass does both.
#include "channel_passes.cuh"

namespace lfp::cuda {
namespace {

// ---- forward

template <class T>
struct Forward {
  using Value = Acc<T>;
  struct Element {
    Value x;
  };
  // y = (x - mean) * scale + offset. While sums are made, mean is any value of the channel: the
  // deviations from it do not cancel as those from 0 would.
  struct Channel {
    Value mean, scale, offset;
  };
  template <int V>
  static constexpr int kPacks = V == 1 ? 8 : 4;
  template <int V>
  static constexpr int kRowPacks = V == 8 ? 2 : kPacks<V>;  // registers: a thread has V channels

  const T* x;
  T* out;
  const Channel* channels;  // null while sums are made
  int64_t inner;
  Value low;  // 0 with ReLU, else -inf

  __device__ Channel channel(int64_t c) const {
    return channels ? channels[c] : Channel{lfp::cuda::load(x, c * inner)};
  }
  template <int V>
  __device__ void load(int64_t offset, Element* e) const {
    Value v[V];
    lfp::cuda::load<V>(x, offset, v);
#pragma unroll
    for (int k = 0; k < V; ++k) e[k].x = v[k];
  }
  // Sums of x - mean and its square: deviations from the mean of the B values in T's arithmetic,
  // where they are small, then in float64.
  template <int B>
  __device__ void add(const Channel& channel, const Element* e, Pair& sums) const {
    Value total = Value(0), first = Value(0), second = Value(0);
#pragma unroll
    for (int k = 0; k < B; ++k) total += e[k].x;
    const Value center = total * Value(1.0 / B);
#pragma unroll
    for (int k = 0; k < B; ++k) {
      const Value d = e[k].x - center;
      first += d;
      second += d * d;
    }
    const double shift = double(center) - double(channel.mean), sum = double(first);
    sums.first += B * shift + sum;
    sums.second += double(second) + shift * (2 * sum + B * shift);
  }
  __device__ Value value(const Channel& k, const Element& e) const {
    const Value y = (e.x - k.mean) * k.scale + k.offset;
    return y < low ? low : y;  // NaN passes
  }
};

template <class T>
struct Statistics {
  const T* x;
  ChannelVector<T> gamma, beta, running_mean, running_var;
  typename Forward<T>::Channel* channels;
  Acc<T>*mean, *invstd;
  const Pair* partial;  // null: the running statistics normalize
  double count, momentum, eps;
};

// One warp per channel: from the sums to mean and variance, the running statistics, and the
// coefficients of y.
template <class T>
__global__ void __launch_bounds__(kPassThreads)
    statistics_kernel(const Cut cut, const Statistics<T> s) {
  const int64_t c = int64_t(blockIdx.x) * kPassWarps + threadIdx.x / 32;
  if (c >= cut.channels) return;
  const Pair sums = channel_sums(cut, s.partial, c);
  if (threadIdx.x % 32 != 0) return;
  double mean = s.running_mean.at(c, 0.0), variance = s.running_var.at(c, 1.0);
  if (s.partial) {
    const double shift = sums.first / s.count, keep = 1 - s.momentum;
    const double squares = sums.second / s.count - shift * shift;
    const double batch_mean = double(load(s.x, c * cut.inner)) + shift;
    const double batch_variance = squares < 0 ? 0 : squares;  // NaN passes
    const double unbiased = batch_variance * (s.count / (s.count - 1));
    s.running_mean.put(c, s.momentum * batch_mean + keep * mean);
    s.running_var.put(c, s.momentum * unbiased + keep * variance);
    mean = batch_mean, variance = batch_variance;
  }
  using A = Acc<T>;
  const double invstd = 1 / square_root(variance + s.eps);
  const double factor = s.gamma.at(c, 1.0) * invstd;
  s.mean[c] = A(mean);
  s.invstd[c] = A(invstd);
  // What rounding takes from the mean goes into the offset.
  s.channels[c] = {A(mean), A(factor), A(s.beta.at(c, 0.0) - (mean - double(A(mean))) * factor)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(Tensor x, std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias,
                                                      std::optional<Tensor> running_mean,
                                                      std::optional<Tensor> running_var,
                                                      bool training, double momentum, double eps,
                                                      bool relu) {
  const Device device(x);
  const Tensor source = dense_any_order(x);
  const int64_t C = x.size(1);
  const ScalarType wide =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor out = torch::stable::empty_like(source);
  const Tensor mean = torch::stable::new_empty(x, {C}, wide);
  const Tensor invstd = torch::stable::new_empty(x, {C}, wide);
  if (C == 0) return {out, mean, invstd};
  const bool sums = training && x.numel() != 0;  // no values leave the running statistics alone
  const ChannelView view = channel_view(source);
  dispatch_dtype(x.scalar_type(), "batch_norm_forward", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    using Body = Forward<T>;
    const bool packed = divides(kWide<T>, view) && aligned16(data<T>(source), data<T>(out));
    const Cut cut(view, packed ? kWide<T> : 1, sizeof(T));
    const Tensor partial =
        torch::stable::new_empty(x, {sums ? 2 * cut.partials() : 0}, ScalarType::Double);
    const Tensor channels = torch::stable::new_empty(x, {3 * C}, wide);
    Body body{data<T>(source), data<T>(out), nullptr, view.inner,
              relu ? A(0) : -std::numeric_limits<A>::infinity()};
    const auto run = [&](const Pass& pass) {
      if (packed)
        run_pass<kWide<T>>(cut, body, pass, device.stream);
      else
        run_pass<1>(cut, body, pass, device.stream);
    };
    Pair* parts = sums ? static_cast<Pair*>(partial.data_ptr()) : nullptr;
    if (sums) run({parts, false});
    auto* coefficients = static_cast<typename Body::Channel*>(channels.data_ptr());
    const Statistics<T> statistics{body.x,
                                   ChannelVector<T>(weight, "weight"),
                                   ChannelVector<T>(bias, "bias"),
                                   ChannelVector<T>(running_mean, "running_mean"),
                                   ChannelVector<T>(running_var, "running_var"),
                                   coefficients,
                                   data<A>(mean),
                                   data<A>(invstd),
                                   parts,
                                   cut.count(),
                                   momentum,
                                   eps};
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(C, kPassWarps));
    statistics_kernel<<<blocks, kPassThreads, 0, device.stream>>>(cut, statistics);
    check_launch();
    body.channels = coefficients;
    if (x.numel() != 0) run({nullptr, true});
  });
  return {out, mean, invstd};
}

// ---- redistribute

template <class T, class Rule>
struct Redistribute {
  using Value = Acc<T>;
  struct Element {
    Value x, s;
  };
  // dx = scale * (s - mean_s - (x - mean) * slope)
  struct Channel {
    Value mean, scale, mean_s, slope;
  };
  template <int V>
  static constexpr int kPacks = V == 1 ? 4 : 2;
  template <int V>
  static constexpr int kRowPacks = V == 8 ? 1 : kPacks<V>;  // registers: a thread has V channels

  const T *x, *z, *reward;
  T* out;
  ChannelVector<T> gamma, mean, invstd;
  const Value* terms;  // [C, 2] mean_s and slope; null where they are 0
  RuleParams<Value> params;
  bool signal_in, signal_out;

  __device__ Channel channel(int64_t c) const {
    Channel k{Value(mean.at(c, 0.0)), Value(gamma.at(c, 1.0) * invstd.at(c, 1.0))};
    if (terms) k.mean_s = terms[2 * c], k.slope = terms[2 * c + 1];
    return k;
  }
  template <int V>
  __device__ void load(int64_t offset, Element* e) const {
    Value vx[V], vz[V], r[V];
    lfp::cuda::load<V>(x, offset, vx);
    lfp::cuda::load<V>(reward, offset, r);
    if (!signal_in) lfp::cuda::load<V>(z, offset, vz);
#pragma unroll
    for (int k = 0; k < V; ++k)
      e[k] = {vx[k], signal_in ? r[k] : Rule::prologue(r[k], vz[k], params)};
  }
  // Sums of s and s * (x - mean), which cancel: in float64 from the first addition on.
  template <int B>
  __device__ void add(const Channel& channel, const Element* e, Pair& sums) const {
#pragma unroll
    for (int k = 0; k < B; ++k) {
      sums.first += double(e[k].s);
      sums.second += double(e[k].s) * double(e[k].x - channel.mean);
    }
  }
  __device__ Value value(const Channel& k, const Element& e) const {
    const Value dx = k.scale * (e.s - k.mean_s - (e.x - k.mean) * k.slope);
    return signal_out ? chain_epilogue(dx, e.x, params) : Rule::input_epilogue(dx, e.x, params);
  }
};

template <class T>
struct Feedback {
  ChannelVector<T> gamma, beta, gamma_feedback, beta_feedback, invstd;
  Acc<T>* terms;  // null with running statistics
  const Pair* partial;
  double count;
  RuleParams<Acc<T>> params;
};

// One warp per channel: from the sums of s and s * (x - mean) to the terms of dx and the feedback.
template <class T, class Rule>
__global__ void __launch_bounds__(kPassThreads)
    feedback_kernel(const Cut cut, const Feedback<T> f) {
  using A = Acc<T>;
  const int64_t c = int64_t(blockIdx.x) * kPassWarps + threadIdx.x / 32;
  if (c >= cut.channels) return;
  const Pair sums = channel_sums(cut, f.partial, c);
  if (threadIdx.x % 32 != 0) return;
  const double invstd = f.invstd.at(c, 1.0);
  if (f.terms) {
    f.terms[2 * c] = A(sums.first / f.count);
    f.terms[2 * c + 1] = A(sums.second * invstd * invstd / f.count);
  }
  const A gamma = A(f.gamma.at(c, 0.0)), beta = A(f.beta.at(c, 0.0));
  f.gamma_feedback.put(c, Rule::weight_epilogue(A(sums.second * invstd), gamma, f.params));
  f.beta_feedback.put(c, Rule::weight_epilogue(A(sums.first), beta, f.params));
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_redistribute(
    Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor z, Tensor reward,
    Tensor mean, Tensor invstd, bool training, int64_t rule, Params params, bool need_input,
    bool need_weight, bool need_bias, int64_t chain) {
  const Device device(x);
  const char* op = "batch_norm_redistribute";
  const Tensor source = dense_any_order(x);
  const int64_t C = x.size(1);
  need_weight = need_weight && weight.has_value();
  need_bias = need_bias && bias.has_value();
  const bool signal_in = chain & kSignalIn;
  const Tensor input = need_input ? torch::stable::empty_like(source) : none_like(x);
  std::optional<Tensor> gamma_feedback, beta_feedback;
  if (need_weight) gamma_feedback = torch::stable::empty_like(dense(*weight));
  if (need_bias) beta_feedback = torch::stable::empty_like(dense(*bias));
  const Tensor r = arranged_like(source, reward), zd = signal_in ? r : arranged_like(source, z);
  const ChannelView view = channel_view(source);
  const bool empty = x.numel() == 0;
  const bool batch = training && need_input && !empty;  // terms of dx
  const bool sums = (batch || need_weight || need_bias) && !empty;
  if (C != 0)
    dispatch_dtype(x.scalar_type(), op, [&](auto element) {
      using T = decltype(element);
      using A = Acc<T>;
      const T *xp = data<T>(source), *zp = data<T>(zd), *rp = data<T>(r);
      T* out = data<T>(input);
      const bool packed = divides(kWide<T>, view) && aligned16(xp, zp, rp, out);
      const Cut cut(view, packed ? kWide<T> : 1, sizeof(T));
      const Tensor partial =
          torch::stable::new_empty(x, {sums ? 2 * cut.partials() : 0}, ScalarType::Double);
      const Tensor terms = torch::stable::new_empty(
          x, {batch ? 2 * C : 0}, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
      Pair* parts = sums ? static_cast<Pair*>(partial.data_ptr()) : nullptr;
      const auto p = rule_params<A>(params);
      const ChannelVector<T> gamma(weight, "weight"), deviation(invstd, "invstd");
      dispatch_rule<A>(rule, op, [&](auto functor) {
        using Rule = decltype(functor);
        Redistribute<T, Rule> body{xp,
                                   zp,
                                   rp,
                                   out,
                                   gamma,
                                   ChannelVector<T>(mean, "mean"),
                                   deviation,
                                   nullptr,
                                   p,
                                   signal_in,
                                   (chain & kSignalOut) != 0};
        const auto run = [&](const Pass& pass) {
          if (packed)
            run_pass<kWide<T>>(cut, body, pass, device.stream);
          else
            run_pass<1>(cut, body, pass, device.stream);
        };
        const bool at_once = need_input && !training;
        if (sums || (at_once && !empty)) run({parts, at_once});
        if (batch || need_weight || need_bias) {
          const Feedback<T> feedback{gamma,
                                     ChannelVector<T>(bias, "bias"),
                                     ChannelVector<T>(gamma_feedback, "weight"),
                                     ChannelVector<T>(beta_feedback, "bias"),
                                     deviation,
                                     batch ? data<A>(terms) : nullptr,
                                     parts,
                                     cut.count(),
                                     p};
          const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(C, kPassWarps));
          feedback_kernel<T, Rule><<<blocks, kPassThreads, 0, device.stream>>>(cut, feedback);
          check_launch();
        }
        body.terms = data<A>(terms);
        if (batch) run({nullptr, true});
      });
    });
  return {input, gamma_feedback.value_or(none_like(x)), beta_feedback.value_or(none_like(x))};
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("batch_norm_forward", TORCH_BOX(&lfp::cuda::batch_norm_forward));
  m.impl("batch_norm_redistribute", TORCH_BOX(&lfp::cuda::batch_norm_redistribute));
}
