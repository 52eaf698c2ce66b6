// Which core multiplies which tensors, and with which tile.
#pragma once

#include "product.cuh"
#include "product_mma.cuh"
#include "product_simt.cuh"

namespace lfp::cuda {

// f(T{}, P{}): element type and the type the products run in. float16 as the product type of
// float32 tensors is TF32: the 10-bit mantissa of float16 with the range of float32.
template <class F>
void dispatch_product(ScalarType dtype, ScalarType product, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(BFloat16{}, BFloat16{});
    case ScalarType::Half: return f(Half{}, Tf32{});
    case ScalarType::Float:
      if (product == ScalarType::BFloat16) return f(float{}, BFloat16{});
      if (product == ScalarType::Half) return f(float{}, Tf32{});
      return f(float{}, float{});
    default:
      STD_TORCH_CHECK(false, "lfp_kernels::", op,
                      ": expected float64, float32, bfloat16 or float16");
  }
}

template <class P>
struct CoreOf {
  using Large = Mma<P, 128, 64, 32>;
  using Small = Mma<P, 64, 32, 32>;
};
template <>
struct CoreOf<float> {
  using Large = Simt<float, 128>;
  using Small = Simt<float, 64>;
};
template <>
struct CoreOf<double> {
  using Large = Simt<double, 64>;
  using Small = Simt<double, 64>;
};

// The large tile reads half as much; the small one makes four times the blocks.
template <class P, class OperandA, class OperandB, class Epilogue>
void tiled_product(int64_t m, int64_t n, int64_t k, const OperandA& a, const OperandB& b,
                   const Epilogue& epilogue, const Tensor& like, const Device& device,
                   int64_t parts = 1) {
  using Large = typename CoreOf<P>::Large;
  using Small = typename CoreOf<P>::Small;
  const int64_t tiles = ceil_div<int64_t>(m, Large::kTileM) * ceil_div<int64_t>(n, Large::kTileN);
  if (tiles * parts >= device.processors())
    product<Large>(m, n, k, a, b, epilogue, like, device, parts);
  else
    product<Small>(m, n, k, a, b, epilogue, like, device, parts);
}

}  // namespace lfp::cuda
