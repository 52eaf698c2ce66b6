// Relevance through layer, RMS and group norms of x [N, C, M], C in groups (a layer norm: one
// group, M = 1), for rows of any length, in three passes (docs/math.md, section 7):
//   statistics  a block per row, which is a group of a sample: mean, 1 / deviation, and the means
//   of
//               g * xhat and of g, with g = w * r / stab(z)
//   rows        a thread per V columns of C * M walks over samples: r_x, and its partial sums of
//               s * xhat and s for weight and bias
//   add         the partial sums, in a fixed order
#pragma once

#include "common.cuh"

namespace lfp::cuda {
namespace {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;

template <class T>
struct Norm {
  const T *x, *weight, *bias, *reward;  // weight, bias: null where there is none
  T* found;
  int64_t batch, channels, inner, groups;
  Acc<T> eps, stabilizer;
  bool centred, identity;

  int64_t width() const { return channels * inner; }               // of a sample
  int64_t length() const { return width() / groups; }              // of a row
  bool hands_on() const { return identity && !centred && !bias; }  // each term is its own input's
};

template <class A>
struct RowValues {
  A mean, invstd, slope, shift;  // r_x = x * (g - (x - mean) * slope - shift) * invstd
};

// s = r / stab(z)
template <class A>
__device__ __forceinline__ A norm_signal(A r, A xhat, A w, A b, A stabilizer) {
  return r / stabilize(xhat * w + b, stabilizer);
}

template <class T>
__device__ __forceinline__ Acc<T> value_or(const T* p, int64_t i, Acc<T> otherwise) {
  return p ? load(p, i) : otherwise;
}

template <class T, int V>
__global__ void __launch_bounds__(kNormThreads)
    norm_statistics_kernel(const Norm<T> f, int64_t length, RowValues<Acc<T>>* rows) {
  using A = Acc<T>;
  __shared__ A scratch[4][kNormWarps];
  const int64_t begin = int64_t(blockIdx.x) * length;
  const int64_t first_channel = int64_t(blockIdx.x) % f.groups * (f.channels / f.groups);
  const A count = static_cast<A>(length);
  A mean = A(0);
  if (f.centred) {
#pragma unroll 4
    for (int64_t c = threadIdx.x * V; c < length; c += kNormThreads * V) {
      A x[V];
      load<V>(f.x, begin + c, x);
#pragma unroll
      for (int k = 0; k < V; ++k) mean += x[k];
    }
    mean = block_sum<kNormThreads>(mean, scratch[0]) / count;
  }
  A square = A(0);
#pragma unroll 4
  for (int64_t c = threadIdx.x * V; c < length; c += kNormThreads * V) {
    A x[V];
    load<V>(f.x, begin + c, x);
#pragma unroll
    for (int k = 0; k < V; ++k) square += (x[k] - mean) * (x[k] - mean);
  }
  square = block_sum<kNormThreads>(square, scratch[1]);
  const A invstd = A(1) / square_root(square / count + f.eps);
  A along = A(0), shift = A(0);
  for (int64_t c = threadIdx.x * V; c < length; c += kNormThreads * V) {
    A x[V], r[V];
    load<V>(f.x, begin + c, x);
    load<V>(f.reward, begin + c, r);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int64_t channel =
          first_channel + static_cast<uint32_t>(c + k) / static_cast<uint32_t>(f.inner);
      const A w = value_or(f.weight, channel, A(1)), b = value_or(f.bias, channel, A(0));
      const A h = (x[k] - mean) * invstd, g = w * norm_signal(r[k], h, w, b, f.stabilizer);
      along += g * h, shift += g;
    }
  }
  along = block_sum<kNormThreads>(along, scratch[2]);
  shift = block_sum<kNormThreads>(shift, scratch[3]);
  if (threadIdx.x != 0) return;
  rows[blockIdx.x] = {mean, invstd, f.identity ? A(0) : along / count * invstd,
                      f.centred ? shift / count : A(0)};
}

// sums[2, gridDim.y, width]: of s * xhat and of s over the samples of blockIdx.y.
template <class T, int V>
__global__ void __launch_bounds__(kNormThreads)
    norm_rows_kernel(const Norm<T> f, int64_t width, int64_t length, const RowValues<Acc<T>>* rows,
                     bool hands_on, Acc<T>* sums) {
  using A = Acc<T>;
  const int64_t c = (int64_t(blockIdx.x) * kNormThreads + threadIdx.x) * V;
  if (c >= width) return;
  const int64_t first = f.batch * blockIdx.y / gridDim.y;
  const int64_t last = f.batch * (blockIdx.y + 1) / gridDim.y;
  const int64_t group = c / length;
  A w[V], b[V], of_weight[V] = {}, of_bias[V] = {};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int64_t channel = (c + k) / f.inner;
    w[k] = value_or(f.weight, channel, A(1));
    b[k] = value_or(f.bias, channel, A(0));
  }
#pragma unroll 2
  for (int64_t n = first; n < last; ++n) {
    const RowValues<A> row = rows[n * f.groups + group];
    A x[V], r[V];
    load<V>(f.x, n * width + c, x);
    load<V>(f.reward, n * width + c, r);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A d = x[k] - row.mean, h = d * row.invstd;
      const A s = norm_signal(r[k], h, w[k], b[k], f.stabilizer);
      of_weight[k] += s * h, of_bias[k] += s;
      if (!hands_on) r[k] = x[k] * (s * w[k] - d * row.slope - row.shift) * row.invstd;
    }
    store<V>(f.found, n * width + c, r);
  }
  store<V>(sums, blockIdx.y * width + c, of_weight);
  store<V>(sums, (gridDim.y + blockIdx.y) * width + c, of_bias);
}

// totals[which, c] = sum over parts and m of sums[which, part, c, m]; which = blockIdx.y.
// One element per channel: a thread per channel and every eighth part.
template <class A>
__global__ void __launch_bounds__(kNormThreads)
    add_rows_kernel(const A* sums, int64_t parts, int64_t channels, A* weight_sum, A* bias_sum) {
  __shared__ A scratch[kNormWarps][32];
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int64_t c = int64_t(blockIdx.x) * 32 + lane;
  A total = A(0);
  if (c < channels)
#pragma unroll 8
    for (int64_t part = slice; part < parts; part += kNormWarps)
      total += sums[(blockIdx.y * parts + part) * channels + c];
  scratch[slice][lane] = total;
  __syncthreads();
  if (slice != 0 || c >= channels) return;
#pragma unroll
  for (int k = 1; k < kNormWarps; ++k) total += scratch[k][lane];
  (blockIdx.y == 0 ? weight_sum : bias_sum)[c] = total;
}

// Planes of `inner` elements: a block per channel.
template <class A>
__global__ void __launch_bounds__(kNormThreads)
    add_planes_kernel(const A* sums, int64_t parts, int64_t channels, int64_t inner, A* weight_sum,
                      A* bias_sum) {
  __shared__ A scratch[kNormWarps];
  const int64_t c = blockIdx.x;
  A total = A(0);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t m = threadIdx.x; m < inner; m += kNormThreads)
      total += sums[((blockIdx.y * parts + part) * channels + c) * inner + m];
  total = block_sum<kNormThreads>(total, scratch);
  if (threadIdx.x == 0) (blockIdx.y == 0 ? weight_sum : bias_sum)[c] = total;
}

template <class A>
void add_partial_sums(const Tensor& sums, int64_t parts, int64_t channels, int64_t inner,
                      const Tensor& weight_sum, const Tensor& bias_sum, cudaStream_t stream) {
  const A* from = data<A>(sums);
  A *of_weight = data<A>(weight_sum), *of_bias = data<A>(bias_sum);
  if (inner == 1) {
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(channels, 32)), 2);
    add_rows_kernel<A>
        <<<grid, kNormThreads, 0, stream>>>(from, parts, channels, of_weight, of_bias);
  } else {
    const dim3 grid(static_cast<unsigned>(channels), 2);
    add_planes_kernel<A>
        <<<grid, kNormThreads, 0, stream>>>(from, parts, channels, inner, of_weight, of_bias);
  }
  check_launch();
}

inline Tensor new_sums(const Tensor& x, const Ints& size) {
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(x, size, type);
}

template <class T, int V>
void launch_norm(const Norm<T>& f, const Tensor& like, const Tensor& weight_sum,
                 const Tensor& bias_sum, cudaStream_t stream) {
  using A = Acc<T>;
  const int64_t rows = f.batch * f.groups, width = f.width(), length = f.length();
  const int64_t columns = ceil_div<int64_t>(width, kNormThreads * V);
  // Partial sums of an eighth of x at most.
  const int64_t parts = std::clamp<int64_t>(f.batch / 8, 1, 256);
  LFP_CHECK(rows <= INT_MAX && columns <= INT_MAX && length <= INT_MAX, "norm_redistribute",
            "tensor too large");
  const Tensor values = new_sums(like, {rows, 4}), sums = new_sums(like, {2, parts, width});
  auto* row_values = static_cast<RowValues<A>*>(values.data_ptr());
  norm_statistics_kernel<T, V>
      <<<static_cast<unsigned>(rows), kNormThreads, 0, stream>>>(f, length, row_values);
  check_launch();
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(parts));
  norm_rows_kernel<T, V><<<grid, kNormThreads, 0, stream>>>(f, width, length, row_values,
                                                            f.hands_on(), data<A>(sums));
  check_launch();
  add_partial_sums<A>(sums, parts, f.channels, f.inner, weight_sum, bias_sum, stream);
}

// Every row's length a multiple of V, every pointer aligned: V elements make 16 bytes.
template <class T>
bool is_wide(const Norm<T>& f) {
  return f.length() % kWide<T> == 0 && aligned16(f.x, f.reward, f.found);
}

}  // namespace
}  // namespace lfp::cuda
