// Row sums with warp shuffles, module variables and a "last block" reduction, each with a host
// launcher. BUG selects a planted bug, 0 none.
#include <cuda_runtime.h>

__constant__ float scale[2] = {1.f, 1.f};
__device__ unsigned rows_done;

__global__ void row_sum(const float* x, float* y, int columns) {
  __shared__ float parts[32];
  const float* row = x + (size_t)blockIdx.x * columns;
  float sum = 0.f;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += row[i];
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  float total = 0.f;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) total += parts[i];
  y[blockIdx.x] = total * scale[1];
  atomicAdd(&rows_done, 1u);
}

enum { NO_FENCE = 1, NO_SYNC = 2 };

// Each block sums its part; the block that finishes last adds the parts.
template <int BUG>
__global__ void sum(const float* x, float* parts, unsigned* count, float* result, int n) {
  __shared__ float tile[128];
  __shared__ bool last;
  int t = threadIdx.x;
  float value = 0.f;
  for (int i = blockIdx.x * 128 + t; i < n; i += gridDim.x * 128) value += x[i];
  tile[t] = value;
  __syncthreads();
  for (int half = 64; half; half /= 2) {
    if (t < half) tile[t] += tile[t + half];
    if (BUG != NO_SYNC) __syncthreads();
  }
  if (t == 0) {
    parts[blockIdx.x] = tile[0];
    if (BUG != NO_FENCE) __threadfence();
    last = atomicAdd(count, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && t == 0) {
    float total = 0.f;
    for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i];
    *result = total;
  }
}

__global__ void reverse(const float* x, float* y, int n) {
  extern __shared__ float tile[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = tile[n - 1 - i];
}

static const char* status() {
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

extern "C" {

const char* launch_row_sum(const float* x, float* y, int rows, int columns, float factor) {
  float host[2] = {0.f, factor};
  cudaMemcpyToSymbol(scale, host, sizeof host, 0);
  row_sum<<<rows, 128>>>(x, y, columns);
  return status();
}

unsigned count_rows() {
  unsigned rows = 0;
  cudaMemcpyFromSymbol(&rows, rows_done, sizeof rows);
  return rows;
}

const char* launch_sum(const float* x, float* parts, unsigned* count, float* result, int n,
                       int bug) {
  auto kernel = bug == NO_FENCE ? sum<NO_FENCE> : bug == NO_SYNC ? sum<NO_SYNC> : sum<0>;
  kernel<<<7, 128>>>(x, parts, count, result, n);
  return status();
}

// opt_in: bytes of dynamic shared memory to ask for first, 0 for none.
const char* launch_reverse(const float* x, float* y, int n, int opt_in) {
  if (opt_in && cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     opt_in) != cudaSuccess)
    return status();
  reverse<<<1, 256, n * sizeof(float)>>>(x, y, n);
  return status();
}

int occupancy(int threads, int bytes) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reverse, threads, bytes);
  return blocks;
}
}
