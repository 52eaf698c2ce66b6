// Versions for processors with AVX-512: functions marked LFP_V4 run only where has_wide_vectors().
#pragma once

#include "loops.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LFP_WIDE 1
#define LFP_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#else
#define LFP_WIDE 0
#endif

namespace lfp::cpu {

inline bool has_wide_vectors() {
#if LFP_WIDE
  static const bool wide = __builtin_cpu_supports("x86-64-v4");
  return wide;
#else
  return false;
#endif
}

// Whether bfloat16 products of ours pay: AVX-512 multiplies pairs of them, but tiles of AMX, which
// only the library's products use, are several times faster.
inline bool has_wide_pairs() {
#if LFP_WIDE
  static const bool pairs = has_wide_vectors() && __builtin_cpu_supports("avx512bf16") &&
                            !__builtin_cpu_supports("amx-bf16");
  return pairs;
#else
  return false;
#endif
}

// Whether there are products of type P for them.
template <class P>
constexpr bool kHasWide = std::is_same_v<P, float> || std::is_same_v<P, BFloat16>;

}  // namespace lfp::cpu
