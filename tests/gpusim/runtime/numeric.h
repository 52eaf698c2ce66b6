// Number formats that C++ lacks, and conversions that round exactly once.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

struct Half {
  uint16_t bits;
};

struct Bfloat {
  uint16_t bits;
};

enum class Round { Nearest, Zero, Down, Up, NearestAway };

template <class T, class Bits>
inline T from_bits(Bits bits) {
  return std::bit_cast<T>(bits);
}
inline uint32_t to_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline uint64_t to_bits(double x) { return std::bit_cast<uint64_t>(x); }
inline uint16_t to_bits(Half x) { return x.bits; }
inline uint16_t to_bits(Bfloat x) { return x.bits; }

template <class T>
inline T peek(const char* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

template <class T>
inline void poke(char* p, T value) {
  memcpy(p, &value, sizeof value);
}

// Exact conversions to double.
inline double widen(float x) { return x; }
inline double widen(double x) { return x; }
inline double widen(Half x) { return (double)std::bit_cast<_Float16>(x.bits); }
inline double widen(Bfloat x) { return std::bit_cast<float>((uint32_t)x.bits << 16); }

template <class T>
constexpr bool is_native = std::is_floating_point_v<T>;

// Rounds to odd: a later rounding to a format with at least two bits less is then correct.
inline float odd_float(double x) {
  float nearest = (float)x;
  if (nearest == x || std::isnan(x)) return nearest;
  uint32_t bits = to_bits(nearest);
  if (std::fabs(nearest) > std::fabs(x)) --bits;
  return from_bits<float>(bits | 1);
}

inline double odd_double(long double x) {
  double nearest = (double)x;
  if (nearest == x) return nearest;
  uint64_t bits = to_bits(nearest);
  if (std::fabs((long double)nearest) > std::fabs(x)) --bits;
  return from_bits<double>(bits | 1);
}

inline Bfloat nearest_bfloat(float x) {
  uint32_t bits = to_bits(x);
  if (std::isnan(x)) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class T>
inline T nearest(double x) {
  if constexpr (std::is_same_v<T, Half>)
    return {std::bit_cast<uint16_t>((_Float16)x)};
  else if constexpr (std::is_same_v<T, Bfloat>)
    return nearest_bfloat(odd_float(x));
  else
    return (T)x;
}

// The neighbour of a floating-point number with the next smaller or larger magnitude.
template <class T>
inline T step_magnitude(T x, int step) {
  return from_bits<T>((decltype(to_bits(x)))(to_bits(x) + step));
}

template <class T>
inline T smallest(bool negative) {
  using Bits = decltype(to_bits(T{}));
  Bits sign = negative ? (Bits)1 << (8 * sizeof(T) - 1) : 0;
  return from_bits<T>((Bits)(sign | 1));
}

// One rounding, in any direction: the nearest value, stepped back when it lies on the wrong side.
template <class T, Round mode = Round::Nearest>
inline T narrow(double x) {
  T result = nearest<T>(x);
  double rounded = widen(result);
  if (mode == Round::Nearest || rounded == x || std::isnan(x)) return result;
  bool above = rounded > x;
  if (mode == Round::Zero)
    return std::fabs(rounded) > std::fabs(x) ? step_magnitude(result, -1) : result;
  if (above != (mode == Round::Down)) return result;
  if (rounded == 0) return smallest<T>(above);
  return step_magnitude(result, (rounded > 0) == above ? -1 : 1);
}

template <class T, Round mode, class Int>
inline T int_to(Int x) {
  // An 80-bit long double holds every 64-bit integer.
  long double exact = x;
  if constexpr (std::is_same_v<T, double>) {
    double result = (double)exact;
    bool away = std::fabs((long double)result) > std::fabs(exact);
    bool above = result > exact, below = result < exact;
    if (mode == Round::Zero ? away : mode == Round::Down ? above : mode == Round::Up && below)
      result = step_magnitude(result, away ? -1 : 1);
    return result;
  } else {
    return narrow<T, mode>(odd_double(exact));
  }
}

template <Round mode>
inline double integral(double x) {
  switch (mode) {
    case Round::Zero: return std::trunc(x);
    case Round::Down: return std::floor(x);
    case Round::Up: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}

// Out of range clamps. NaN gives 0, or the highest bit alone where a 64-bit format takes part.
template <class Int, Round mode, bool nan_is_high, class T>
inline Int to_int(T value) {
  double x = integral<mode>(widen(value));
  if (std::isnan(x))
    return nan_is_high ? (Int)((std::make_unsigned_t<Int>)1 << (8 * sizeof(Int) - 1)) : 0;
  if (x <= (double)std::numeric_limits<Int>::min()) return std::numeric_limits<Int>::min();
  if (x >= (double)std::numeric_limits<Int>::max()) return std::numeric_limits<Int>::max();
  return (Int)x;
}

template <Round mode>
inline uint32_t to_tf32(float x) {
  uint32_t bits = to_bits(x), exponent = bits >> 23 & 255;
  if (exponent == 255) return std::isnan(x) ? 0x7fffe000u : bits;
  if (mode == Round::NearestAway)
    bits += 0x1000;
  else if (mode == Round::Nearest)
    bits += 0xfff + (bits >> 13 & 1);
  return bits & 0xffffe000u;
}

// Tensor cores ignore the low 13 bits of a tf32 operand.
inline float tf32_value(uint32_t bits) { return from_bits<float>(bits & 0xffffe000u); }

}  // namespace ptx
