// A bf16 product the sm_80 way: cp.async into two buffers, ldmatrix, mma.sync. BUG selects a
// planted bug, 0 none; each is one that people make.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

enum Bug {
  NONE,
  NO_WAIT,
  WAIT_TOO_SHALLOW,
  NO_SYNC_AFTER_WAIT,
  NO_SYNC_BEFORE_OVERWRITE,
  NO_ROW_MASK,
  WRONG_FRAGMENT,
  NO_STORE_MASK,
  MISALIGNED_ROWS,
  ONE_BUFFER,
  NO_PREFETCH,
  BUGS
};

constexpr int BM = 32, BN = 32, BK = 32, THREADS = 128;

__device__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ void copy16(void* shared, const void* global, bool valid) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ void load_a(unsigned (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

__device__ void load_b(unsigned (&r)[2], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(p))
               : "memory");
}

__device__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [m, n] = a [m, k] b [k, n]; k and n are multiples of 8. Four warps, 16 x 16 of the tile each.
template <int BUG>
__global__ void __launch_bounds__(THREADS)
    product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  constexpr int LDA = BK + (BUG == MISALIGNED_ROWS ? 4 : 8), LDB = BN + 8;
  constexpr int BUFFERS = BUG == ONE_BUFFER ? 1 : 2;
  __shared__ __align__(16) __nv_bfloat16 tile_a[BUFFERS][BM * LDA], tile_b[2][BK * LDB];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row = warp / 2 * 16, column = warp % 2 * 16;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  float sums[2][4] = {};
  auto load = [&](int buffer, int k0) {
    for (int i = thread; i < BM * BK / 8; i += THREADS) {
      int r = i / (BK / 8), col = i % (BK / 8) * 8;
      bool valid = (BUG == NO_ROW_MASK || m0 + r < m) && k0 + col < k;
      copy16(&tile_a[buffer % BUFFERS][r * LDA + col],
             valid ? a + (size_t)(m0 + r) * k + k0 + col : a, valid);
    }
    for (int i = thread; i < BK * BN / 8; i += THREADS) {
      int r = i / (BN / 8), col = i % (BN / 8) * 8;
      bool valid = k0 + r < k && n0 + col < n;
      copy16(&tile_b[buffer][r * LDB + col], valid ? b + (size_t)(k0 + r) * n + n0 + col : b,
             valid);
    }
    commit();
  };
  const int steps = (k + BK - 1) / BK;
  load(0, 0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps && BUG != NO_PREFETCH)
      load((step + 1) % 2, (step + 1) * BK);
    else
      commit();
    if (BUG == WAIT_TOO_SHALLOW)
      wait<2>();
    else if (BUG != NO_WAIT)
      wait<1>();
    if (BUG != NO_SYNC_AFTER_WAIT) __syncthreads();
    const __nv_bfloat16 *sa = tile_a[step % BUFFERS], *sb = tile_b[step % 2];
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) {
      unsigned fa[4], fb[2];
      int half = BUG == WRONG_FRAGMENT ? 0 : lane / 16 * 8;
      load_a(fa, sa + (row + lane % 16) * LDA + kk + half);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_b(fb, sb + (kk + lane % 16) * LDB + column + j * 8);
        multiply(sums[j], fa, fb);
      }
    }
    if (BUG != NO_SYNC_BEFORE_OVERWRITE) __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int r = m0 + row + lane / 4 + i / 2 * 8, col = n0 + column + j * 8 + lane % 4 * 2 + i % 2;
      if (r < m && (BUG == NO_STORE_MASK || col < n)) c[(size_t)r * n + col] = sums[j][i];
    }
}

template <int BUG = 0>
static void launch(int bug, dim3 grid, const __nv_bfloat16* a, const __nv_bfloat16* b, float* c,
                   int m, int n, int k) {
  if constexpr (BUG < BUGS) {
    if (bug == BUG)
      product<BUG><<<grid, THREADS>>>(a, b, c, m, n, k);
    else
      launch<BUG + 1>(bug, grid, a, b, c, m, n, k);
  }
}

extern "C" const char* launch_product(const void* a, const void* b, float* c, int m, int n, int k,
                                      int bug) {
  dim3 grid((n + BN - 1) / BN, (m + BM - 1) / BM);
  launch(bug, grid, (const __nv_bfloat16*)a, (const __nv_bfloat16*)b, c, m, n, k);
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
