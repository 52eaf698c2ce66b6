// The input product s W [N, I] of one layer: W is packed a block at a time, in its own order and in
// the type of the products. A library product would have all of W transposed for it first.
//
// For processors with AVX-512; elsewhere the library's.
#pragma once

#include "signal.h"
#include "wide_product.h"

namespace lfp::cpu {

// P: the type of the products. In float32 only a W that no cache holds is worth it.
template <class P>
bool input_product_pays(int64_t n, int64_t in, int64_t out) {
  if (n == 0) return false;
  if (std::is_same_v<P, float>) return has_wide_vectors() && n <= 256 && in * out >= 1 << 22;
  return has_wide_pairs() && n <= 512 && in * out >= 1 << 16;
}

#if LFP_WIDE

constexpr int64_t kInputColumns = 256;  // of W whose packed block stays in the core's cache
constexpr int64_t kInputDepth = 128;    // of a packed block; one panel of it fits the first cache

// The rows of W that are packed next, brought into the core's cache meanwhile.
template <class T>
struct NextRows {
  static constexpr int64_t kLine = 64 / sizeof(T), kOfRow = kInputColumns / kLine;
  const T* from;
  int64_t stride, at, end, each;  // lines done, all lines, lines of a product
  void step() { at = std::min(end, at + each); }
  LFP_HD int64_t lines() const { return std::min(each, end - at); }
  LFP_HD void fetch(int64_t line) const {
    line += at;
    __builtin_prefetch(from + line / kOfRow * stride + line % kOfRow * kLine, 0, 2);
  }
};

// Columns [begin, end) of the result, with scratch for them: W[out, in], the signal packed whole by
// pack_row_panels.
template <class Factors, class T, class Finish, class Packed = typename Factors::Packed>
LFP_V4 void input_columns(const Packed* signal, const T* w, const T* x, T* to, int64_t rows,
                          int64_t in, int64_t out, int64_t begin, int64_t end, Finish finish,
                          Packed* packed, float* sum) {
  const int64_t columns = end - begin;
  const int64_t stride = (columns + kBlock - 1) / kBlock * kBlock;
  const int64_t products = stride / kBlock * ((rows + kRows - 1) / kRows);
  for (int64_t k = 0; k < out; k += kInputDepth) {
    const int64_t depth = std::min(kInputDepth, out - k), steps = Factors::steps(depth);
    const T* from = w + k * in + begin;
    pack_panels<kBlock>(from, in, depth, columns, packed);
    const int64_t left_rows = std::min(kInputDepth, out - k - depth);
    const int64_t lines = left_rows * NextRows<T>::kOfRow;
    NextRows<T> next{from + depth * in, in, 0, lines, (lines + products - 1) / products};
    for (int64_t c = 0; c < columns; c += kBlock) {
      const Packed* right = packed + packed_size<kBlock>(steps, c);
      for (int64_t r = 0; r < rows; r += kRows, next.step()) {
        const Packed* left = signal + r * Factors::steps(out) + Factors::steps(k) * kRows;
        float* at = sum + r * stride + c;
        if (k == 0)
          block_product<Factors, false>(left, right, steps, at, stride, next);
        else
          block_product<Factors, true>(left, right, steps, at, stride, next);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * in + begin;
#pragma GCC ivdep
    for (int64_t i = 0; i < columns; ++i)
      store(to, at + i, finish(sum[r * stride + i], load(x, at + i)));
  }
}

// to[n, in] = finish(s W, x) for s[n, out].
template <class T, class P, class Finish>
void input_product(const P* s, const T* w, const T* x, T* to, int64_t n, int64_t in, int64_t out,
                   Finish finish) {
  using Factors = FactorsOf<P>;
  using Packed = typename Factors::Packed;
  const int64_t groups = (n + kRows - 1) / kRows, size = kRows * Factors::steps(out);
  const auto signal = scratch<Packed>(groups * size);
  parallel_items(groups, size, [&](int64_t first, int64_t last) {
    pack_row_panels<kRows>(s + first * kRows * out, out, out,
                           std::min(n, last * kRows) - first * kRows, signal.get() + first * size);
  });
  // The same number of blocks of columns for every thread.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t blocks = (in + kInputColumns - 1) / kInputColumns;
  blocks = (blocks + threads - 1) / threads * threads;
  const int64_t width = ((in + blocks - 1) / blocks + kBlock - 1) / kBlock * kBlock;
  blocks = (in + width - 1) / width;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    const auto packed = scratch<Packed>(packed_size<kBlock>(Factors::steps(kInputDepth), width));
    const auto sum = scratch<float>(groups * kRows * width);
    for (int64_t b = first; b < last; ++b)
      input_columns<Factors>(signal.get(), w, x, to, n, in, out, b * width,
                             std::min(in, (b + 1) * width), finish, packed.get(), sum.get());
  });
}

#endif  // LFP_WIDE

}  // namespace lfp::cpu
