// The core on tensor cores (mma.sync, sm_80 and later), float32 accumulation:
//   BFloat16  m16n8k16, operands rounded to bfloat16
//   Tf32      m16n8k8, operands rounded to 10 bits of mantissa with the range of float32. It takes
//             float16 tensors too: their values are exact in it, and r / stab(z) does not overflow.
// A tile lies in shared memory in the order of its operand, so that both loads and stores are wide:
// [outer][k] or [k][outer], padded such that the fragments are read without bank conflicts.
#pragma once

#include "common.cuh"

namespace lfp::cuda {

struct Tf32 {
  uint32_t bits;
};

__device__ __forceinline__ void round_to(float v, Tf32& out) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out.bits) : "f"(v));
}
__device__ __forceinline__ void round_to(float v, BFloat16& out) { out = static_cast<BFloat16>(v); }
__device__ __forceinline__ float widen(Tf32 v) { return __uint_as_float(v.bits); }
__device__ __forceinline__ float widen(BFloat16 v) { return static_cast<float>(v); }

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    Tf32) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* address) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(address));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
}

// bfloat16: rows of 16 bytes times an odd number. Tf32: 4 or 8 banks between neighbouring rows.
template <class P>
constexpr int mma_pad(bool along_k) {
  return sizeof(P) == 2 ? 8 : (along_k ? 4 : 8);
}

template <class P, int kOuter, int kTileK, bool kAlongK, int kPad = mma_pad<P>(kAlongK)>
struct alignas(16) MmaTile {
  static constexpr int kLines = kAlongK ? kOuter : kTileK;
  static constexpr int kStride = (kAlongK ? kTileK : kOuter) + kPad;
  P value[kLines][kStride];

  template <int V>
  __device__ __forceinline__ void put_line(int line, int at, const float (&v)[V]) {
    Pack<P, (V * sizeof(P) > 16 ? 16 / sizeof(P) : V)> pack;
    constexpr int kPart = sizeof(pack) / sizeof(P);
#pragma unroll
    for (int first = 0; first < V; first += kPart) {
#pragma unroll
      for (int j = 0; j < kPart; ++j) round_to(v[first + j], pack.value[j]);
      *reinterpret_cast<decltype(pack)*>(&value[line][at + first]) = pack;
    }
  }
  template <int V>
  __device__ __forceinline__ void put_along_k(int outer, int k, const float (&v)[V]) {
    put_line<V>(outer, k, v);
  }
  template <int V>
  __device__ __forceinline__ void put_across(int outer, int k, const float (&v)[V]) {
    put_line<V>(k, outer, v);
  }
  __device__ __forceinline__ P at(int outer, int k) const {
    return kAlongK ? value[outer][k] : value[k][outer];
  }
  __device__ __forceinline__ float sum(int outer) const {
    float total = 0.f;
#pragma unroll
    for (int k = 0; k < kTileK; ++k) total += widen(at(outer, k));
    return total;
  }

  // Fragment of 16 rows by one step of k, as the left operand of mma.
  __device__ __forceinline__ void left(int outer, int k, uint32_t (&out)[4]) const {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(P) == 2) {
      const int low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
      if constexpr (kAlongK)
        load_matrices<false>(out, &value[outer + second + low][k + third]);
      else
        load_matrices<true>(out, &value[k + third + low][outer + second]);
    } else {
      const int group = lane / 4, in_group = lane % 4;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        out[j] = at(outer + group + j % 2 * 8, k + in_group + j / 2 * 4).bits;
    }
  }
  // Fragments of two neighbouring 8-column parts, as the right operand.
  __device__ __forceinline__ void right(int outer, int k, uint32_t (&out)[4]) const {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(P) == 2) {
      const int low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
      if constexpr (kAlongK)
        load_matrices<false>(out, &value[outer + third + low][k + second]);
      else
        load_matrices<true>(out, &value[k + second + low][outer + third]);
    } else {
      const int group = lane / 4, in_group = lane % 4;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        out[j] = at(outer + group + j / 2 * 8, k + in_group + j % 2 * 4).bits;
    }
  }
};

template <class P>
inline constexpr int kMmaStep = sizeof(P) == 2 ? 16 : 8;  // k of one mma

// P: BFloat16 or Tf32. kM x kN sums by warps of kWarpM x kWarpN, over kK at a time.
template <class P, int kM, int kN, int kK, int kWarpM, int kWarpN>
struct MmaCore {
  using Accumulator = float;
  static constexpr int kTileM = kM, kTileN = kN, kTileK = kK;
  static constexpr int kStep = kMmaStep<P>;
  static constexpr int kWarpsN = kN / kWarpN;
  static constexpr int kThreads = 32 * (kM / kWarpM) * kWarpsN;
  static constexpr int kBlocksPerProcessor = kThreads <= 128 ? 3 : 1;
  static constexpr int kPartsM = kWarpM / 16, kPartsN = kWarpN / 8;
  static_assert(kPartsN % 2 == 0 && kK % kStep == 0);

  template <bool kAlong>
  using TileA = MmaTile<P, kM, kK, kAlong>;
  template <bool kAlong>
  using TileB = MmaTile<P, kN, kK, kAlong>;

  template <bool kAlongA, bool kAlongB>
  struct Shared {
    struct {
      TileA<kAlongA> a;
      TileB<kAlongB> b;
    } stage[2];
  };

  // The sums pass through shared memory 16 rows per warp row at a time, to leave it in wide runs.
  static constexpr int kVisitRows = 16 * (kM / kWarpM);
  static constexpr int kVisitStride = kN + 4;
  static constexpr size_t kVisitBytes = sizeof(float) * kVisitRows * kVisitStride;

  float sums[kPartsM][kPartsN][4] = {};

  __device__ __forceinline__ int warp_m() const { return threadIdx.x / 32 / kWarpsN; }
  __device__ __forceinline__ int warp_n() const { return threadIdx.x / 32 % kWarpsN; }

  template <class Left, class Right>
  __device__ __forceinline__ void multiply(const Left& a, const Right& b) {
#pragma unroll
    for (int k = 0; k < kTileK; k += kStep) {
      uint32_t left[kPartsM][4], right[kPartsN / 2][4];
#pragma unroll
      for (int i = 0; i < kPartsM; ++i) a.left(warp_m() * kWarpM + i * 16, k, left[i]);
#pragma unroll
      for (int j = 0; j < kPartsN / 2; ++j) b.right(warp_n() * kWarpN + j * 16, k, right[j]);
#pragma unroll
      for (int i = 0; i < kPartsM; ++i)
#pragma unroll
        for (int j = 0; j < kPartsN; ++j) {
          const uint32_t part[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          mma(sums[i][j], left[i], part, P{});
        }
    }
  }

  template <int kWidth, class Use>
  __device__ __forceinline__ void visit(unsigned char* memory, Use use) {
    auto* rows = reinterpret_cast<float (*)[kVisitStride]>(memory);
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    constexpr int kPacks = kN / kWidth;
#pragma unroll
    for (int i = 0; i < kPartsM; ++i) {
      if (i > 0) __syncthreads();  // the tiles, and then the rows before, have been read
#pragma unroll
      for (int j = 0; j < kPartsN; ++j) {
        const int m = warp_m() * 16 + group, n = warp_n() * kWarpN + j * 8 + pair;
        *reinterpret_cast<float2*>(&rows[m][n]) = {sums[i][j][0], sums[i][j][1]};
        *reinterpret_cast<float2*>(&rows[m + 8][n]) = {sums[i][j][2], sums[i][j][3]};
      }
      __syncthreads();
      for (int pack = threadIdx.x; pack < kVisitRows * kPacks; pack += kThreads) {
        const int row = pack / kPacks, n = pack % kPacks * kWidth;
        float run[kWidth];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) run[k] = rows[row][n + k];
        use(row / 16 * kWarpM + i * 16 + row % 16, n, run);
      }
    }
  }
};

template <class P, int kTile, int kWarpM, int kWarpN>
using Mma = MmaCore<P, kTile, kTile, 2 * kMmaStep<P>, kWarpM, kWarpN>;

}  // namespace lfp::cuda
