// Operands and epilogues of convolutions for made kernels and for rules with two signals. One set
// serves both layouts, its k always along the packs: rows that neighbouring lanes read are
// neighbouring positions in the plain layout, packs are neighbouring channels in channels last.
#pragma once

#include "conv_rules.h"
#include "made_matrix.cuh"
#include "split.cuh"

namespace lfp::cuda {

// ---- what a window reads

// A part of x; 0 in the padding, which is not the part of 0.
template <class T>
struct PartSource {
  static constexpr int kWidth = kRunOf<T>;
  using Value = Acc<T>;
  struct Raw {
    Pack<T, kWidth> value;
    int inside;  // bits
    int part;
  };
  const T* p;
  PartFunction<Acc<T>> function;

  __device__ __forceinline__ Raw outside(int part) const {
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) raw.value.value[j] = T(0.f);
    raw.inside = 0;
    raw.part = part;
    return raw;
  }
  __device__ __forceinline__ void read(int64_t offset, int j, Raw& raw) const {
    raw.value.value[j] = p[offset];
    raw.inside |= 1 << j;
  }
  __device__ __forceinline__ void read_wide(int64_t offset, Raw& raw) const {
    raw.value = *reinterpret_cast<const Pack<T, kWidth>*>(p + offset);
    raw.inside = (1 << kWidth) - 1;
  }
  __device__ __forceinline__ void convert(const Raw& raw, Value (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Value v = function(static_cast<Value>(raw.value.value[j]), raw.part);
      out[j] = raw.inside >> j & 1 ? v : Value(0);
    }
  }
  bool aligned() const { return aligned16(p); }
};

// u or v.
template <class A>
struct SidesSource {
  static constexpr int kWidth = kWide<A>;
  using Value = A;
  struct Raw {
    Pack<A, kWidth> value;
    int part;
  };
  const A *u, *v;

  __device__ __forceinline__ Raw outside(int part) const {
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) raw.value.value[j] = A(0);
    raw.part = part;
    return raw;
  }
  __device__ __forceinline__ void read(int64_t offset, int j, Raw& raw) const {
    raw.value.value[j] = (raw.part == 0 ? u : v)[offset];
  }
  __device__ __forceinline__ void read_wide(int64_t offset, Raw& raw) const {
    raw.value = *reinterpret_cast<const Pack<A, kWidth>*>((raw.part == 0 ? u : v) + offset);
  }
  __device__ __forceinline__ void convert(const Raw& raw, A (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[j] = raw.value.value[j];
  }
  bool aligned() const { return aligned16(u, v); }
};

// s = prologue(r, z); prologue(0, 1) = 0 in the padding.
template <class T>
struct SignalSource {
  static constexpr int kWidth = kRunOf<T>;
  using Value = Acc<T>;
  struct Raw {
    Pack<T, kWidth> reward, z;
  };
  const T *reward, *z;
  RuleCall<Acc<T>> rule;

  __device__ __forceinline__ Raw outside(int) const {
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) raw.reward.value[j] = T(0.f), raw.z.value[j] = T(1.f);
    return raw;
  }
  __device__ __forceinline__ void read(int64_t offset, int j, Raw& raw) const {
    raw.reward.value[j] = reward[offset];
    if (!rule.signal_in) raw.z.value[j] = z[offset];
  }
  __device__ __forceinline__ void read_wide(int64_t offset, Raw& raw) const {
    raw.reward = *reinterpret_cast<const Pack<T, kWidth>*>(reward + offset);
    if (!rule.signal_in) raw.z = *reinterpret_cast<const Pack<T, kWidth>*>(z + offset);
  }
  __device__ __forceinline__ void convert(const Raw& raw, Value (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      out[j] = rule.prologue(static_cast<Value>(raw.reward.value[j]),
                             static_cast<Value>(raw.z.value[j]));
  }
  bool aligned() const { return aligned16(reward, z); }
};

__device__ __forceinline__ Tap tap_of(const Window& window, int64_t index, bool tap_major) {
  return tap_major ? window.tap_major(index) : window.channel_major(index);
}

// What a window sees of a source. Rows are positions and k the index of the kernel, or the other
// way round.
template <class Source, bool kPositionRows>
struct WindowOperand {
  static constexpr bool kAlongK = true;
  static constexpr int kWidth = Source::kWidth;
  using Value = typename Source::Value;
  using Raw = typename Source::Raw;
  Source source;
  Window window;
  bool tap_major;
  bool wide;  // rows of positions: packs stay within a tap and are aligned

  __device__ __forceinline__ void select(int64_t part) { window.select(part); }
  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col, int part = 0) const {
    Raw raw = source.outside(part);
    if constexpr (kPositionRows) {
      const Position q = window.positions(row);
      if (wide) {
        const int64_t offset = window.offset(q, window.tap_major(col));
        if (offset >= 0) source.read_wide(offset, raw);
        return raw;
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int64_t offset = window.offset(q, tap_of(window, col + j, tap_major));
        if (offset >= 0) source.read(offset, j, raw);
      }
    } else {
      const Tap tap = tap_of(window, row, tap_major);
      Position q = window.positions(col);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int64_t offset = window.offset(q, tap);
        if (offset >= 0) source.read(offset, j, raw);
        window.positions.advance(q);
      }
    }
    return raw;
  }
  __device__ __forceinline__ void convert(const Raw& raw, Value (&out)[kWidth]) const {
    source.convert(raw, out);
  }
};

// ---- the kernel [small channels, large channels / groups, taps]: rows are target channels

struct KernelPlace {
  Window window;
  int targets;  // channels made by one group
  bool tap_major, up;

  // Index in the contiguous kernel, -1 outside.
  __device__ __forceinline__ int64_t operator()(int64_t row, int64_t k) const {
    const Tap tap = tap_of(window, k, tap_major);
    const int64_t source = int64_t(window.group) * window.channels + tap.channel;
    const int64_t line =
        up ? source * targets + row
           : (int64_t(window.group) * targets + row) * window.channels + tap.channel;
    return tap.valid && row < targets ? line * window.kernel_taps() + window.kernel_index(tap) : -1;
  }
};

// Wp or Wn. Outside of the kernel the other factor is 0.
template <class T>
struct KernelParts {
  static constexpr bool kAlongK = true;
  static constexpr int kWidth = kRunOf<T>;
  using Value = Acc<T>;
  struct Raw {
    Pack<T, kWidth> value;
    int part;
  };
  const T* p;
  KernelPlace place;
  PartFunction<Acc<T>> function;

  __device__ __forceinline__ void select(int64_t part) { place.window.select(part); }
  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col, int part) const {
    Raw raw;
    raw.part = part;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const int64_t at = place(row, col + j);
      raw.value.value[j] = at >= 0 ? p[at] : T(0.f);
    }
    return raw;
  }
  __device__ __forceinline__ void convert(const Raw& raw, Value (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      out[j] = function(static_cast<Value>(raw.value.value[j]), raw.part);
  }
};

// M, made on the way in.
template <class T>
struct MadeKernel {
  static constexpr bool kAlongK = true;
  static constexpr int kWidth = kRunOf<T>;
  struct Raw {
    Pack<T, kWidth> w, given;
    Acc<T> draws[kWidth];
  };
  const T *w, *given;
  KernelPlace place;
  RuleCall<Acc<T>> rule;

  __device__ __forceinline__ void select(int64_t part) { place.window.select(part); }
  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const int64_t at = place(row, col + j);
      raw.w.value[j] = at >= 0 && rule.code.matrix != Matrix::kNoisy ? w[at] : T(0.f);
      raw.given.value[j] = at >= 0 && rule.code.takes_matrix() ? given[at] : T(0.f);
      Acc<T> one[1] = {Acc<T>(0)};
      if (rule.code.draws()) draw(at, rule.params.seed, one);
      raw.draws[j] = one[0];
    }
    return raw;
  }
  __device__ __forceinline__ void convert(const Raw& raw, Acc<T> (&out)[kWidth]) const {
    using A = Acc<T>;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      out[j] = made(rule, static_cast<A>(raw.w.value[j]), static_cast<A>(raw.given.value[j]),
                    raw.draws[j]);
  }
};

// ---- what is done with sums

// m is a position, n a channel of the group.
template <class T, class Finish>
struct PositionPairs {
  using Element = T;
  static constexpr int kWidth = kRunOf<T>;
  static constexpr bool wants_row_sums = false, kTakesRuns = true;
  PairSums<T, Finish> sums;
  Window window;
  Strides strides;  // of the target
  int channels;     // of one group
  bool together;    // runs of channels are neighbours, aligned, and end with the group

  __device__ __forceinline__ void select(int64_t part) { window.select(part); }
  __device__ __forceinline__ int64_t depth() const {
    return depth_of_terms(sums.two, int64_t(window.taps) * window.channels);
  }
  template <int V>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, Acc<T> (&v)[V]) const {
    const int64_t pixel = window.target_offset(window.positions(m), strides);
    if (pixel < 0) return;
    const int64_t channel = int64_t(window.group) * channels + n;
    Run<V> run{{}, together};
#pragma unroll
    for (int k = 0; k < V; ++k)
      run.at[k] = n + k < channels ? pixel + (channel + k) * strides.channel : -1;
    sums.finish(run, channel, v);
  }
  __device__ __forceinline__ void row_sum(int64_t, Acc<T>) const {}
};

// m is a small channel of the group, n an index of the kernel, as KernelEpilogue has it.
template <class T, class Finish>
struct KernelPairs {
  using Element = T;
  static constexpr int kWidth = kRunOf<T>;
  static constexpr bool wants_row_sums = false, kTakesRuns = true;
  PairSums<T, Finish> sums;
  int rows, taps;          // small channels of one group
  FastDivide by_channels;  // large channels of one group
  bool tap_major;
  bool together;  // runs are aligned and end with the row
  int64_t group = 0;

  __device__ __forceinline__ void select(int64_t part) { group = part; }
  template <int V>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, Acc<T> (&f)[V]) const {
    sums.finish(kernel_run<V>(*this, m, n), 0, f);
  }
  __device__ __forceinline__ void row_sum(int64_t, Acc<T>) const {}
};

// r_in = input_epilogue(g, x) of rules with one signal
template <class T>
struct InputOfSum {
  const T* x;
  T* to;
  RuleCall<Acc<T>> rule;

  template <int V>
  __device__ __forceinline__ void operator()(const Run<V>& run, int64_t, Acc<T> (&g)[V],
                                             Acc<T> (&)[V]) const {
    Acc<T> in[V];
    run.load_from(x, in);
#pragma unroll
    for (int k = 0; k < V; ++k) g[k] = rule.input_epilogue(g[k], in[k]);
    run.store_to(to, g);
  }
};

}  // namespace lfp::cuda
