// Products of blocks that lie in a core's cache: c[rows, columns] (+)= a[rows, depth] b[depth,
// columns]. a may be strided either way (a transpose costs nothing); rows of b and c are contiguous
// and padded to whole panels.
#pragma once

#include "wide.h"

namespace lfp::cpu {

template <class A>
constexpr int64_t kStrip = 128 / sizeof(A);  // columns in registers: two vectors of 64 bytes

template <class A>
constexpr int64_t padded(int64_t columns) {
  return (columns + kStrip<A> - 1) / kStrip<A> * kStrip<A>;
}

template <class A>
struct Block {
  A* at;
  int64_t row, depth;  // strides
};

// R rows and two vectors of c, sums in registers.
template <class Vector, int64_t R, class A>
LFP_HD void multiply_rows(const A* a, int64_t row, int64_t step, const A* b, int64_t b_row,
                          int64_t depth, A* c, int64_t c_row, bool add) {
  constexpr int64_t lanes = sizeof(Vector) / sizeof(A);
  Vector sum[R][2] = {};
  if (add)  // c is needed at the end, and b and a fill the nearest cache until then
#pragma GCC unroll 12
    for (int64_t r = 0; r < R; ++r) {
      __builtin_prefetch(c + r * c_row, 1, 3);
      __builtin_prefetch(c + r * c_row + lanes, 1, 3);
    }
  for (int64_t k = 0; k < depth; ++k, a += step, b += b_row) {
    const Vector left = *reinterpret_cast<const Vector*>(b);
    const Vector right = *reinterpret_cast<const Vector*>(b + lanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < R; ++r) {
      const A factor = a[r * row];
      sum[r][0] += factor * left;
      sum[r][1] += factor * right;
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < R; ++r) {
    Vector* to = reinterpret_cast<Vector*>(c + r * c_row);
    Vector* next = reinterpret_cast<Vector*>(c + r * c_row + lanes);
    *to = add ? *to + sum[r][0] : sum[r][0];
    *next = add ? *next + sum[r][1] : sum[r][1];
  }
}

// All rows of one strip of two vectors.
template <class Vector, int64_t kMost, class A>
LFP_HD void multiply_strip(Block<const A> a, int64_t rows, const A* b, int64_t b_row, int64_t depth,
                           A* c, int64_t c_row, bool add) {
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost)
    multiply_rows<Vector, kMost>(a.at + r * a.row, a.row, a.depth, b, b_row, depth, c + r * c_row,
                                 c_row, add);
  for (; r + 2 <= rows; r += 2)
    multiply_rows<Vector, 2>(a.at + r * a.row, a.row, a.depth, b, b_row, depth, c + r * c_row,
                             c_row, add);
  if (r < rows)
    multiply_rows<Vector, 1>(a.at + r * a.row, a.row, a.depth, b, b_row, depth, c + r * c_row,
                             c_row, add);
}

// columns: a multiple of kStrip.
template <class A>
LFP_CLONES void small_product_portable(Block<const A> a, int64_t rows, const A* b, int64_t b_row,
                                       int64_t depth, A* c, int64_t c_row, int64_t columns,
                                       bool add) {
  using Vector = typename VectorOf<A, 32>::type;
  for (int64_t j = 0; j < columns; j += 64 / sizeof(A))
    multiply_strip<Vector, 4>(a, rows, b + j, b_row, depth, c + j, c_row, add);
}

#if LFP_WIDE
template <class A>
LFP_V4 void small_product_v4(Block<const A> a, int64_t rows, const A* b, int64_t b_row,
                             int64_t depth, A* c, int64_t c_row, int64_t columns, bool add) {
  using Vector = typename VectorOf<A, 64>::type;
  for (int64_t j = 0; j < columns; j += kStrip<A>)
    multiply_strip<Vector, 8>(a, rows, b + j, b_row, depth, c + j, c_row, add);
}
#endif

template <class A>
using SmallProduct = void (*)(Block<const A>, int64_t, const A*, int64_t, int64_t, A*, int64_t,
                              int64_t, bool);

template <class A>
SmallProduct<A> small_product() {
#if LFP_WIDE
  if (has_wide_vectors()) return small_product_v4<A>;
#endif
  return small_product_portable<A>;
}

}  // namespace lfp::cpu
