// What the two passes of attention share: tensors of heads, tasks, packed blocks and rows of
// probabilities.
//   Z = scale q k^T,  P = exp(Z + mask - lse),  K = keep / (1 - rate),  out = (P K) v
#pragma once

#include <limits>

#include "../philox.h"
#include "exponential.h"
#include "small_product.h"

namespace lfp::cpu {

constexpr int64_t kQueries = 64, kKeys = 128;  // of a block
constexpr int64_t kLeastTasks = 8;             // what is cut further where there are fewer heads

// [B, H, L, E] with any strides but that of E.
template <class T>
struct HeadView {
  T* at;
  int64_t batch, head, row;  // strides
  explicit HeadView(const Tensor& t)
      : at(static_cast<T*>(t.data_ptr())),
        batch(t.stride(0)),
        head(t.stride(1)),
        row(t.stride(2)) {}
  T* rows(int64_t b, int64_t h) const { return at + b * batch + h * head; }
};

// The tensor itself, or a copy whose last dimension is contiguous.
inline Tensor rows_contiguous(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

// [B, H, L, E] in memory [B, L, H, E].
inline Tensor empty_heads(const Tensor& like, int64_t b, int64_t h, int64_t l, int64_t e) {
  return torch::stable::transpose(torch::stable::new_empty(like, {b, l, h, e}), 1, 2);
}

template <class A>
constexpr ScalarType type_of() {
  return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
}

// One call's sizes, options and how its work is cut: by key head, and by blocks of queries in turn
// where there are few heads, as the shapes alone say.
struct Attention {
  int64_t batch, heads, kv, queries, keys, width, out_width;
  bool causal;
  double scale, rate;
  uint64_t seed;
  int64_t shared, blocks, parts;

  Attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal_, double scale_,
            double rate_, int64_t seed_)
      : batch(q.size(0)),
        heads(q.size(1)),
        kv(k.size(1)),
        queries(q.size(2)),
        keys(k.size(2)),
        width(q.size(3)),
        out_width(v.size(3)),
        causal(causal_),
        scale(scale_),
        rate(rate_),
        seed(static_cast<uint64_t>(seed_)) {
    shared = heads / std::max<int64_t>(1, kv);
    blocks = (queries + kQueries - 1) / kQueries;
    const int64_t whole = std::max<int64_t>(1, batch * kv);
    parts =
        std::clamp<int64_t>((kLeastTasks + whole - 1) / whole, 1, std::max<int64_t>(1, blocks / 4));
  }
  int64_t tasks() const { return batch * kv * parts; }
  // Keys that any of the queries before `last` sees.
  int64_t seen(int64_t last) const { return causal ? std::min(keys, last) : keys; }
};

// to[rows][width padded] = from[rows][width], zeros beside.
template <class T, class A>
LFP_CLONES void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t width, A* to) {
  const int64_t wide = padded<A>(width);
  for (int64_t r = 0; r < rows; ++r, from += stride, to += wide) {
    for (int64_t i = 0; i < width; ++i) to[i] = static_cast<A>(load(from, i));
    for (int64_t i = width; i < wide; ++i) to[i] = A(0);
  }
}

// to[width][kKeys] = from[rows][width]^T, zeros beside.
template <class T, class A>
LFP_CLONES void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t width, A* to) {
  const int64_t wide = padded<A>(rows);
  for (int64_t r0 = 0; r0 < wide; r0 += 16)
    for (int64_t i = 0; i < width; ++i) {
      const int64_t last = std::min(rows, r0 + 16);
      for (int64_t r = r0; r < last; ++r)
        to[i * kKeys + r] = static_cast<A>(load(from, r * stride + i));
      for (int64_t r = std::max(last, r0); r < r0 + 16; ++r) to[i * kKeys + r] = A(0);
    }
}

// The mask of a call, [B, H, L, S] of bool or of the elements' type, with any strides.
template <class T>
struct Mask {
  const char* at = nullptr;
  bool added = false;
  int64_t batch = 0, head = 0, row = 0, column = 0;

  explicit Mask(const std::optional<Tensor>& mask) {
    if (!mask) return;
    at = static_cast<const char*>(mask->data_ptr());
    added = mask->scalar_type() != ScalarType::Bool;
    batch = mask->stride(0), head = mask->stride(1), row = mask->stride(2),
    column = mask->stride(3);
  }
  explicit operator bool() const { return at != nullptr; }

  // z[0, count) of query i and the keys from `key` on: what is hidden becomes -inf.
  template <class A>
  LFP_CLONES void apply(int64_t b, int64_t h, int64_t i, int64_t key, int64_t count, A* z) const {
    const int64_t from = b * batch + h * head + i * row + key * column;
    if (added) {
      const T* m = reinterpret_cast<const T*>(at) + from;
      for (int64_t j = 0; j < count; ++j) z[j] += static_cast<A>(load(m, j * column));
    } else {
      const bool* m = reinterpret_cast<const bool*>(at) + from;
      for (int64_t j = 0; j < count; ++j)
        z[j] = m[j * column] ? z[j] : -std::numeric_limits<A>::infinity();
    }
  }
};

// keep[0, count) = kept / (1 - rate) of the elements from `index` on.
template <class A>
LFP_CLONES void keep_row(int64_t index, int64_t count, double rate, uint64_t seed, A* keep) {
  const float limit = static_cast<float>(rate);
  const A scale = A(1) / (A(1) - A(rate));
  const int64_t first = index / 4, shift = index % 4;
  for (int64_t block = 0; 4 * block - shift < count; ++block) {
    const PhiloxBlock drawn = philox(static_cast<uint64_t>(first + block), seed);
    for (int64_t w = 0; w < 4; ++w) {
      const int64_t j = 4 * block + w - shift;
      if (j >= 0 && j < count)
        keep[j] = unit_interval<float>(drawn.word[w]) >= limit ? scale : A(0);
    }
  }
}

}  // namespace lfp::cpu
