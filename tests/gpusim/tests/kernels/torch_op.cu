// An op of the stable ABI, as a product registers it; only the dispatch key is the CPU's.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

using torch::stable::Tensor;

__global__ void leaky(const float* x, float* y, float slope, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] > 0.f ? x[i] : slope * x[i];
}

Tensor leaky_op(const Tensor& x, double slope) {
  Tensor y = torch::stable::empty_like(x);
  int n = (int)x.numel();
  leaky<<<(n + 127) / 128, 128>>>((const float*)x.const_data_ptr(), (float*)y.mutable_data_ptr(),
                                  (float)slope, n);
  cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
  return y;
}

STABLE_TORCH_LIBRARY(gpusim_test, m) { m.def("leaky(Tensor x, float slope) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(gpusim_test, CPU, m) { m.impl("leaky", TORCH_BOX(&leaky_op)); }
