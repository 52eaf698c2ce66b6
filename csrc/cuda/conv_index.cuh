// Index arithmetic of convolutions. Divisors are known on the host: a division is a multiplication
// by a precomputed reciprocal and a shift.
#pragma once

#include <cstdint>

#include "../rules.h"  // LFP_HD

namespace lfp::cuda {

// n / divisor for 0 <= n < 2^31: with 2^(s-1) < divisor <= 2^s and m = ceil(2^(31+s) / divisor),
// m * divisor - 2^(31+s) < 2^s, so the error of n * m / 2^(31+s) stays below 1 / divisor.
struct FastDivide {
  uint32_t multiplier = 0x80000000u;
  uint32_t shift = 31;
  uint32_t divisor = 1;

  FastDivide() = default;
  LFP_HD explicit FastDivide(uint32_t d) : divisor(d < 1 ? 1 : d) {
    uint32_t s = 0;
    while ((uint64_t(1) << s) < divisor) ++s;
    shift = 31 + s;
    multiplier = static_cast<uint32_t>(((uint64_t(1) << shift) + divisor - 1) / divisor);
  }
  LFP_HD uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>((uint64_t(n) * multiplier) >> shift);
  }
  // n becomes the remainder.
  LFP_HD uint32_t split(uint32_t& n) const {
    const uint32_t quotient = divide(n);
    n -= quotient * divisor;
    return quotient;
  }
};

// The same for 0 <= n < 2^62, with m = ceil(2^(62+s) / divisor).
struct FastDivide64 {
  uint64_t multiplier = uint64_t(1) << 62;
  uint32_t shift = 0;

  FastDivide64() = default;
  explicit FastDivide64(uint64_t divisor) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    const auto power = static_cast<unsigned __int128>(1) << (62 + shift);
    multiplier = static_cast<uint64_t>((power + divisor - 1) / divisor);
  }
  __device__ __forceinline__ uint64_t divide(uint64_t n) const {
    return __umul64hi(n << 2, multiplier) >> shift;
  }
};

// The axes of a convolution: 0 depth, 1 height, 2 width. Fewer dimensions leave the first at 1.
constexpr int kAxes = 3;

struct Position {
  int64_t sample;
  int at[kAxes];
};

// Index -> (sample, depth, height, width). The positions of one sample are less than 2^31; those
// of a batch may be more, and then the sample is split off with 64 bits first.
struct Positions {
  int64_t samples = 0;
  int64_t plane = 1;
  FastDivide by_size[kAxes];
  FastDivide64 by_plane;
  bool index64 = false;

  Positions() = default;
  Positions(const int (&sizes)[kAxes], int64_t batch, bool large) : samples(batch), index64(large) {
    for (int d = 0; d < kAxes; ++d) {
      by_size[d] = FastDivide(static_cast<uint32_t>(sizes[d]));
      plane *= sizes[d];
    }
    by_plane = FastDivide64(plane);
  }
  LFP_HD int64_t count() const { return samples * plane; }

  __device__ __forceinline__ Position operator()(int64_t index) const {
    Position p;
    const int64_t first = index64 ? by_plane.divide(index) : 0;
    auto rest = static_cast<uint32_t>(index - first * plane);
#pragma unroll
    for (int d = kAxes - 1; d >= 0; --d) {
      const uint32_t quotient = by_size[d].divide(rest);
      p.at[d] = static_cast<int>(rest - quotient * by_size[d].divisor);
      rest = quotient;
    }
    p.sample = first + rest;
    return p;
  }
  // On to the next index.
  __device__ __forceinline__ void advance(Position& p) const {
    if (++p.at[2] < int(by_size[2].divisor)) return;
    p.at[2] = 0;
    if (++p.at[1] < int(by_size[1].divisor)) return;
    p.at[1] = 0;
    if (++p.at[0] < int(by_size[0].divisor)) return;
    p.at[0] = 0;
    ++p.sample;
  }
};

}  // namespace lfp::cuda
