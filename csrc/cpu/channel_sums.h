// Sums over batch and space per channel, for the bias of a convolution.
#pragma once

#include "../layout.h"
#include "loops.h"

namespace lfp::cpu {

constexpr int64_t kSumLanes = 32;   // partial sums, enough for every vector width
constexpr int64_t kSumPiece = 512;  // values added up before float64 takes over

// sums[k] = sum of s[k, :], for k < rows.
template <class P>
LFP_CLONES void row_sums(const P* s, int64_t rows, int64_t width, double* sums) {
  for (int64_t k = 0; k < rows; ++k, s += width) {
    sums[k] = 0;
    for (int64_t begin = 0; begin < width; begin += kSumPiece * kSumLanes) {
      const int64_t end = std::min(width, begin + kSumPiece * kSumLanes);
      const int64_t whole = end - (end - begin) % kSumLanes;
      Acc<P> lanes[kSumLanes] = {};
      for (int64_t i = begin; i < whole; i += kSumLanes)
        for (int64_t j = 0; j < kSumLanes; ++j) lanes[j] += load(s, i + j);
      for (int64_t i = whole; i < end; ++i) lanes[i - whole] += load(s, i);
      Acc<P> sum(0);
      for (int64_t j = 0; j < kSumLanes; ++j) sum += lanes[j];
      sums[k] += sum;
    }
  }
}

// sums[j] += sum of s[:, j], for j < width.
template <class P>
LFP_CLONES void column_sums(const P* s, int64_t rows, int64_t width, Acc<P>* sums) {
  for (int64_t k = 0; k < rows; ++k, s += width)
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) sums[j] += load(s, j);
}

// sums[k, O] = sums over the k-th piece of `pixels` pixels of s[pixels, O]. Few channels: several
// pixels make one row, so that rows fill the vector units.
template <class P>
void pixel_sums(const P* s, int64_t first, int64_t last, int64_t pixels, int64_t total,
                int64_t channels, double* sums) {
  const int64_t pack = (kSumLanes + channels - 1) / channels, width = pack * channels;
  std::vector<Acc<P>> lanes(width);
  for (int64_t k = first; k < last; ++k) {
    const int64_t begin = k * pixels, count = std::min(pixels, total - begin);
    const int64_t rows = count / pack;
    std::fill(lanes.begin(), lanes.end(), Acc<P>(0));
    column_sums(s + begin * channels, rows, width, lanes.data());
    column_sums(s + (begin + rows * pack) * channels, 1, (count - rows * pack) * channels,
                lanes.data());
    for (int64_t j = 0; j < width; ++j) sums[k * channels + j % channels] += lanes[j];
  }
}

// sums[O] += sum over batch and space of s[N,O,...]. Plain: the sums of all planes first. Channels
// last: the sums of pieces of pixels first. Neither depends on the number of threads.
template <class P>
void add_channel_sums(const Tensor& s, MemoryFormat format, double* sums) {
  const int64_t channels = s.size(1), total = s.numel() / channels;
  const bool plain = format == MemoryFormat::Contiguous;
  const int64_t pixels = plain ? total / s.size(0) : kSumPiece;
  const int64_t pieces = (total + pixels - 1) / pixels;
  std::vector<double> partial(pieces * channels, 0.0);
  const P* from = data<P>(s);
  const int64_t grain = std::max<int64_t>(kGrain / (pixels * channels), 1);
  torch::stable::parallel_for(0, pieces, grain, [&](int64_t first, int64_t last) {
    if (plain)
      return row_sums(from + first * channels * pixels, (last - first) * channels, pixels,
                      partial.data() + first * channels);
    pixel_sums(from, first, last, pixels, total, channels, partial.data());
  });
  for (int64_t k = 0; k < pieces; ++k)
    for (int64_t c = 0; c < channels; ++c) sums[c] += partial[k * channels + c];
}

}  // namespace lfp::cpu
