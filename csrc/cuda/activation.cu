// step(x) = x > 0 ? 1 : 0. Activations hand the reward on unchanged, so this is all they need.
#include "elementwise.cuh"

namespace lfp::cuda {
namespace {

template <class T>
struct Step {
  const T* x;
  T* y;
  template <int V>
  __device__ void operator()(int64_t i) const {
    Acc<T> v[V];
    load<V>(x, i, v);
#pragma unroll
    for (int k = 0; k < V; ++k) v[k] = v[k] > Acc<T>(0) ? Acc<T>(1) : Acc<T>(0);
    store<V>(y, i, v);
  }
};

Tensor step(Tensor x) {
  const Device device(x);
  x = dense_any_order(x);
  Tensor y = torch::stable::empty_like(x);
  dispatch_dtype(x.scalar_type(), "step", [&](auto element) {
    using T = decltype(element);
    const Step<T> f{data<T>(x), data<T>(y)};
    elementwise_wide<T>(x.numel(), device.stream, f, f.x, f.y);
  });
  return y;
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) { m.impl("step", TORCH_BOX(&lfp::cuda::step)); }
