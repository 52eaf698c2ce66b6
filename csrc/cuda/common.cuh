// What every CUDA operator file needs: device guard, stream, launch check, element access.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../layout.h"

// The tests compile the same files with LFP_SIMULATED: the ops then stand where the CPU ops stand
// and the executor of tests/gpusim takes the launches. These lines are the only difference.
#ifdef LFP_SIMULATED
#define LFP_DISPATCH_KEY CPU
#else
#define LFP_DISPATCH_KEY CUDA
#endif
// Expands LFP_DISPATCH_KEY before the library macro makes a name of it.
#define LFP_REGISTER_AS(key, m) STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, key, m)
#define LFP_REGISTER(m) LFP_REGISTER_AS(LFP_DISPATCH_KEY, m)

#define LFP_CUDA_CHECK(call)                                                             \
  do {                                                                                   \
    const cudaError_t status = (call);                                                   \
    STD_TORCH_CHECK(status == cudaSuccess, "lfp_kernels: ", cudaGetErrorString(status)); \
  } while (0)

namespace lfp::cuda {

// For the time of one operator: its tensors' device is current; `stream` is torch's current one.
class Device {
 public:
#ifdef LFP_SIMULATED
  explicit Device(const Tensor&) {}
  cudaStream_t stream = nullptr;
#else
  explicit Device(const Tensor& t)
      : guard_(t.get_device_index()),
        stream(static_cast<cudaStream_t>(
            torch::stable::accelerator::getCurrentStream(t.get_device_index()).nativeHandle())) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  cudaStream_t stream;
#endif
  // Blocks of this many threads that fill the device once, roughly.
  int processors() const {
    int device = 0, count = 0;
    LFP_CUDA_CHECK(cudaGetDevice(&device));
    LFP_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }
};

inline void check_launch() { LFP_CUDA_CHECK(cudaGetLastError()); }

// kernel<<<...>>> with dynamic shared memory above 48 KB needs the kernel's consent.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    LFP_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
}

template <class T>
LFP_HD T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* state(const std::vector<Tensor>& states, size_t k) {
  return k < states.size() ? data<T>(states[k]) : nullptr;
}

// ---- element access: values are computed in Acc<T>

template <class T>
__device__ __forceinline__ Acc<T> load(const T* p, int64_t i) {
  return static_cast<Acc<T>>(p[i]);
}

template <class T>
__device__ __forceinline__ void store(T* p, int64_t i, Acc<T> v) {
  p[i] = static_cast<T>(v);
}

// V neighbouring elements, one memory instruction when V * sizeof(T) is 16 or less.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

// Elements of T that make a 16-byte access.
template <class T>
inline constexpr int kWide = 16 / sizeof(T);

template <int V, class T>
__device__ __forceinline__ void load(const T* p, int64_t i, Acc<T> (&out)[V]) {
  const auto pack = *reinterpret_cast<const Pack<T, V>*>(p + i);
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = static_cast<Acc<T>>(pack.value[k]);
}

// To global memory. The compiler takes a struct of V values apart and does not always put it
// together again, which costs as many stores as it has values: 16 bytes are spelled out.
template <int V, class T>
__device__ __forceinline__ void store(T* p, int64_t i, const Acc<T> (&v)[V]) {
  union {
    Pack<T, V> pack;
    uint32_t word[4];
  } bits = {};
#pragma unroll
  for (int k = 0; k < V; ++k) bits.pack.value[k] = static_cast<T>(v[k]);
  if constexpr (sizeof(bits.pack) == 16)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p + i)),
                 "r"(bits.word[0]), "r"(bits.word[1]), "r"(bits.word[2]), "r"(bits.word[3])
                 : "memory");
  else
    *reinterpret_cast<Pack<T, V>*>(p + i) = bits.pack;
}

// Whether all pointers, null ones aside, allow 16-byte accesses.
template <class... P>
bool aligned16(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// ---- reductions

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// Sum over a block of kThreads threads, the same bits every time; every thread gets it.
// `scratch` holds kThreads / 32 values and is free again after the caller's next barrier.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T v, T* scratch) {
  static_assert(kThreads % 32 == 0);
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  T sum = scratch[0];
#pragma unroll
  for (int k = 1; k < kThreads / 32; ++k) sum += scratch[k];
  return sum;
}

}  // namespace lfp::cuda
