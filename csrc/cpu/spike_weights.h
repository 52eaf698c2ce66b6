// Weights of spike_products.cpp in the order in which its walks read them, and back.
#pragma once

#include "spike_events.h"

namespace lfp::cpu {

// Of a weight [O, C, kh, kw].
struct WeightStrides {
  int64_t output, channel, row, column;
};

// Where packed weights lie: [block][row][output of the block], zeros behind the last output. A row
// is a channel and a tap; `rows` tells which, by the number channel * taps + tap. The forward
// product has a row of zeros behind the others.
struct Packing {
  std::vector<int64_t> rows;
  int64_t all;

  Packing(const SpikeLayer& layer, bool by_tap) {
    const int64_t taps = layer.taps();
    for (int64_t c = 0; c < layer.channels; ++c)
      for (int64_t k = 0; k < taps; ++k)
        rows.push_back(by_tap ? k * layer.channels + c : c * taps + k);
    all = static_cast<int64_t>(rows.size()) + by_tap;
  }
};

// f(output, count, row, count of rows): squares of weights of a block, which a transposition reads
// and writes by the line.
constexpr int64_t kSquare = 16;
template <class F>
void for_each_square(const SpikeLayer& layer, const Packing& packing, int64_t block, F f) {
  const int64_t first = block * layer.block_channels(), rows = packing.rows.size();
  const int64_t last = std::min(first + layer.block_channels(), layer.outputs);
  for (int64_t o = first; o < last; o += kSquare)
    for (int64_t r = 0; r < rows; r += kSquare)
      f(o, std::min(kSquare, last - o), r, std::min(kSquare, rows - r));
}

template <class A>
Scratch<A> pack_weights(const SpikeLayer& layer, const Packing& packing, const A* w,
                        const WeightStrides& stride) {
  const int64_t width = layer.block_channels(), block_size = packing.all * width;
  auto packed = scratch<A>(layer.blocks * block_size);
  std::vector<int64_t> from;
  for (int64_t c = 0; c < layer.channels; ++c)
    for (int64_t k = 0; k < layer.taps(); ++k)
      from.push_back(c * stride.channel + k / layer.kw * stride.row + k % layer.kw * stride.column);
  parallel_items(layer.blocks, block_size, [&](int64_t a, int64_t b) {
    for (int64_t block = a; block < b; ++block) {
      A* to = packed.get() + block * block_size;
      if (packing.all > static_cast<int64_t>(packing.rows.size()) ||
          (block + 1) * width > layer.outputs)
        std::fill_n(to, block_size, A(0));
      for_each_square(layer, packing, block, [&](int64_t o, int64_t m, int64_t r, int64_t n) {
        A square[kSquare][kSquare];
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) square[i][j] = w[(o + i) * stride.output + from[r + j]];
        for (int64_t j = 0; j < n; ++j)
          for (int64_t i = 0; i < m; ++i)
            to[packing.rows[r + j] * width + o - block * width + i] = square[i][j];
      });
    }
  });
  return packed;
}

// The sums of all parts, in order, times |W|, as [O, C, kh, kw].
template <class A>
void finish_weights(const SpikeLayer& layer, const Packing& packing, const A* packed,
                    const std::vector<Scratch<A>>& parts, bool magnitude, A* out) {
  const int64_t width = layer.block_channels(), rows = packing.rows.size();
  parallel_items(layer.blocks, rows * width, [&](int64_t a, int64_t b) {
    for (int64_t block = a; block < b; ++block)
      for_each_square(layer, packing, block, [&](int64_t o, int64_t m, int64_t r, int64_t n) {
        A square[kSquare][kSquare];
        for (int64_t j = 0; j < n; ++j) {
          const int64_t at = (block * rows + packing.rows[r + j]) * width + o - block * width;
          for (int64_t i = 0; i < m; ++i) {
            A sum(0);
            for (const auto& part : parts) sum += part[at + i];
            square[i][j] = magnitude ? sum * std::abs(packed[at + i]) : sum;
          }
        }
        for (int64_t i = 0; i < m; ++i) std::copy_n(square[i], n, out + (o + i) * rows + r);
      });
  });
}

}  // namespace lfp::cpu
