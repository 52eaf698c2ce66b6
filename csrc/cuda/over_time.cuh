// Kernels over [steps, neurons] whose threads keep V neighbouring neurons through the steps.
#pragma once

#include <bit>

#include "../neuron.h"
#include "common.cuh"

namespace lfp::cuda {

// V elements on their way: 16 bytes are kept as 4 registers, whatever the element type.
template <class T, int V>
struct Raw {
  std::conditional_t<sizeof(T) * V == 16, uint4, Pack<T, V>> bits;

  __device__ __forceinline__ void read(const T* p) {
    bits = *reinterpret_cast<const decltype(bits)*>(p);
  }
  __device__ __forceinline__ void get(Acc<T> (&out)[V]) const {
    const auto pack = std::bit_cast<Pack<T, V>>(bits);
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = static_cast<Acc<T>>(pack.value[k]);
  }
};

// The bytes of V neurons in a plane of packed spikes.
template <int V>
using Word = std::conditional_t<
    V == 1, uint8_t,
    std::conditional_t<V == 2, uint16_t, std::conditional_t<V == 4, uint32_t, uint64_t>>>;

template <int V>
__device__ __forceinline__ Word<V> spikes_at(const uint8_t* bits, int64_t i) {
  return *reinterpret_cast<const Word<V>*>(bits + i);
}

// Blocks of kBlock threads, each with V neighbouring neurons, for every one of `chunks`.
template <int V, int kBlock>
dim3 grid_over(int64_t neurons, int64_t chunks = 1) {
  const int64_t blocks = ceil_div<int64_t>(neurons / V, kBlock);
  LFP_CHECK(blocks < (int64_t(1) << 31), "spiking", "too many neurons: ", neurons);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(chunks));
}

// f(constant V): 16 bytes of T where every row of `neurons` elements, and of as many bytes of
// spikes, begins at such an address.
template <class T, class F, class... P>
void dispatch_width(int64_t neurons, const uint8_t* bits, F&& f, const P*... pointers) {
  constexpr int V = kWide<T>;
  if (neurons % V == 0 && reinterpret_cast<uintptr_t>(bits) % V == 0 && aligned16(pointers...))
    f(std::integral_constant<int, V>{});
  else
    f(std::integral_constant<int, 1>{});
}

}  // namespace lfp::cuda
