// The core for float32 and float64: exact products on the ordinary units.
// Tiles lie in shared memory as [k][m] and [k][n]; a thread owns kThread x kThread sums.
#pragma once

#include "common.cuh"

namespace lfp::cuda {

template <class A, int kTile>
struct Simt {
  using Accumulator = A;
  static constexpr int kTileM = kTile, kTileN = kTile;
  static constexpr int kTileK = 32 / sizeof(A) * (kTile == 64 ? 2 : 1);
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerProcessor = 2;
  static constexpr size_t kVisitBytes = 0;
  static constexpr int kSide = 16;             // 16 x 16 threads
  static constexpr int kRun = 16 / sizeof(A);  // neighbouring columns of a thread
  static constexpr int kRuns = kTile / kSide / kRun;
  static constexpr int kThread = kRun * kRuns;
  static_assert(kRuns * kRun * kSide == kTile);

  struct alignas(16) Tile {
    static constexpr int kStride = kTile + kRun;  // keeps rows aligned, spreads transposed stores
    A value[kTileK][kStride];

    template <int V>
    __device__ __forceinline__ void put_along_k(int outer, int k, const A (&v)[V]) {
#pragma unroll
      for (int j = 0; j < V; ++j) value[k + j][outer] = v[j];
    }
    template <int V>
    __device__ __forceinline__ void put_across(int outer, int k, const A (&v)[V]) {
#pragma unroll
      for (int j = 0; j < V; ++j) value[k][outer + j] = v[j];
    }
    __device__ __forceinline__ A sum(int outer) const {
      A total = A(0);
#pragma unroll
      for (int k = 0; k < kTileK; ++k) total += value[k][outer];
      return total;
    }
    // The elements of one k that a thread multiplies: kRuns runs, kSide runs apart.
    __device__ __forceinline__ void get(int k, int side, A (&out)[kThread]) const {
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        const auto pack =
            *reinterpret_cast<const Pack<A, kRun>*>(&value[k][(r * kSide + side) * kRun]);
#pragma unroll
        for (int j = 0; j < kRun; ++j) out[r * kRun + j] = pack.value[j];
      }
    }
  };

  template <bool, bool>
  struct Shared {
    struct {
      Tile a, b;
    } stage[2];
  };

  A sums[kThread][kThread] = {};

  __device__ __forceinline__ void multiply(const Tile& a, const Tile& b) {
#pragma unroll
    for (int k = 0; k < kTileK; ++k) {
      A left[kThread], right[kThread];
      a.get(k, threadIdx.x / kSide, left);
      b.get(k, threadIdx.x % kSide, right);
#pragma unroll
      for (int i = 0; i < kThread; ++i)
#pragma unroll
        for (int j = 0; j < kThread; ++j) sums[i][j] += left[i] * right[j];
    }
  }

  // use(m, n, sums of kWidth neighbouring columns), with a run as the widest.
  template <int kWidth, class Use>
  __device__ __forceinline__ void visit(unsigned char*, Use use) {
    static_assert(kWidth == kRun);
#pragma unroll
    for (int i = 0; i < kThread; ++i)
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        A run[kRun];
#pragma unroll
        for (int j = 0; j < kRun; ++j) run[j] = sums[i][r * kRun + j];
        const int m = (i / kRun * kSide + threadIdx.x / kSide) * kRun + i % kRun;
        use(m, (r * kSide + int(threadIdx.x) % kSide) * kRun, run);
      }
  }
};

}  // namespace lfp::cuda
