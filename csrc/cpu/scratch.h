// Memory of one call's or one thread's own.
#pragma once

#include <memory>
#include <new>

#include "loops.h"

namespace lfp::cpu {

// Memory that begins with a cache line: a vector of 64 bytes is then one line.
template <class A>
struct Aligned {
  void operator()(A* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <class A>
using Scratch = std::unique_ptr<A[], Aligned<A>>;

template <class A>
Scratch<A> scratch(int64_t elements) {
  const auto bytes = static_cast<size_t>(std::max<int64_t>(elements, 1)) * sizeof(A);
  return Scratch<A>(static_cast<A*>(::operator new(bytes, std::align_val_t(64))));
}

}  // namespace lfp::cpu
