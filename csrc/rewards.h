// Initial rewards at the logits o (docs/math.md, section 5), one functor per reward.
// No torch and no CUDA headers: g++ and nvcc compile the same text.
#pragma once

#include "rules.h"

namespace lfp {

// Reward codes; lfp_kernels/ops/reward/codes.py holds the same numbers.
enum RewardCode : int64_t {
  kSoftmax = 0,
  kSigmoid = 1,
  kMaximize = 2,
  kMinimize = 3,
  kBoundedSoftmax = 4,
  kCorrectClassification = 5,
  kMisclassification = 6,
  kBinarySigmoid = 7,
  kRegression = 8
};

// What a reward must know of the whole row o[C] before it can give one value: nothing, the softmax
// p, whether the logit is the row's first maximum, or the logit of the label.
enum class RowQuantity { kNone, kProbability, kIsWinner, kLabelLogit };

template <class T>
struct RewardParams {
  T low, high, use_sign;  // bounded softmax
};

template <class T>
LFP_HD T exponential(T v) {
#if defined(__CUDA_ARCH__)
  return exp(v);
#else
  return std::exp(v);
#endif
}

template <class T>
LFP_HD T sigmoid(T v) {
  return T(1) / (T(1) + exponential(-v));
}

// value(o, y, q): logit, target (one-hot entry or value), row quantity. NaN logits give NaN.
template <class T>
struct SoftmaxReward {
  static constexpr RowQuantity kRow = RowQuantity::kProbability;
  static LFP_HD T value(T o, T y, T p, RewardParams<T>) { return o * (y - p); }
};

template <class T>
struct BoundedSoftmaxReward {
  static constexpr RowQuantity kRow = RowQuantity::kProbability;
  static LFP_HD T value(T o, T y, T p, RewardParams<T> params) {
    const T bounded = p > params.high ? T(1) : p < params.low ? T(0) : p;
    return (params.use_sign != T(0) ? sign(o) : o) * (y - bounded);
  }
};

template <class T>
struct SigmoidReward {
  static constexpr RowQuantity kRow = RowQuantity::kNone;
  static LFP_HD T value(T o, T y, T, RewardParams<T>) { return o * (y - sigmoid(o)); }
};

template <class T>
struct MaximizeReward {
  static constexpr RowQuantity kRow = RowQuantity::kNone;
  static LFP_HD T value(T o, T y, T, RewardParams<T>) { return y * sign(o) * (T(1) - sigmoid(o)); }
};

template <class T>
struct MinimizeReward {
  static constexpr RowQuantity kRow = RowQuantity::kNone;
  static LFP_HD T value(T o, T y, T, RewardParams<T>) { return -y * sign(o) * (T(1) - sigmoid(o)); }
};

template <class T>
struct CorrectClassificationReward {
  static constexpr RowQuantity kRow = RowQuantity::kIsWinner;
  static LFP_HD T value(T o, T y, T wins, RewardParams<T>) { return y * wins * sign(o); }
};

template <class T>
struct MisclassificationReward {
  static constexpr RowQuantity kRow = RowQuantity::kLabelLogit;
  static LFP_HD T value(T o, T, T label_logit, RewardParams<T>) {
    return (o > label_logit ? T(-1) : T(0)) * sign(o);
  }
};

// Cubic: the target is a value, not a class.
template <class T>
struct RegressionReward {
  static constexpr RowQuantity kRow = RowQuantity::kNone;
  static LFP_HD T value(T o, T t, T, RewardParams<T>) {
    return (t - o) * (t - o) * (t - o) * sign(o);
  }
};

}  // namespace lfp
