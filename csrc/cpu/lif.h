// Tiles of spiking neurons that go through all time steps with their state in the nearest cache
// (docs/math.md, section 6).
#pragma once

#include <array>
#include <cmath>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")  // of everything behind this line: see neuron.h
#endif

#include "../neuron.h"
#include "loops.h"

namespace lfp::cpu {

constexpr int64_t kTile = 128;  // neurons

template <class A>
struct Values {
  std::array<A, kTile> beta, threshold;
};

// beta and threshold of the neurons m .. m + count - 1.
template <class T>
Values<Acc<T>> parameters_of(const Tensor& beta, const Tensor& threshold, int64_t inner, int64_t m,
                             int64_t count) {
  Values<Acc<T>> v;
  const auto fill = [&](const Tensor& from, auto& to) {
    const int64_t channels = from.numel();
    const T* p = data<T>(from);
    for (int64_t i = 0; i < count; ++i)
      to[i] = load(p, channels == 1 ? 0 : ((m + i) / inner) % channels);
  };
  fill(beta, v.beta);
  fill(threshold, v.threshold);
  return v;
}

// One step of a tile: u becomes the membrane after it; spikes are set in bit `shift` of `bits`.
template <class T, class N>
LFP_CLONES void forward_step(const T* current, const Values<Acc<T>>& v, int64_t count, int shift,
                             Acc<T>* u, uint8_t* bits, T* membrane) {
  using A = Acc<T>;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const N neuron{v.beta[i], v.threshold[i]};
    bool spike;
    const A after = static_cast<A>(static_cast<T>(neuron.step(u[i], load(current, i), spike)));
    u[i] = after;
    if (membrane) membrane[i] = static_cast<T>(after);
    if constexpr (!std::is_same_v<N, Neuron<A, Reset::kSubtractAtOnce>>)
      spike = neuron.fires(after);
    bits[i] |= static_cast<uint8_t>(static_cast<int>(spike) << shift);
  }
}

// What the backward scan of a tile carries from step to step, and what a step leaves behind.
template <class A>
struct Backward {
  std::array<A, kTile> carry{}, total{}, beta{}, threshold{};
  std::array<A, kTile> signal, current, entering, resets;
};

template <class T, class N>
LFP_CLONES void feedback_step(const T* reward, const T* membrane, const T* before,
                              const uint8_t* bits, int shift, const Values<Acc<T>>& v, Acc<T> eps,
                              int64_t count, Backward<Acc<T>>& b) {
  using A = Acc<T>;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const N neuron{v.beta[i], v.threshold[i]};
    const auto f = neuron.feedback(load(reward, i), b.carry[i], load(membrane, i), load(before, i),
                                   (bits[i] >> shift) & 1, eps);
    b.carry[i] = f.carry;
    b.signal[i] = f.signal;
    b.current[i] = f.current;
    b.entering[i] = f.entering;
    b.resets[i] = f.resets ? A(2) : A(1);
  }
}

// Signals or rewards of the step: added to the tile's sum over time, or stored.
template <class T>
LFP_CLONES void hand_on(bool sums, bool as_reward, int64_t count, Backward<Acc<T>>& b, T* signal) {
  if (as_reward)
    for (int64_t i = 0; i < count; ++i) b.signal[i] *= b.current[i];
  if (sums)
    for (int64_t i = 0; i < count; ++i) b.total[i] += b.signal[i];
  else
    for (int64_t i = 0; i < count; ++i) store(signal, i, b.signal[i]);
}

template <class A>
LFP_CLONES void add_parameters(int64_t count, Backward<A>& b) {
  for (int64_t i = 0; i < count; ++i) {
    b.beta[i] += b.entering[i] * b.signal[i];
    b.threshold[i] -= b.signal[i] * b.resets[i];
  }
}

}  // namespace lfp::cpu
