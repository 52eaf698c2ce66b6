// Relevance through softmax by AttnLRP's rule, on rows [M, N]: r_x = x * (r - p * sum r), 0 where x
// is infinite (masked out). A warp or a block has a row; its rewards stay in registers where they
// fit, so that everything is read once.
#include "common.cuh"

namespace lfp::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kHeld = 16;  // rewards of a thread

template <class T>
struct Rows {
  const T *x, *p, *reward;
  T* found;
  int64_t rows, count;
};

template <int V, class T>
__device__ __forceinline__ void finish(const Rows<T>& call, int64_t at, Acc<T> total,
                                       Acc<T> (&r)[V]) {
  Acc<T> x[V], p[V];
  load<V>(call.x, at, x);
  load<V>(call.p, at, p);
#pragma unroll
  for (int k = 0; k < V; ++k)
    r[k] = magnitude(x[k]) == Acc<T>(INFINITY) ? Acc<T>(0) : x[k] * (r[k] - p[k] * total);
  store<V>(call.found, at, r);
}

// Rows of at most kHeld elements per thread: of a warp, or with kBlock of a block.
template <class T, int V, bool kBlock>
__global__ void __launch_bounds__(kThreads) held_rows_kernel(const Rows<T> call) {
  using A = Acc<T>;
  constexpr int kPacks = kHeld / V, kGroup = kBlock ? kThreads : 32;
  __shared__ A scratch[kWarps];
  const int64_t row = kBlock ? blockIdx.x : int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= call.rows) return;  // a whole warp
  const int first = threadIdx.x % kGroup * V;
  A r[kPacks][V] = {}, total = A(0);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int c = first + k * kGroup * V;
    if (c < call.count) load<V>(call.reward, row * call.count + c, r[k]);
#pragma unroll
    for (int j = 0; j < V; ++j) total += r[k][j];
  }
  total = kBlock ? block_sum<kThreads>(total, scratch) : warp_sum(total);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int c = first + k * kGroup * V;
    if (c < call.count) finish(call, row * call.count + c, total, r[k]);
  }
}

// Rows of any length: the rewards are read twice.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) long_rows_kernel(const Rows<T> call) {
  using A = Acc<T>;
  __shared__ A scratch[kWarps];
  const int64_t begin = int64_t(blockIdx.x) * call.count;
  A total = A(0);
#pragma unroll 4
  for (int64_t c = threadIdx.x * V; c < call.count; c += kThreads * V) {
    A r[V];
    load<V>(call.reward, begin + c, r);
#pragma unroll
    for (int j = 0; j < V; ++j) total += r[j];
  }
  total = block_sum<kThreads>(total, scratch);
  for (int64_t c = threadIdx.x * V; c < call.count; c += kThreads * V) {
    A r[V];
    load<V>(call.reward, begin + c, r);
    finish(call, begin + c, total, r);
  }
}

template <class T, int V>
void launch(const Rows<T>& call, cudaStream_t stream) {
  const bool by_warp = call.count <= 32 * kHeld;
  const int64_t blocks = by_warp ? ceil_div<int64_t>(call.rows, kWarps) : call.rows;
  LFP_CHECK(blocks <= INT_MAX, "softmax_redistribute", "too many rows: ", call.rows);
  const auto grid = static_cast<unsigned>(blocks);
  if (by_warp)
    held_rows_kernel<T, V, false><<<grid, kThreads, 0, stream>>>(call);
  else if (call.count <= kThreads * kHeld)
    held_rows_kernel<T, V, true><<<grid, kThreads, 0, stream>>>(call);
  else
    long_rows_kernel<T, V><<<grid, kThreads, 0, stream>>>(call);
  check_launch();
}

Tensor softmax_redistribute(Tensor x, Tensor p, Tensor reward) {
  const Device device(x);
  x = dense(x), p = dense(p), reward = dense(reward);
  Tensor found = empty_like(x, {x.size(0), x.size(1)});
  if (x.numel() == 0) return found;
  dispatch_dtype(x.scalar_type(), "softmax_redistribute", [&](auto element) {
    using T = decltype(element);
    const Rows<T> call{data<T>(x),     data<T>(p), data<T>(reward),
                       data<T>(found), x.size(0),  x.size(1)};
    if (call.count % kWide<T> == 0 && aligned16(call.x, call.p, call.reward, call.found))
      launch<T, kWide<T>>(call, device.stream);
    else
      launch<T, 1>(call, device.stream);
  });
  return found;
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) { m.impl("softmax_redistribute", TORCH_BOX(&lfp::cuda::softmax_redistribute)); }
