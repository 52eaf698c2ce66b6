// The weight product s^T x [O, I] tile by tile: each tile is a library product in a core's own
// cache and goes to its epilogue before the next one is made, so that the whole never exists.
#pragma once

#include "aten.h"
#include "long_product.h"

namespace lfp::cpu {

// Elements of a tile: at most about 1 MB. A layer gives each thread at least four tiles, so that
// its feedback is never held whole, down to tiles not worth a call.
constexpr int64_t kLargestTile = 1 << 18;
constexpr int64_t kSmallestTile = 1 << 16;
constexpr int64_t kSmallestLongTile = 1 << 17;  // x is packed again for each tile
constexpr int64_t kTransposeBlock = 16;

// out[rows,N] = transpose of s[N, begin : begin+rows]: whole cache lines are written, since a line
// of every row of a tile does not stay in the nearest cache (rows lie a power of two apart).
template <class P>
LFP_CLONES void transpose_columns(const P* s, P* out, int64_t n, int64_t stride, int64_t begin,
                                  int64_t rows) {
  s += begin;
  for (int64_t k0 = 0; k0 < n; k0 += kTransposeBlock) {
    const int64_t k1 = std::min(n, k0 + kTransposeBlock);
    for (int64_t o = 0; o < rows; ++o)
      for (int64_t k = k0; k < k1; ++k) out[o * n + k] = s[k * stride + o];
  }
}

// body(first tile, last tile, rows of a tile): the tiles of a weight [out, in], shared among the
// threads, of at least `smallest` elements where the weight has that many.
template <class Body>
void cut_weight(int64_t n, int64_t in, int64_t out, int64_t smallest, Body body) {
  if (in == 0 || out == 0) return;
  const int64_t work = std::max<int64_t>(n, 8) * in * out;
  const int64_t threads =
      std::clamp<int64_t>(work / kProductGrain, 1, torch::stable::get_num_threads());
  const int64_t share = (out + threads - 1) / threads;
  // Every thread gets the same number of tiles, of one height.
  const int64_t target = std::clamp(share * in / 4, smallest, kLargestTile);
  const int64_t each = std::max<int64_t>(1, (share * in + target / 2) / target);
  const int64_t rows = std::max<int64_t>((share + each - 1) / each, std::min<int64_t>(share, 16));
  const int64_t tiles = (out + rows - 1) / rows;
  torch::stable::parallel_for(0, tiles, 1,
                              [&](int64_t first, int64_t last) { body(first, last, rows); });
}

// visit(first row, rows, tile) for tiles [rows, I] of s^T x, spread over the threads, after
// form(first row, rows, columns) has written columns [rows, N] of s^T. An empty batch has zero
// tiles and forms nothing: weight decay and momentum still act.
template <class P, class Form, class Visit>
void weight_tiles(const Tensor& x, int64_t out, Form form, Visit visit) {
  const int64_t n = x.size(0), in = x.size(1);
  cut_weight(n, in, out, kSmallestTile, [&](int64_t first, int64_t last, int64_t rows) {
    const std::vector<P> zeros(n == 0 ? rows * in : 0, P(0));
    std::vector<P> columns(rows * n);
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = t * rows, count = std::min(rows, out - begin);
      if (n == 0) {
        visit(begin, count, zeros.data());
        continue;
      }
      form(begin, count, columns.data());
      const Tensor a = matrix_view(x, columns.data(), count, n, n, 1);
      const Tensor b = matrix_view(x, x.data_ptr(), in, n, 1, in);
      const Tensor tile = product_nt(a, b, std::nullopt);
      visit(begin, count, data<P>(tile));
    }
  });
}

// sums[rows] of columns[rows, N], in float64: the sums of a bias cancel.
template <class P>
LFP_CLONES void row_sums(const P* columns, int64_t rows, int64_t n, double* sums) {
  constexpr int64_t kParts = 32;
  for (int64_t o = 0; o < rows; ++o, columns += n) {
    double parts[kParts] = {};
    const int64_t whole = n - n % kParts;
    for (int64_t k = 0; k < whole; k += kParts)
      for (int64_t j = 0; j < kParts; ++j) parts[j] += double(load(columns, k + j));
    for (int64_t k = whole; k < n; ++k) parts[k - whole] += double(load(columns, k));
    sums[o] = 0;
    for (double part : parts) sums[o] += part;
  }
}

// The tiles of a signal s[N, O] in memory. Where `sums` is not null it gets sum_n s[N, O], from the
// columns while they are in cache.
template <class P, class Visit>
void signal_tiles(const Tensor& s, const Tensor& x, double* sums, Visit visit) {
  const int64_t n = s.size(0), out = s.size(1);
  const P* from = data<P>(s);
  if constexpr (std::is_same_v<P, float> || std::is_same_v<P, double>)
    if (long_product_pays(n))
      return cut_weight(
          n, x.size(1), out, kSmallestLongTile, [&](int64_t first, int64_t last, int64_t rows) {
            LongProduct<P> product(s, x, rows);
            for (int64_t begin = first * rows; begin < std::min(out, last * rows); begin += rows) {
              const int64_t count = std::min(rows, out - begin);
              visit(begin, count, product.tile(begin, count, sums ? sums + begin : nullptr));
            }
          });
  weight_tiles<P>(
      x, out,
      [=](int64_t begin, int64_t rows, P* columns) {
        transpose_columns(from, columns, n, out, begin, rows);
        if (sums) row_sums(columns, rows, n, sums + begin);
      },
      visit);
}

}  // namespace lfp::cpu
