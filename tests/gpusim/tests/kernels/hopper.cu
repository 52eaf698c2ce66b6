// A bf16 product the sm_90 way: TMA tiles, mbarriers and wgmma, behind a host launcher that encodes
// its tensor maps through the driver entry point.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

constexpr int TILE = 64;

__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ void init(void* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

__device__ void expect(void* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ void wait(void* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ void load_tile(void* shared, const CUtensorMap* map, int x, int y, void* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}

// A 64 x 64 tile with 128-byte rows and swizzle: 1024 bytes from 8 rows to the next 8.
__device__ uint64_t descriptor(const void* p) {
  return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)1 << 16 |
         (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
      "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
      : FOUR(0), FOUR(4), FOUR(8), FOUR(12), FOUR(16), FOUR(20), FOUR(24), FOUR(28)
      : "l"(a), "l"(b));
}

// c [m, n] = a [m, k] b^T, b [n, k]; k is a multiple of 64. One warpgroup per 64 x 64 tile.
template <bool WAIT>
__global__ void __launch_bounds__(128)
    product(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
            float* c, int m, int n, int k) {
  __shared__ __align__(1024) __nv_bfloat16 a[2][TILE * TILE], b[2][TILE * TILE];
  __shared__ __align__(8) uint64_t full[2];
  const int thread = threadIdx.x, m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
  float sums[32] = {};
  if (thread == 0) {
    init(&full[0], 1);
    init(&full[1], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  auto load = [&](int step) {
    int s = step % 2;
    expect(&full[s], 2 * TILE * TILE * 2);
    load_tile(a[s], &map_a, step * TILE, m0, &full[s]);
    load_tile(b[s], &map_b, step * TILE, n0, &full[s]);
  };
  const int steps = k / TILE;
  if (thread == 0) load(0);
  for (int step = 0; step < steps; ++step) {
    if (thread == 0 && step + 1 < steps) load(step + 1);
    if (WAIT) wait(&full[step % 2], step / 2 % 2);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 4; ++i)
      multiply(sums, descriptor(a[step % 2] + i * 16), descriptor(b[step % 2] + i * 16));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    int row = m0 + thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    int column = n0 + i / 4 * 8 + thread % 4 * 2 + i % 2;
    if (row < m && column < n) c[(size_t)row * n + column] = sums[i];
  }
}

static CUresult encode(CUtensorMap* map, const void* base, int rows, int columns, int stride) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                   &found);
  if (!entry) return CUDA_ERROR_NOT_FOUND;
  cuuint64_t extents[] = {(cuuint64_t)columns, (cuuint64_t)rows};
  cuuint64_t strides[] = {(cuuint64_t)stride * 2};
  cuuint32_t box[] = {TILE, TILE}, steps[] = {1, 1};
  return ((decltype(&cuTensorMapEncodeTiled))entry)(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void*)base, extents, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

extern "C" const char* launch_product(const void* a, const void* b, float* c, int m, int n, int k,
                                      int stride, bool wait) {
  alignas(64) CUtensorMap map_a, map_b;
  if (encode(&map_a, a, m, k, stride) || encode(&map_b, b, n, k, stride))
    return "tensor map refused";
  dim3 grid((n + TILE - 1) / TILE, (m + TILE - 1) / TILE);
  if (wait)
    product<true><<<grid, 128>>>(map_a, map_b, c, m, n, k);
  else
    product<false><<<grid, 128>>>(map_a, map_b, c, m, n, k);
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
