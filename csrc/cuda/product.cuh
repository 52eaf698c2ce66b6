// C[M,N] = A[M,K] B[K,N] in tiles, with a function on the way in (operands) and on the way out
// (epilogue): every product of every layer is this kernel.
//
// An operand gives packs of neighbouring elements:
//   kWidth, Raw, kAlongK (its memory runs along k, not along m or n)
//   Raw fetch(row, col)            row: the slow axis, col: the axis that its memory runs along
//   void convert(Raw, A (&)[kWidth])
// and answers with zeros outside of its matrix. An epilogue takes finished sums:
//   kWidth, wide (runs of kWidth sums of a row may be handed over together)
//   operator()<V>(m, n, A (&)[V]);  wants_row_sums, row_sum(m, sum_k A[m,k])
// Several products of one shape may share a launch, such as the groups of a convolution. Operands
// and epilogue then have select(part), and the epilogue may have depth(), the k of that part.
// An epilogue with kBlocksPerProcessor<Core> overrules the core's.
// An epilogue with kTakesRuns is handed every run whole and sees to the end of the row itself.
// An epilogue with wants_sums == false takes row sums only, the same bits as with the sums.
// A core (product_simt.cuh, product_mma.cuh) keeps the tiles in shared memory and multiplies them.
// One with kChain > 0 adds no more terms than that in a row; longer sums have Totals, behind its
// tiles.
#pragma once

#include "common.cuh"

namespace lfp::cuda {

// Tiles of neighbouring blocks share operands in the L2 cache: blocks go down kGroup rows of tiles
// before they move on to the next column.
constexpr int kGroup = 8;

template <class A>
struct Problem {
  int64_t m, n, k;
  int64_t tiles_m, tiles_n;
  int64_t k_per_split;        // multiple of the core's kTileK
  A* partial = nullptr;       // [parts, splits, M, N] when the sum over k is split over blocks
  A* partial_rows = nullptr;  // [parts, splits, M]
  int64_t parts = 1;
};

template <class F>
__device__ __forceinline__ void select_part(F& f, int64_t part) {
  if constexpr (requires { f.select(part); }) f.select(part);
}

template <class Epilogue>
LFP_HD bool wants_sums(const Epilogue& epilogue) {
  if constexpr (requires { epilogue.wants_sums; })
    return epilogue.wants_sums;
  else
    return true;
}

struct TileIndex {
  int64_t m, n;
};

__device__ __forceinline__ TileIndex tile_of_block(int64_t block, int64_t tiles_m,
                                                   int64_t tiles_n) {
  const int64_t group = block / (kGroup * tiles_n);
  const int64_t first = group * kGroup;
  const int64_t rows = tiles_m - first < kGroup ? tiles_m - first : kGroup;
  const int64_t inside = block - group * kGroup * tiles_n;
  return {first + inside % rows, inside / rows};
}

// The share of one thread in fetching an operand tile of kOuter (m or n) by kTileK elements.
template <class Core, class Operand, int kOuter>
struct Share {
  static constexpr int kWidth = Operand::kWidth;
  static constexpr int kLine = (Operand::kAlongK ? Core::kTileK : kOuter) / kWidth;  // packs
  static constexpr int kPacks = kOuter * Core::kTileK / kWidth / Core::kThreads;
  static_assert(kPacks > 0 && kPacks * kWidth * Core::kThreads == kOuter * Core::kTileK);

  typename Operand::Raw raw[kPacks];

  __device__ __forceinline__ void fetch(const Operand& operand, int64_t outer, int64_t k) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int pack = threadIdx.x + j * Core::kThreads;
      const int line = pack / kLine, at = pack % kLine * kWidth;
      raw[j] = Operand::kAlongK ? operand.fetch(outer + line, k + at)
                                : operand.fetch(k + line, outer + at);
    }
  }

  template <class Tile>
  __device__ __forceinline__ void put(const Operand& operand, Tile& tile) const {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int pack = threadIdx.x + j * Core::kThreads;
      const int line = pack / kLine, at = pack % kLine * kWidth;
      typename Core::Accumulator values[kWidth];
      operand.convert(raw[j], values);
      if constexpr (Operand::kAlongK)
        tile.template put_along_k<kWidth>(line, at, values);
      else
        tile.template put_across<kWidth>(at, line, values);
    }
  }
};

// Hands sums of one row to the epilogue, or to the `slot`-th matrix of partial sums.
template <class A, class Epilogue, int W>
__device__ __forceinline__ void finish(const Problem<A>& p, const Epilogue& epilogue, int64_t slot,
                                       int64_t m, int64_t n, A (&sums)[W]) {
  if (m >= p.m || n >= p.n) return;
  if (p.partial) {
    A* to = p.partial + (slot * p.m + m) * p.n + n;
#pragma unroll
    for (int k = 0; k < W; ++k)
      if (n + k < p.n) to[k] = sums[k];
    return;
  }
  if constexpr (requires { Epilogue::kTakesRuns; }) {
    epilogue.template operator()<W>(m, n, sums);
  } else {
    if (epilogue.wide) return epilogue.template operator()<W>(m, n, sums);
#pragma unroll
    for (int k = 0; k < W; ++k)
      if (n + k < p.n) {
        A one[1] = {sums[k]};
        epilogue.template operator()<1>(m, n + k, one);
      }
  }
}

// How many blocks must fit a processor at once: each thread gets the registers that this leaves.
template <class Core, class Epilogue>
constexpr int blocks_per_processor() {
  if constexpr (requires { Epilogue::template kBlocksPerProcessor<Core>; })
    return Epilogue::template kBlocksPerProcessor<Core>;
  else
    return Core::kBlocksPerProcessor;
}

// Terms that are added in a row, 0: however many there are.
template <class Core>
constexpr int chain_of() {
  if constexpr (requires { Core::kChain; })
    return Core::kChain;
  else
    return 0;
}

template <class Core, class Shared>
__device__ __forceinline__ auto& totals_behind(Shared& shared) {
  static_assert(sizeof(Shared) % alignof(typename Core::Totals) == 0);
  static_assert(chain_of<Core>() % Core::kTileK == 0);
  return *reinterpret_cast<typename Core::Totals*>(&shared + 1);
}

template <class Core, class OperandA, class OperandB, class Epilogue>
__global__ void __launch_bounds__(Core::kThreads, blocks_per_processor<Core, Epilogue>())
    product_kernel(Problem<typename Core::Accumulator> p, OperandA a, OperandB b,
                   Epilogue epilogue) {
  using A = typename Core::Accumulator;
  using Shared = typename Core::template Shared<OperandA::kAlongK, OperandB::kAlongK>;
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);

  const int64_t tiles = p.tiles_m * p.tiles_n;
  const int64_t part = p.parts == 1 ? 0 : blockIdx.x / tiles;
  const int64_t slot = part * gridDim.y + blockIdx.y;
  select_part(a, part);
  select_part(b, part);
  select_part(epilogue, part);
  if constexpr (requires { epilogue.depth(); }) p.k = epilogue.depth();
  const TileIndex tile = tile_of_block(blockIdx.x - part * tiles, p.tiles_m, p.tiles_n);
  const int64_t m0 = tile.m * Core::kTileM, n0 = tile.n * Core::kTileN;
  const int64_t begin = blockIdx.y * p.k_per_split;
  const int64_t end = min(p.k, begin + p.k_per_split);
  const bool sums_rows = epilogue.wants_row_sums && tile.n == 0;
  if (!wants_sums(epilogue) && !sums_rows) return;

  Core core;
  A row_sum = A(0);
  Share<Core, OperandA, Core::kTileM> share_a;
  Share<Core, OperandB, Core::kTileN> share_b;
  if (begin < end) {
    share_a.fetch(a, m0, begin);
    share_b.fetch(b, n0, begin);
    share_a.put(a, shared.stage[0].a);
    share_b.put(b, shared.stage[0].b);
  }
  __syncthreads();
  int now = 0;
  for (int64_t k = begin; k < end; k += Core::kTileK, now ^= 1) {
    if constexpr (chain_of<Core>() > 0)
      if (k > begin && (k - begin) % chain_of<Core>() == 0)
        core.end_chain(totals_behind<Core>(shared), k - begin == chain_of<Core>());
    const bool more = k + Core::kTileK < end;
    if (more) {  // in flight while this stage is multiplied
      share_a.fetch(a, m0, k + Core::kTileK);
      share_b.fetch(b, n0, k + Core::kTileK);
    }
    core.multiply(shared.stage[now].a, shared.stage[now].b);
    if (sums_rows && threadIdx.x < Core::kTileM) row_sum += shared.stage[now].a.sum(threadIdx.x);
    if (more) {  // nobody reads the other stage since the last barrier
      share_a.put(a, shared.stage[now ^ 1].a);
      share_b.put(b, shared.stage[now ^ 1].b);
    }
    __syncthreads();
  }
  if constexpr (chain_of<Core>() > 0)
    if (end - begin > chain_of<Core>()) core.add(totals_behind<Core>(shared));
  if (wants_sums(epilogue))
    core.template visit<Epilogue::kWidth>(memory, [&](int m, int n, A(&sums)[Epilogue::kWidth]) {
      finish(p, epilogue, slot, m0 + m, n0 + n, sums);
    });
  if (sums_rows && threadIdx.x < Core::kTileM && m0 + threadIdx.x < p.m) {
    const int64_t m = m0 + threadIdx.x;
    if (p.partial_rows)
      p.partial_rows[slot * p.m + m] = row_sum;
    else
      epilogue.row_sum(m, row_sum);
  }
}

constexpr int kReduceThreads = 256;

// Adds the splits in their order and finishes the sums; thread i < M also adds the row sums.
template <class A, class Epilogue>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_splits_kernel(Problem<A> p, int splits, const A* partial, const A* partial_rows,
                         Epilogue epilogue) {
  constexpr int W = Epilogue::kWidth;
  const int64_t line = ceil_div<int64_t>(p.n, W);
  const int64_t blocks = gridDim.x / p.parts, part = p.parts == 1 ? 0 : blockIdx.x / blocks;
  const int64_t i = (blockIdx.x - part * blocks) * kReduceThreads + threadIdx.x;
  const int64_t first = part * splits;
  select_part(epilogue, part);
  if (wants_sums(epilogue) && i < p.m * line) {
    const int64_t m = i / line, n = i % line * W;
    A sums[W] = {};
    for (int s = 0; s < splits; ++s) {
      const A* from = partial + ((first + s) * p.m + m) * p.n + n;
#pragma unroll
      for (int k = 0; k < W; ++k)
        if (n + k < p.n) sums[k] += from[k];
    }
    finish(p, epilogue, 0, m, n, sums);
  }
  if (epilogue.wants_row_sums && i < p.m) {
    A sum = A(0);
    for (int s = 0; s < splits; ++s) sum += partial_rows[(first + s) * p.m + i];
    epilogue.row_sum(i, sum);
  }
}

// Enough blocks for every processor, but not so many splits that the partial sums cost more than
// they bring: a split keeps at least kLeastTiles tiles of k.
template <class Core>
int64_t count_splits(int64_t tiles, int64_t k, const Device& device) {
  constexpr int64_t kLeastTiles = 8;
  const int64_t most = ceil_div<int64_t>(k, kLeastTiles * Core::kTileK);
  const int64_t wanted = ceil_div<int64_t>(2 * device.processors(), std::max<int64_t>(tiles, 1));
  return tiles >= device.processors() ? 1 : std::clamp<int64_t>(std::min(wanted, most), 1, 64);
}

// launch(problem, grid) for the tiles of Core, and a second launch where their sums were split.
template <class Core, class Epilogue, class Launch>
void split_product(int64_t m, int64_t n, int64_t k, const Epilogue& epilogue, const Tensor& like,
                   const Device& device, int64_t parts, Launch launch) {
  using A = typename Core::Accumulator;
  if (m == 0 || n == 0 || parts == 0) return;
  Problem<A> p{m, n, k, ceil_div<int64_t>(m, Core::kTileM), ceil_div<int64_t>(n, Core::kTileN)};
  p.parts = parts;
  const int64_t tiles = p.tiles_m * p.tiles_n * parts;
  const int64_t wanted = count_splits<Core>(tiles, k, device);
  p.k_per_split = ceil_div<int64_t>(ceil_div<int64_t>(k, wanted), Core::kTileK) * Core::kTileK;
  const int64_t splits = k == 0 ? 1 : ceil_div<int64_t>(k, p.k_per_split);
  Tensor partial, rows;
  if (splits > 1) {
    const auto type = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
    partial = torch::stable::new_empty(like, {parts, splits, m, n}, type);
    p.partial = data<A>(partial);
    if (epilogue.wants_row_sums) {
      rows = torch::stable::new_empty(like, {parts, splits, m}, type);
      p.partial_rows = data<A>(rows);
    }
  }
  LFP_CHECK(tiles < (int64_t(1) << 31), "product", "tensor too large: ", tiles, " tiles");
  launch(p, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(splits)));
  check_launch();
  if (splits == 1) return;
  const int64_t items = std::max(m * ceil_div<int64_t>(n, Epilogue::kWidth), m);
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(items, kReduceThreads) * parts);
  Problem<A> whole = p;
  whole.partial = nullptr;
  reduce_splits_kernel<A, Epilogue><<<blocks, kReduceThreads, 0, device.stream>>>(
      whole, static_cast<int>(splits), p.partial, p.partial_rows, epilogue);
  check_launch();
}

template <class Core, class OperandA, class OperandB, class Epilogue>
void product(int64_t m, int64_t n, int64_t k, const OperandA& a, const OperandB& b,
             const Epilogue& epilogue, const Tensor& like, const Device& device,
             int64_t parts = 1) {
  using Shared = typename Core::template Shared<OperandA::kAlongK, OperandB::kAlongK>;
  auto* kernel = product_kernel<Core, OperandA, OperandB, Epilogue>;
  split_product<Core>(m, n, k, epilogue, like, device, parts, [&](const auto& p, dim3 grid) {
    size_t bytes = std::max(sizeof(Shared), Core::kVisitBytes);
    if constexpr (chain_of<Core>() > 0)
      if (p.k_per_split > chain_of<Core>()) bytes = sizeof(Shared) + sizeof(typename Core::Totals);
    allow_shared(kernel, bytes);
    kernel<<<grid, Core::kThreads, bytes, device.stream>>>(p, a, b, epilogue);
  });
}

}  // namespace lfp::cuda
