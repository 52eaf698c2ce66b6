// step(x) = x > 0 ? 1 : 0. Activations hand the reward on unchanged, so this is all they need.
#include "loops.h"

namespace lfp::cpu {
namespace {

bool same_strides(const Tensor& a, const Tensor& b) {
  const auto x = a.strides(), y = b.strides();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

Tensor step(Tensor x) {
  // empty_like keeps the strides of a dense tensor in any memory format; others are copied.
  Tensor y = torch::stable::empty_like(x);
  const bool direct = same_strides(x, y);
  if (!direct) torch::stable::copy_(y, x);
  dispatch_dtype(x.scalar_type(), "step", [&](auto element) {
    using T = decltype(element);
    const T* from = data<T>(direct ? x : y);
    T* to = data<T>(y);
    parallel_loop(y.numel(), [=](int64_t i) {
      store(to, i, load(from, i) > Acc<T>(0) ? Acc<T>(1) : Acc<T>(0));
    });
  });
  return y;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) { m.impl("step", TORCH_BOX(&lfp::cpu::step)); }
