// What packed_product.h multiplies, formed while it is packed: parts of a row-major matrix.
#pragma once

#include "packed_product.h"

namespace lfp::cpu {

constexpr int64_t kTransposed = 16;  // rows and columns of a block that is transposed

// Two parts of one value.
template <class A>
struct Parted {
  A first, second;
};

// f(x) = x_a, x_b
template <class A, Parts kind>
struct InputParts {
  RuleParams<A> p;
  LFP_HD Parted<A> operator()(A x) const { return {part_a(kind, x, p), part_b(kind, x, p)}; }
};

// f(w) = Wp, Wn
template <class A, Map kind>
struct WeightParts {
  LFP_HD Parted<A> operator()(A w) const {
    const A m = mapped(kind, w);
    return {positive_part(m), negative_part(m)};
  }
};

template <class A>
struct Whole {
  LFP_HD Parted<A> operator()(A v) const { return {v, A(0)}; }
};

template <class A, class Visit>
void with_input_parts(Parts kind, RuleParams<A> p, Visit visit) {
  switch (kind) {
    case Parts::kSign: return visit(InputParts<A, Parts::kSign>{p});
    case Parts::kOnes: return visit(InputParts<A, Parts::kOnes>{p});
    case Parts::kBox: return visit(InputParts<A, Parts::kBox>{p});
  }
  LFP_CHECK(false, "redistribute", "unknown parts code ", static_cast<int>(kind));
}

template <class A, class Visit>
void with_weight_parts(Map kind, Visit visit) {
  switch (kind) {
    case Map::kValue: return visit(WeightParts<A, Map::kValue>{});
    case Map::kSquare: return visit(WeightParts<A, Map::kSquare>{});
    case Map::kOnes: return visit(WeightParts<A, Map::kOnes>{});
  }
  LFP_CHECK(false, "redistribute", "unknown map code ", static_cast<int>(kind));
}

// A dense matrix and the parts of its elements.
template <class T, class F>
struct Operand {
  const T* from;
  int64_t stride;  // between rows
  F f;
  bool both;  // whether the second part is wanted
};

// As A of a product: its rows are the result's rows.
template <bool kBoth, class T, class A, class F>
LFP_CLONES void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t depth, A* first,
                          A* second, F f) {
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC ivdep
    for (int64_t j = 0; j < depth; ++j) {
      const Parted<A> v = f(load(from, r * stride + j));
      first[r * kPanelStride + j] = v.first;
      if constexpr (kBoth) second[r * kPanelStride + j] = v.second;
    }
}

// As B, its columns the result's columns.
template <bool kBoth, class T, class A, class F>
LFP_CLONES void pack_columns(const T* from, int64_t stride, int64_t columns, int64_t depth,
                             A* first, A* second, F f) {
  constexpr int64_t kWidth = kPanelColumns<A>;
  if (columns == kWidth) {
    for (int64_t j = 0; j < depth; ++j)
#pragma GCC ivdep
      for (int64_t c = 0; c < kWidth; ++c) {
        const Parted<A> v = f(load(from, j * stride + c));
        first[j * kWidth + c] = v.first;
        if constexpr (kBoth) second[j * kWidth + c] = v.second;
      }
    return;
  }
  for (int64_t j = 0; j < depth; ++j)
    for (int64_t c = 0; c < kWidth; ++c) {
      const Parted<A> v = c < columns ? f(load(from, j * stride + c)) : Parted<A>{A(0), A(0)};
      first[j * kWidth + c] = v.first;
      if constexpr (kBoth) second[j * kWidth + c] = v.second;
    }
}

// As B, its rows the result's columns.
template <bool kBoth, class T, class A, class F>
LFP_CLONES void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t depth,
                                A* first, A* second, F f) {
  constexpr int64_t kWidth = kPanelColumns<A>;
  for (int64_t j0 = 0; j0 < depth; j0 += kTransposed)
    for (int64_t c = 0; c < kWidth; ++c) {
      const int64_t j1 = std::min(depth, j0 + kTransposed);
      for (int64_t j = j0; j < j1; ++j) {
        const Parted<A> v = c < rows ? f(load(from, c * stride + j)) : Parted<A>{A(0), A(0)};
        first[j * kWidth + c] = v.first;
        if constexpr (kBoth) second[j * kWidth + c] = v.second;
      }
    }
}

// Whether any of rows x columns values has a negative part (NaN has).
template <class T>
LFP_CLONES bool any_negative(const T* from, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    int found = 0;
    for (int64_t c = 0; c < columns; ++c) found |= !(load(from, r * stride + c) >= 0);
    if (found) return true;
  }
  return false;
}

template <class T, class F, class A = Acc<T>>
auto rows_of(Operand<T, F> o) {
  return [o](const Panel& at, A* const* to) {
    const T* from = o.from + at.first * o.stride + at.k;
    if (o.both) return pack_rows<true>(from, o.stride, at.count, at.depth, to[0], to[1], o.f);
    pack_rows<false>(from, o.stride, at.count, at.depth, to[0], to[1], o.f);
  };
}

// x of a rule that parts by sign has no second part where it is nowhere negative.
template <class T, class F>
bool has_second(const Operand<T, F>& o, const T* from, int64_t rows, int64_t columns) {
  if (!o.both) return false;
  if constexpr (std::is_same_v<F, InputParts<Acc<T>, Parts::kSign>>)
    return any_negative(from, o.stride, rows, columns);
  return true;
}

template <class T, class F, class A = Acc<T>>
auto columns_of(Operand<T, F> o) {
  return [o](const Panel& at, A* const* to) {
    const T* from = o.from + at.k * o.stride + at.first;
    if (has_second(o, from, at.depth, at.count)) {
      pack_columns<true>(from, o.stride, at.count, at.depth, to[0], to[1], o.f);
      return 3;
    }
    pack_columns<false>(from, o.stride, at.count, at.depth, to[0], to[1], o.f);
    return 1;
  };
}

template <class T, class F, class A = Acc<T>>
auto transposed_of(Operand<T, F> o) {
  return [o](const Panel& at, A* const* to) {
    const T* from = o.from + at.first * o.stride + at.k;
    if (has_second(o, from, at.count, at.depth)) {
      pack_transposed<true>(from, o.stride, at.count, at.depth, to[0], to[1], o.f);
      return 3;
    }
    pack_transposed<false>(from, o.stride, at.count, at.depth, to[0], to[1], o.f);
    return 1;
  };
}

}  // namespace lfp::cpu
