// The shapes of one call of a convolution: which sides it has and through which windows they see
// each other.
#pragma once

#include <cstdlib>

#include "conv_operand.cuh"

namespace lfp::cuda {

struct Geometry {
  Ints stride, padding, dilation;
  bool transposed;
  int64_t groups;
};

inline int to_int(int64_t v) {
  LFP_CHECK(v < (int64_t(1) << 31), "conv", "expected sizes below 2^31, got ", v);
  return static_cast<int>(v);
}

// 64-bit positions on small tensors too, for tests.
inline bool forces_index64() {
  static const bool force = std::getenv("LFP_KERNELS_INDEX64") != nullptr;
  return force;
}

inline Side side_of(const Tensor& t, bool channels_last) {
  Side side{t.size(0), to_int(t.size(1))};
  for (int64_t d = 2; d < t.dim(); ++d) side.size[kAxes - t.dim() + d] = to_int(t.size(d));
  side.channels_last = channels_last;
  to_int(side.plane());
  return side;
}

// The shapes of one call. W is [small channels, large channels / groups, ...].
struct Shapes {
  Side x, z;
  Axis down[kAxes], up[kAxes];
  bool transposed, index64, channels_last;
  int groups, taps = 1;

  Shapes(const Tensor& x_, const Tensor& z_, const Tensor& weight, const Geometry& g, bool last)
      : x(side_of(x_, last)),
        z(side_of(z_, last)),
        transposed(g.transposed),
        channels_last(last),
        groups(to_int(g.groups)) {
    constexpr int64_t kLargest = (int64_t(1) << 31) - (1 << 16);  // beyond: the edges of tiles
    index64 = forces_index64() || x_.numel() >= kLargest || z_.numel() >= kLargest;
    LFP_CHECK(weight.numel() < kLargest, "conv", "weight: expected fewer than 2^31 elements");
    for (int64_t k = 0; k < weight.dim() - 2; ++k) {
      const int64_t d = kAxes - (weight.dim() - 2) + k;
      const int kernel = to_int(weight.size(k + 2)), stride = to_int(g.stride[k]),
                pad = to_int(g.padding[k]), dilation = to_int(g.dilation[k]);
      taps *= kernel;
      down[d] = Axis::down(large().size[d], small().size[d], kernel, stride, pad, dilation);
      up[d] = Axis::up(large().size[d], small().size[d], kernel, stride, pad, dilation);
    }
  }
  const Side& large() const { return transposed ? z : x; }
  const Side& small() const { return transposed ? x : z; }
  int large_channels() const { return large().channels / groups; }
  int small_channels() const { return small().channels / groups; }

  Window window(bool is_up) const {
    return is_up ? Window(up, small(), groups, index64) : Window(down, large(), groups, index64);
  }
  // Every position of a side, seen as it is.
  Window identity(const Side& side) const {
    Axis axes[kAxes];
    for (int d = 0; d < kAxes; ++d) axes[d].source = axes[d].target = side.size[d];
    return Window(axes, side, groups, index64);
  }
};

inline MemoryFormat format_of(const Tensor& x, bool channels_last) {
  return channels_last_or_plain(x, channels_last);
}

// One call's arguments, checked in Python, dense, and in one format.
struct ConvLayer {
  bool channels_last;
  Tensor x, z, reward;
  Shapes shapes;

  ConvLayer(const Tensor& x_, const Tensor& weight, const Tensor& z_, const Tensor& reward_,
            const Geometry& geometry, bool reads_z)
      : channels_last(strided_channels_last(x_) || strided_channels_last(reward_)),
        x(in_format(x_, format_of(x_, channels_last))),
        z(reads_z ? in_format(z_, format_of(x_, channels_last)) : reward_),
        reward(in_format(reward_, format_of(x_, channels_last))),
        shapes(x, reward, weight, geometry, channels_last) {}

  template <class T>
  ElementSource<T> signal(const RuleCall<Acc<T>>& rule) const {
    return {data<T>(reward), data<T>(z), rule};
  }
};

}  // namespace lfp::cuda
