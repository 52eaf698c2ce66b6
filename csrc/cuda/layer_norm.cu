// Relevance through layer and RMS norms of rows [R, D]. A warp or a block has a row in registers,
// so that x and the reward are read once, and keeps its sums for weight and bias from row to row.
// Longer rows take the passes of layer_norm.cuh.
#include "layer_norm.cuh"

namespace lfp::cuda {
namespace {

template <class T>
inline constexpr int kHeld = 64 / sizeof(Acc<T>);  // elements of a row that a thread holds
template <class T>
inline constexpr int64_t kWarpRow = 32 * kHeld<T>;
template <class T>
inline constexpr int64_t kBlockRow = kNormThreads * kHeld<T>;
constexpr int64_t kBlocks = 1024;     // partial sums for weight and bias at most
constexpr int64_t kRowsOfBlock = 16;  // and rows of each at least, where a warp has a row

// Sum over the threads of a row: all of the block, or a warp.
template <bool kBlock, class A>
__device__ __forceinline__ A row_total(A v, A* scratch) {
  return kBlock ? block_sum<kNormThreads>(v, scratch) : warp_sum(v);
}

// sums[2, gridDim.x, D]
template <class T, int V, bool kBlock>
__global__ void __launch_bounds__(kNormThreads)
    held_rows_kernel(const Norm<T> f, bool hands_on, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int kPacks = kHeld<T> / V, kGroup = kBlock ? kNormThreads : 32;
  // Of this row and of the last one, which slower threads may still read.
  __shared__ A scratches[2][4][kNormWarps];
  const int n = static_cast<int>(f.channels), column = threadIdx.x % kGroup * V;
  const A count = static_cast<A>(n);
  const int64_t first = f.batch * blockIdx.x / gridDim.x;
  const int64_t last = f.batch * (blockIdx.x + 1) / gridDim.x;
  A of_weight[kPacks][V] = {}, of_bias[kPacks][V] = {};
  for (int64_t row = first + (kBlock ? 0 : threadIdx.x / 32); row < last;
       row += kBlock ? 1 : kNormWarps) {
    A(&scratch)[4][kNormWarps] = scratches[row % 2];
    A x[kPacks][V] = {}, g[kPacks][V] = {};
    A mean = A(0), square = A(0), along = A(0), shift = A(0);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int c = column + p * kGroup * V;
      if (c >= n) continue;
      load<V>(f.x, row * n + c, x[p]);
      load<V>(f.reward, row * n + c, g[p]);
#pragma unroll
      for (int k = 0; k < V; ++k) mean += x[p][k];
    }
    mean = f.centred ? row_total<kBlock>(mean, scratch[0]) / count : A(0);
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A d = x[p][k] - mean;
        if (column + p * kGroup * V < n) square += d * d;
      }
    square = row_total<kBlock>(square, scratch[1]);
    const A invstd = A(1) / square_root(square / count + f.eps);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int c = column + p * kGroup * V;
      if (c >= n) continue;
      if (hands_on) store<V>(f.found, row * n + c, g[p]);
      A w[V], b[V];
#pragma unroll
      for (int k = 0; k < V; ++k) w[k] = A(1), b[k] = A(0);
      if (f.weight) load<V>(f.weight, c, w);
      if (f.bias) load<V>(f.bias, c, b);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A h = (x[p][k] - mean) * invstd;
        const A s = norm_signal(g[p][k], h, w[k], b[k], f.stabilizer);
        of_weight[p][k] += s * h, of_bias[p][k] += s;
        g[p][k] = s * w[k];
        along += g[p][k] * h, shift += g[p][k];
      }
    }
    if (hands_on) continue;
    along = f.identity ? A(0) : row_total<kBlock>(along, scratch[2]) / count;
    shift = f.centred ? row_total<kBlock>(shift, scratch[3]) / count : A(0);
    const A slope = along * invstd;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int c = column + p * kGroup * V;
      if (c >= n) continue;
#pragma unroll
      for (int k = 0; k < V; ++k)
        g[p][k] = x[p][k] * (g[p][k] - (x[p][k] - mean) * slope - shift) * invstd;
      store<V>(f.found, row * n + c, g[p]);
    }
  }
  A* to = sums + int64_t(blockIdx.x) * n;
  const int64_t bias_sums = int64_t(gridDim.x) * n;
  if constexpr (kBlock) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int c = column + p * kGroup * V;
      if (c >= n) continue;
      store<V>(to, c, of_weight[p]);
      store<V>(to, bias_sums + c, of_bias[p]);
    }
  } else {  // warp after warp adds its sums to those of the block
    __shared__ A block_sums[2][kWarpRow<T>];
    for (int warp = 0; warp < kNormWarps; ++warp) {
      if (threadIdx.x / 32 == warp)
#pragma unroll
        for (int p = 0; p < kPacks; ++p)
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const int c = column + p * kGroup * V + k;
            if (warp > 0) of_weight[p][k] += block_sums[0][c], of_bias[p][k] += block_sums[1][c];
            block_sums[0][c] = of_weight[p][k], block_sums[1][c] = of_bias[p][k];
          }
      __syncthreads();
    }
    for (int c = threadIdx.x; c < n; c += kNormThreads) {
      to[c] = block_sums[0][c];
      to[bias_sums + c] = block_sums[1][c];
    }
  }
}

template <class T, int V>
void launch(const Norm<T>& f, const Tensor& like, const Tensor& weight_sum, const Tensor& bias_sum,
            cudaStream_t stream) {
  using A = Acc<T>;
  if (f.channels > kBlockRow<T>) return launch_norm<T, V>(f, like, weight_sum, bias_sum, stream);
  const bool by_warp = f.channels <= kWarpRow<T>;
  const int64_t parts =
      std::clamp<int64_t>(by_warp ? f.batch / kRowsOfBlock : f.batch / 4, 1, kBlocks);
  const Tensor sums = new_sums(like, {2, parts, f.channels});
  const auto grid = static_cast<unsigned>(parts);
  if (by_warp)
    held_rows_kernel<T, V, false>
        <<<grid, kNormThreads, 0, stream>>>(f, f.hands_on(), data<A>(sums));
  else
    held_rows_kernel<T, V, true><<<grid, kNormThreads, 0, stream>>>(f, f.hands_on(), data<A>(sums));
  check_launch();
  add_partial_sums<A>(sums, parts, f.channels, 1, weight_sum, bias_sum, stream);
}

std::tuple<Tensor, Tensor, Tensor> norm_redistribute(Tensor x, std::optional<Tensor> weight,
                                                     std::optional<Tensor> bias, Tensor reward,
                                                     bool centred, double eps, double stabilizer,
                                                     bool identity) {
  const Device device(x);
  x = dense(x), reward = dense(reward);
  if (weight) weight = dense(*weight);
  if (bias) bias = dense(*bias);
  const int64_t n = x.size(1);
  Tensor found = torch::stable::empty_like(x);
  Tensor weight_sum = new_sums(x, {n}), bias_sum = new_sums(x, {n});
  if (x.numel() == 0) {
    torch::stable::zero_(weight_sum), torch::stable::zero_(bias_sum);
    return {found, weight_sum, bias_sum};
  }
  dispatch_dtype(x.scalar_type(), "norm_redistribute", [&](auto element) {
    using T = decltype(element);
    const Norm<T> f{data<T>(x),
                    weight ? data<T>(*weight) : nullptr,
                    bias ? data<T>(*bias) : nullptr,
                    data<T>(reward),
                    data<T>(found),
                    x.size(0),
                    n,
                    1,
                    1,
                    Acc<T>(eps),
                    Acc<T>(stabilizer),
                    centred,
                    identity};
    if (is_wide(f) && aligned16(f.weight, f.bias))
      launch<T, kWide<T>>(f, x, weight_sum, bias_sum, device.stream);
    else
      launch<T, 1>(f, x, weight_sum, bias_sum, device.stream);
  });
  return {found, weight_sum, bias_sum};
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) { m.impl("norm_redistribute", TORCH_BOX(&lfp::cuda::norm_redistribute)); }
