// U[0,1) for every element of a tensor from its index alone: Philox4x32-10 (Salmon et al. 2011),
// the same numbers on every backend (lfp_kernels/rules/base.py: uniform).
#pragma once

#include "rules.h"

namespace lfp {

struct PhiloxBlock {
  uint32_t word[4];
};

// Words 4 * block ... 4 * block + 3 of the stream of `seed`: key = the halves of the seed, counter
// = (the halves of the block, 0, 0).
LFP_HD PhiloxBlock philox(uint64_t block, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = 0,
           c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The upper 24 bits as a number in [0, 1): exact in float32.
template <class T>
LFP_HD T unit_interval(uint32_t word) {
  return static_cast<T>(static_cast<int32_t>(word >> 8)) * T(1.0 / 16777216.0);
}

// The draw of element `index` of the contiguous weight.
template <class T>
LFP_HD T uniform(int64_t index, uint64_t seed) {
  return unit_interval<T>(philox(static_cast<uint64_t>(index) >> 2, seed).word[index & 3]);
}

}  // namespace lfp
