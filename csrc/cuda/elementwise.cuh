// Elementwise passes over dense memory: 16-byte accesses, a thread handles kUnroll of them.
#pragma once

#include "common.cuh"

namespace lfp::cuda {

constexpr int kElementwiseThreads = 256;
// Independent 16-byte accesses of a thread in flight for each operand.
constexpr int kUnroll = 2;

// f.template operator()<V>(i) handles the elements i .. i + V - 1.
template <int V, class F>
__global__ void __launch_bounds__(kElementwiseThreads, 4) elementwise_kernel(int64_t n, F f) {
  const int64_t packs = n / V;
  const int64_t first = int64_t(blockIdx.x) * (kElementwiseThreads * kUnroll) + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t pack = first + k * kElementwiseThreads;
    if (pack < packs) f.template operator()<V>(pack * V);
  }
  // What does not fill a pack: less than V elements, one thread each.
  if constexpr (V > 1) {
    const int64_t i = packs * V + first;
    if (i < n) f.template operator()<1>(i);
  }
}

// Runs f over n elements; V > 1 needs pointers that allow accesses of V elements.
template <int V, class F>
void elementwise(int64_t n, cudaStream_t stream, F f) {
  if (n == 0) return;
  const int64_t blocks =
      std::max<int64_t>(1, ceil_div<int64_t>(n / V, kElementwiseThreads * kUnroll));
  LFP_CHECK(blocks < (int64_t(1) << 31), "elementwise", "tensor too large: ", n, " elements");
  elementwise_kernel<V><<<static_cast<unsigned>(blocks), kElementwiseThreads, 0, stream>>>(n, f);
  check_launch();
}

// The same with V chosen: 16 bytes of T where all pointers allow it.
template <class T, class F, class... P>
void elementwise_wide(int64_t n, cudaStream_t stream, F f, const P*... pointers) {
  if (aligned16(pointers...))
    elementwise<kWide<T>>(n, stream, f);
  else
    elementwise<1>(n, stream, f);
}

}  // namespace lfp::cuda
