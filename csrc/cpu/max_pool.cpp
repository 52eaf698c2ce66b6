// Max pools, forward (geometry and indices: max_pool.h). The first largest value of a window wins,
// the last NaN if there is one, as in torch.
#include "max_pool.h"

#include <cstring>
#include <limits>

namespace lfp::cpu {
namespace {

constexpr int64_t kStrip = 256;   // outputs whose running winners stay in the first-level cache
constexpr int64_t kBlock = 1024;  // outputs of whole rows that one thread pools at a time

int64_t output_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                    bool ceil_mode) {
  const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
  int64_t out = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // the last window has to start inside the input or the padding before it
  if (ceil_mode && (out - 1) * stride >= in + padding) --out;
  return out;
}

// best, label <- v, candidate where v wins
template <class A, class Label>
LFP_HD void contest(A v, Label candidate, A& best, Label& label) {
  const bool take = v > best || v != v;
  best = take ? v : best;
  label = take ? candidate : label;
}

// A place of a window: where its value lies, and what is remembered when it wins.
template <class U, class Label>
struct Place {
  const U* value;
  Label label;
};

// Labels are compared beside values, so they are as narrow as the indices allow.
template <class Index>
using LabelOf = std::conditional_t<std::is_same_v<Index, int64_t>, int64_t, int32_t>;

// The winners of `count` windows of K places: place q of window l holds places[q].value[l] and is
// remembered as places[q].label + l * slope; base + lead[l] is where all values are -inf.
template <int64_t K, class U, class Label, class T, class Index>
LFP_CLONES void pool_strip(const Place<U, Label>* places, int64_t count, Label slope, Label base,
                           const Label* lead, T* out, Index* winner) {
  const U* value[K];
  Label first[K];
  for (int64_t q = 0; q < K; ++q) {
    value[q] = places[q].value;
    first[q] = places[q].label;
  }
#pragma GCC ivdep
  for (int64_t l = 0; l < count; ++l) {
    Acc<U> best = -std::numeric_limits<Acc<U>>::infinity();
    Label label = base + lead[l];
    for (int64_t q = 0; q < K; ++q)
      contest(load(value[q], l), first[q] + Label(l) * slope, best, label);
    out[l] = static_cast<T>(best);
    winner[l] = static_cast<Index>(label);
  }
}

// The same for any number of places, which take turns.
template <class U, class Label, class T, class Index>
LFP_CLONES void pool_strip(const Place<U, Label>* places, int64_t number, int64_t count,
                           Label slope, Label base, const Label* lead, T* out, Index* winner) {
  Acc<U> best[kStrip];
  Label label[kStrip];
  for (int64_t begin = 0; begin < count; begin += kStrip) {
    const int64_t size = std::min(kStrip, count - begin);
#pragma GCC ivdep
    for (int64_t l = 0; l < size; ++l) {
      best[l] = -std::numeric_limits<Acc<U>>::infinity();
      label[l] = base + lead[begin + l];
    }
    for (int64_t q = 0; q < number; ++q) {
      const U* value = places[q].value + begin;
      const Label first = places[q].label + Label(begin) * slope;
#pragma GCC ivdep
      for (int64_t l = 0; l < size; ++l)
        contest(load(value, l), first + Label(l) * slope, best[l], label[l]);
    }
#pragma GCC ivdep
    for (int64_t l = 0; l < size; ++l) {
      out[begin + l] = static_cast<T>(best[l]);
      winner[begin + l] = static_cast<Index>(label[l]);
    }
  }
}

// Few places run in registers. The first place may stand repeatedly: it never wins against itself.
template <class U, class Label, class T, class Index>
void pool_windows(std::vector<Place<U, Label>>& places, int64_t count, Label slope, Label base,
                  const Label* lead, T* out, Index* winner) {
  const size_t number = places.size(), padded = number <= 4 ? 4 : number <= 9 ? 9 : number;
  places.insert(places.begin(), padded - number, Place<U, Label>(places[0]));
  if (padded == 4) return pool_strip<4>(places.data(), count, slope, base, lead, out, winner);
  if (padded == 9) return pool_strip<9>(places.data(), count, slope, base, lead, out, winner);
  pool_strip(places.data(), int64_t(number), count, slope, base, lead, out, winner);
}

// Samples [D, H, W, C]: a strip is one window over all channels.
template <class T, class Index>
void pool_last(const Geometry& g, const T* x, int64_t samples, int64_t C, T* out, Index* winner) {
  constexpr bool kTiles = std::is_same_v<Index, uint8_t>;
  using Label = LabelOf<Index>;
  const int64_t lines = g.out[0] * g.out[1], width = g.out[2] * C;
  const std::vector<Label> lead(C, 0);
  parallel_items(samples * lines, g.places() * width, [&](int64_t first, int64_t last) {
    std::vector<WindowRow> rows;
    std::vector<Place<T, Label>> places;
    for (int64_t i = first; i < last; ++i) {
      const T* from = x + i / lines * g.input() * C;
      window_rows(g, i % lines / g.out[1], i % lines % g.out[1], rows);
      for (int64_t ow = 0; ow < g.out[2]; ++ow) {
        places.clear();
        for (const auto& [row, place] : rows)
          for (int64_t k = 0; k < g.kernel[2]; ++k) {
            const int64_t w = ow * g.stride[2] - g.padding[2] + k * g.dilation[2];
            const int64_t at = row * g.in[2] + w;
            if (w >= 0 && w < g.in[2])
              places.push_back({from + at * C, Label(kTiles ? place + k : at)});
          }
        pool_windows(places, C, Label(0), places[0].label, lead.data(), out + i * width + ow * C,
                     winner + i * width + ow * C);
      }
    }
  });
}

// phases[(w + padding) % stride * pitch + (w + padding) / stride] = x[w]: neighbouring windows read
// neighbouring values.
template <class A, class T>
LFP_CLONES void split_phases(const T* x, int64_t width, int64_t stride, int64_t padding,
                             int64_t pitch, A* phases) {
  if (stride == 2) {
    A* even = phases + padding % 2 * pitch + padding / 2;
    A* odd = phases + (padding + 1) % 2 * pitch + (padding + 1) / 2;
#pragma GCC ivdep
    for (int64_t j = 0; j < width / 2; ++j) {
      even[j] = load(x, 2 * j);
      odd[j] = load(x, 2 * j + 1);
    }
    if (width % 2) even[width / 2] = load(x, width - 1);
    return;
  }
  for (int64_t w = 0, at = padding; w < width; ++w, ++at)
    phases[at % stride * pitch + at / stride] = load(x, w);
}

// Planes [D, H, W]: a strip is a row of windows. The plane is split into phases first, between
// margins of -inf that never win; a strip is whole vectors, and what runs over into the next row is
// overwritten by it.
template <class T, class Index>
void pool_planes(const Geometry& g, const T* x, int64_t planes, T* out, Index* winner) {
  using Label = LabelOf<Index>;
  constexpr bool kTiles = std::is_same_v<Index, uint8_t>;
  using A = Acc<T>;
  const int64_t W = g.in[2], S = g.stride[2], lines = g.in[0] * g.in[1];
  const int64_t reach = (g.out[2] - 1) * S + (g.kernel[2] - 1) * g.dilation[2] + 1;
  const int64_t width = (g.out[2] + kVector - 1) / kVector * kVector;
  const int64_t pitch = std::max(reach, W + g.padding[2]) / S + 1 + kVector;
  std::vector<Label> lead(g.out[2] + kVector, 0);  // column of the first place inside the input
  for (int64_t ow = 0; ow < g.out[2] && !kTiles; ++ow) {
    int64_t w = ow * S - g.padding[2];
    while (w < 0) w += g.dilation[2];
    lead[ow] = Label(w);
  }
  parallel_items(planes, g.places() * g.output(), [&](int64_t first, int64_t last) {
    std::vector<WindowRow> rows;
    std::vector<Place<A, Label>> places;
    std::vector<T> values(g.output() + kVector);
    std::vector<Index> winners(values.size());
    std::vector<A> phases(lines * S * pitch, -std::numeric_limits<A>::infinity());
    for (int64_t p = first; p < last; ++p) {
      for (int64_t line = 0; line < lines; ++line)
        split_phases(x + (p * lines + line) * W, W, S, g.padding[2], pitch,
                     phases.data() + line * S * pitch);
      for (int64_t o = 0; o < g.out[0] * g.out[1]; ++o) {
        window_rows(g, o / g.out[1], o % g.out[1], rows);
        places.clear();
        for (const auto& [row, place] : rows)
          for (int64_t k = 0; k < g.kernel[2]; ++k) {
            const int64_t column = k * g.dilation[2];
            places.push_back({phases.data() + (row * S + column % S) * pitch + column / S,
                              Label(kTiles ? place + k : row * W + column - g.padding[2])});
          }
        pool_windows(places, width, Label(kTiles ? 0 : S), Label(kTiles ? 0 : rows[0].row * W),
                     lead.data(), values.data() + o * g.out[2], winners.data() + o * g.out[2]);
      }
      std::copy_n(values.data(), g.output(), out + p * g.output());
      std::copy_n(winners.data(), g.output(), winner + p * g.output());
    }
  });
}

template <class T>
LFP_CLONES void store_winners(const Acc<T>* best, const int32_t* label, int64_t count, T* out,
                              uint8_t* winner) {
#pragma GCC ivdep
  for (int64_t l = 0; l < count; ++l) store(out, l, best[l]);
#pragma GCC ivdep
  for (int64_t l = 0; l < count; ++l) winner[l] = uint8_t(label[l]);
}

// 2 x 2 windows that tile planes: `rows` output rows of OW from 2 * rows input rows of 2 * OW, all
// contiguous. First neighbours in a row contest, whatever the row; then the two rows of a window,
// in whole vectors that run over into the next row, which comes later and overwrites.
template <class T>
LFP_CLONES void pool_quads(const T* x, int64_t rows, int64_t OW, Acc<T>* value, int32_t* column,
                           Acc<T>* best, int32_t* label) {
#pragma GCC ivdep
  for (int64_t p = 0; p < 2 * rows * OW; ++p) {
    Acc<T> v = load(x, 2 * p);
    int32_t j = 0;
    contest(load(x, 2 * p + 1), 1, v, j);
    value[p] = v;
    column[p] = j;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t begin = 0; begin < OW; begin += kVector) {
      const int64_t upper = 2 * r * OW + begin, lower = upper + OW, to = r * OW + begin;
#pragma GCC ivdep
      for (int64_t l = 0; l < kVector; ++l) {
        Acc<T> v = value[upper + l];
        int32_t q = column[upper + l];
        contest(value[lower + l], 2 + column[lower + l], v, q);
        best[to + l] = v;
        label[to + l] = q;
      }
    }
}

template <class T>
void pool_plane_quads(const Geometry& g, const T* x, int64_t planes, T* out, uint8_t* winner) {
  const int64_t OW = g.out[2], rows = planes * g.out[0] * g.out[1];
  const int64_t step = std::max<int64_t>(1, kBlock / OW), blocks = (rows + step - 1) / step;
  parallel_items(blocks, 4 * step * OW, [&](int64_t first, int64_t last) {
    std::vector<Acc<T>> value(2 * step * OW + kVector), best(step * OW + kVector);
    std::vector<int32_t> column(value.size()), label(best.size());
    for (int64_t b = first; b < last; ++b) {
      const int64_t at = b * step, count = std::min(step, rows - at);
      pool_quads(x + 4 * at * OW, count, OW, value.data(), column.data(), best.data(),
                 label.data());
      store_winners(best.data(), label.data(), count * OW, out + at * OW, winner + at * OW);
    }
  });
}

std::tuple<Tensor, Tensor> max_pool_forward(Tensor x, Ints kernel, Ints stride, Ints padding,
                                            Ints dilation, bool ceil_mode) {
  Geometry g;
  Ints size{x.size(0), x.size(1)};
  for (int64_t a = 0; a < kAxes; ++a) {
    const int64_t k = a - kAxes + (x.dim() - 2);
    g.in[a] = k < 0 ? 1 : x.size(k + 2);
    g.kernel[a] = k < 0 ? 1 : kernel[k];
    g.stride[a] = k < 0 ? 1 : stride[k];
    g.padding[a] = k < 0 ? 0 : padding[k];
    g.dilation[a] = k < 0 ? 1 : dilation[k];
    g.out[a] =
        output_size(g.in[a], g.kernel[a], g.stride[a], g.padding[a], g.dilation[a], ceil_mode);
    if (k >= 0) size.push_back(g.out[a]);
  }
  const bool channels_last = strided_channels_last(x);
  const Tensor source = in_format(x, channels_last_or_plain(x, channels_last));
  const auto type = g.tiles()                         ? ScalarType::Byte
                    : g.input() <= int64_t(INT32_MAX) ? ScalarType::Int
                                                      : ScalarType::Long;
  const Tensor out = empty_output(x, size, x.scalar_type(), channels_last);
  const Tensor winner = empty_output(x, size, type, channels_last);
  if (out.numel() == 0) return {out, winner};
  dispatch_dtype(x.scalar_type(), "max_pool_forward", [&](auto element) {
    using T = decltype(element);
    if (g.quads() && !channels_last)
      return pool_plane_quads(g, data<T>(source), x.size(0) * x.size(1), data<T>(out),
                              data<uint8_t>(winner));
    dispatch_winner(type, [&](auto index) {
      using Index = decltype(index);
      const int64_t N = x.size(0), C = x.size(1);
      T* to = data<T>(out);
      Index* who = data<Index>(winner);
      if (channels_last)
        pool_last<T, Index>(g, data<T>(source), N, C, to, who);
      else
        pool_planes<T, Index>(g, data<T>(source), N * C, to, who);
    });
  });
  return {out, winner};
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("max_pool_forward", TORCH_BOX(&lfp::cpu::max_pool_forward));
}
