// Floating-point instructions. Half and Bfloat compute in double and round once.
#pragma once
#include <cfenv>

#include "operations.h"

namespace ptx {

// Function objects rather than templates, so that they can be arguments.
inline constexpr auto add_float = []<class T>(T a, T b) -> T {
  if constexpr (is_native<T>)
    return a + b;
  else
    return narrow<T>(widen(a) + widen(b));
};
inline constexpr auto sub_float = []<class T>(T a, T b) -> T {
  if constexpr (is_native<T>)
    return a - b;
  else
    return narrow<T>(widen(a) - widen(b));
};
inline constexpr auto mul_float = []<class T>(T a, T b) -> T {
  if constexpr (is_native<T>)
    return a * b;
  else
    return narrow<T>(widen(a) * widen(b));
};
inline constexpr auto fma_float = []<class T>(T a, T b, T c) -> T {
  if constexpr (is_native<T>)
    return std::fma(a, b, c);
  else
    return narrow<T>(std::fma(widen(a), widen(b), widen(c)));
};
inline constexpr auto div_float = []<class T>(T a, T b) -> T { return a / b; };
inline constexpr auto sqrt_float = []<class T>(T a) -> T { return std::sqrt(a); };
inline constexpr auto rcp_float = []<class T>(T a) -> T { return 1 / a; };

template <class F, class... Args>
[[gnu::noinline]] auto opaque(F f, Args... args) {
  asm volatile("" ::: "memory");  // keeps the compiler from moving the call
  return f(args...);
}

// Evaluates with the processor's rounding mode changed.
template <class F, class... Args>
inline auto directed(int mode, F f, Args... args) {
  fesetround(mode);
  auto result = opaque(f, args...);
  fesetround(FE_TONEAREST);
  return result;
}

inline constexpr auto rsqrt_float = []<class T>(T a) -> T {
  return narrow<T>(1 / std::sqrt(widen(a)));
};
inline constexpr auto sin_float = []<class T>(T a) -> T { return narrow<T>(std::sin(widen(a))); };
inline constexpr auto cos_float = []<class T>(T a) -> T { return narrow<T>(std::cos(widen(a))); };
inline constexpr auto lg2_float = []<class T>(T a) -> T { return narrow<T>(std::log2(widen(a))); };
inline constexpr auto ex2_float = []<class T>(T a) -> T { return narrow<T>(std::exp2(widen(a))); };
inline constexpr auto tanh_float = []<class T>(T a) -> T { return narrow<T>(std::tanh(widen(a))); };

// Sign changes act on the bits: they are exact, also for NaN.
template <class T>
constexpr auto sign_bit() {
  return (decltype(to_bits(T{})))((decltype(to_bits(T{})))1 << (8 * sizeof(T) - 1));
}
inline constexpr auto neg_float = []<class T>(T a) -> T {
  return from_bits<T>((decltype(to_bits(a)))(to_bits(a) ^ sign_bit<T>()));
};
inline constexpr auto abs_float = []<class T>(T a) -> T {
  return from_bits<T>((decltype(to_bits(a)))(to_bits(a) & ~sign_bit<T>()));
};

template <class T>
inline bool is_nan(T a) {
  return std::isnan(widen(a));
}
template <class T>
inline T quiet_nan() {
  return nearest<T>(NAN);
}

// Of a number and a NaN the number wins, unless .NaN; and -0 is below +0.
template <bool nan, bool maximum, class T>
inline T extreme(T a, T b) {
  if (is_nan(a) || is_nan(b))
    return nan || (is_nan(a) && is_nan(b)) ? quiet_nan<T>() : is_nan(a) ? b : a;
  double x = widen(a), y = widen(b);
  bool less = x < y || (x == y && std::signbit(x) && !std::signbit(y));
  return less == maximum ? b : a;
}
template <bool nan, class T>
inline T min_float(T a, T b) {
  return extreme<nan, false>(a, b);
}
template <bool nan, class T>
inline T max_float(T a, T b) {
  return extreme<nan, true>(a, b);
}

// .ftz: subnormal numbers become zero of the same sign.
inline double flush(double x) { return x; }
inline float flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
}
inline Half flush(Half x) { return x.bits & 0x7c00 ? x : Half{(uint16_t)(x.bits & 0x8000)}; }
inline Bfloat flush(Bfloat x) { return x.bits & 0x7f80 ? x : Bfloat{(uint16_t)(x.bits & 0x8000)}; }
template <class T>
inline double flush_as(double x) {
  return widen(flush((T)x));
}

template <class T>
inline T saturate(T a) {
  double x = widen(a);
  return x > 0 ? (x < 1 ? a : nearest<T>(1)) : nearest<T>(0);  // NaN becomes 0
}
template <class T>
inline T relu(T a) {
  if (is_nan(a)) return quiet_nan<T>();
  return widen(a) > 0 ? a : nearest<T>(0);
}

// Comparisons: ordered ones are false on NaN, the ...u ones true.
template <class T>
inline bool unordered(T a, T b) {
  return is_nan(a) || is_nan(b);
}
template <class T>
inline bool compare_eq(T a, T b) {
  return widen(a) == widen(b);
}
template <class T>
inline bool compare_ne(T a, T b) {
  return !unordered(a, b) && widen(a) != widen(b);
}
template <class T>
inline bool compare_lt(T a, T b) {
  return widen(a) < widen(b);
}
template <class T>
inline bool compare_le(T a, T b) {
  return widen(a) <= widen(b);
}
template <class T>
inline bool compare_gt(T a, T b) {
  return widen(a) > widen(b);
}
template <class T>
inline bool compare_ge(T a, T b) {
  return widen(a) >= widen(b);
}
template <class T>
inline bool compare_equ(T a, T b) {
  return unordered(a, b) || compare_eq(a, b);
}
template <class T>
inline bool compare_neu(T a, T b) {
  return widen(a) != widen(b);
}
template <class T>
inline bool compare_ltu(T a, T b) {
  return !compare_ge(a, b);
}
template <class T>
inline bool compare_leu(T a, T b) {
  return !compare_gt(a, b);
}
template <class T>
inline bool compare_gtu(T a, T b) {
  return !compare_le(a, b);
}
template <class T>
inline bool compare_geu(T a, T b) {
  return !compare_lt(a, b);
}
template <class T>
inline bool compare_num(T a, T b) {
  return !unordered(a, b);
}
template <class T>
inline bool compare_nan(T a, T b) {
  return unordered(a, b);
}

template <class T>
inline bool is_finite(T a) {
  return std::isfinite(a);
}
template <class T>
inline bool is_infinite(T a) {
  return std::isinf(a);
}
template <class T>
inline bool is_number(T a) {
  return !std::isnan(a);
}
template <class T>
inline bool is_notanumber(T a) {
  return std::isnan(a);
}
template <class T>
inline bool is_normal(T a) {
  return std::isnormal(a);
}
template <class T>
inline bool is_subnormal(T a) {
  return std::fpclassify(a) == FP_SUBNORMAL;
}

// Pairs packed in one register.
template <class T, class F, class... Args>
inline uint32_t on_halves(F f, Args... args) {
  uint32_t low = to_bits(f(from_bits<T>((uint16_t)args)...));
  uint32_t high = to_bits(f(from_bits<T>((uint16_t)(args >> 16))...));
  return high << 16 | low;
}
template <class F, class... Args>
inline uint64_t on_floats(F f, Args... args) {
  uint64_t low = to_bits(f(from_bits<float>((uint32_t)args)...));
  uint64_t high = to_bits(f(from_bits<float>((uint32_t)(args >> 32))...));
  return high << 32 | low;
}
template <class T>
inline uint32_t pair_add(uint32_t a, uint32_t b) {
  return on_halves<T>(add_float, a, b);
}

// Read-modify-write: the new bits from the old bits and an operand.
template <class T, class Bits>
inline T from_storage(Bits bits) {
  if constexpr (std::is_integral_v<T>)
    return (T)bits;
  else
    return from_bits<T>(bits);
}
template <class T, class Bits>
inline Bits fetch_add(Bits old, T x) {
  if constexpr (std::is_integral_v<T>)
    return old + (Bits)x;
  else
    return to_bits(add_float(from_storage<T>(old), x));
}
template <class T, class Bits>
inline Bits fetch_min(Bits old, T x) {
  return (Bits)std::min((T)old, x);
}
template <class T, class Bits>
inline Bits fetch_max(Bits old, T x) {
  return (Bits)std::max((T)old, x);
}
template <class T, class Bits>
inline Bits fetch_and(Bits old, T x) {
  return old & x;
}
template <class T, class Bits>
inline Bits fetch_or(Bits old, T x) {
  return old | x;
}
template <class T, class Bits>
inline Bits fetch_xor(Bits old, T x) {
  return old ^ x;
}
template <class T, class Bits>
inline Bits fetch_exchange(Bits, T x) {
  return x;
}
template <class T, class Bits>
inline Bits fetch_increment(Bits old, T x) {
  return old >= x ? 0 : old + 1;
}
template <class T, class Bits>
inline Bits fetch_decrement(Bits old, T x) {
  return old == 0 || old > x ? x : old - 1;
}

}  // namespace ptx
