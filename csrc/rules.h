// The small functions around the two products, one functor per rule (docs/math.md, section 1).
// No torch and no CUDA headers: g++ and nvcc compile the same text.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LFP_HD __host__ __device__ __forceinline__
#else
#define LFP_HD inline __attribute__((always_inline))
#endif

namespace lfp {

// Rule codes; lfp_kernels/rules.py holds the same numbers.
enum RuleCode : int64_t { kEpsilon = 0, kGradient = 1 };
// Optimizer codes; lfp_kernels/optim.py holds the same numbers.
enum OptimizerCode : int64_t { kSgd = 0, kSgdMomentum = 1, kAdamW = 2 };
// Chain bits: kSignalIn = the reward that arrives is already the signal s of this layer;
// kSignalOut = hand the layer below its signal x / stab(x) * g instead of its reward x * g.
enum ChainBit : int64_t { kSignalIn = 1, kSignalOut = 2 };

template <class T>
LFP_HD T magnitude(T v) {
  return v < T(0) ? -v : v;
}

template <class T>
LFP_HD T square_root(T v) {
#if defined(__CUDA_ARCH__)
  return sqrt(v);
#else
  return std::sqrt(v);
#endif
}

// stab(z) = z + eps * sgn(z), with sgn = +1 at both zeros; NaN and inf stay what they are.
template <class T>
LFP_HD T stabilize(T z, T eps) {
  return z + (z < T(0) ? -eps : eps);
}

// Run-time parameters of a rule. `below` is the eps of the layer below, for kSignalOut.
template <class T>
struct RuleParams {
  T eps;
  T below;
};

// LFP-epsilon: s = r / stab(z), M = W, r_in = x * g, feedback = abs(W) * f.
template <class T>
struct Epsilon {
  static constexpr bool kMatrixIsWeight = true;  // matrix() may be left out
  static LFP_HD T prologue(T r, T z, RuleParams<T> p) { return r / stabilize(z, p.eps); }
  static LFP_HD T matrix(T w) { return w; }
  static LFP_HD T input_epilogue(T g, T x, RuleParams<T>) { return g * x; }
  static LFP_HD T weight_epilogue(T f, T w, RuleParams<T>) { return f * magnitude(w); }
};

// Plain gradient through the same pair of products: every function is the identity.
template <class T>
struct Gradient {
  static constexpr bool kMatrixIsWeight = true;
  static LFP_HD T prologue(T r, T, RuleParams<T>) { return r; }
  static LFP_HD T matrix(T w) { return w; }
  static LFP_HD T input_epilogue(T g, T, RuleParams<T>) { return g; }
  static LFP_HD T weight_epilogue(T f, T, RuleParams<T>) { return f; }
};

// Input epilogue of this layer followed by the epsilon prologue of the layer below, whose output
// is x:  s_below = x * g / stab(x).
template <class T>
LFP_HD T chain_epilogue(T g, T x, RuleParams<T> p) {
  return g * x / stabilize(x, p.below);
}

// Optimizer updates (docs/math.md, section 1, last line). Feedback points uphill, so the descent
// direction is d = -feedback * scale; `scale` is the clip factor of the global norm (1 without).
// `a` and `b` are the state values of this weight; an optimizer with fewer states ignores the rest.
template <class T>
struct OptimizerParams {
  T lr, weight_decay, scale;
  T momentum, nesterov;  // SGD
  // AdamW; correction_i = 1 - beta_i^step and rest_i = 1 - beta_i, both rounded from float64
  T beta1, beta2, eps, correction1, correction2, rest1, rest2;
};

template <class T>
struct Sgd {
  static constexpr int kStates = 0;
  static LFP_HD void apply(T feedback, T& w, T&, T&, OptimizerParams<T> p) {
    w -= p.lr * (p.weight_decay * w - feedback * p.scale);
  }
};

// torch.optim.SGD with dampening 0: m = mu*m + d;  w -= lr * (nesterov ? d + mu*m : m).
template <class T>
struct SgdMomentum {
  static constexpr int kStates = 1;
  static LFP_HD void apply(T feedback, T& w, T& a, T&, OptimizerParams<T> p) {
    const T d = p.weight_decay * w - feedback * p.scale;
    a = p.momentum * a + d;
    w -= p.lr * (p.nesterov != T(0) ? d + p.momentum * a : a);
  }
};

// torch.optim.AdamW: decoupled decay, bias-corrected moments.
template <class T>
struct AdamW {
  static constexpr int kStates = 2;
  static LFP_HD void apply(T feedback, T& w, T& a, T& b, OptimizerParams<T> p) {
    const T d = -feedback * p.scale;
    a += p.rest1 * (d - a);
    b = p.beta2 * b + p.rest2 * d * d;
    const T root = square_root(b / p.correction2) + p.eps;
    w -= p.lr * (p.weight_decay * w + a / p.correction1 / root);
  }
};

}  // namespace lfp
