#include "packed_product.h"

#include <cstring>

#include "scratch.h"
#include "small_product.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kTileColumns = 256;    // of float32; B's packed block stays in the core's cache
constexpr int64_t kShallowTile = 61440;  // and so does a tile that is written once
constexpr int64_t kDeepTile = 1 << 18;   // one that is added to need not
constexpr int64_t kMostRows = 960, kLeastRows = 48;

// c[R][two vectors] += a[R][depth] b[depth][two vectors]
template <class Vector, int64_t R, class A>
LFP_HD void accumulate(const A* a, const A* b, int64_t depth, A* c, int64_t stride) {
  multiply_rows<Vector, R>(a, kPanelStride, 1, b, kPanelColumns<A>, depth, c, stride, true);
}

// Four rows and two vectors of 32 bytes at a time: what 16 registers hold.
template <class A>
LFP_CLONES void multiply_portable(const A* a, const A* b, int64_t depth, A* c, int64_t stride) {
  using Vector = typename VectorOf<A, 32>::type;
  for (int64_t r = 0; r < kPanelRows; r += 4)
    for (int64_t j = 0; j < kPanelColumns<A>; j += 64 / sizeof(A))
      accumulate<Vector, 4>(a + r * kPanelStride, b + j, depth, c + r * stride + j, stride);
}

#if LFP_WIDE
template <class A>
LFP_V4 void multiply_v4(const A* a, const A* b, int64_t depth, A* c, int64_t stride) {
  accumulate<typename VectorOf<A, 64>::type, kPanelRows>(a, b, depth, c, stride);
}
#endif

template <class A>
auto multiply_of_this_processor() {
#if LFP_WIDE
  if (has_wide_vectors()) return multiply_v4<A>;
#endif
  return multiply_portable<A>;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the result is cut into tiles; no element depends on it.
template <class A>
struct Cut {
  int64_t rows, columns, across, tiles;

  explicit Cut(const PackedProduct<A>& p) {
    constexpr int64_t kWidth = kPanelColumns<A>, kMost = kTileColumns * sizeof(float) / sizeof(A);
    const int64_t threads = torch::stable::get_num_threads();
    across = ceil_div(p.columns, kMost);
    columns = ceil_div(ceil_div(p.columns, across), kWidth) * kWidth;
    const int64_t elements = p.depth > kDepth ? kDeepTile : kShallowTile;
    int64_t down = ceil_div(p.rows, std::min(kMostRows, elements / columns));
    // Enough tiles for every thread, and the same number for each.
    const int64_t work = p.rows * p.columns * std::max<int64_t>(p.depth, 8);
    if (threads > 1 && work >= 2 * kProductGrain)
      while ((down * across < 2 * threads || down * across % threads) &&
             ceil_div(p.rows, down + 1) >= kLeastRows)
        ++down;
    rows = ceil_div(ceil_div(p.rows, down), kPanelRows) * kPanelRows;
    tiles = ceil_div(p.rows, rows) * across;
  }
};

// What one thread works in.
template <class A>
class Worker {
 public:
  Worker(const PackedProduct<A>& product, const Cut<A>& cut)
      : p_(product),
        cut_(cut),
        multiply_(multiply_of_this_processor<A>()),
        a_(scratch<A>(2 * kPanelRows * kPanelStride)),
        b_(scratch<A>(2 * depth() * cut.columns)),
        tile_(scratch<A>((product.wants_cross ? 2 : 1) * cut.rows * cut.columns)) {
    std::memset(a_.get(), 0, 2 * kPanelRows * kPanelStride * sizeof(A));
  }

  void run(int64_t index) {
    const int64_t row = index / cut_.across * cut_.rows;
    const int64_t column = index % cut_.across * cut_.columns;
    const int64_t elements = cut_.rows * cut_.columns;
    Tile<A> tile{row,          std::min(cut_.rows, p_.rows - row),
                 column,       std::min(cut_.columns, p_.columns - column),
                 cut_.columns, tile_.get(),
                 nullptr};
    if (p_.wants_cross && p_.wants_cross(tile)) tile.cross = tile_.get() + elements;
    std::memset(tile_.get(), 0, (tile.cross ? 2 : 1) * elements * sizeof(A));
    for (int64_t k = 0; k < p_.depth; k += kDepth) add(tile, k, std::min(kDepth, p_.depth - k));
    p_.finish(tile);
  }

 private:
  int64_t depth() const { return std::min(kDepth, std::max<int64_t>(p_.depth, 1)); }

  // tile += A[:, k : k + depth] B[k : k + depth, :]
  void add(const Tile<A>& tile, int64_t k, int64_t depth) {
    constexpr int64_t kWidth = kPanelColumns<A>;
    const int64_t panels = ceil_div(tile.columns, kWidth), part = depth * panels * kWidth;
    int filled[kTileColumns];
    for (int64_t j = 0; j < panels; ++j) {
      A* const to[2] = {b_.get() + j * depth * kWidth, b_.get() + part + j * depth * kWidth};
      filled[j] = p_.pack_b(
          {tile.column + j * kWidth, std::min(kWidth, tile.columns - j * kWidth), k, depth}, to);
    }
    A* const a[2] = {a_.get(), a_.get() + kPanelRows * kPanelStride};
    for (int64_t r = 0; r < tile.rows; r += kPanelRows) {
      p_.pack_a({tile.row + r, std::min(kPanelRows, tile.rows - r), k, depth}, a);
      for (int64_t j = 0; j < panels; ++j)
        for (int q = 0; q < 2; ++q) {
          if (!(filled[j] & (1 << q))) continue;
          const A* b = b_.get() + q * part + j * depth * kWidth;
          const int64_t at = r * tile.stride + j * kWidth;
          for (int s = 0; s < (p_.two_parts ? 2 : 1); ++s) {
            A* to = s == q ? tile.same : tile.cross;
            if (to) multiply_(a[s], b, depth, to + at, tile.stride);
          }
        }
    }
  }

  const PackedProduct<A>& p_;
  const Cut<A>& cut_;
  void (*multiply_)(const A*, const A*, int64_t, A*, int64_t);
  Scratch<A> a_, b_, tile_;
};

}  // namespace

template <class A>
void PackedProduct<A>::run() const {
  if (rows == 0 || columns == 0) return;
  const Cut<A> cut(*this);
  const auto work = [&](int64_t first, int64_t last) {
    Worker<A> worker(*this, cut);
    for (int64_t t = first; t < last; ++t) worker.run(t);
  };
  if (cut.tiles == 1) return work(0, 1);
  torch::stable::parallel_for(0, cut.tiles, 1, work);
}

template struct PackedProduct<float>;
template struct PackedProduct<double>;

}  // namespace lfp::cpu
