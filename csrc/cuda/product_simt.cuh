// The core for float32 and float64: exact products on the ordinary units. 16 x 16 threads; each
// owns runs of neighbouring rows and columns, sixteen runs apart.
//
// A float32 sum of k terms, one after another, errs like k; chains of c terms, whose sums are then
// added, like sqrt(k c). Small tiles have the registers for chains of one tile of k. Others are
// short of them, so their totals of kChain terms wait in shared memory: each thread has its own,
// touched once in kChain terms, and only where a sum is longer than that.
#pragma once

#include "common.cuh"

namespace lfp::cuda {

constexpr int kSimtSide = 16;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }

// kOuter (m or n) by kK elements in shared memory, [k][outer] or (kAlongK) [outer][k].
template <class A, int kOuter, int kK, bool kAlongK>
struct alignas(16) SimtTile {
  static constexpr int kRun =
      kOuter / kSimtSide < 16 / int(sizeof(A)) ? kOuter / kSimtSide : 16 / int(sizeof(A));
  static constexpr int kRuns = kOuter / kSimtSide / kRun;
  // Keeps rows aligned and spreads stores across them over the banks.
  static constexpr int kStride = (kAlongK ? kK : kOuter) + 16 / sizeof(A);
  A value[kAlongK ? kOuter : kK][kStride];

  __device__ __forceinline__ A& at(int outer, int k) {
    return kAlongK ? value[outer][k] : value[k][outer];
  }
  __device__ __forceinline__ const A& at(int outer, int k) const {
    return kAlongK ? value[outer][k] : value[k][outer];
  }
  template <int V>
  __device__ __forceinline__ void put_along_k(int outer, int k, const A (&v)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) at(outer, k + j) = v[j];
  }
  template <int V>
  __device__ __forceinline__ void put_across(int outer, int k, const A (&v)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) at(outer + j, k) = v[j];
  }
  __device__ __forceinline__ A sum(int outer) const {
    A total = A(0);
#pragma unroll 8
    for (int k = 0; k < kK; ++k) total += at(outer, k);
    return total;
  }
  // The elements of one k that a thread multiplies.
  __device__ __forceinline__ void get(int k, int side, A (&out)[kRun * kRuns]) const {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int outer = (r * kSimtSide + side) * kRun;
      if constexpr (kAlongK) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) out[r * kRun + j] = value[outer + j][k];
      } else {
        const auto pack = *reinterpret_cast<const Pack<A, kRun>*>(&value[k][outer]);
#pragma unroll
        for (int j = 0; j < kRun; ++j) out[r * kRun + j] = pack.value[j];
      }
    }
  }
};

template <class A, int kM, int kN, int kK>
struct SimtCore {
  using Accumulator = A;
  static constexpr int kTileM = kM, kTileN = kN, kTileK = kK;
  static constexpr int kThreads = kSimtSide * kSimtSide;
  // Registers: 128 for two blocks do not hold 64 sums and two operands on their way.
  static constexpr int kBlocksPerProcessor = kM * kN > 64 * 64 ? 1 : 2;
  static constexpr size_t kVisitBytes = 0;

  template <bool kAlong>
  using TileA = SimtTile<A, kM, kK, kAlong>;
  template <bool kAlong>
  using TileB = SimtTile<A, kN, kK, kAlong>;
  static constexpr int kRunM = TileA<false>::kRun, kRun = TileB<false>::kRun;
  static constexpr int kThreadM = kM / kSimtSide, kThreadN = kN / kSimtSide;

  static constexpr bool kChainPerTile = sizeof(A) == 4 && kM * kN * kK <= 64 * 64 * 16;
  static constexpr int kChain = sizeof(A) == 8 || kChainPerTile ? 0 : 256;  // 0: no Totals
  struct Totals {
    Pack<A, kRun> value[kThreadM * kThreadN / kRun][kThreads];
  };

  // Operands of any order arrive in the order that multiplies fastest.
  template <bool, bool>
  struct Shared {
    struct {
      TileA<false> a;
      TileB<false> b;
    } stage[2];
  };

  using Sums = A[kThreadM][kThreadN];
  Sums sums = {};

  template <class Left, class Right>
  __device__ __forceinline__ void multiply(const Left& a, const Right& b) {
    if constexpr (kChainPerTile) {
      Sums chain = {};
      add_products(a, b, chain);
      add(chain);
    } else {
      add_products(a, b, sums);
    }
  }
  template <class Left, class Right>
  __device__ __forceinline__ void add_products(const Left& a, const Right& b, Sums& to) const {
#pragma unroll(kTileK <= 16 ? kTileK : 8)
    for (int k = 0; k < kTileK; ++k) {
      A left[kThreadM], right[kThreadN];
      a.get(k, threadIdx.x / kSimtSide, left);
      b.get(k, threadIdx.x % kSimtSide, right);
#pragma unroll
      for (int i = 0; i < kThreadM; ++i)
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) to[i][j] += left[i] * right[j];
    }
  }

  // Ends a chain: its sums are added to the totals, or start them, and the next chain is empty.
  __device__ __forceinline__ void end_chain(Totals& totals, bool first) {
#pragma unroll
    for (int i = 0; i < kThreadM; ++i)
#pragma unroll
      for (int r = 0; r < kThreadN / kRun; ++r) {
        auto& mine = totals.value[i * (kThreadN / kRun) + r][threadIdx.x];
        Pack<A, kRun> total = {};
        if (!first) total = mine;
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          A& sum = sums[i][r * kRun + j];
          total.value[j] += sum;
          sum = A(0);
        }
        mine = total;
      }
  }
  __device__ __forceinline__ void add(const Sums& chain) {
#pragma unroll
    for (int i = 0; i < kThreadM; ++i)
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) sums[i][j] += chain[i][j];
  }
  // The last chain and the totals of those before it.
  __device__ __forceinline__ void add(const Totals& totals) {
#pragma unroll
    for (int i = 0; i < kThreadM; ++i)
#pragma unroll
      for (int r = 0; r < kThreadN / kRun; ++r) {
        const auto total = totals.value[i * (kThreadN / kRun) + r][threadIdx.x];
#pragma unroll
        for (int j = 0; j < kRun; ++j) sums[i][r * kRun + j] += total.value[j];
      }
  }

  // use(m, n, sums of kWidth neighbouring columns), with a run as the widest.
  template <int kWidth, class Use>
  __device__ __forceinline__ void visit(unsigned char*, Use use) {
    static_assert(kWidth == kRun);
#pragma unroll
    for (int i = 0; i < kThreadM; ++i)
#pragma unroll
      for (int r = 0; r < kThreadN / kRun; ++r) {
        A run[kRun];
#pragma unroll
        for (int j = 0; j < kRun; ++j) run[j] = sums[i][r * kRun + j];
        const int side = threadIdx.x / kSimtSide;
        const int m = (i / kRunM * kSimtSide + side) * kRunM + i % kRunM;
        use(m, (r * kSimtSide + int(threadIdx.x) % kSimtSide) * kRun, run);
      }
  }
};

template <class A, int kTile>
using Simt = SimtCore<A, kTile, kTile, 32 / int(sizeof(A)) * (kTile == 64 ? 2 : 1)>;

}  // namespace lfp::cuda
