// Normal numbers in blocks, vectorized: the same stream as normal() in neuron.h to the last bits.
#pragma once

#include <array>
#include <bit>

#include "../neuron.h"
#include "loops.h"

namespace lfp::cpu {

constexpr int64_t kBlocks = 64;          // Philox blocks at a time
constexpr int64_t kDraws = 4 * kBlocks;  // normal numbers at a time

// log(u) of u in (0, 1]: u = 2^e m with m in [sqrt(1/2), sqrt(2)), and the series of
// log m = 2 atanh((m - 1) / (m + 1)), whose next term is below 1e-9.
LFP_HD float log_unit(float u) {
  const int32_t bits = std::bit_cast<int32_t>(u);
  const int32_t shifted = bits - 0x3f3504f3;  // sqrt(1/2)
  const int32_t e = shifted >> 23;
  const float m = std::bit_cast<float>(bits - e * (1 << 23));
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const float series = 1.0f + q * (0.33333333f + q * (0.2f + q * (0.14285714f + q * 0.11111111f)));
  return static_cast<float>(e) * 0.69314718f + 2.0f * s * series;
}

// cos(2 pi v) and sin(2 pi v) of v in [0, 1): the nearest quarter turn, and Taylor's series within
// an eighth of a turn.
LFP_HD void turn(float v, float& cosine, float& sine) {
  const int32_t quarter = static_cast<int32_t>(4.0f * v + 0.5f);
  const float a = 6.2831853f * (v - 0.25f * static_cast<float>(quarter)), q = a * a;
  const float s =
      a * (1.0f + q * (-1.0f / 6 + q * (1.0f / 120 + q * (-1.0f / 5040 + q * (1.0f / 362880)))));
  const float c = 1.0f + q * (-0.5f + q * (1.0f / 24 + q * (-1.0f / 720 + q * (1.0f / 40320))));
  const bool swap = quarter & 1;
  const float x = swap ? s : c, y = swap ? c : s;
  cosine = ((quarter + 1) & 2) ? -x : x;
  sine = (quarter & 2) ? -y : y;
}

// The normal numbers of the blocks first .. first + kBlocks - 1 of the stream of `seed`.
LFP_CLONES inline void draw(uint64_t first, uint64_t seed, float* z) {
  std::array<uint32_t, kBlocks> words[4];
  for (int64_t i = 0; i < kBlocks; ++i) {
    const PhiloxBlock block = philox(first + static_cast<uint64_t>(i), seed);
    for (int k = 0; k < 4; ++k) words[k][static_cast<size_t>(i)] = block.word[k];
  }
  for (int pair = 0; pair < 4; pair += 2)
    for (int64_t i = 0; i < kBlocks; ++i) {
      const float u = unit_interval<float>(words[pair][static_cast<size_t>(i)]) + 0x1p-24f;
      float cosine, sine;
      turn(unit_interval<float>(words[pair + 1][static_cast<size_t>(i)]), cosine, sine);
      const float radius = std::sqrt(-2.0f * log_unit(u));
      z[4 * i + pair] = radius * cosine;
      z[4 * i + pair + 1] = radius * sine;
    }
}

// f(i, normal number of element index + i) for i in [begin, end).
template <class A, class F>
void with_noise(int64_t begin, int64_t end, int64_t index, uint64_t seed, F f) {
  if constexpr (std::is_same_v<A, double>) {
    for (int64_t i = begin; i < end; ++i) f(i, normal<double>(index + i, seed));
  } else {
    std::array<float, kDraws> z;
    for (int64_t i = begin; i < end;) {
      const int64_t block = (index + i) / 4, stop = std::min(end, 4 * block + kDraws - index);
      draw(static_cast<uint64_t>(block), seed, z.data());
      const float* at = z.data() + (index - 4 * block);
      for (; i < stop; ++i) f(i, at[i]);
    }
  }
}

}  // namespace lfp::cpu
