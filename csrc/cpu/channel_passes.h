// Passes over x [outer, C, inner] that reduce to, or take, one value per channel.
#pragma once

#include "../layout.h"
#include "loops.h"

namespace lfp::cpu {

constexpr int64_t kLanes = 32;  // independent partial sums
constexpr int64_t kRun = 8;  // additions in a row before float64 takes over: feedback sums cancel
constexpr int64_t kTileRows = 32;  // rows x columns of a tile stay in the first-level cache
constexpr int64_t kTileColumns = 256;
constexpr int64_t kBlock = 32768;  // elements of a block stay in the second-level cache
constexpr int64_t kMaxBlocks = 256;
constexpr int64_t kNarrow = 32;  // below this many contiguous elements a plane is a part of a row

template <class A>
struct Pair {
  A first, second;
};

// How the passes cut [outer, C, inner]. Planes: a group is one channel, a block some of its planes.
// Rows (channels_last, 2-d input, tiny planes): one group of all channels, a block is some rows of
// `width` = C * inner columns. The cut depends on the shape alone, so thread counts keep the bits.
struct Cut {
  int64_t outer, channels, inner, width, groups, step, blocks;
  bool rows;

  explicit Cut(const ChannelView& v)
      : outer(v.outer), channels(v.channels), inner(v.inner), rows(v.inner < kNarrow) {
    width = rows ? channels * inner : inner;
    groups = rows ? 1 : channels;
    step = std::max(kBlock / std::max<int64_t>(width, 1), (outer + kMaxBlocks - 1) / kMaxBlocks);
    step = std::max(step, rows ? kTileRows : 1);
    blocks = (outer + step - 1) / step;
  }
  int64_t begin(int64_t block) const { return block * step; }
  int64_t end(int64_t block) const { return std::min(outer, (block + 1) * step); }
  int64_t stride() const { return channels * inner; }
  double count() const { return double(outer) * double(inner); }  // values per channel
};

// reduce(group, block) for all, finish(group), write(group, block) for all. A thread that owns a
// whole group writes it while it is still in cache, last block first.
template <class Reduce, class Finish, class Write>
void run_passes(const Cut& cut, Reduce reduce, Finish finish, Write write) {
  const int64_t elements = cut.step * cut.width;
  if (cut.groups >= 4 * int64_t(torch::stable::get_num_threads())) {
    parallel_items(cut.groups, elements * cut.blocks, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        for (int64_t b = 0; b < cut.blocks; ++b) reduce(g, b);
        finish(g);
        for (int64_t b = cut.blocks; b-- > 0;) write(g, b);
      }
    });
    return;
  }
  parallel_items(cut.groups * cut.blocks, elements, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) reduce(i / cut.blocks, i % cut.blocks);
  });
  for (int64_t g = 0; g < cut.groups; ++g) finish(g);
  parallel_items(cut.groups * cut.blocks, elements, [&](int64_t first, int64_t last) {
    for (int64_t i = last; i-- > first;) write(i / cut.blocks, i % cut.blocks);
  });
}

// Sums of the pair f(i) over planes [first, last) of one channel.
template <class A, class F>
LFP_CLONES Pair<double> sum_planes(int64_t first, int64_t last, int64_t stride, int64_t inner,
                                   F f) {
  A a[kLanes] = {}, b[kLanes] = {};
  double sum_a[kLanes] = {}, sum_b[kLanes] = {};
  int64_t pending = 0;
  const auto flush = [&] {
    for (int64_t l = 0; l < kLanes; ++l) {
      sum_a[l] += double(a[l]);
      sum_b[l] += double(b[l]);
      a[l] = b[l] = A(0);
    }
    pending = 0;
  };
  for (int64_t o = first; o < last; ++o) {
    const int64_t base = o * stride;
    for (int64_t begin = 0; begin < inner; begin += kRun * kLanes) {
      const int64_t end = std::min(inner, begin + kRun * kLanes);
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) {
          const Pair<A> p = f(base + i + l);
          a[l] += p.first;
          b[l] += p.second;
        }
      for (int64_t l = 0; i < end; ++i, ++l) {
        const Pair<A> p = f(base + i);
        a[l] += p.first;
        b[l] += p.second;
      }
      pending += end - begin;
      if (pending >= kRun * kLanes) flush();
    }
  }
  flush();
  Pair<double> total{0, 0};
  for (int64_t l = 0; l < kLanes; ++l) {
    total.first += sum_a[l];
    total.second += sum_b[l];
  }
  return total;
}

// a[j], b[j] += the pair f(i, column) over the rows of a tile; f sees i = row * width + column.
template <class A, class F>
LFP_HD void sum_tile(int64_t row, int64_t last, int64_t column, int64_t columns, int64_t width,
                     A* a, A* b, F f) {
  for (int64_t j = 0; j < columns; ++j) a[j] = b[j] = A(0);
  for (int64_t r = row; r < last; ++r)
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      const Pair<A> p = f(r * width + column + j, column + j);
      a[j] += p.first;
      b[j] += p.second;
    }
}

// total_a[column], total_b[column] = sums of the pair f(i, column) over rows [first, last).
template <class A, class F>
LFP_CLONES void sum_rows(int64_t first, int64_t last, int64_t width, double* total_a,
                         double* total_b, F f) {
  A a[kTileColumns], b[kTileColumns];
  for (int64_t c = 0; c < width; c += kTileColumns) {
    const int64_t columns = std::min(kTileColumns, width - c);
    double *sum_a = total_a + c, *sum_b = total_b + c;
    for (int64_t j = 0; j < columns; ++j) sum_a[j] = sum_b[j] = 0;
    for (int64_t r = first; r < last; r += kRun) {
      sum_tile(r, std::min(last, r + kRun), c, columns, width, a, b, f);
#pragma GCC ivdep
      for (int64_t j = 0; j < columns; ++j) {
        sum_a[j] += double(a[j]);
        sum_b[j] += double(b[j]);
      }
    }
  }
}

template <class F>
LFP_CLONES void write_planes(int64_t first, int64_t last, int64_t stride, int64_t inner, F f) {
  for (int64_t o = first; o < last; ++o) {
    const int64_t base = o * stride;
#pragma GCC ivdep
    for (int64_t i = 0; i < inner; ++i) f(base + i);
  }
}

template <class F>
LFP_CLONES void write_rows(int64_t first, int64_t last, int64_t width, F f) {
  for (int64_t r = first; r < last; ++r)
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) f(r * width + j, j);
}

// Chan's update: mean and sum of squared deviations m2 of the union of two sets of values.
LFP_HD void merge_moments(double& mean, double& m2, double count, double other_mean,
                          double other_m2, double other_count) {
  const double both = count + other_count, delta = other_mean - mean;
  mean += delta * (other_count / both);
  m2 += other_m2 + delta * delta * (count * other_count / both);
}

// Moments of rows [first, last): each tile twice from the first-level cache (its mean, then the
// deviations from it, which do not cancel), then merged.
template <class T>
LFP_CLONES void row_moments(const T* x, int64_t first, int64_t last, int64_t width, double* mean,
                            double* m2) {
  using A = Acc<T>;
  A a[kTileColumns], b[kTileColumns], center[kTileColumns];
  for (int64_t r = first; r < last; r += kTileRows)
    for (int64_t c = 0; c < width; c += kTileColumns) {
      const int64_t columns = std::min(kTileColumns, width - c);
      const int64_t end = std::min(last, r + kTileRows);
      const double count = double(end - r), before = double(r - first);
      sum_tile(r, end, c, columns, width, a, b,
               [=](int64_t i, int64_t) { return Pair<A>{load(x, i), A(0)}; });
      for (int64_t j = 0; j < columns; ++j) center[j] = a[j] / A(count);
      const A* m = center;
      sum_tile(r, end, c, columns, width, a, b, [=](int64_t i, int64_t column) {
        const A d = load(x, i) - m[column - c];
        return Pair<A>{d, d * d};
      });
#pragma GCC ivdep
      for (int64_t j = 0; j < columns; ++j) {
        const double shift = double(a[j]) / count;
        merge_moments(mean[c + j], m2[c + j], before, double(center[j]) + shift,
                      double(b[j]) - shift * double(a[j]), count);
      }
    }
}

template <class T>
void plane_moments(const T* x, int64_t first, int64_t last, int64_t stride, int64_t inner,
                   double& mean, double& m2) {
  using A = Acc<T>;
  const double count = double(last - first) * double(inner);
  const auto sum = sum_planes<A>(first, last, stride, inner,
                                 [=](int64_t i) { return Pair<A>{load(x, i), A(0)}; });
  const A center = A(sum.first / count);
  const auto deviation = sum_planes<A>(first, last, stride, inner, [=](int64_t i) {
    const A d = load(x, i) - center;
    return Pair<A>{d, d * d};
  });
  const double shift = deviation.first / count;
  mean = double(center) + shift;
  m2 = deviation.second - shift * deviation.first;
}

}  // namespace lfp::cpu
