// sums[row] = (a . b, |a|^2, |b|^2) of the rows of a[R, K] and b[R, K], each read once: a block per
// row, several accesses of 16 bytes in flight.
#include "common.cuh"

namespace lfp::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    alignment_kernel(const T* a, const T* b, Acc<T>* sums, int64_t count) {
  using A = Acc<T>;
  __shared__ A scratch[3][kThreads / 32];
  const int64_t row = blockIdx.x;
  const T *x = a + row * count, *y = b + row * count;
  A total[3] = {};
#pragma unroll 2
  for (int64_t i = int64_t(threadIdx.x) * V; i < count; i += int64_t(kThreads) * V) {
    A u[V], v[V];
    load<V>(x, i, u);
    load<V>(y, i, v);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      total[0] += u[k] * v[k];
      total[1] += u[k] * u[k];
      total[2] += v[k] * v[k];
    }
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const A sum = block_sum<kThreads>(total[k], scratch[k]);
    if (threadIdx.x == 0) sums[row * 3 + k] = sum;
  }
}

Tensor alignment_sums(Tensor a, Tensor b) {
  const Device device(a);
  const Tensor x = dense(a), y = dense(b);
  const int64_t rows = x.size(0), count = x.size(1);
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor sums = torch::stable::new_empty(x, {rows, 3}, type);
  if (rows == 0) return sums;
  LFP_CHECK(rows < (int64_t(1) << 31), "alignment_sums", "too many rows: ", rows);
  dispatch_dtype(x.scalar_type(), "alignment_sums", [&](auto element) {
    using T = decltype(element);
    const T *pa = data<T>(x), *pb = data<T>(y);
    auto* to = data<Acc<T>>(sums);
    const auto blocks = static_cast<unsigned>(rows);
    if (count % kWide<T> == 0 && aligned16(pa, pb))
      alignment_kernel<T, kWide<T>><<<blocks, kThreads, 0, device.stream>>>(pa, pb, to, count);
    else
      alignment_kernel<T, 1><<<blocks, kThreads, 0, device.stream>>>(pa, pb, to, count);
    check_launch();
  });
  return sums;
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) { m.impl("alignment_sums", TORCH_BOX(&lfp::cuda::alignment_sums)); }
