// Scans of spiking neurons over time (docs/math.md, section 6).
//
// A thread takes V neighbouring neurons through all steps with their state in registers: currents,
// rewards and membranes are read once, several steps ahead of their use, spikes move as one word of
// V bytes per kPlane steps.
#include "over_time.cuh"

namespace lfp::cuda {
namespace {

constexpr int kThreads = 128;
// Steps that a scan reads ahead: loads in flight for each operand of a thread.
constexpr int kAhead = kPlane, kAheadBack = 4;

template <class N>
inline constexpr bool kAtOnce = false;
template <class A>
inline constexpr bool kAtOnce<Neuron<A, Reset::kSubtractAtOnce>> = true;

// A value per neuron from one value or one per channel.
template <class T>
struct PerChannel {
  const T* values;
  int64_t channels, inner;

  template <int V>
  __device__ void get(int64_t m, Acc<T> (&out)[V]) const {
    int64_t channel = 0, place = 0;
    if (channels > 1) {
      channel = m / inner;
      place = m - channel * inner;
      channel %= channels;
    }
    Acc<T> value = load(values, channel);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      out[k] = value;
      if (k + 1 < V && channels > 1 && ++place == inner) {
        place = 0;
        if (++channel == channels) channel = 0;
        value = load(values, channel);
      }
    }
  }
};

template <class T>
struct Forward {
  const T *current, *state;
  PerChannel<T> beta, threshold;
  uint8_t* bits;
  T *membrane, *last;
  int64_t neurons, steps, rows;  // rows of currents: all steps, or one for every step
};

template <class T, int V, class N>
__global__ void __launch_bounds__(kThreads, 4) forward_scan_kernel(Forward<T> f) {
  using A = Acc<T>;
  const int64_t m = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (m >= f.neurons) return;
  // Slot t % kAhead holds the current of step t; a current for every step stays in all of them.
  Raw<T, V> ahead[kAhead];
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < f.rows)
      ahead[s].read(f.current + s * f.neurons + m);
    else
      ahead[s] = ahead[0];
  }
  A beta[V], threshold[V], u[V] = {};
  f.beta.get(m, beta);
  f.threshold.get(m, threshold);
  if (f.state) load<V>(f.state, m, u);
  for (int64_t first = 0; first < f.steps; first += kPlane) {
    Word<V> packed = 0;
#pragma unroll
    for (int s = 0; s < kPlane; ++s) {
      const int64_t t = first + s;
      if (t >= f.steps) break;
      A current[V];
      ahead[s].get(current);
      if (t + kAhead < f.rows) ahead[s].read(f.current + (t + kAhead) * f.neurons + m);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const N neuron{beta[k], threshold[k]};
        bool spike;
        u[k] = static_cast<A>(static_cast<T>(neuron.step(u[k], current[k], spike)));
        if constexpr (!kAtOnce<N>) spike = neuron.fires(u[k]);
        packed |= static_cast<Word<V>>(static_cast<Word<V>>(spike) << (8 * k + s));
      }
      if (f.membrane) store<V>(f.membrane, t * f.neurons + m, u);
    }
    *reinterpret_cast<Word<V>*>(f.bits + first / kPlane * f.neurons + m) = packed;
  }
  store<V>(f.last, m, u);
}

template <class T>
struct Backward {
  const T *reward, *membrane, *state, *carry;
  const uint8_t* bits;
  PerChannel<T> beta, threshold;
  T *signal, *carried, *beta_sum, *threshold_sum;  // no sums: null
  int64_t neurons, steps;
  Acc<T> eps;
  bool sums, as_reward;

  // The membrane after step t; t = -1: before the first one.
  template <int V>
  __device__ void read_membrane(int64_t t, int64_t m, Raw<T, V>& to) const {
    if (t >= 0)
      to.read(membrane + t * neurons + m);
    else if (t == -1 && state)
      to.read(state + m);
    else
      to.bits = {};
  }
};

template <class T, int V, class N>
__global__ void __launch_bounds__(kThreads) backward_scan_kernel(Backward<T> f) {
  using A = Acc<T>;
  const int64_t m = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (m >= f.neurons) return;
  const int64_t last = f.steps - 1;
  // Slot t % kAheadBack holds the reward and the membrane of step t; a step uses its own reward and
  // the membrane before it, its own membrane is left over from the step after it.
  Raw<T, V> rewards[kAheadBack] = {}, membranes[kAheadBack] = {};
#pragma unroll
  for (int s = 0; s < kAheadBack; ++s) {
    const int64_t t = last - ((last - s) & (kAheadBack - 1));
    const int64_t before = last - 1 - ((last - 1 - s) & (kAheadBack - 1));
    if (t >= 0) rewards[s].read(f.reward + t * f.neurons + m);
    f.read_membrane(before, m, membranes[s]);
  }
  A beta[V], threshold[V], u[V] = {}, carry[V] = {}, total[V] = {};
  A beta_sum[V] = {}, threshold_sum[V] = {};
  f.beta.get(m, beta);
  f.threshold.get(m, threshold);
  if (last >= 0) load<V>(f.membrane, last * f.neurons + m, u);
  if (f.carry) load<V>(f.carry, m, carry);
  Word<V> packed = 0;
  for (int64_t first = last & ~int64_t(kAheadBack - 1); first >= 0; first -= kAheadBack) {
    if constexpr (kAtOnce<N>)
      if (first % kPlane != 0 || first + kAheadBack > last)
        packed = spikes_at<V>(f.bits, first / kPlane * f.neurons + m);
    const int shift = static_cast<int>(first % kPlane);
#pragma unroll
    for (int s = kAheadBack - 1; s >= 0; --s) {
      const int64_t t = first + s;
      if (t > last) continue;
      A reward[V], before[V], out[V];
      rewards[s].get(reward);
      membranes[(s + kAheadBack - 1) % kAheadBack].get(before);
      if (t >= kAheadBack) {
        rewards[s].read(f.reward + (t - kAheadBack) * f.neurons + m);
        f.read_membrane(t - 1 - kAheadBack, m, membranes[(s + kAheadBack - 1) % kAheadBack]);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const N neuron{beta[k], threshold[k]};
        const bool spike = (packed >> (8 * k + s + shift)) & 1;
        const auto step = neuron.feedback(reward[k], carry[k], u[k], before[k], spike, f.eps);
        carry[k] = step.carry;
        u[k] = before[k];
        out[k] = f.as_reward ? times(step.signal, step.current) : step.signal;
        if (f.beta_sum) {
          beta_sum[k] += times(step.entering, step.signal);
          threshold_sum[k] -= times(step.signal, step.resets ? A(2) : A(1));
        }
        if (f.sums) total[k] += out[k];
      }
      if (!f.sums) store<V>(f.signal, t * f.neurons + m, out);
    }
  }
  store<V>(f.carried, m, carry);
  if (f.sums) store<V>(f.signal, m, total);
  if (f.beta_sum) {
    store<V>(f.beta_sum, m, beta_sum);
    store<V>(f.threshold_sum, m, threshold_sum);
  }
}

template <class T>
PerChannel<T> per_channel(const Tensor& t, int64_t inner) {
  return {data<T>(t), t.numel(), inner};
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> lif_forward(Tensor current, std::optional<Tensor> state,
                                               Tensor beta, Tensor threshold, int64_t inner,
                                               int64_t steps, int64_t reset, bool keep) {
  const Device device(current);
  current = dense(current), beta = dense(beta), threshold = dense(threshold);
  if (state) state = dense(*state);
  const int64_t neurons = current.size(1);
  Tensor bits = torch::stable::new_empty(current, {ceil_div<int64_t>(steps, kPlane), neurons},
                                         ScalarType::Byte);
  Tensor membrane = keep ? empty_like(current, {steps, neurons}) : none_like(current);
  Tensor last = empty_like(current, {neurons});
  dispatch_dtype(current.scalar_type(), "lif_forward", [&](auto element) {
    using T = decltype(element);
    const Forward<T> f{data<T>(current),
                       data_or_null<T>(state),
                       per_channel<T>(beta, inner),
                       per_channel<T>(threshold, inner),
                       data<uint8_t>(bits),
                       keep ? data<T>(membrane) : nullptr,
                       data<T>(last),
                       neurons,
                       steps,
                       current.size(0)};
    const bool known = dispatch_reset<Acc<T>>(reset, [&](auto kind) {
      if (neurons == 0) return;
      const auto run = [&](auto width) {
        constexpr int V = decltype(width)::value;
        forward_scan_kernel<T, V, decltype(kind)>
            <<<grid_over<V, kThreads>(neurons), kThreads, 0, device.stream>>>(f);
      };
      dispatch_width<T>(neurons, f.bits, run, f.current, f.state, f.membrane, f.last);
      check_launch();
    });
    LFP_CHECK(known, "lif_forward", "unknown reset code ", reset);
  });
  return {bits, membrane, last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lif_feedback(Tensor reward, Tensor membrane, Tensor bits,
                                                        std::optional<Tensor> state,
                                                        std::optional<Tensor> carry, Tensor beta,
                                                        Tensor threshold, int64_t inner, double eps,
                                                        int64_t reset, bool sums, bool as_reward,
                                                        bool need_parameters) {
  const Device device(reward);
  reward = dense(reward), membrane = dense(membrane), bits = dense(bits);
  beta = dense(beta), threshold = dense(threshold);
  if (state) state = dense(*state);
  if (carry) carry = dense(*carry);
  const int64_t steps = reward.size(0), neurons = reward.size(1);
  Tensor signal = empty_like(reward, {sums ? 1 : steps, neurons});
  Tensor carried = empty_like(reward, {neurons});
  Tensor beta_sum = empty_like(reward, {need_parameters ? neurons : 0});
  Tensor threshold_sum = empty_like(reward, {need_parameters ? neurons : 0});
  dispatch_dtype(reward.scalar_type(), "lif_feedback", [&](auto element) {
    using T = decltype(element);
    const Backward<T> f{data<T>(reward),
                        data<T>(membrane),
                        data_or_null<T>(state),
                        data_or_null<T>(carry),
                        data<uint8_t>(bits),
                        per_channel<T>(beta, inner),
                        per_channel<T>(threshold, inner),
                        data<T>(signal),
                        data<T>(carried),
                        need_parameters ? data<T>(beta_sum) : nullptr,
                        need_parameters ? data<T>(threshold_sum) : nullptr,
                        neurons,
                        steps,
                        Acc<T>(eps),
                        sums,
                        as_reward};
    const bool known = dispatch_reset<Acc<T>>(reset, [&](auto kind) {
      if (neurons == 0) return;
      const auto run = [&](auto width) {
        constexpr int V = decltype(width)::value;
        backward_scan_kernel<T, V, decltype(kind)>
            <<<grid_over<V, kThreads>(neurons), kThreads, 0, device.stream>>>(f);
      };
      dispatch_width<T>(neurons, f.bits, run, f.reward, f.membrane, f.state, f.carry, f.signal,
                        f.carried, f.beta_sum, f.threshold_sum);
      check_launch();
    });
    LFP_CHECK(known, "lif_feedback", "unknown reset code ", reset);
  });
  return {signal, carried, beta_sum, threshold_sum};
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("lif_forward", TORCH_BOX(&lfp::cuda::lif_forward));
  m.impl("lif_feedback", TORCH_BOX(&lfp::cuda::lif_feedback));
}
