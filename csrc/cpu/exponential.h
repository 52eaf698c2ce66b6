// The exponential of softmax, in a form that vectorizes.
#pragma once

#include <bit>
#include <cmath>

#include "loops.h"

namespace lfp::cpu {

// exp(x) of x <= about 0, within 2 units in the last place; 0 below the normal numbers.
LFP_HD float fast_exp(float x) {
  const float n = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * r + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  const float value = series * r * r + r + 1.0f;
  const float bounded = n < -126.0f ? -126.0f : (n > 127.0f ? 127.0f : n);
  const float power = std::bit_cast<float>((static_cast<int32_t>(bounded) + 127) << 23);
  return x < -87.0f ? 0.0f : value * power;
}
LFP_HD double fast_exp(double x) { return std::exp(x); }

}  // namespace lfp::cpu
