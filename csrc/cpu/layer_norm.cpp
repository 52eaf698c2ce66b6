// Relevance through layer, RMS and group norms (docs/math.md, section 7), row by row: statistics,
// the division by the output and the whole derivative while a row is in the nearest cache. The
// rows' sums for weight and bias are partial sums of fixed blocks of rows, added up in order.
#include "loops.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kRows = 32, kParts = 256;  // rows of a partial sum at least, partial sums at most
// Partial sums of a row: more than the compiler unrolls, so that it adds vectors and not scalars.
constexpr int64_t kLanes = 64;

template <class A>
struct NormCall {
  const A *weight, *bias;  // one per element of a row, or of a group norm one per channel
  int64_t count;           // elements of a row
  A eps, stabilizer;
  bool centred, identity;
  bool hands_on;  // every term of z is its own input's: the reward passes as it is
};

// f(i) summed over [0, count).
template <class A, class F>
LFP_HD A row_sum(int64_t count, F f) {
  A lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += f(i + j);
  for (int64_t j = 0; j < count - whole; ++j) lanes[j] += f(whole + j);
  A sums[16];
  for (int64_t j = 0; j < 16; ++j)
    sums[j] = (lanes[j] + lanes[j + 16]) + (lanes[j + 32] + lanes[j + 48]);
  for (int64_t j = 0; j < 8; ++j) sums[j] += sums[j + 8];
  for (int64_t j = 0; j < 4; ++j) sums[j] += sums[j + 4];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// Values of a row in their arithmetic type: where they are, or converted into `scratch`.
template <class T>
LFP_HD const Acc<T>* converted(const T* values, int64_t count, Acc<T>* scratch) {
  if constexpr (std::is_same_v<T, Acc<T>>) return values;
  for (int64_t i = 0; i < count; ++i) scratch[i] = load(values, i);
  return scratch;
}

template <class A>
struct Statistics {
  A mean, invstd;
};

template <class A>
LFP_HD Statistics<A> statistics(const A* x, const NormCall<A>& call) {
  const int64_t n = call.count;
  const A count = static_cast<A>(n);
  const A mean = call.centred ? row_sum<A>(n, [=](int64_t i) { return x[i]; }) / count : A(0);
  const A square = row_sum<A>(n, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  return {mean, A(1) / std::sqrt(square / count + call.eps)};
}

// r_x from g; AttnLRP holds the deviation constant: then nothing flows along xhat.
template <class T, class A>
LFP_HD void finish_row(const A* __restrict x, const A* __restrict g, const A* reward, int64_t n,
                       Statistics<A> row, A along, A shift, bool hands_on, T* __restrict found) {
  if (hands_on) {
    for (int64_t i = 0; i < n; ++i) store(found, i, reward[i]);
    return;
  }
  const A slope = along * row.invstd;
  for (int64_t i = 0; i < n; ++i)
    store(found, i, x[i] * (g[i] - (x[i] - row.mean) * slope - shift) * row.invstd);
}

// `scratch` holds four rows; the sums grow by this row's share.
template <class T, class A>
LFP_CLONES void norm_row(const NormCall<A> call, const T* values, const T* rewards, T* found,
                         A* scratch, A* __restrict weight_sum, A* __restrict bias_sum) {
  const int64_t n = call.count;
  A* __restrict g = scratch, * __restrict gh = scratch + n;
  const A* x = converted(values, n, scratch + 2 * n);
  const A* r = converted(rewards, n, scratch + 3 * n);
  const A *w = call.weight, *b = call.bias;
  const Statistics<A> row = statistics(x, call);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const A h = (x[i] - row.mean) * row.invstd;
    const A s = r[i] / stabilize(h * w[i] + b[i], call.stabilizer);
    g[i] = s * w[i];
    gh[i] = s * w[i] * h;
    weight_sum[i] += s * h;
    bias_sum[i] += s;
  }
  const A count = static_cast<A>(n);
  const A along = call.identity ? A(0) : row_sum<A>(n, [=](int64_t i) { return gh[i]; }) / count;
  const A shift = call.centred ? row_sum<A>(n, [=](int64_t i) { return g[i]; }) / count : A(0);
  finish_row(x, g, r, n, row, along, shift, call.hands_on, found);
}

// A row of a group norm, `inner` elements per channel: the sums of its channels come out.
template <class T, class A>
LFP_CLONES void group_row(const NormCall<A> call, int64_t inner, const T* values, const T* rewards,
                          T* found, A* scratch, A* weight_sum, A* bias_sum) {
  const int64_t n = call.count, channels = n / inner;
  A* __restrict g = scratch, * __restrict sh = scratch + n;
  const A* x = converted(values, n, scratch + 2 * n);
  const A* r = converted(rewards, n, scratch + 3 * n);
  const Statistics<A> row = statistics(x, call);
  A along = A(0), shift = A(0);
  for (int64_t c = 0; c < channels; ++c) {
    const A w = call.weight[c], b = call.bias[c];
    const int64_t first = c * inner;
#pragma GCC ivdep
    for (int64_t i = first; i < first + inner; ++i) {
      const A h = (x[i] - row.mean) * row.invstd;
      g[i] = r[i] / stabilize(h * w + b, call.stabilizer);
      sh[i] = g[i] * h;
    }
    weight_sum[c] = row_sum<A>(inner, [=](int64_t i) { return sh[first + i]; });
    bias_sum[c] = row_sum<A>(inner, [=](int64_t i) { return g[first + i]; });
    along += w * weight_sum[c], shift += w * bias_sum[c];
    for (int64_t i = first; i < first + inner; ++i) g[i] *= w;
  }
  const A count = static_cast<A>(n);
  finish_row(x, g, r, n, row, call.identity ? A(0) : along / count, shift / count, false, found);
}

// A parameter in its arithmetic type; a missing one is `otherwise` everywhere.
template <class T>
std::vector<Acc<T>> parameter(const std::optional<Tensor>& given, int64_t count, double otherwise) {
  std::vector<Acc<T>> values(static_cast<size_t>(count), Acc<T>(otherwise));
  if (!given) return values;
  const Tensor t = dense(*given);
  for (int64_t i = 0; i < count; ++i) values[i] = load(data<T>(t), i);
  return values;
}

Tensor sums_like(const Tensor& x, int64_t count) {
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(x, {count}, type);
}

// to[j] = sum over k of parts[k, j], float64 from part to part.
template <class A>
void add_parts(const A* parts, int64_t count, int64_t width, int64_t stride, A* to) {
  std::vector<double> totals(static_cast<size_t>(width), 0.0);
  double* total = totals.data();
  for (int64_t k = 0; k < count; ++k, parts += stride)
    serial_loop(0, width, [=](int64_t j) { total[j] += parts[j]; });
  for (int64_t j = 0; j < width; ++j) to[j] = static_cast<A>(total[j]);
}

std::tuple<Tensor, Tensor, Tensor> norm_redistribute(Tensor x, std::optional<Tensor> weight,
                                                     std::optional<Tensor> bias, Tensor reward,
                                                     bool centred, double eps, double stabilizer,
                                                     bool identity) {
  x = dense(x), reward = dense(reward);
  const int64_t rows = x.size(0), n = x.size(1);
  Tensor found = torch::stable::empty_like(x);
  Tensor weight_sum = sums_like(x, n), bias_sum = sums_like(x, n);
  dispatch_dtype(x.scalar_type(), "norm_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const std::vector<A> w = parameter<T>(weight, n, 1), b = parameter<T>(bias, n, 0);
    const NormCall<A> call{w.data(),      b.data(), n,        A(eps),
                           A(stabilizer), centred,  identity, identity && !centred && !bias};
    const T *values = data<T>(x), *rewards = data<T>(reward);
    T* out = data<T>(found);
    // As many partial sums as there are blocks of rows, whatever the threads: the same bits, and no
    // sum is long.
    const int64_t parts = std::clamp<int64_t>(rows / kRows, 1, kParts);
    std::vector<A> sums(static_cast<size_t>(2 * parts * n), A(0));
    parallel_items(parts, std::max<int64_t>(1, rows * n / parts), [&](int64_t first, int64_t last) {
      std::vector<A> scratch(static_cast<size_t>(4 * n));
      for (int64_t part = first; part < last; ++part)
        for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts; ++r)
          norm_row<T, A>(call, values + r * n, rewards + r * n, out + r * n, scratch.data(),
                         sums.data() + 2 * part * n, sums.data() + (2 * part + 1) * n);
    });
    add_parts(sums.data(), parts, n, 2 * n, data<A>(weight_sum));
    add_parts(sums.data() + n, parts, n, 2 * n, data<A>(bias_sum));
  });
  return {found, weight_sum, bias_sum};
}

// x[N, C, M], its channels in `groups`.
std::tuple<Tensor, Tensor, Tensor> group_norm_redistribute(Tensor x, std::optional<Tensor> weight,
                                                           std::optional<Tensor> bias,
                                                           Tensor reward, int64_t groups,
                                                           double eps, double stabilizer,
                                                           bool identity) {
  x = dense(x), reward = dense(reward);
  const int64_t batch = x.size(0), channels = x.size(1), inner = x.size(2);
  LFP_CHECK(groups > 0 && channels % groups == 0, "group_norm_redistribute", "groups: expected a ",
            "divisor of ", channels, " channels, got ", groups);
  Tensor found = torch::stable::empty_like(x);
  Tensor weight_sum = sums_like(x, channels), bias_sum = sums_like(x, channels);
  dispatch_dtype(x.scalar_type(), "group_norm_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const std::vector<A> w = parameter<T>(weight, channels, 1), b = parameter<T>(bias, channels, 0);
    const int64_t width = channels / groups, n = width * inner;
    const T *values = data<T>(x), *rewards = data<T>(reward);
    T* out = data<T>(found);
    std::vector<A> sums(static_cast<size_t>(2 * batch * channels), A(0));
    const auto walk = [&](int64_t first, int64_t last) {
      std::vector<A> scratch(static_cast<size_t>(4 * n));
      for (int64_t r = first; r < last; ++r) {
        const int64_t group = r % groups;
        const NormCall<A> call{w.data() + group * width,
                               b.data() + group * width,
                               n,
                               A(eps),
                               A(stabilizer),
                               true,
                               identity,
                               false};
        A* to_weight = sums.data() + r * width;
        group_row<T, A>(call, inner, values + r * n, rewards + r * n, out + r * n, scratch.data(),
                        to_weight, to_weight + batch * channels);
      }
    };
    if (n > 0) parallel_items(batch * groups, n, walk);
    add_parts(sums.data(), batch, channels, channels, data<A>(weight_sum));
    add_parts(sums.data() + batch * channels, batch, channels, channels, data<A>(bias_sum));
  });
  return {found, weight_sum, bias_sum};
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("norm_redistribute", TORCH_BOX(&lfp::cpu::norm_redistribute));
  m.impl("group_norm_redistribute", TORCH_BOX(&lfp::cpu::group_norm_redistribute));
}
