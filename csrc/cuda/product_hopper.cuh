// The tiled product of bfloat16 matrices on sm_90a. One warp keeps TMA busy: kStages boxes of the
// operands on their way or in use. Two warpgroups, 64 rows of the tile each, turn r and z into s in
// registers, which wgmma takes as its left operand; the right one goes from the box directly.
#pragma once

#include "hopper.cuh"
#include "operand.cuh"
#include "product.cuh"
#include "product_mma.cuh"

namespace lfp::cuda {

struct HopperCore {  // the sizes of a tile, for split_product
  using Accumulator = float;
  static constexpr int kTileM = 128, kTileN = 128, kTileK = 64;
};

constexpr int kBox = 64;  // a box is 64 rows of 64 elements, 128 bytes
constexpr int kBoxBytes = kBox * kBox * 2;
constexpr int kStages = 4;
constexpr int kConsumers = 256;                  // two warpgroups
constexpr int kHopperThreads = kConsumers + 32;  // and the warp that loads

using Box = BFloat16[kBox][kBox];

struct HopperStage {
  Box a[2], z[2], b[2];  // a: the left matrix, or r; z only with r
};
struct HopperShared {
  HopperStage stage[kStages];
  alignas(8) uint64_t full[kStages], empty[kStages];
};
// The sums leave through the memory of the stages: [warpgroup][64][kTileN + 4].
constexpr int kHopperVisitStride = HopperCore::kTileN + 4;
static_assert(2 * kBox * kHopperVisitStride * sizeof(float) <= sizeof(HopperStage) * kStages);
// The boxes must start at multiples of 1024 bytes, which dynamic shared memory may not.
constexpr size_t kHopperBytes = sizeof(HopperShared) + 1024;

struct HopperMaps {
  CUtensorMap a, z, b;
};

// Element (row, col) of a box in the 128-byte swizzle, col a multiple of 8.
__device__ __forceinline__ const BFloat16* in_box(const Box& box, int row, int col) {
  return &box[row][(col / 8 ^ row % 8) * 8];
}

// The fragment of 16 rows m by 16 k of a box that lies [m][k] (kAlongK) or [k][m].
template <bool kAlongK>
__device__ __forceinline__ void box_fragment(const Box& box, int m, int k, uint32_t (&out)[4]) {
  const int lane = threadIdx.x % 32;
  const int low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
  if constexpr (kAlongK)
    load_matrices<false>(out, in_box(box, m + second + low, k + third));
  else
    load_matrices<true>(out, in_box(box, k + third + low, m + second));
}

struct PairOfBFloat16 {
  BFloat16 low, high;
};

// s = prologue(r, z) in place of r, rounded; adds what was rounded to the sums of rows m, m + 8.
__device__ __forceinline__ void form_signal(const RuleCall<float>& rule, uint32_t (&a)[4],
                                            const uint32_t (&z)[4], float (&row_sums)[2]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    auto r = *reinterpret_cast<PairOfBFloat16*>(&a[j]);
    const auto o = *reinterpret_cast<const PairOfBFloat16*>(&z[j]);
    if (!rule.signal_in) {
      r.low = static_cast<BFloat16>(
          rule.prologue(static_cast<float>(r.low), static_cast<float>(o.low)));
      r.high = static_cast<BFloat16>(
          rule.prologue(static_cast<float>(r.high), static_cast<float>(o.high)));
    }
    row_sums[j % 2] += static_cast<float>(r.low) + static_cast<float>(r.high);
    a[j] = *reinterpret_cast<uint32_t*>(&r);
  }
}

// kSignal: the left operand is s from r and z, else the matrix `a` itself.
template <bool kSignal, bool kAlongA, bool kAlongB, class Epilogue>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_kernel(Problem<float> p, const __grid_constant__ HopperMaps maps, RuleCall<float> rule,
                  Epilogue epilogue) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char unaligned[];
  unsigned char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  HopperShared& shared = *reinterpret_cast<HopperShared*>(memory);
  const TileIndex tile = tile_of_block(blockIdx.x, p.tiles_m, p.tiles_n);
  const int64_t m0 = tile.m * HopperCore::kTileM, n0 = tile.n * HopperCore::kTileN;
  const int64_t begin = blockIdx.y * p.k_per_split;
  const int64_t end = min(p.k, begin + p.k_per_split);
  const int steps = static_cast<int>(ceil_div<int64_t>(end - begin, kBox));

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], kConsumers / 32);
    }
    barriers_visible();
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {  // the warp that loads
    if (threadIdx.x != kConsumers) return;
    const bool wants_z = kSignal && !rule.signal_in;
    for (int step = 0; step < steps; ++step) {
      const int s = step % kStages;
      HopperStage& stage = shared.stage[s];
      if (step >= kStages) barrier_wait(&shared.empty[s], (step / kStages - 1) % 2);
      barrier_expect(&shared.full[s], (wants_z ? 6 : 4) * kBoxBytes);
      const int k = static_cast<int>(begin) + step * kBox;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = static_cast<int>(m0) + half * kBox, n = static_cast<int>(n0) + half * kBox;
        load_box(stage.a[half], maps.a, kAlongA ? k : m, kAlongA ? m : k, &shared.full[s]);
        if (wants_z)
          load_box(stage.z[half], maps.z, kAlongA ? k : m, kAlongA ? m : k, &shared.full[s]);
        load_box(stage.b[half], maps.b, kAlongB ? k : n, kAlongB ? n : k, &shared.full[s]);
      }
    }
    return;
  }

  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float sums[64] = {}, row_sums[2] = {};
  for (int step = 0; step < steps; ++step) {
    const int s = step % kStages;
    const HopperStage& stage = shared.stage[s];
    barrier_wait(&shared.full[s], step / kStages % 2);
    // While this group forms its signals, the other one has the tensor cores.
    uint32_t left[kBox / 16][4];
#pragma unroll
    for (int j = 0; j < kBox / 16; ++j) {
      box_fragment<kAlongA>(stage.a[group], warp * 16, j * 16, left[j]);
      if constexpr (kSignal) {
        uint32_t z[4] = {};
        if (!rule.signal_in) box_fragment<kAlongA>(stage.z[group], warp * 16, j * 16, z);
        form_signal(rule, left[j], z, row_sums);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kBox / 16; ++j) {
      // 16 k further: 32 bytes along a row, or 16 rows of 128 bytes
      const auto* b = reinterpret_cast<const unsigned char*>(stage.b);
      wgmma<!kAlongB>(sums, left[j],
                      matrix_descriptor(b + j * (kAlongB ? 32 : 16 * 128), kBoxBytes));
    }
    wgmma_commit();
    wgmma_wait();
    __syncwarp();  // all lanes have read
    if (lane == 0) barrier_arrive(&shared.empty[s]);
  }

  // All stages are read by now once both groups are here.
  named_barrier(1, kConsumers);
  auto* rows = reinterpret_cast<float (*)[kHopperVisitStride]>(memory) + group * kBox;
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    const int m = warp * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(&rows[m][n]) = {sums[i], sums[i + 1]};
  }
  named_barrier(2 + group, 128);
  constexpr int W = Epilogue::kWidth, kLine = HopperCore::kTileN / W;
  for (int pack = threadIdx.x % 128; pack < kBox * kLine; pack += 128) {
    const int m = pack / kLine, n = pack % kLine * W;
    float run[W];
#pragma unroll
    for (int k = 0; k < W; ++k) run[k] = rows[m][n + k];
    finish(p, epilogue, blockIdx.y, m0 + group * kBox + m, n0 + n, run);
  }
  if (epilogue.wants_row_sums && tile.n == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sums[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int64_t m = m0 + group * kBox + warp * 16 + half * 8 + lane / 4;
      if (lane % 4 != 0 || m >= p.m) continue;
      if (p.partial_rows)
        p.partial_rows[blockIdx.y * p.m + m] = sum;
      else
        epilogue.row_sum(m, sum);
    }
  }
#endif
}

// ---- host

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime: nothing links to libcuda.
inline EncodeTiled encode_tiled() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  LFP_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                  cudaEnableDefault, &found));
  return reinterpret_cast<EncodeTiled>(entry);
}

// TMA wants 16-byte rows and coordinates of 32 bits.
inline bool allows_boxes(const BFloat16* p, int64_t rows, int64_t cols) {
  return aligned16(p) && cols % 8 == 0 && rows > 0 && cols > 0 && rows < (1 << 30) &&
         cols < (1 << 30);
}

inline void box_map(EncodeTiled encode, const BFloat16* p, int64_t rows, int64_t cols,
                    CUtensorMap& map) {
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(cols) * sizeof(BFloat16)};
  const cuuint32_t box[] = {kBox, kBox}, steps[] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<BFloat16*>(p), extents, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "lfp_kernels: the driver refused a tensor map of ", rows,
                  " x ", cols, " bfloat16, error ", int(result));
}

inline bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  LFP_CUDA_CHECK(cudaGetDevice(&device));
  LFP_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  LFP_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

// Too few tiles leave the device idle: the smaller tiles of mma.sync are better then.
inline bool hopper_pays(int64_t m, int64_t n, int64_t k, const Device& device) {
  const int64_t tiles =
      ceil_div<int64_t>(m, HopperCore::kTileM) * ceil_div<int64_t>(n, HopperCore::kTileN);
  return is_hopper() && k >= 2 * kBox && 2 * tiles >= device.processors();
}

// The product of a left operand s (SignalOperand) or matrix and a right matrix; false where sm_90a,
// the alignment or the size do not allow it.
template <class OperandA, class OperandB, class Epilogue>
bool hopper_product(int64_t m, int64_t n, int64_t k, const OperandA& a, const OperandB& b,
                    const Epilogue& epilogue, const Tensor& like, const Device& device) {
  constexpr bool kSignal = requires { a.reward; };
  const BFloat16 *left, *z = nullptr;
  if constexpr (kSignal)
    left = a.reward, z = a.z;
  else
    left = a.p;
  if (!hopper_pays(m, n, k, device) || !allows_boxes(left, a.rows, a.cols) ||
      !allows_boxes(b.p, b.rows, b.cols) || (z && !allows_boxes(z, a.rows, a.cols)))
    return false;
  const EncodeTiled encode = encode_tiled();
  if (!encode) return false;
  alignas(128) HopperMaps maps;  // the compiler forgets that CUtensorMap asks for it
  box_map(encode, left, a.rows, a.cols, maps.a);
  box_map(encode, z ? z : left, a.rows, a.cols, maps.z);
  box_map(encode, b.p, b.rows, b.cols, maps.b);
  auto* kernel = hopper_kernel<kSignal, OperandA::kAlongK, OperandB::kAlongK, Epilogue>;
  allow_shared(kernel, kHopperBytes);
  split_product<HopperCore>(m, n, k, epilogue, like, device, 1, [&](const auto& p, dim3 grid) {
    kernel<<<grid, kHopperThreads, kHopperBytes, device.stream>>>(p, maps, a.rule, epilogue);
  });
  return true;
}

}  // namespace lfp::cuda
