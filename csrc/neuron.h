// The leaky integrate-and-fire neuron, one time step forwards and one backwards
// (docs/math.md, section 6). No torch and no CUDA headers: g++ and nvcc compile the same text.
//
// Every product and sum rounds by itself, so that all backends make the same spikes from the same
// currents: CUDA code multiplies through `times`, and lif.cpp is compiled without contraction.
#pragma once

#include "philox.h"

namespace lfp {

// Reset codes; lfp_kernels/ops/spiking/codes.py holds the same numbers.
enum class Reset : int64_t { kSubtract = 0, kSubtractAtOnce = 1, kZero = 2, kNone = 3 };

// Time steps in a byte of packed spikes.
constexpr int kPlane = 8;

// A product that no compiler fuses with the sum around it.
template <class A>
LFP_HD A times(A a, A b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == 8)
    return __dmul_rn(a, b);
  else
    return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <class A, Reset reset>
struct Neuron {
  A beta, threshold;
  static constexpr bool kTakesOff = reset == Reset::kSubtract || reset == Reset::kSubtractAtOnce;

  // What is left of the membrane `before` when a step begins.
  LFP_HD A entering(A before) const {
    return reset == Reset::kZero && before > threshold ? A(0) : before;
  }
  // Whether the reset takes the threshold off the charged membrane before the neuron may fire.
  LFP_HD bool resets(A p) const { return kTakesOff && p > threshold; }

  // The membrane after a step; `spike` as the neuron itself sees it. Readers of the stored membrane
  // ask `fires` instead wherever the reset is not at once: it was rounded in between.
  LFP_HD A step(A before, A current, bool& spike) const {
    const A p = entering(before);
    const A v = times(beta, p) + current;
    const A w = resets(p) ? v - threshold : v;
    spike = w > threshold;
    return reset == Reset::kSubtractAtOnce ? (spike ? v - threshold : v) : w;
  }
  LFP_HD bool fires(A membrane) const { return membrane > threshold; }

  struct Feedback {
    A signal, carry, current, entering;
    bool resets;
  };

  // The signal n of a step whose membrane is u after `before`, from its reward r and the carry m of
  // the step after it.
  LFP_HD Feedback feedback(A r, A m, A u, A before, bool spike, A eps) const {
    Feedback f;
    f.entering = entering(before);
    f.resets = resets(f.entering);
    const bool off = reset == Reset::kSubtractAtOnce ? spike : f.resets;
    const A v = off ? u + threshold : u;
    const A change = v - f.entering;
    const A total =
        (f.entering < A(0) ? -f.entering : f.entering) + (change < A(0) ? -change : change);
    f.signal = (r + m) / (total + eps);
    const A decayed = times(beta, f.entering);
    f.carry = times(decayed, f.signal);
    f.current = v - decayed;
    return f;
  }
};

// f(Neuron<A, reset>{}) for a reset code.
template <class A, class F>
bool dispatch_reset(int64_t reset, F&& f) {
  switch (static_cast<Reset>(reset)) {
    case Reset::kSubtract: f(Neuron<A, Reset::kSubtract>{}); return true;
    case Reset::kSubtractAtOnce: f(Neuron<A, Reset::kSubtractAtOnce>{}); return true;
    case Reset::kZero: f(Neuron<A, Reset::kZero>{}); return true;
    case Reset::kNone: f(Neuron<A, Reset::kNone>{}); return true;
  }
  return false;
}

// N(0, 1) of the element `index` by Box-Muller on its Philox block: words 0, 1 for the indices
// 0, 1 modulo 4 (cosine, sine), words 2, 3 for the others.
template <class A>
LFP_HD A normal(int64_t index, uint64_t seed) {
  const PhiloxBlock block = philox(static_cast<uint64_t>(index) >> 2, seed);
  const int pair = index & 2;
  // The first word in (0, 1], so that its logarithm is finite.
  const A u1 = unit_interval<A>(block.word[pair]) + A(1.0 / 16777216.0);
  const A angle = A(6.283185307179586) * unit_interval<A>(block.word[pair + 1]);
#if defined(__CUDA_ARCH__)
  const A radius = sqrt(A(-2) * log(u1));
  return radius * (index & 1 ? sin(angle) : cos(angle));
#else
  const A radius = std::sqrt(A(-2) * std::log(u1));
  return radius * (index & 1 ? std::sin(angle) : std::cos(angle));
#endif
}

}  // namespace lfp
