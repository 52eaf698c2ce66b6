// Small batches: the traffic is W, so W is read once and, updated, written once.
//
// A block owns kCols columns of W over a range of its rows and goes down them, kRows at a time. In
// shared memory: x[N, cols] for the whole time, W[rows, cols] and s[N, rows] of the tile. Two
// products leave it: r_in[N, cols] += s W stays in registers until the range is done, and
// s^T x is at once the feedback of the tile. The next tile is on its way meanwhile. Ranges of rows
// add their parts of r_in in a second launch, in order.
#pragma once

#include <type_traits>
#include <utility>

#include "epilogue.cuh"
#include "operand.cuh"
#include "product_mma.cuh"
#include "product_simt.cuh"

namespace lfp::cuda {

// The largest batch of each kernel, ascending. Those of exact products come in several sizes: they
// are bound by arithmetic, and rows of zeros would be multiplied, too.
template <class P>
struct OnePassBatches {
  using Sizes = std::integer_sequence<int, sizeof(P) == 2 ? 128 : 64>;
};
template <>
struct OnePassBatches<float> {
  using Sizes = std::integer_sequence<int, 32, 64, 128>;
};
template <>
struct OnePassBatches<double> {
  using Sizes = std::integer_sequence<int, 32>;
};

// The two cores: r_in[kBatch, 64] over 64, feedback[64, 64] over kBatch. The signal s[kBatch, 64]
// is the left operand of both, across in the second: of one layout.
template <class P, int kBatch>
struct OnePassShape {
  using Signal = MmaTile<P, kBatch, 64, true, 8>;
  using SignalAcross = MmaTile<P, 64, kBatch, false, 8>;
  using Input = MmaCore<P, kBatch, 64, 64, kBatch / 4, 32>;
  using Weight = MmaCore<P, 64, 64, kBatch, 32, 16>;
};
template <class P, int kBatch>
  requires std::is_floating_point_v<P>
struct OnePassShape<P, kBatch> {
  using Signal = SimtTile<P, kBatch, 64, true>;
  using SignalAcross = SimtTile<P, 64, kBatch, false>;
  using Input = SimtCore<P, kBatch, 64, 64>;
  using Weight = SimtCore<P, 64, 64, kBatch>;
};

template <class T>
struct OnePass {
  using A = Acc<T>;
  MatrixOperand<T, false> x;
  SignalOperand<T, true> s;
  MatrixOperand<T, false> w;
  WeightEpilogue<T> weight;
  InputEpilogue<T> input;
  bool wants_input;
  int64_t rows_per_range;  // multiple of kRows
  A* partial;              // [ranges, N, I], or null with one range
};

template <class T, class P, int kLargest>
struct OnePassKernel {
  using Shape = OnePassShape<P, kLargest>;
  using Input = typename Shape::Input;
  using Weight = typename Shape::Weight;
  using A = Acc<T>;
  static constexpr int kBatch = kLargest, kRows = 64, kCols = 64, kThreads = 256;
  // Blocks per processor: more ranges of rows than it holds only add partial sums. But products
  // bound by arithmetic end sooner where the last wave of blocks is a smaller part of them.
  static constexpr int kPerProcessor = kBatch > 64 && sizeof(P) == 2 ? 1 : 2;
  static constexpr int V = kWide<T>;
  static_assert(Input::kThreads == kThreads && Weight::kThreads == kThreads);
  // Exact products add a chain per tile: one over the whole range would err like its length. The
  // largest batch has no registers for chain and total while the next tile is on its way.
  static constexpr bool kChains = std::is_same_v<P, float>;
  static constexpr bool kFetchLate = kChains && kBatch > 64;

  // The tile that is multiplied is W itself, or a rounded one: the update needs W as it is.
  static constexpr bool kExact = std::is_same_v<T, P> && std::is_floating_point_v<P>;
  struct alignas(16) Multiplied {
    typename Weight::template TileB<false> x;  // [n][col]
    typename Shape::Signal s;                  // [n][row]
    typename Input::template TileB<false> w;   // [row][col]
  };
  struct alignas(16) WithExact : Multiplied {
    T exact[kRows][kCols + V];
  };
  using Shared = std::conditional_t<kExact, Multiplied, WithExact>;

  static __device__ __forceinline__ A weight_at(const Shared& shared, int row, int col) {
    if constexpr (kExact)
      return shared.w.at(col, row);
    else
      return static_cast<A>(shared.exact[row][col]);
  }

  static constexpr size_t kVisitBytes = std::max(Input::kVisitBytes, Weight::kVisitBytes);
  static constexpr size_t kBytes = sizeof(Shared) + kVisitBytes;

  using SignalAcross = typename Shape::SignalAcross;
  static_assert(sizeof(SignalAcross) == sizeof(Shared::s));

  static constexpr int kPacksW = kRows * kCols / V / kThreads;
  static constexpr int kPacksS = kBatch * kRows / V / kThreads;
  static constexpr int kPacksX = kBatch * kCols / V / kThreads;
  static_assert(kPacksW > 0 && kPacksS > 0);

  struct Raw {
    Pack<T, V> w[kPacksW];
    typename SignalOperand<T, true>::Raw s[kPacksS];
  };

  // Column packs of a line: threads of a warp read neighbours.
  static constexpr int kLine = kCols / V;
  static_assert(kRows == kCols);

  static __device__ __forceinline__ void fetch(const OnePass<T>& p, int64_t row, int64_t col,
                                               Raw& raw) {
#pragma unroll
    for (int j = 0; j < kPacksW; ++j) {
      const int pack = threadIdx.x + j * kThreads;
      raw.w[j] = p.w.fetch(row + pack / kLine, col + pack % kLine * V);
    }
#pragma unroll
    for (int j = 0; j < kPacksS; ++j) {
      const int pack = threadIdx.x + j * kThreads;
      raw.s[j] = p.s.fetch(pack / kLine, row + pack % kLine * V);
    }
  }

  static __device__ __forceinline__ void put(const OnePass<T>& p, const Raw& raw, Shared& shared) {
#pragma unroll
    for (int j = 0; j < kPacksW; ++j) {
      const int pack = threadIdx.x + j * kThreads;
      const int row = pack / kLine, at = pack % kLine * V;
      A values[V];
      p.w.convert(raw.w[j], values);
      shared.w.template put_across<V>(at, row, values);
      if constexpr (!kExact) *reinterpret_cast<Pack<T, V>*>(&shared.exact[row][at]) = raw.w[j];
    }
#pragma unroll
    for (int j = 0; j < kPacksS; ++j) {
      const int pack = threadIdx.x + j * kThreads;
      A values[V];
      p.s.convert(raw.s[j], values);
      shared.s.template put_along_k<V>(pack / kLine, pack % kLine * V, values);
    }
  }

  static __device__ __forceinline__ void put_x(const OnePass<T>& p, int64_t col, Shared& shared) {
#pragma unroll
    for (int j = 0; j < kPacksX; ++j) {
      const int pack = threadIdx.x + j * kThreads;
      const int n = pack / kLine, at = pack % kLine * V;
      A values[V];
      p.x.convert(p.x.fetch(n, col + at), values);
      shared.x.template put_across<V>(at, n, values);
    }
  }

  static __device__ __forceinline__ void multiply(const Shared& shared, Input& input) {
    if constexpr (kChains) {
      Input chain;
      chain.multiply(shared.s, shared.w);
      input.add(chain.sums);
    } else {
      input.multiply(shared.s, shared.w);
    }
  }

  // feedback[row.., col..] of one tile, into W or where it is wanted
  static __device__ __forceinline__ void finish_weight(const OnePass<T>& p, int64_t row,
                                                       int64_t col, const Shared& shared,
                                                       unsigned char* memory) {
    Weight weight;
    weight.multiply(reinterpret_cast<const SignalAcross&>(shared.s), shared.x);
    weight.template visit<V>(memory, [&](int m, int n, A(&sums)[V]) {
      const int64_t o = row + m, i = col + n;
      if (o >= p.w.rows || i >= p.w.cols) return;
      A w[V];
#pragma unroll
      for (int k = 0; k < V; ++k) w[k] = weight_at(shared, m, n + k);
      if (p.weight.wide) return p.weight.weight.apply(o * p.w.cols + i, sums, w, p.weight.rule);
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (i + k < p.w.cols) {
          A one[1] = {sums[k]}, old[1] = {w[k]};
          p.weight.weight.apply(o * p.w.cols + i + k, one, old, p.weight.rule);
        }
    });
  }

  static __device__ __forceinline__ void finish_input(const OnePass<T>& p, Input& input,
                                                      int64_t col, unsigned char* memory) {
    const int64_t batch = p.x.rows, cols = p.w.cols;
    input.template visit<V>(memory, [&](int m, int n, A(&sums)[V]) {
      const int64_t i = col + n;
      if (m >= batch || i >= cols) return;
      if (p.partial) {
        A* to = p.partial + (blockIdx.y * batch + m) * cols + i;
#pragma unroll
        for (int k = 0; k < V; ++k)
          if (i + k < cols) to[k] = sums[k];
      } else if (p.input.wide) {
        p.input(m, i, sums);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k)
          if (i + k < cols) {
            A one[1] = {sums[k]};
            p.input(m, i + k, one);
          }
      }
    });
  }
};

template <class T, class P, int kBatch>
__global__ void __launch_bounds__(256, kBatch > 32 || sizeof(T) == 8 ? 1 : 2)
    one_pass_kernel(OnePass<T> p) {
  using K = OnePassKernel<T, P, kBatch>;
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename K::Shared*>(memory);
  unsigned char* visit_memory = memory + sizeof(typename K::Shared);

  const int64_t col = int64_t(blockIdx.x) * K::kCols;
  const int64_t begin = blockIdx.y * p.rows_per_range;
  const int64_t end = min(p.w.rows, begin + p.rows_per_range);
  typename K::Raw raw;
  K::fetch(p, begin, col, raw);
  K::put_x(p, col, shared);
  typename K::Input input;
  for (int64_t row = begin; row < end; row += K::kRows) {
    K::put(p, raw, shared);
    __syncthreads();
    const bool more = row + K::kRows < end;
    if (!K::kFetchLate && more) K::fetch(p, row + K::kRows, col, raw);
    if (p.wants_input) K::multiply(shared, input);
    if (K::kFetchLate && more) K::fetch(p, row + K::kRows, col, raw);
    K::finish_weight(p, row, col, shared, visit_memory);
    if (p.weight.wants_row_sums && blockIdx.x == 0 && threadIdx.x < K::kRows &&
        row + threadIdx.x < p.w.rows) {
      A sum = A(0);
      for (int n = 0; n < K::kBatch; ++n) sum += widen(shared.s.at(n, threadIdx.x));
      p.weight.row_sum(row + threadIdx.x, sum);
    }
    __syncthreads();  // everybody is done with the tile
  }
  if (p.wants_input) K::finish_input(p, input, col, visit_memory);
}

// r_in = epilogue(sum over ranges), in the order of the ranges
template <class T>
__global__ void __launch_bounds__(256) add_ranges_kernel(OnePass<T> p, int ranges) {
  using A = Acc<T>;
  const int64_t size = p.x.rows * p.w.cols;
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= size) return;
  A sum[1] = {A(0)};
  for (int r = 0; r < ranges; ++r) sum[0] += p.partial[r * size + i];
  p.input(i / p.w.cols, i % p.w.cols, sum);
}

}  // namespace lfp::cuda
