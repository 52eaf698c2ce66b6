// A blocked matrix product whose operands exist only in cache: functions form them while they are
// packed, and another function takes the finished tiles. Each operand may have two parts:
//   same  = A_0 B_0 + A_1 B_1        cross = A_0 B_1 + A_1 B_0
// which are all products of the rules with two signals (docs/math.md, section 3). What a function
// reads, it reads once per block, whatever the number of parts.
#pragma once

#include <functional>

#include "loops.h"

namespace lfp::cpu {

constexpr int64_t kDepth = 256;                // of a packed block
constexpr int64_t kPanelRows = 12;             // rows of A in registers
constexpr int64_t kPanelStride = kDepth + 16;  // between the rows of a packed panel of A
template <class A>
constexpr int64_t kPanelColumns = 128 / sizeof(A);  // columns of B in registers: two vectors

// Part of an operand: rows and depth of A, or columns and depth of B, from `first` and `k` on.
struct Panel {
  int64_t first, count, k, depth;
};

// A finished part of the result, row-major. `cross` is null where it was not computed.
template <class A>
struct Tile {
  int64_t row, rows, column, columns, stride;
  A *same, *cross;
};

template <class A>
struct PackedProduct {
  int64_t rows, columns, depth;
  bool two_parts;  // of A; those of B are what pack_b says
  // part p of A: to[p][r * kPanelStride + j] = A_p[first + r, k + j]
  std::function<void(const Panel&, A* const* to)> pack_a;
  // part p of B: to[p][j * kPanelColumns<A> + c] = B_p[k + j, first + c], zero beyond count.
  // Returns the parts that are not all zero, bit p for part p; the others need not be filled.
  std::function<int(const Panel&, A* const* to)> pack_b;
  // Whether a tile wants `cross`; null where none does.
  std::function<bool(const Tile<A>&)> wants_cross;
  std::function<void(const Tile<A>&)> finish;

  // Spread over the threads; the result does not depend on their number.
  void run() const;
};

}  // namespace lfp::cpu
