// Operands of the products of convolutions: what a window sees of a tensor, and the kernel.
//
//                          channels last                    plain
//   output positions       rows m                           columns n
//   index of the kernel    (tap, channel)                   (channel, tap)
//   the source is read     16 bytes of channels             16 bytes along the width
//   the kernel is read     16 bytes of channels             16 bytes of (channel, tap) down,
//                                                           element by element up
// 16 bytes need extents that are multiples of it, and along the width also stride 1 and a tap whose
// shift is one; elsewhere the same elements are read one by one, neighbours by neighbouring lanes.
#pragma once

#include "conv_window.cuh"
#include "operand.cuh"

namespace lfp::cuda {

// Elements on their way into a product: as they are, or s = prologue(reward, z).
template <class T>
struct ElementSource {
  static constexpr int kWidth = kWide<T>;
  struct Raw {
    Pack<T, kWidth> value, z;
  };
  const T *value, *z;
  RuleCall<Acc<T>> rule;  // signal_in: as they are

  // What stands in the padding: prologue(0, 1) = 0.
  __device__ __forceinline__ Raw outside() const {
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) raw.value.value[j] = T(0.f), raw.z.value[j] = T(1.f);
    return raw;
  }
  __device__ __forceinline__ void read(int64_t offset, int j, Raw& raw) const {
    raw.value.value[j] = value[offset];
    if (!rule.signal_in) raw.z.value[j] = z[offset];
  }
  __device__ __forceinline__ void read_wide(int64_t offset, Raw& raw) const {
    raw.value = *reinterpret_cast<const Pack<T, kWidth>*>(value + offset);
    if (!rule.signal_in) raw.z = *reinterpret_cast<const Pack<T, kWidth>*>(z + offset);
  }
  __device__ __forceinline__ void convert(const Raw& raw, Acc<T> (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const auto v = static_cast<Acc<T>>(raw.value.value[j]);
      out[j] = rule.prologue(v, static_cast<Acc<T>>(raw.z.value[j]));
    }
  }
  // One element.
  __device__ __forceinline__ Acc<T> operator()(int64_t offset) const {
    using A = Acc<T>;
    const A v = load(value, offset);
    return rule.signal_in ? v : rule.prologue(v, load(z, offset));
  }
  bool aligned() const { return aligned16(value, z); }
};

// What follows from an index is not computed before the loop, to live in registers during it.
__device__ __forceinline__ void decode_anew(int64_t& index) { asm volatile("" : "+l"(index)); }

// Channels last: rows are positions, columns (tap, channel).
template <class T, bool kAlong>
struct PixelOperand {
  static constexpr bool kAlongK = kAlong;
  static constexpr int kWidth = kWide<T>;
  using Raw = typename ElementSource<T>::Raw;
  ElementSource<T> source;
  Window window;
  bool wide;  // packs stay within a tap and are aligned

  __device__ __forceinline__ void select(int64_t part) { window.select(part); }
  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    Raw raw = source.outside();
    const Position q = window.positions(row);
    // col may be the same for every k: a tap, and kWidth of them where packs are taken apart.
    if constexpr (sizeof(T) == 4 && !kAlong) decode_anew(col);
    if (wide) {
      const int64_t offset = window.offset(q, window.tap_major(col));
      if (offset >= 0) source.read_wide(offset, raw);
      return raw;
    }
    decode_anew(col);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const int64_t offset = window.offset(q, window.tap_major(col + j));
      if (offset >= 0) source.read(offset, j, raw);
    }
    return raw;
  }
  __device__ __forceinline__ void convert(const Raw& raw, Acc<T> (&out)[kWidth]) const {
    source.convert(raw, out);
  }
};

// Plain layout: rows are (channel, tap), columns positions.
template <class T, bool kAlong>
struct PlaneOperand {
  static constexpr bool kAlongK = kAlong;
  static constexpr int kWidth = kWide<T>;
  using Raw = typename ElementSource<T>::Raw;
  ElementSource<T> source;
  Window window;
  bool in_rows;  // packs of positions stay in a row and read neighbours
  bool wide;     // rows of the source start aligned

  __device__ __forceinline__ void select(int64_t part) { window.select(part); }
  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    Raw raw = source.outside();
    const Tap tap = window.channel_major(row);
    Position q = window.positions(col);
    if (in_rows) {
      const int64_t row_start = window.template offset<2>(q, tap);
      if (row_start < 0) return raw;
      const int first = window.source_at(2, q, tap);
      const auto end = static_cast<uint32_t>(window.axis[2].source);
      if (wide && first % kWidth == 0) {
        if (uint32_t(first) < end) source.read_wide(row_start + first, raw);
        return raw;
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (uint32_t(first + j) < end) source.read(row_start + first + j, j, raw);
      return raw;
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const int64_t offset = window.offset(q, tap);
      if (offset >= 0) source.read(offset, j, raw);
      window.positions.advance(q);
    }
    return raw;
  }
  __device__ __forceinline__ void convert(const Raw& raw, Acc<T> (&out)[kWidth]) const {
    source.convert(raw, out);
  }
};

// The kernel [groups, small channels, ...].
template <class T>
struct KernelOperand {
  static constexpr int kWidth = kWide<T>;
  using Raw = Pack<T, kWidth>;
  const T* p;
  Window window;
  int64_t targets;  // channels made by one group
  bool wide, up;

  __device__ __forceinline__ void select(int64_t part) { window.select(part); }
  __device__ __forceinline__ void convert(const Raw& raw, Acc<T> (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[j] = static_cast<Acc<T>>(raw.value[j]);
  }
};

// Rows are target channels, columns the index of the kernel.
template <class T>
struct KernelRows : KernelOperand<T> {
  static constexpr bool kAlongK = true;
  static constexpr int kWidth = kWide<T>;
  using Raw = Pack<T, kWidth>;

  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    const Window& w = this->window;
    if constexpr (sizeof(T) == 8) decode_anew(row);  // two blocks have few registers for float64
    if (!this->up) {                                 // the memory is this matrix
      const int64_t cols = int64_t(w.channels) * w.taps;
      return fetch_pack(this->p + w.group * this->targets * cols, this->targets, cols, row, col,
                        this->wide);
    }
    // Plain layout, [source channels, target channels, taps].
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Tap tap = w.channel_major(col + j);
      const int64_t line = (int64_t(w.group) * w.channels + tap.channel) * this->targets + row;
      raw.value[j] = T(0.f);
      if (tap.valid && row < this->targets)
        raw.value[j] = this->p[line * w.kernel_taps() + w.kernel_index(tap)];
    }
    return raw;
  }
};

// Channels last and up, [source channels, taps, target channels]: rows are (tap, source channel),
// columns target channels.
template <class T>
struct KernelColumns : KernelOperand<T> {
  static constexpr bool kAlongK = false;
  static constexpr int kWidth = kWide<T>;
  using Raw = Pack<T, kWidth>;

  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    const Window& w = this->window;
    const Tap tap = w.tap_major(row);
    const int64_t line = (int64_t(w.group) * w.channels + tap.channel) * w.kernel_taps() +
                         (tap.valid ? w.kernel_index(tap) : 0);
    return fetch_pack(this->p + line * this->targets, tap.valid, this->targets, 0, col, this->wide);
  }
};

}  // namespace lfp::cuda
