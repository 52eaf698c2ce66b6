// Initial rewards at the logits o[N,C]: one read of each row, one write.
//   reward             labels[N], target values of o's shape, or no target at all
//   reward_spike_rate  spikes[T,N,C], rate coded
// A label outside [0, C) makes its row NaN: no memory is misread, whoever calls the operator.
#include <limits>

#include "../reward_dispatch.h"
#include "exponential.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kRowGrain = 2048;     // elements per thread: each costs an exponential
constexpr int64_t kColumnBlock = 1024;  // neurons whose spikes are counted at a time

template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// q[C] = softmax(o[C])
template <class T>
LFP_CLONES void softmax_row(const T* o, Acc<T>* q, int64_t classes) {
  using A = Acc<T>;
  constexpr int64_t kParts = 16;
  const int64_t whole = classes - classes % kParts;
  A tops[kParts], sums[kParts] = {};
  for (A& t : tops) t = load(o, 0);
  for (int64_t k = 0; k < whole; k += kParts)
    for (int64_t i = 0; i < kParts; ++i) tops[i] = std::max(tops[i], load(o, k + i));
  for (int64_t k = whole; k < classes; ++k) tops[0] = std::max(tops[0], load(o, k));
  const A top = *std::max_element(tops, tops + kParts);
  for (int64_t k = 0; k < whole; k += kParts)
    for (int64_t i = 0; i < kParts; ++i) sums[i] += q[k + i] = fast_exp(load(o, k + i) - top);
  for (int64_t k = whole; k < classes; ++k) sums[k - whole] += q[k] = fast_exp(load(o, k) - top);
  A total = 0;
  for (A sum : sums) total += sum;
  for (int64_t k = 0; k < classes; ++k) q[k] /= total;
}

// The first of the largest logits; a NaN counts as the largest, as in torch.argmax.
template <class T>
int64_t winner(const T* o, int64_t classes) {
  int64_t best = 0;
  for (int64_t k = 0; k < classes; ++k) {
    if (std::isnan(load(o, k))) return k;
    if (load(o, k) > load(o, best)) best = k;
  }
  return best;
}

// result[C] for one row; label -1 targets every neuron.
template <class T, class Reward>
void reward_row(const T* o, T* result, Acc<T>* q, int64_t classes, int64_t label,
                RewardParams<Acc<T>> p) {
  using A = Acc<T>;
  if (label < -1 || label >= classes)
    return serial_loop(0, classes, [=](int64_t k) { store(result, k, kNaN<A>); });
  if constexpr (Reward::kRow == RowQuantity::kProbability) softmax_row(o, q, classes);
  if constexpr (Reward::kRow == RowQuantity::kIsWinner) {
    std::fill(q, q + classes, A(0));
    q[winner(o, classes)] = A(1);
  }
  if constexpr (Reward::kRow == RowQuantity::kLabelLogit) std::fill(q, q + classes, load(o, label));
  if constexpr (Reward::kRow == RowQuantity::kNone) std::fill(q, q + classes, A(0));
  for (int64_t k = 0; k < classes; ++k) {
    const A y = label < 0 || k == label ? A(1) : A(0);
    store(result, k, Reward::value(load(o, k), y, q[k], p));
  }
}

// labels null: every row targets `neuron`.
template <class T>
void reward_rows(const Tensor& out, const int64_t* labels, int64_t neuron, Tensor& result,
                 int64_t kind, RewardParams<Acc<T>> p) {
  using A = Acc<T>;
  const int64_t classes = out.size(out.dim() - 1), rows = out.numel() / classes;
  const T* o = data<T>(out);
  T* to = data<T>(result);
  dispatch_row_reward<A>(kind, [&](auto functor) {
    using Reward = decltype(functor);
    const int64_t grain = std::max<int64_t>(1, kRowGrain / classes);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
      std::vector<A> q(classes);
      for (int64_t n = first; n < last; ++n) {
        // A negative label must not pass for "every neuron".
        const int64_t label = !labels ? neuron : labels[n] < 0 ? classes : labels[n];
        reward_row<T, Reward>(o + n * classes, to + n * classes, q.data(), classes, label, p);
      }
    });
  });
}

template <class T, class Reward>
void reward_values(const Tensor& out, const Tensor& target, Tensor& result) {
  const T *o = data<T>(out), *t = data<T>(target);
  T* to = data<T>(result);
  parallel_loop(out.numel(), [=](int64_t i) {
    store(to, i, Reward::value(load(o, i), load(t, i), Acc<T>(0), RewardParams<Acc<T>>{}));
  });
}

// params = [low, high, sign, neuron]
Tensor reward(Tensor out, std::optional<Tensor> target, int64_t kind, Params params) {
  const Tensor o = dense(out);
  Tensor result = empty_like(o, Ints(o.sizes().begin(), o.sizes().end()));
  if (o.numel() == 0) return result;
  dispatch_dtype(o.scalar_type(), "reward", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    if (kind == kBinarySigmoid || kind == kRegression) {
      LFP_CHECK(target.has_value() && target->numel() == o.numel(), "reward",
                "expected one target per output");
      const Tensor t = dense(*target);
      if (kind == kRegression) return reward_values<T, RegressionReward<A>>(o, t, result);
      return reward_values<T, SigmoidReward<A>>(o, t, result);
    }
    const RewardParams<A> p{A(params.at(0)), A(params.at(1)), A(params.at(2))};
    if (!target.has_value()) {
      LFP_CHECK(kind == kMaximize || kind == kMinimize, "reward", "expected labels");
      return reward_rows<T>(o, nullptr, static_cast<int64_t>(params.at(3)), result, kind, p);
    }
    LFP_CHECK(target->numel() * o.size(o.dim() - 1) == o.numel(), "reward",
              "expected one label per row");
    const Tensor labels = dense(*target);
    reward_rows<T>(o, data<int64_t>(labels), -1, result, kind, p);
  });
  return result;
}

// Rewards at every step are constant + factor * spike, with one constant and factor per neuron:
//   true class  1 - sigma(sum_t s - T/2);   others  -s * (1 - sigma(sum_t (1 - s) - T/2))
template <class T>
void spike_rate_block(const T* spikes, const int64_t* labels, T* result, int64_t steps,
                      int64_t neurons, int64_t classes, int64_t begin, int64_t count,
                      Acc<T>* constant, Acc<T>* factor) {
  using A = Acc<T>;
  std::fill(constant, constant + count, A(0));
  for (int64_t t = 0; t < steps; ++t) {
    const T* s = spikes + t * neurons + begin;
    serial_loop(0, count, [=](int64_t j) { constant[j] += load(s, j); });
  }
  const A half = A(steps / 2);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t label = labels[(begin + j) / classes];
    const A fired = constant[j], silent = A(steps) - fired;
    const bool is_true = (begin + j) % classes == label;
    constant[j] = is_true ? A(1) - sigmoid(fired - half) : A(0);
    factor[j] = is_true ? A(0) : sigmoid(silent - half) - A(1);
    if (label < 0 || label >= classes) constant[j] = kNaN<A>;
  }
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = t * neurons + begin;
    serial_loop(0, count, [=](int64_t j) {
      store(result, at + j, constant[j] + factor[j] * load(spikes, at + j));
    });
  }
}

Tensor reward_spike_rate(Tensor spikes, Tensor labels) {
  const Tensor s = dense(spikes), y = dense(labels);
  Tensor result = empty_like(s, Ints(s.sizes().begin(), s.sizes().end()));
  if (s.numel() == 0) return result;
  const int64_t steps = s.size(0), neurons = s.numel() / steps, classes = s.size(s.dim() - 1);
  LFP_CHECK(y.numel() * classes == neurons, "reward_spike_rate", "expected one label per row");
  dispatch_dtype(s.scalar_type(), "reward_spike_rate", [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = (neurons + kColumnBlock - 1) / kColumnBlock;
    const int64_t grain = std::max<int64_t>(1, kGrain / (kColumnBlock * steps));
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
      std::vector<Acc<T>> constant(kColumnBlock), factor(kColumnBlock);
      for (int64_t k = first; k < last; ++k) {
        const int64_t begin = k * kColumnBlock;
        spike_rate_block<T>(data<T>(s), data<int64_t>(y), data<T>(result), steps, neurons, classes,
                            begin, std::min(kColumnBlock, neurons - begin), constant.data(),
                            factor.data());
      }
    });
  });
  return result;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("reward", TORCH_BOX(&lfp::cpu::reward));
  m.impl("reward_spike_rate", TORCH_BOX(&lfp::cpu::reward_spike_rate));
}
