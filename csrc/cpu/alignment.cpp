// sums[row] = (a . b, |a|^2, |b|^2) of the rows of a[R, K] and b[R, K], each read once.
#include "loops.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kSumLanes = 32;  // partial sums of a row, so that the loop fills the vector units

template <class T>
LFP_CLONES void row_alignment(const T* a, const T* b, int64_t count, Acc<T>* sums) {
  using A = Acc<T>;
  A ab[kSumLanes] = {}, aa[kSumLanes] = {}, bb[kSumLanes] = {};
  const int64_t whole = count - count % kSumLanes;
  for (int64_t i = 0; i < whole; i += kSumLanes)
    for (int64_t j = 0; j < kSumLanes; ++j) {
      const A x = load(a, i + j), y = load(b, i + j);
      ab[j] += x * y;
      aa[j] += x * x;
      bb[j] += y * y;
    }
  for (int64_t i = whole; i < count; ++i) {
    const A x = load(a, i), y = load(b, i);
    ab[i - whole] += x * y;
    aa[i - whole] += x * x;
    bb[i - whole] += y * y;
  }
  double total[3] = {};
  for (int64_t j = 0; j < kSumLanes; ++j) {
    total[0] += ab[j];
    total[1] += aa[j];
    total[2] += bb[j];
  }
  for (int64_t k = 0; k < 3; ++k) sums[k] = static_cast<A>(total[k]);
}

Tensor alignment_sums(Tensor a, Tensor b) {
  const Tensor x = dense(a), y = dense(b);
  const int64_t rows = x.size(0), count = x.size(1);
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor sums = torch::stable::new_empty(x, {rows, 3}, type);
  dispatch_dtype(x.scalar_type(), "alignment_sums", [&](auto element) {
    using T = decltype(element);
    const T *pa = data<T>(x), *pb = data<T>(y);
    auto* to = data<Acc<T>>(sums);
    parallel_items(rows, count, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        row_alignment(pa + r * count, pb + r * count, count, to + r * 3);
    });
  });
  return sums;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("alignment_sums", TORCH_BOX(&lfp::cpu::alignment_sums));
}
