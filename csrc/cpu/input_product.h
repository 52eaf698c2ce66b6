// The input product s W [N, I] of one layer: W is packed a block at a time, in its own order and in
// the type of the products. A library product would have all of W transposed for it first.
//
// For processors with AVX-512; elsewhere the library's.
#pragma once

#include "signal.h"
#include "wide_product.h"

namespace lfp::cpu {

constexpr int64_t kInputWeights = 1 << 16;  // fewer are not worth packing

// P: the type of the products.
template <class P>
bool input_product_pays(int64_t n, int64_t in, int64_t out) {
  return std::is_same_v<P, BFloat16> && has_wide_pairs() && n >= kRows &&
         in * out >= kInputWeights;
}

#if LFP_WIDE

constexpr int64_t kInputColumns = 256;  // of W whose packed block stays in the core's cache
constexpr int64_t kInputDepth = 128;    // of a packed block; one panel of it fits the first cache
constexpr int64_t kInputRows = 512;     // of the result a thread adds up at a time

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

// Columns [begin, end) of the result, for rows [row, row + rows), with scratch for them:
// W[out, in], signal packed by pack_row_pairs.
template <class T, class Finish>
LFP_V4 void input_columns(const Pair* signal, const T* w, const T* x, T* to, int64_t rows,
                          int64_t in, int64_t out, int64_t begin, int64_t end, Finish finish,
                          Pair* packed, float* sum) {
  const int64_t pairs = Pairs::steps(out), columns = end - begin;
  const int64_t stride = (columns + kBlock - 1) / kBlock * kBlock;
  const int64_t products = stride / kBlock * ((rows + kRows - 1) / kRows);
  for (int64_t k = 0; k < out; k += kInputDepth) {
    const int64_t depth = std::min(kInputDepth, out - k), steps = Pairs::steps(depth);
    const T* from = w + k * in + begin;
    pack_pairs<kBlock>(from, in, depth, columns, packed);
    const int64_t left_rows = std::min(kInputDepth, out - k - depth);
    const int64_t lines = left_rows * NextRows<T>::kOfRow;
    NextRows<T> next{from + depth * in, in, 0, lines, (lines + products - 1) / products};
    for (int64_t c = 0; c < columns; c += kBlock) {
      const Pair* right = packed + packed_size<kBlock>(steps, c);
      for (int64_t r = 0; r < rows; r += kRows, next.step()) {
        const Pair* left = signal + (r * pairs + k / 2 * kRows);
        float* at = sum + r * stride + c;
        if (k == 0)
          block_product<Pairs, false>(left, right, steps, at, stride, next);
        else
          block_product<Pairs, true>(left, right, steps, at, stride, next);
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
template <class T, class Finish>
void input_product(const BFloat16* s, const T* w, const T* x, T* to, int64_t n, int64_t in,
                   int64_t out, Finish finish) {
  const int64_t groups = (n + kRows - 1) / kRows, size = kRows * Pairs::steps(out);
  const auto signal = scratch<Pair>(groups * size);
  parallel_items(groups, size, [&](int64_t first, int64_t last) {
    pack_row_pairs<kRows>(s + first * kRows * out, out, out,
                          std::min(n, last * kRows) - first * kRows, signal.get() + first * size);
  });
  // The same number of blocks of columns for every thread.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t blocks = (in + kInputColumns - 1) / kInputColumns;
  blocks = (blocks + threads - 1) / threads * threads;
  const int64_t width = ((in + blocks - 1) / blocks + kBlock - 1) / kBlock * kBlock;
  blocks = (in + width - 1) / width;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    const auto packed = scratch<Pair>(packed_size<kBlock>(Pairs::steps(kInputDepth), width));
    const auto sum = scratch<float>((std::min(n, kInputRows) + kRows) * width);
    for (int64_t b = first; b < last; ++b)
      for (int64_t r = 0; r < n; r += kInputRows)
        input_columns(signal.get() + r / kRows * size, w, x + r * in, to + r * in,
                      std::min(kInputRows, n - r), in, out, b * width,
                      std::min(in, (b + 1) * width), finish, packed.get(), sum.get());
  });
}

#endif  // LFP_WIDE

}  // namespace lfp::cpu
