// Relevance through layer and RMS norms, row by row (docs/math.md, section 7): statistics, the
// division by the output and the whole derivative while a row is in the nearest cache; the rows'
// sums for weight and bias in one partial sum per block of rows, added up in order.
#include "loops.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kRows = 32, kParts = 256;  // rows of a partial sum at least, partial sums at most
constexpr int64_t kLanes = 16;  // partial sums of a row, so that its loops fill the vector units

template <class T>
struct NormRow {
  const T *x, *weight, *bias, *reward;
  int64_t count;
  Acc<T> eps, stabilizer;
  bool centred, identity;
};

// f(i) summed over [0, count).
template <class A, class F>
LFP_HD A row_sum(int64_t count, F f) {
  A lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += f(i + j);
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += f(i);
  A total = 0;
  for (int64_t j = 0; j < kLanes; ++j) total += lanes[j];
  return total;
}

// xhat and g are scratch of a row's length; the sums grow by this row's share.
template <class T>
LFP_CLONES void norm_row(NormRow<T> row, Acc<T>* xhat, Acc<T>* g, T* found, Acc<T>* weight_sum,
                         Acc<T>* bias_sum) {
  using A = Acc<T>;
  const int64_t n = row.count;
  const A count = static_cast<A>(n);
  const A mean =
      row.centred ? row_sum<A>(n, [&](int64_t i) { return load(row.x, i); }) / count : A(0);
  const A square = row_sum<A>(n, [&](int64_t i) {
    const A d = load(row.x, i) - mean;
    return d * d;
  });
  const A invstd = A(1) / std::sqrt(square / count + row.eps);
  for (int64_t i = 0; i < n; ++i) {
    const A h = (load(row.x, i) - mean) * invstd;
    const A w = row.weight ? load(row.weight, i) : A(1);
    const A b = row.bias ? load(row.bias, i) : A(0);
    const A s = load(row.reward, i) / stabilize(h * w + b, row.stabilizer);
    xhat[i] = h;
    g[i] = s * w;
    weight_sum[i] += s * h;
    bias_sum[i] += s;
  }
  if (row.identity && !row.centred && !row.bias) {  // every term of z is its own input's
    for (int64_t i = 0; i < n; ++i) store(found, i, load(row.reward, i));
    return;
  }
  // AttnLRP holds the deviation constant: then nothing flows along xhat.
  const A along =
      row.identity ? A(0) : row_sum<A>(n, [&](int64_t i) { return g[i] * xhat[i]; }) / count;
  const A shift = row.centred ? row_sum<A>(n, [&](int64_t i) { return g[i]; }) / count : A(0);
  for (int64_t i = 0; i < n; ++i)
    store(found, i, load(row.x, i) * (g[i] - xhat[i] * along - shift) * invstd);
}

std::tuple<Tensor, Tensor, Tensor> norm_redistribute(Tensor x, std::optional<Tensor> weight,
                                                     std::optional<Tensor> bias, Tensor reward,
                                                     bool centred, double eps, double stabilizer,
                                                     bool identity) {
  x = dense(x), reward = dense(reward);
  if (weight) weight = dense(*weight);
  if (bias) bias = dense(*bias);
  const int64_t rows = x.size(0), n = x.size(1);
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor found = torch::stable::empty_like(x);
  Tensor weight_sum = torch::stable::new_empty(x, {n}, type);
  Tensor bias_sum = torch::stable::new_empty(x, {n}, type);
  dispatch_dtype(x.scalar_type(), "norm_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    // As many partial sums as there are blocks of rows, whatever the threads: the same bits, and no
    // sum is long.
    const int64_t parts = std::clamp<int64_t>(rows / kRows, 1, kParts);
    std::vector<A> sums(static_cast<size_t>(2 * parts * n), A(0));
    const auto walk = [&](int64_t first, int64_t last) {
      std::vector<A> scratch(static_cast<size_t>(2 * n));
      for (int64_t part = first; part < last; ++part)
        for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts; ++r)
          norm_row<T>({data<T>(x) + r * n, weight ? data<T>(*weight) : nullptr,
                       bias ? data<T>(*bias) : nullptr, data<T>(reward) + r * n, n, A(eps),
                       A(stabilizer), centred, identity},
                      scratch.data(), scratch.data() + n, data<T>(found) + r * n,
                      sums.data() + 2 * part * n, sums.data() + (2 * part + 1) * n);
    };
    parallel_items(parts, std::max<int64_t>(1, rows * n / parts), walk);
    A *to_weight = data<A>(weight_sum), *to_bias = data<A>(bias_sum);
    for (int64_t i = 0; i < n; ++i) {
      A w = 0, b = 0;
      for (int64_t part = 0; part < parts; ++part) {
        w += sums[static_cast<size_t>(2 * part * n + i)];
        b += sums[static_cast<size_t>((2 * part + 1) * n + i)];
      }
      to_weight[i] = w;
      to_bias[i] = b;
    }
  });
  return {found, weight_sum, bias_sum};
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("norm_redistribute", TORCH_BOX(&lfp::cpu::norm_redistribute));
}
