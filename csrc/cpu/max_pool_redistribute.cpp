// Max pools, redistribute: the winner takes the reward of its window, overlapping windows add
// (geometry and indices: max_pool.h).
#include <atomic>

#include "max_pool.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // rewards of whole rows that one thread passes on at a time

// out[l * step] = reward[l] where winner[l] is `place`, else 0.
template <class T>
LFP_CLONES void give_place(const T* reward, const uint8_t* winner, uint8_t place, int64_t count,
                           int64_t step, T* out) {
  if (step == 1) {
#pragma GCC ivdep
    for (int64_t l = 0; l < count; ++l) out[l] = winner[l] == place ? reward[l] : T(0);
    return;
  }
  for (int64_t l = 0; l < count; ++l) out[l * step] = winner[l] == place ? reward[l] : T(0);
}

// Windows that tile: every position belongs to one window.
template <class T>
void give_tiles(const Geometry& g, const T* reward, const uint8_t* winner, int64_t outer,
                int64_t channels, bool planes, T* out) {
  const int64_t lines = g.out[0] * g.out[1], W = g.in[2], K = g.kernel[2];
  const int64_t width = g.out[2] * channels;
  parallel_items(outer * lines, g.places() * width, [&](int64_t first, int64_t last) {
    std::vector<WindowRow> rows;
    for (int64_t i = first; i < last; ++i) {
      window_rows(g, i % lines / g.out[1], i % lines % g.out[1], rows);
      const T* r = reward + i * width;
      const uint8_t* who = winner + i * width;
      for (const auto& [row, place] : rows) {
        T* to = out + (i / lines * g.input() + row * W) * channels;
        if (planes)
          for (int64_t k = 0; k < K; ++k) give_place(r, who, place + k, g.out[2], K, to + k);
        else
          for (int64_t w = 0; w < W; ++w)
            give_place(r + w / K * channels, who + w / K * channels, place + w % K, channels, 1,
                       to + w * channels);
      }
    }
  });
}

// 2 x 2 windows that tile planes: `rows` rows of OW rewards to 2 * rows rows of 2 * OW, all
// contiguous. First the even and the odd columns apart, in whole vectors that run over into the
// next row, which comes later and overwrites; then interleaved, whatever the row.
template <class T>
LFP_CLONES void give_quads(const T* reward, const uint8_t* winner, int64_t rows, int64_t OW,
                           Acc<T>* narrow, int32_t* label, Acc<T>* even, Acc<T>* odd, T* out) {
  using A = Acc<T>;
#pragma GCC ivdep
  for (int64_t p = 0; p < rows * OW; ++p) narrow[p] = load(reward, p);
#pragma GCC ivdep
  for (int64_t p = 0; p < rows * OW; ++p) label[p] = winner[p];
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t i = 0; i < 2; ++i)
      for (int64_t begin = 0; begin < OW; begin += kVector) {
        const int64_t from = r * OW + begin, to = (2 * r + i) * OW + begin;
#pragma GCC ivdep
        for (int64_t l = 0; l < kVector; ++l) {
          even[to + l] = label[from + l] == 2 * i ? narrow[from + l] : A(0);
          odd[to + l] = label[from + l] == 2 * i + 1 ? narrow[from + l] : A(0);
        }
      }
#pragma GCC ivdep
  for (int64_t p = 0; p < 2 * rows * OW; ++p) {
    store(out, 2 * p, even[p]);
    store(out, 2 * p + 1, odd[p]);
  }
}

template <class T>
void give_plane_quads(const Geometry& g, const T* reward, const uint8_t* winner, int64_t planes,
                      T* out) {
  const int64_t OW = g.out[2], rows = planes * g.out[0] * g.out[1];
  const int64_t step = std::max<int64_t>(1, kBlock / OW), blocks = (rows + step - 1) / step;
  parallel_items(blocks, 4 * step * OW, [&](int64_t first, int64_t last) {
    std::vector<Acc<T>> narrow(step * OW + kVector), even(2 * step * OW + kVector);
    std::vector<Acc<T>> odd(even.size());
    std::vector<int32_t> label(narrow.size());
    for (int64_t b = first; b < last; ++b) {
      const int64_t at = b * step, count = std::min(step, rows - at);
      give_quads(reward + at * OW, winner + at * OW, count, OW, narrow.data(), label.data(),
                 even.data(), odd.data(), out + 4 * at * OW);
    }
  });
}

// Overlapping windows add their rewards, in the order of the outputs.
template <class T, class Index>
void give_flat(const Geometry& g, const Tensor& reward, const Tensor& winner, const Tensor& out,
               int64_t outer, int64_t channels) {
  using A = Acc<T>;
  const int64_t size = g.input() * channels, rewards = g.output() * channels;
  std::atomic<bool> outside = false;
  parallel_items(outer, size, [&](int64_t first, int64_t last) {
    std::vector<A> wide(std::is_same_v<T, A> ? 0 : size);
    for (int64_t n = first; n < last; ++n) {
      const T* r = data<T>(reward) + n * rewards;
      const Index* who = data<Index>(winner) + n * rewards;
      T* to = data<T>(out) + n * size;
      A* sums = wide.data();
      if constexpr (std::is_same_v<T, A>) sums = to;
      std::fill_n(sums, size, A(0));
      for (int64_t o = 0; o < rewards; o += channels)
        for (int64_t c = 0; c < channels; ++c) {
          const auto place = static_cast<uint64_t>(who[o + c]);
          if (place < uint64_t(g.input()))
            sums[int64_t(place) * channels + c] += load(r, o + c);
          else
            outside = true;
        }
      if constexpr (!std::is_same_v<T, A>)
        serial_loop(0, size, [=](int64_t i) { store(to, i, sums[i]); });
    }
  });
  LFP_CHECK(!outside, "max_pool_redistribute", "indices point outside input_shape");
}

Tensor max_pool_redistribute(Tensor reward, Tensor indices, Ints input_shape) {
  Geometry g;
  for (int64_t a = 0; a < kAxes; ++a) {
    const int64_t d = a - kAxes + reward.dim();
    g.in[a] = d < 2 ? 1 : input_shape[d];
    g.out[a] = d < 2 ? 1 : reward.size(d);
    g.kernel[a] = g.stride[a] = g.out[a] ? g.in[a] / g.out[a] : 1;
    g.padding[a] = 0;
    g.dilation[a] = 1;
  }
  const bool channels_last = strided_channels_last(indices);
  const auto format = channels_last_or_plain(indices, channels_last);
  const Tensor r = in_format(reward, format), winner = in_format(indices, format);
  const Tensor out = empty_output(reward, input_shape, reward.scalar_type(), channels_last);
  const int64_t N = reward.size(0), C = reward.size(1), channels = channels_last ? C : 1;
  const int64_t outer = channels_last ? N : N * C;
  if (out.numel() == 0) return out;
  dispatch_dtype(reward.scalar_type(), "max_pool_redistribute", [&](auto element) {
    using T = decltype(element);
    dispatch_winner(indices.scalar_type(), [&](auto index) {
      using Index = decltype(index);
      if constexpr (std::is_same_v<Index, uint8_t>) {
        LFP_CHECK(g.tiles(), "max_pool_redistribute", "windows of these indices tile the input");
        const T* from = data<T>(r);
        const uint8_t* who = data<uint8_t>(winner);
        if (g.quads() && !channels_last)
          give_plane_quads(g, from, who, outer, data<T>(out));
        else
          give_tiles(g, from, who, outer, channels, !channels_last, data<T>(out));
      } else {
        give_flat<T, Index>(g, r, winner, out, outer, channels);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("max_pool_redistribute", TORCH_BOX(&lfp::cpu::max_pool_redistribute));
}
