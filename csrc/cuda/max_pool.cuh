// Geometry of max pools and how their winners are remembered: in the shape and layout of the
// output, as
//   uint8         place inside the window, where windows of at most 256 places tile the input
//   int32, int64  place inside the input's [D, H, W]
// The dtype alone says which: windows that tile have the size input / output.
#pragma once

#include "pool_tiles.cuh"

namespace lfp::cuda {

using Axes = std::array<int64_t, kPoolAxes>;
constexpr int64_t kMaxPlaces = 256;

inline bool windows_tile(const Axes& in, const Axes& out, const Axes& kernel, const Axes& stride,
                         const Axes& padding, const Axes& dilation) {
  bool yes = kernel[0] * kernel[1] * kernel[2] <= kMaxPlaces;
  for (int k = 0; k < kPoolAxes; ++k)
    yes = yes && in[k] == out[k] * kernel[k] && stride[k] == kernel[k] && padding[k] == 0 &&
          dilation[k] == 1;
  return yes;
}

inline Axes reordered(const Axes& values, const Axes& order) {
  return {values[order[0]], values[order[1]], values[order[2]]};
}

inline Tensor empty_output(const Tensor& like, const Ints& size, ScalarType dtype,
                           bool channels_last) {
  const auto format =
      size.size() < 4 || !channels_last
          ? MemoryFormat::Contiguous
          : (size.size() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
  return torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, format);
}

// N neighbouring winners; `bytes` is the size of their integer type.
template <int N>
__device__ __forceinline__ void load_winners(const void* from, int bytes, int64_t i,
                                             int64_t (&out)[N]) {
  const auto copy = [&](auto index) {
    using Index = decltype(index);
    const auto pack = *reinterpret_cast<const Pack<Index, N>*>(static_cast<const Index*>(from) + i);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = pack.value[k];
  };
  if (bytes == 1)
    copy(uint8_t{});
  else if (bytes == 4)
    copy(int32_t{});
  else
    copy(int64_t{});
}

template <int N>
__device__ __forceinline__ void store_winners(void* to, int bytes, int64_t i,
                                              const int64_t (&v)[N]) {
  const auto copy = [&](auto index) {
    using Index = decltype(index);
    Pack<Index, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.value[k] = static_cast<Index>(v[k]);
    *reinterpret_cast<Pack<Index, N>*>(static_cast<Index*>(to) + i) = pack;
  };
  if (bytes == 1)
    copy(uint8_t{});
  else if (bytes == 4)
    copy(int32_t{});
  else
    copy(int64_t{});
}

// Whether N winners of `bytes` bytes each may be accessed at once.
inline bool winners_aligned(const Tensor& winner, int N) {
  return reinterpret_cast<uintptr_t>(winner.data_ptr()) % (N * winner.element_size()) == 0;
}

}  // namespace lfp::cuda
