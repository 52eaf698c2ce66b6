// Average pools over x [N, C, D, H, W] (1-d and 2-d: leading axes of size 1), plain or channels
// last.
//   s    = prologue(r, z)
//   dx   = sum over the windows that cover the position: s / divisor of the window
//   r_in = input_epilogue(dx, x)
// Along each axis the windows that cover a position are a range of outputs. That holds for strided
// and for adaptive pools alike, so both share one gathering pass, which adds in a fixed order.
#include "../layout.h"
#include "loops.h"
#include "signal.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kAxes = 3;

// One axis of the pool.
struct Axis {
  int64_t in = 1, out = 1;
  std::vector<int64_t> divisor;      // [out] share of the window's divisor
  std::vector<int64_t> first, last;  // [in] outputs whose window covers the position: first..last-1

  // begin, end: the part of each window that lies inside the input
  void cover(const std::vector<int64_t>& begin, const std::vector<int64_t>& end) {
    first.resize(in);
    last.resize(in);
    int64_t lo = 0, hi = 0;
    for (int64_t i = 0; i < in; ++i) {
      while (lo < out && end[lo] <= i) ++lo;
      while (hi < out && begin[hi] <= i) ++hi;
      first[i] = lo;
      last[i] = hi;
    }
  }
};

Axis strided_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                  bool include_padding) {
  Axis axis{in, out};
  std::vector<int64_t> begin(out), end(out);
  for (int64_t o = 0; o < out; ++o) {
    const int64_t start = o * stride - padding, stop = std::min(start + kernel, in + padding);
    begin[o] = std::max<int64_t>(start, 0);
    end[o] = std::min(stop, in);
    axis.divisor.push_back(include_padding ? stop - start : end[o] - begin[o]);
  }
  axis.cover(begin, end);
  return axis;
}

Axis adaptive_axis(int64_t in, int64_t out) {
  Axis axis{in, out};
  std::vector<int64_t> begin(out), end(out);
  for (int64_t o = 0; o < out; ++o) {
    begin[o] = o / out * in + o % out * in / out;
    end[o] = 1 + ((o + 1) * in - 1) / out;
    axis.divisor.push_back(end[o] - begin[o]);
  }
  axis.cover(begin, end);
  return axis;
}

struct Pool {
  Axis axes[kAxes];                // D, H, W
  std::optional<int64_t> divisor;  // of every window, in place of its size
  int64_t in() const { return axes[0].in * axes[1].in * axes[2].in; }
  int64_t out() const { return axes[0].out * axes[1].out * axes[2].out; }

  // [out] what a window passes on of its signal
  template <class A>
  std::vector<A> shares() const {
    std::vector<A> result;
    for (const int64_t d : axes[0].divisor)
      for (const int64_t h : axes[1].divisor)
        for (const int64_t w : axes[2].divisor)
          result.push_back(A(1.0 / double(divisor.value_or(d * h * w))));
    return result;
  }
};

// f(first, last) over the output rows (d, h) that cover the input row (d, h), as row numbers.
template <class F>
LFP_HD void covering_rows(const Pool& pool, int64_t d, int64_t h, F f) {
  for (int64_t od = pool.axes[0].first[d]; od < pool.axes[0].last[d]; ++od)
    for (int64_t oh = pool.axes[1].first[h]; oh < pool.axes[1].last[h]; ++oh)
      f(od * pool.axes[1].out + oh);
}

// For each of the covering windows of a column at most `covers` steps: source[step * W + w] is the
// column of the output row to add, or OW, where a zero stands.
struct Columns {
  int64_t covers = 0;
  std::vector<int32_t> source;
  explicit Columns(const Axis& axis) {
    for (int64_t w = 0; w < axis.in; ++w) covers = std::max(covers, axis.last[w] - axis.first[w]);
    source.assign(covers * axis.in, int32_t(axis.out));
    for (int64_t w = 0; w < axis.in; ++w)
      for (int64_t k = 0; k < axis.last[w] - axis.first[w]; ++k)
        source[k * axis.in + w] = int32_t(axis.first[w] + k);
  }
};

// Planes [first, last) of [N * C, D, H, W].
template <class T, class Prologue, class Finish>
LFP_CLONES void spread_planes(const Pool& pool, const Columns& columns, const Acc<T>* share,
                              RuleParams<Acc<T>> p, const T* x, const T* z, const T* r, T* result,
                              int64_t first, int64_t last, Finish finish) {
  using A = Acc<T>;
  const int64_t in = pool.in(), out = pool.out(), W = pool.axes[2].in, OW = pool.axes[2].out;
  std::vector<A> signal(out), row(OW + 1), sums(W);
  A *s = signal.data(), *row_sum = row.data(), *g = sums.data();
  for (int64_t plane = first; plane < last; ++plane) {
    const T *zp = z + plane * out, *rp = r + plane * out;
#pragma GCC ivdep
    for (int64_t o = 0; o < out; ++o)
      s[o] = Prologue::prologue(load(rp, o), load(zp, o), p) * share[o];
    for (int64_t line = 0; line < in / W; ++line) {
      for (int64_t o = 0; o <= OW; ++o) row_sum[o] = A(0);
      covering_rows(pool, line / pool.axes[1].in, line % pool.axes[1].in, [&](int64_t from) {
#pragma GCC ivdep
        for (int64_t o = 0; o < OW; ++o) row_sum[o] += s[from * OW + o];
      });
      for (int64_t w = 0; w < W; ++w) g[w] = A(0);
      for (int64_t k = 0; k < columns.covers; ++k) {
        const int32_t* source = columns.source.data() + k * W;
#pragma GCC ivdep
        for (int64_t w = 0; w < W; ++w) g[w] += row_sum[source[w]];
      }
      const T* xp = x + plane * in + line * W;
      T* to = result + plane * in + line * W;
#pragma GCC ivdep
      for (int64_t w = 0; w < W; ++w) store(to, w, finish(g[w], load(xp, w)));
    }
  }
}

// Samples [first, last) of [N, D, H, W, C].
template <class T, class Prologue, class Finish>
LFP_CLONES void spread_samples(const Pool& pool, const Acc<T>* share, RuleParams<Acc<T>> p,
                               const T* x, const T* z, const T* r, T* result, int64_t C,
                               int64_t first, int64_t last, Finish finish) {
  using A = Acc<T>;
  const int64_t in = pool.in(), out = pool.out(), W = pool.axes[2].in, OW = pool.axes[2].out;
  std::vector<A> signal(out * C), sums(C);
  A *s = signal.data(), *g = sums.data();
  for (int64_t n = first; n < last; ++n) {
    for (int64_t o = 0; o < out; ++o) {
      const int64_t at = (n * out + o) * C;
      const A part = share[o];
#pragma GCC ivdep
      for (int64_t c = 0; c < C; ++c)
        s[o * C + c] = Prologue::prologue(load(r, at + c), load(z, at + c), p) * part;
    }
    for (int64_t i = 0; i < in; ++i) {
      const int64_t w = i % W, line = i / W, at = (n * in + i) * C;
      for (int64_t c = 0; c < C; ++c) g[c] = A(0);
      covering_rows(pool, line / pool.axes[1].in, line % pool.axes[1].in, [&](int64_t from) {
        for (int64_t ow = pool.axes[2].first[w]; ow < pool.axes[2].last[w]; ++ow) {
          const A* add = s + (from * OW + ow) * C;
#pragma GCC ivdep
          for (int64_t c = 0; c < C; ++c) g[c] += add[c];
        }
      });
#pragma GCC ivdep
      for (int64_t c = 0; c < C; ++c) store(result, at + c, finish(g[c], load(x, at + c)));
    }
  }
}

template <class T, class Prologue, class Finish>
void spread(const Pool& pool, const Tensor& x, const Tensor& z, const Tensor& r, const Tensor& out,
            bool channels_last, const Params& params, Finish finish) {
  const auto shares = pool.shares<Acc<T>>();
  const auto p = rule_params<Acc<T>>(params);
  const int64_t N = x.size(0), C = x.size(1);
  if (channels_last)
    return parallel_items(N, pool.in() * C, [&](int64_t first, int64_t last) {
      spread_samples<T, Prologue>(pool, shares.data(), p, data<T>(x), data<T>(z), data<T>(r),
                                  data<T>(out), C, first, last, finish);
    });
  const Columns columns(pool.axes[2]);
  parallel_items(N * C, pool.in(), [&](int64_t first, int64_t last) {
    spread_planes<T, Prologue>(pool, columns, shares.data(), p, data<T>(x), data<T>(z), data<T>(r),
                               data<T>(out), first, last, finish);
  });
}

// visit(prologue, finish): the pairs that occur, each compiled once.
template <class A, class Visit>
void with_functions(const RuleCall& call, const char* op, Visit visit) {
  const auto p = rule_params<A>(call.params);
  // A reward that is the signal already takes the gradient's prologue: the identity.
  const int64_t prologue = (call.chain & kSignalIn) ? int64_t(kGradient) : call.rule;
  dispatch_rule<A>(prologue, op, [&](auto functor) {
    if (call.chain & kSignalOut)
      return visit(functor, [p](A g, A x) { return chain_epilogue(g, x, p); });
    if (call.rule != kGradient) return visit(functor, [](A g, A x) { return g * x; });
    if constexpr (std::is_same_v<decltype(functor), Gradient<A>>)
      visit(functor, [](A g, A) { return g; });
  });
}

Tensor redistribute(const Pool& pool, const Tensor& x, const Tensor& z, const Tensor& reward,
                    const RuleCall& call, const char* op) {
  const bool channels_last = strided_channels_last(x);
  const auto format = channels_last_or_plain(x, channels_last);
  const Tensor xd = in_format(x, format), r = in_format(reward, format);
  const Tensor zd = (call.chain & kSignalIn) ? r : in_format(z, format);
  Tensor out = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(),
                                    std::nullopt, format);
  if (x.numel() == 0) return out;
  dispatch_dtype(x.scalar_type(), op, [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    with_functions<A>(call, op, [&](auto functor, auto finish) {
      spread<T, decltype(functor)>(pool, xd, zd, r, out, channels_last, call.params, finish);
    });
  });
  return out;
}

Tensor avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, Ints kernel, Ints stride,
                             Ints padding, bool count_include_pad, std::optional<int64_t> divisor,
                             int64_t rule, Params params, int64_t chain) {
  Pool pool;
  pool.divisor = divisor;
  for (int64_t a = 0; a < kAxes; ++a) {
    const int64_t k = a - kAxes + (x.dim() - 2), d = k + 2;
    pool.axes[a] = k < 0 ? strided_axis(1, 1, 1, 1, 0, true)
                         : strided_axis(x.size(d), reward.size(d), kernel[k], stride[k], padding[k],
                                        count_include_pad);
  }
  return redistribute(pool, x, z, reward, {rule, chain, params}, "avg_pool_redistribute");
}

Tensor adaptive_avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, int64_t rule,
                                      Params params, int64_t chain) {
  Pool pool;
  for (int64_t a = 0; a < kAxes; ++a) {
    const int64_t d = a - kAxes + x.dim();
    pool.axes[a] = d < 2 ? adaptive_axis(1, 1) : adaptive_axis(x.size(d), reward.size(d));
  }
  return redistribute(pool, x, z, reward, {rule, chain, params}, "adaptive_avg_pool_redistribute");
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("avg_pool_redistribute", TORCH_BOX(&lfp::cpu::avg_pool_redistribute));
  m.impl("adaptive_avg_pool_redistribute", TORCH_BOX(&lfp::cpu::adaptive_avg_pool_redistribute));
}
