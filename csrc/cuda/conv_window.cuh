// Which elements of which tensors meet in a convolution. One relation covers all of its products:
//   large position = small position * stride - padding + tap * dilation
// A convolution reads the large side and makes the small one ("down"); its input product reads the
// small side and makes the large one ("up"). A transposed convolution is the other way round. The
// kernel is [small channels, large channels / groups, taps] in both cases.
//
// Up, a small position exists only where the stride divides. So the positions of the large side
// fall into phases by their remainder: those of one phase meet every step-th tap and no other, and
// their sources are neighbours again. Nothing is multiplied by holes, whatever the stride.
//   target position = q * phases + phase,               q < count
//   source position = q * move + origin + j * reach,    tap = first + j * step, j < taps
#pragma once

#include <numeric>

#include "common.cuh"
#include "conv_index.cuh"

namespace lfp::cuda {

// One side of a convolution: a dense tensor [samples, channels, depth, height, width], its
// channels last in memory or not.
struct Side {
  int64_t samples = 0;
  int channels = 0;  // of all groups
  int size[kAxes] = {1, 1, 1};
  bool channels_last = false;

  int64_t plane() const { return int64_t(size[0]) * size[1] * size[2]; }
};

// Element strides of a Side.
struct Strides {
  int64_t sample = 0, channel = 0;
  int64_t axis[kAxes] = {};

  Strides() = default;
  explicit Strides(const Side& side) {
    const int64_t pixel = side.channels_last ? side.channels : 1;
    axis[2] = pixel;
    axis[1] = axis[2] * side.size[2];
    axis[0] = axis[1] * side.size[1];
    sample = side.plane() * side.channels;
    channel = side.channels_last ? 1 : side.plane();
  }
};

struct Axis {
  int source = 1, target = 1;  // sizes of what is read and of what is made
  int kernel = 1, padding = 0, dilation = 1;
  int phases = 1, move = 1, reach = 1, step = 1;
  // of the selected phase
  int phase = 0, origin = 0, first = 0, taps = 1;

  int count() const { return ceil_div(target, phases); }

  static Axis down(int large, int small, int kernel, int stride, int padding, int dilation) {
    Axis a{large, small, kernel, padding, dilation};
    a.move = stride;
    a.reach = dilation;
    a.origin = -padding;
    a.taps = kernel;
    return a;
  }
  static Axis up(int large, int small, int kernel, int stride, int padding, int dilation) {
    Axis a{small, large, kernel, padding, dilation};
    const int common = std::gcd(stride, dilation);
    a.phases = stride;
    a.reach = -(dilation / common);
    a.step = stride / common;
    a.select(0);
    return a;
  }

  // For `up` only.
  LFP_HD void select(int which) {
    phase = which;
    first = 0;
    while (first < step && (phase + padding - first * dilation) % phases != 0) ++first;
    taps = first < step && first < kernel ? (kernel - first + step - 1) / step : 0;
    origin = (phase + padding - first * dilation) / phases;
  }
  LFP_HD bool alone() const {  // source position = target position
    return kernel == 1 && phases == 1 && move == 1 && padding == 0 && source == target;
  }
};

// A channel of a group and a tap of the phase.
struct Tap {
  int channel;
  int at[kAxes];
  bool valid;
};

// A product that reads `source` through the kernel at the positions of a target.
struct Window {
  Axis axis[kAxes];
  Positions positions;  // q, of every sample
  Strides strides;      // of the source
  int channels = 0;     // of the source, of one group
  int groups = 1, phases = 1;
  int taps = 1;  // of the selected phase
  int group = 0;
  FastDivide by_channels, by_taps, by_height, by_width;

  Window() = default;
  // Axes that meet one to one are run through as one: 1 x 1 kernels see rows as long as planes.
  Window(const Axis (&axes)[kAxes], const Side& source, int group_count, bool index64)
      : strides(source), channels(source.channels / group_count), groups(group_count) {
    bool flat = true;
    for (int d = 0; d < kAxes; ++d) {
      axis[d] = axes[d];
      flat = flat && axes[d].alone();
      phases *= axes[d].phases;
    }
    if (flat) {
      axis[0] = axis[1] = Axis();
      axis[2].source = axis[2].target = static_cast<int>(source.plane());
    }
    const int counts[kAxes] = {axis[0].count(), axis[1].count(), axis[2].count()};
    positions = Positions(counts, source.samples, index64);
    by_channels = FastDivide(channels);
    count_taps();
  }

  int64_t parts() const { return int64_t(groups) * phases; }
  // The most taps of a phase.
  int most_taps() const {
    int most = 1;
    for (int d = 0; d < kAxes; ++d) most *= ceil_div(axis[d].kernel, axis[d].step);
    return most;
  }

  LFP_HD void count_taps() {
    taps = axis[0].taps * axis[1].taps * axis[2].taps;
    by_taps = FastDivide(taps);
    by_height = FastDivide(axis[1].taps);
    by_width = FastDivide(axis[2].taps);
  }
  // Part = (phase, group).
  LFP_HD void select(int64_t part) {
    int rest = static_cast<int>(part / groups);
    group = static_cast<int>(part - int64_t(rest) * groups);
    if (phases == 1) return;
#pragma unroll
    for (int d = kAxes - 1; d >= 0; --d) {
      axis[d].select(rest % axis[d].phases);
      rest /= axis[d].phases;
    }
    count_taps();
  }

  __device__ __forceinline__ void split_tap(uint32_t j, Tap& tap) const {
    const uint32_t rows = by_width.divide(j);
    const uint32_t planes = by_height.divide(rows);
    tap.at[2] = static_cast<int>(j - rows * by_width.divisor);
    tap.at[1] = static_cast<int>(rows - planes * by_height.divisor);
    tap.at[0] = static_cast<int>(planes);
  }
  // Index -> (tap, channel), channels running faster, and -> (channel, tap), taps running faster.
  __device__ __forceinline__ Tap tap_major(int64_t index) const {
    Tap tap;
    const uint32_t j = by_channels.divide(static_cast<uint32_t>(index));
    tap.channel = static_cast<int>(static_cast<uint32_t>(index) - j * by_channels.divisor);
    tap.valid = j < uint32_t(taps);
    split_tap(j, tap);
    return tap;
  }
  __device__ __forceinline__ Tap channel_major(int64_t index) const {
    Tap tap;
    const uint32_t channel = by_taps.divide(static_cast<uint32_t>(index));
    tap.channel = static_cast<int>(channel);
    tap.valid = tap.channel < channels;
    split_tap(static_cast<uint32_t>(index) - channel * by_taps.divisor, tap);
    return tap;
  }
  __device__ __forceinline__ int64_t kernel_taps() const {
    return int64_t(axis[0].kernel) * axis[1].kernel * axis[2].kernel;
  }
  // The tap's index in the kernel.
  __device__ __forceinline__ int kernel_index(const Tap& tap) const {
    int index = 0;
#pragma unroll
    for (int d = 0; d < kAxes; ++d)
      index = index * axis[d].kernel + axis[d].first + tap.at[d] * axis[d].step;
    return index;
  }
  __device__ __forceinline__ int source_at(int d, const Position& q, const Tap& tap) const {
    return q.at[d] * axis[d].move + axis[d].origin + tap.at[d] * axis[d].reach;
  }
  // Offset of the source of q at the tap, -1 in the padding; with kChecked = 2 that of its row.
  template <int kChecked = kAxes>
  __device__ __forceinline__ int64_t offset(const Position& q, const Tap& tap) const {
    int64_t offset =
        q.sample * strides.sample + (int64_t(group) * channels + tap.channel) * strides.channel;
    bool inside = tap.valid && q.sample < positions.samples;
#pragma unroll
    for (int d = 0; d < kChecked; ++d) {
      const int at = source_at(d, q, tap);
      inside = inside && uint32_t(at) < uint32_t(axis[d].source);
      offset += at * strides.axis[d];
    }
    return inside ? offset : -1;
  }
  // Offset of q itself in a target with these strides, -1 outside of it.
  __device__ __forceinline__ int64_t target_offset(const Position& q, const Strides& to) const {
    int64_t offset = q.sample * to.sample;
    bool inside = q.sample < positions.samples;
#pragma unroll
    for (int d = 0; d < kAxes; ++d) {
      const int at = q.at[d] * axis[d].phases + axis[d].phase;
      inside = inside && at < axis[d].target;
      offset += at * to.axis[d];
    }
    return inside ? offset : -1;
  }
};

}  // namespace lfp::cuda
