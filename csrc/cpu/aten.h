// Products of ATen and oneDNN, called through the dispatcher (the stable ABI names operators).
#pragma once

#include "../common.h"

namespace lfp::cpu {

// a[M,K] b[N,K]^T (+ bias[N]) -> [M,N]; strided operands welcome.
Tensor product_nt(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                  bool relu = false);

// A [rows, cols] view of memory that outlives the call. It carries no autograd history, so it may
// be used inside parallel regions, where the caller's no-grad mode is not in force.
Tensor matrix_view(const Tensor& like, void* data, int64_t rows, int64_t cols, int64_t row_stride,
                   int64_t col_stride);

}  // namespace lfp::cpu
