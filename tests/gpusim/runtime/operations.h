// Integer, bit and conversion instructions that are more than one C++ operator.
#pragma once
#include <algorithm>
#include <utility>

#include "numeric.h"

namespace ptx {

template <class To, class From>
inline To clamp_to(From x) {
  using Limits = std::numeric_limits<To>;
  if (std::cmp_less(x, Limits::min())) return Limits::min();
  return std::cmp_greater(x, Limits::max()) ? Limits::max() : (To)x;
}

// A zero divisor and an overflowing quotient trap on the host; PTX leaves them unspecified.
template <class T>
inline T div_int(T a, T b) {
  if (b == 0) return (T)-1;
  if (std::is_signed_v<T> && b == (T)-1) return (T)(0 - (std::make_unsigned_t<T>)a);
  return a / b;
}

template <class T>
inline T rem_int(T a, T b) {
  if (b == 0 || (std::is_signed_v<T> && b == (T)-1)) return b == 0 ? a : 0;
  return a % b;
}

template <class T>
inline T neg_int(T a) {
  return (T)(0 - (std::make_unsigned_t<T>)a);
}
template <class T>
inline T abs_int(T a) {
  return a < 0 ? neg_int(a) : a;
}
template <class T>
inline T sad(T a, T b, T c) {
  using U = std::make_unsigned_t<T>;
  return (T)((U)c + (a > b ? (U)a - (U)b : (U)b - (U)a));
}

inline int64_t low24(int32_t x) { return (int32_t)((uint32_t)x << 8) >> 8; }
inline int64_t low24(uint32_t x) { return x & 0xffffff; }

template <class A, class B>
inline uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (uint32_t)((int32_t)(A)(a >> i) * (int32_t)(B)(b >> i));
  return c;
}

template <class T>
inline T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? 0 : (T)(a << n);
}

template <class T>
inline T shift_right(T a, uint32_t n) {
  if (n >= 8 * sizeof(T)) return a < 0 ? (T)-1 : 0;
  return (T)(a >> n);
}

template <bool left, bool wrap>
inline uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t n) {
  n = wrap ? n & 31 : std::min(n, 32u);
  uint64_t both = (uint64_t)high << 32 | low;
  return (uint32_t)(left ? both << n >> 32 : both >> n);
}

// Bits [position, position + length) of a; those beyond the top repeat the field's sign.
template <class T>
inline T extract_field(T a, uint32_t position, uint32_t length) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t width = 8 * sizeof(T);
  position &= 255, length &= 255;
  if (length == 0) return 0;
  uint32_t top = std::min(position + length - 1, width - 1);
  bool sign = std::is_signed_v<T> && ((U)a >> top & 1);
  U field = position < width ? (U)a >> position : 0;
  uint32_t valid = position < width ? std::min(length, width - position) : 0;
  if (valid < width) {
    U mask = ((U)1 << valid) - 1;
    field = sign ? field | ~mask : field & mask;
  }
  return (T)field;
}

template <class T>
inline T insert_field(T a, T b, uint32_t position, uint32_t length) {
  constexpr uint32_t width = 8 * sizeof(T);
  position &= 255, length &= 255;
  if (position >= width) return b;
  T mask = length >= width ? ~(T)0 : (T)(((T)1 << length) - 1);
  mask <<= position;
  return (b & ~mask) | ((a << position) & mask);
}

template <class T>
inline uint32_t find_leading(T a, bool shift_amount) {
  using U = std::make_unsigned_t<T>;
  U bits = std::is_signed_v<T> && a < 0 ? ~(U)a : (U)a;
  if (bits == 0) return ~0u;
  int zeros = std::countl_zero(bits);
  return shift_amount ? zeros : 8 * sizeof(T) - 1 - zeros;
}

template <class T>
inline T reverse_bits(T a) {
  T result = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); ++i) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}

inline uint32_t byte_of(uint32_t low, uint32_t high, uint32_t index) {
  return (uint32_t)((((uint64_t)high << 32) | low) >> (8 * (index & 7))) & 255;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t choice = selector >> (4 * i) & 15, byte = byte_of(a, b, choice);
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

template <class Choice>
inline uint32_t permute_by(uint32_t a, uint32_t b, Choice choice) {
  uint32_t result = 0;
  for (uint32_t i = 0; i < 4; ++i) result |= byte_of(a, b, choice(i)) << (8 * i);
  return result;
}

inline uint32_t permute_f4e(uint32_t a, uint32_t b, uint32_t n) {
  return permute_by(a, b, [=](uint32_t i) { return (n & 3) + i; });
}
inline uint32_t permute_b4e(uint32_t a, uint32_t b, uint32_t n) {
  return permute_by(a, b, [=](uint32_t i) { return (n & 3) - i; });
}
inline uint32_t permute_rc8(uint32_t a, uint32_t b, uint32_t n) {
  return permute_by(a, b, [=](uint32_t) { return n & 3; });
}
inline uint32_t permute_ecl(uint32_t a, uint32_t b, uint32_t n) {
  return permute_by(a, b, [=](uint32_t i) { return std::max(i, n & 3); });
}
inline uint32_t permute_ecr(uint32_t a, uint32_t b, uint32_t n) {
  return permute_by(a, b, [=](uint32_t i) { return std::min(i, n & 3); });
}
inline uint32_t permute_rc16(uint32_t a, uint32_t b, uint32_t n) {
  return permute_by(a, b, [=](uint32_t i) { return (n & 1) * 2 + (i & 1); });
}

inline uint32_t three_input_logic(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

template <bool wrap>
inline uint32_t bit_mask(uint32_t position, uint32_t length) {
  if (wrap) position &= 31, length &= 31;
  uint32_t ones = length >= 32 ? ~0u : (1u << length) - 1;
  return position >= 32 ? 0 : ones << position;
}

}  // namespace ptx
