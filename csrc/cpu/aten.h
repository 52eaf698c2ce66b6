// Products of ATen and oneDNN, called through the dispatcher (the stable ABI names operators).
#pragma once

#include "../layout.h"

namespace lfp::cpu {

// a[M,K] b[N,K]^T (+ bias[N]) -> [M,N]; strided operands welcome.
Tensor product_nt(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                  bool relu = false);

// A [rows, cols] view of memory that outlives the call. It carries no autograd history, so it may
// be used inside parallel regions, where the caller's no-grad mode is not in force.
Tensor matrix_view(const Tensor& like, void* data, int64_t rows, int64_t cols, int64_t row_stride,
                   int64_t col_stride);

// What torch.nn.Conv1-3d and ConvTranspose1-3d hold besides their parameters.
struct ConvGeometry {
  Ints stride, padding, dilation;
  bool transposed;
  Ints output_padding;
  int64_t groups;
};

// x[N,C,...], weight -> z[N,O,...]
Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const ConvGeometry& geometry, bool relu);

// The two transposed products of z = conv(x, weight) with s[N,O,...]: J_x^T s, shaped like x, and
// J_weight^T s, shaped like weight.
Tensor convolution_input(const Tensor& s, const Tensor& x, const Tensor& weight,
                         const ConvGeometry& geometry);
Tensor convolution_weight(const Tensor& s, const Tensor& x, const Tensor& weight,
                          const ConvGeometry& geometry);

}  // namespace lfp::cpu
