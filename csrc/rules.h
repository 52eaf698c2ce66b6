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

// Function codes, four bits each in a rule's code; lfp_kernels/rules/base.py holds the same
// numbers.
enum class Prologue {
  kDivide,           // r / stab(z)
  kIdentity,         // r
  kZero,             // r / z, 0 where z = 0
  kTimesOutput,      // r * z
  kReversePositive,  // -r / stab(z) where z > 0
  kReverseNegative,  // -r / stab(z) where z < 0
};
enum class Matrix {
  kWeight,      // W
  kGiven,       // B, a tensor of W's shape
  kSign,        // a * sign(W)
  kGivenSign,   // |B| * sign(W)
  kRandomSign,  // a * U[0,1) * sign(W)
  kNoisy,       // B + a * (U[0,1) - 0.5)
};
enum class InputEpilogue { kTimesInput, kIdentity };
enum class WeightEpilogue { kMagnitude, kIdentity };
enum class Signals {
  kOne,        // one signal: the prologue
  kPlus,       // r / stab(P), 0
  kAlphaBeta,  // a r / stab(P), -b r / stab(N)
  kGamma,      // the sign of z decides which side is raised by 1 + a
};
enum class Parts {
  kSign,  // max(x, 0), min(x, 0)
  kOnes,  // 1, 0
  kBox,   // x - a, x - b
};
enum class Map { kValue, kSquare, kOnes };

// Optimizer codes; lfp_kernels/optim.py holds the same numbers.
// kFrozen: the rule reads the parameter (a bias, which counts in P and N) and nothing updates it.
enum OptimizerCode : int64_t { kFrozen = -1, kSgd = 0, kSgdMomentum = 1, kAdamW = 2 };
// Chain bits: kSignalIn = the reward that arrives is already the signal s of this layer;
// kSignalOut = hand the layer below its signal x / stab(x) * g instead of its reward x * g;
// kNonnegative = x is nowhere negative; the last three = times the derivative of the activation
// whose output x is.
enum ChainBit : int64_t {
  kSignalIn = 1,
  kSignalOut = 2,
  kNonnegative = 4,
  kReluBelow = 8,
  kTanhBelow = 16,
  kSigmoidBelow = 32
};

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

// The functions of one rule, from its code.
struct RuleCode {
  Prologue prologue;
  Matrix matrix;
  InputEpilogue input;
  WeightEpilogue weight;
  Signals signals;
  Parts parts;
  Map map;

  RuleCode() = default;
  explicit LFP_HD RuleCode(int64_t code)
      : prologue(static_cast<Prologue>(code & 15)),
        matrix(static_cast<Matrix>(code >> 4 & 15)),
        input(static_cast<InputEpilogue>(code >> 8 & 15)),
        weight(static_cast<WeightEpilogue>(code >> 12 & 15)),
        signals(static_cast<Signals>(code >> 16 & 15)),
        parts(static_cast<Parts>(code >> 20 & 15)),
        map(static_cast<Map>(code >> 24 & 15)) {}

  LFP_HD bool split() const { return signals != Signals::kOne; }
  LFP_HD bool takes_matrix() const {
    return matrix == Matrix::kGiven || matrix == Matrix::kGivenSign || matrix == Matrix::kNoisy;
  }
  LFP_HD bool draws() const { return matrix == Matrix::kRandomSign || matrix == Matrix::kNoisy; }
};

// Run-time parameters of a rule. `below` is the eps of the layer below, for kSignalOut; a and b are
// what the functions above name so; seed is the key of the random matrices.
template <class T>
struct RuleParams {
  T eps;
  T below;
  T a, b;
  uint64_t seed;
};

// 0 at both zeros; NaN stays NaN.
template <class T>
LFP_HD T sign(T v) {
  return v > T(0) ? T(1) : v < T(0) ? T(-1) : v;
}

// s = prologue(r, z)
template <Prologue kind, class T>
LFP_HD T prologue(T r, T z, RuleParams<T> p) {
  if constexpr (kind == Prologue::kIdentity) return r;
  if constexpr (kind == Prologue::kZero) return z == T(0) ? T(0) : r / z;
  if constexpr (kind == Prologue::kTimesOutput) return r * z;
  if constexpr (kind == Prologue::kReversePositive) r = z > T(0) ? -r : r;
  if constexpr (kind == Prologue::kReverseNegative) r = z < T(0) ? -r : r;
  return r / stabilize(z, p.eps);
}

// M of the input product from the weight, the given matrix and a draw from U[0,1).
template <Matrix kind, class T>
LFP_HD T matrix(T w, T given, T draw, RuleParams<T> p) {
  if constexpr (kind == Matrix::kGiven) return given;
  if constexpr (kind == Matrix::kSign) return p.a * sign(w);
  if constexpr (kind == Matrix::kGivenSign) return magnitude(given) * sign(w);
  if constexpr (kind == Matrix::kRandomSign) return p.a * draw * sign(w);
  if constexpr (kind == Matrix::kNoisy) return given + p.a * (draw - T(0.5));
  return w;
}

template <InputEpilogue kind, class T>
LFP_HD T input_epilogue(T g, T x) {
  return kind == InputEpilogue::kTimesInput ? g * x : g;
}

template <WeightEpilogue kind, class T>
LFP_HD T weight_epilogue(T f, T w) {
  return kind == WeightEpilogue::kMagnitude ? f * magnitude(w) : f;
}

// g times the derivative of the activation below, from its output x.
template <class T>
LFP_HD T derivative_below(T g, T x, int64_t chain) {
  if (chain & kReluBelow) return x > T(0) ? g : T(0);
  if (chain & kTanhBelow) return g * (T(1) - x * x);
  return chain & kSigmoidBelow ? g * (x * (T(1) - x)) : g;
}

// Rules with two signals (docs/math.md, section 3): u for positive, v for negative contributions.
template <class T>
struct Sides {
  T u, v;
};

template <class T>
LFP_HD Sides<T> signals(Signals kind, T r, T z, T positive, T negative, RuleParams<T> p) {
  if (kind == Signals::kAlphaBeta)
    return {p.a * r / stabilize(positive, p.eps), -p.b * r / stabilize(negative, p.eps)};
  if (kind == Signals::kGamma) {
    const T raised = T(1) + p.a, up = z > T(0) ? raised : T(1), down = z > T(0) ? T(1) : raised;
    const T s = z == T(0) ? T(0) : r / stabilize(up * positive + down * negative, p.eps);
    return {up * s, down * s};
  }
  return {r / stabilize(positive, p.eps), T(0)};
}

// max(v, 0) and min(v, 0); NaN stays NaN.
template <class T>
LFP_HD T positive_part(T v) {
  return v < T(0) ? T(0) : v;
}

template <class T>
LFP_HD T negative_part(T v) {
  return v > T(0) ? T(0) : v;
}

template <class T>
LFP_HD T part_a(Parts kind, T x, RuleParams<T> p) {
  if (kind == Parts::kOnes) return T(1);
  return kind == Parts::kBox ? x - p.a : positive_part(x);
}

template <class T>
LFP_HD T part_b(Parts kind, T x, RuleParams<T> p) {
  if (kind == Parts::kOnes) return T(0);
  return kind == Parts::kBox ? x - p.b : negative_part(x);
}

// The map of the weight whose sign parts it; the bias of box and flat counts nothing.
template <class T>
LFP_HD T mapped(Map kind, T w) {
  return kind == Map::kSquare ? w * w : kind == Map::kOnes ? T(1) : w;
}

template <class T>
LFP_HD T mapped_bias(RuleCode code, T b) {
  return code.parts == Parts::kBox || code.map == Map::kOnes ? T(0) : mapped(code.map, b);
}

// The functions of one rule together, for operators without a weight matrix.
template <class T, Prologue P, InputEpilogue I, WeightEpilogue W>
struct RuleOf {
  static LFP_HD T prologue(T r, T z, RuleParams<T> p) { return lfp::prologue<P>(r, z, p); }
  static LFP_HD T input_epilogue(T g, T x, RuleParams<T>) { return lfp::input_epilogue<I>(g, x); }
  static LFP_HD T weight_epilogue(T f, T w, RuleParams<T>) { return lfp::weight_epilogue<W>(f, w); }
};
template <class T>
using Epsilon =
    RuleOf<T, Prologue::kDivide, InputEpilogue::kTimesInput, WeightEpilogue::kMagnitude>;
template <class T>
using Zero = RuleOf<T, Prologue::kZero, InputEpilogue::kTimesInput, WeightEpilogue::kMagnitude>;
template <class T>
using Gradient =
    RuleOf<T, Prologue::kIdentity, InputEpilogue::kIdentity, WeightEpilogue::kIdentity>;
constexpr int64_t kEpsilon = 0x0000, kZero = 0x0002, kGradient = 0x1101;

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
