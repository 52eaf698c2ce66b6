// The weight product s^T x of long batches. Neither operand is transposed: both are packed a block
// of the batch at a time, in the order in which small_product reads them. A library product would
// have s transposed for it, and pack x again for every tile.
#pragma once

#include "panels.h"
#include "small_product.h"

namespace lfp::cpu {

constexpr int64_t kBatchBlock = 256;      // samples packed at a time
constexpr int64_t kPackedRows = 8;        // rows of the product in registers
constexpr int64_t kLongBatch = 1024;      // where it overtakes the library's product
constexpr int64_t kMostColumns = 1 << 9;  // of x whose packed block stays in the core's cache

inline bool long_product_pays(int64_t n) { return has_wide_vectors() && n >= kLongBatch; }

// sums[count] += sum_k from[k, count], in float64: the sums of a bias cancel.
template <class P>
LFP_CLONES void add_column_sums(const P* from, int64_t stride, int64_t depth, int64_t count,
                                double* sums) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t o = 0; o < count; ++o) sums[o] += double(load(from, k * stride + o));
}

// What one thread works in: tiles of s[N, O]^T x[N, I].
template <class P>
class LongProduct {
 public:
  LongProduct(const Tensor& s, const Tensor& x, int64_t rows)
      : s_(data<P>(s)),
        x_(data<P>(x)),
        n_(x.size(0)),
        in_(x.size(1)),
        out_(s.size(1)),
        left_(scratch<P>(packed_size<kPackedRows>(kBatchBlock, rows))),
        right_(scratch<P>(packed_size<kStrip<P>>(kBatchBlock, std::min(kMostColumns, in_)))),
        tile_(scratch<P>((rows + kPackedRows - 1) / kPackedRows * kPackedRows * padded<P>(in_))) {}

  // [rows, I] from column `begin` of s on; sums[rows], where not null, of those columns.
  const P* tile(int64_t begin, int64_t rows, double* sums) {
    const int64_t width = padded<P>(in_);
    for (int64_t left = 0; left < in_; left += kMostColumns) {
      const int64_t columns = std::min(kMostColumns, in_ - left);
      for (int64_t k = 0; k < n_; k += kBatchBlock) {
        const int64_t depth = std::min(kBatchBlock, n_ - k);
        const P* s = s_ + k * out_ + begin;
        pack_panels<kPackedRows>(s, out_, depth, rows, left_.get());
        pack_panels<kStrip<P>>(x_ + k * in_ + left, in_, depth, columns, right_.get());
        multiply(rows, columns, depth, tile_.get() + left, width, k > 0);
        if (sums && left == 0) add_column_sums(s, out_, depth, rows, sums);
      }
    }
    if (width != in_)
      for (int64_t r = 1; r < rows; ++r)
        std::copy_n(tile_.get() + r * width, in_, tile_.get() + r * in_);
    return tile_.get();
  }

 private:
  void multiply(int64_t rows, int64_t columns, int64_t depth, P* to, int64_t width, bool add) {
    const P* b = right_.get();
    for (int64_t c = 0; c < columns; c += kStrip<P>, b += depth * kStrip<P>) {
      const P* a = left_.get();
      for (int64_t r = 0; r < rows; r += kPackedRows, a += depth * kPackedRows)
        product_({a, 1, kPackedRows}, kPackedRows, b, kStrip<P>, depth, to + r * width + c, width,
                 kStrip<P>, add);
    }
  }

  const P *s_, *x_;
  int64_t n_, in_, out_;
  SmallProduct<P> product_ = small_product<P>();
  Scratch<P> left_, right_, tile_;
};

}  // namespace lfp::cpu
