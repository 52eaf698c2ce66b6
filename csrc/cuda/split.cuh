// Rules with two signals, u for what strengthens an output and v for what weakens it (docs/math.md,
// section 3). Each of their products has two terms, and they come in pairs that differ in which
// right factor meets which left one:
//   P  = x_a Wp^T + x_b Wn^T     N  = x_a Wn^T + x_b Wp^T     u, v = signals(r, z, P, N)
//   g1 = u Wp + v Wn             g2 = u Wn + v Wp             r_in = x_a g1 + x_b g2
//   f1 = u^T x_a + v^T x_b       f2 = u^T x_b + v^T x_a       feedback = sign(W) (Wp f1 + Wn f2)
// Two terms are one product over twice the k; the operands form the parts of x and W on the way in.
// The first launch of a pair stores its raw sums, the second finishes both. Terms with a factor
// that is 0 everywhere are left out. Only u and v [N, O] are stored, in the arithmetic type.
//
// These products run on the ordinary units in the arithmetic type of the tensors (16 bits in
// float32), whatever product type was asked for, with one tile: few kernels, short builds.
#pragma once

#include <limits>

#include "product.cuh"
#include "product_simt.cuh"
#include "run.cuh"

namespace lfp::cuda {

template <class T>
using PlainCore = Simt<Acc<T>, 64>;

// Elements of an access: as many as the core's runs of sums.
template <class T>
inline constexpr int kRunOf = kWide<Acc<T>>;

template <class T>
constexpr ScalarType sum_type() {
  return sizeof(Acc<T>) == 8 ? ScalarType::Double : ScalarType::Float;
}

// ---- terms

// k of the terms alternate in runs of kSpan, a multiple of every pack: what one term reads of x and
// W, the other finds in the cache.
constexpr int64_t kSpan = 4;

// Which parts meet in each term.
struct Terms {
  int count = 0;
  int left[2] = {}, right[2] = {};

  // Straight terms pair first with first; `second_left`, `second_right`: not 0 everywhere.
  Terms(bool crossed, bool second_left, bool second_right) {
    for (int l = 0; l <= int(second_left); ++l) {
      const int r = crossed ? 1 - l : l;
      if (r == 1 && !second_right) continue;
      left[count] = l;
      right[count++] = r;
    }
  }
};

LFP_HD int64_t depth_of_terms(bool two, int64_t k) {
  return two ? 2 * kSpan * ((k + kSpan - 1) / kSpan) : k;
}

// An operand with fetch(row, col, part), seen through its terms.
template <class Base>
struct TermOperand {
  static constexpr bool kAlongK = Base::kAlongK;
  static constexpr int kWidth = Base::kWidth;
  static_assert(kSpan % kWidth == 0);
  using Raw = typename Base::Raw;
  Base base;
  int first, second;
  bool two;

  __device__ __forceinline__ void select(int64_t part) { select_part(base, part); }
  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    int part = first;
    if (two) {
      int64_t& k = kAlongK ? col : row;
      if (k & kSpan) part = second;
      k = (k / (2 * kSpan)) * kSpan + (k & (kSpan - 1));
    }
    return base.fetch(row, col, part);
  }
  __device__ __forceinline__ void convert(const Raw& raw,
                                          typename Base::Value (&out)[kWidth]) const {
    base.convert(raw, out);
  }
};

// ---- parts

// Part 0 or 1 of a value: x_a, x_b or Wp, Wn. Bounds and selects instead of branches on the rule,
// which the compiler would copy once for every element:
//   a: max(v [* v] - shift, low),  b: min(v [* v] - shift, high)
template <class A>
struct PartFunction {
  A shift_a, shift_b;
  A low_a, high_b;    // x_a >= low_a, x_b <= high_b
  bool square, ones;  // ones: 1 and 0

  static PartFunction of_input(const RuleCall<A>& rule) {
    const bool box = rule.code.parts == Parts::kBox;
    const A infinity = std::numeric_limits<A>::infinity();
    return {box ? rule.params.a : A(0),
            box ? rule.params.b : A(0),
            box ? -infinity : A(0),
            box ? infinity : A(0),
            false,
            rule.code.parts == Parts::kOnes};
  }
  static PartFunction of_weight(const RuleCall<A>& rule) {
    const Map map = rule.code.map;
    return {A(0), A(0), A(0), A(0), map == Map::kSquare, map == Map::kOnes};
  }

  __device__ __forceinline__ A operator()(A v, int part) const {
    v = square ? v * v : v;
    v -= part == 0 ? shift_a : shift_b;
    const A a = v < low_a ? low_a : v, b = v > high_b ? high_b : v;  // NaN stays
    const A one = part == 0 ? A(1) : A(0);
    return ones ? one : part == 0 ? a : b;
  }
};

// Whether x_b and Wn are anything but 0.
template <class A>
bool has_second_input(const RuleCall<A>& rule, bool nonnegative) {
  return rule.code.parts == Parts::kBox || (rule.code.parts == Parts::kSign && !nonnegative);
}
template <class A>
bool has_second_weight(const RuleCall<A>& rule) {
  return rule.code.map == Map::kValue;
}
template <class A>
bool has_second_signal(const RuleCall<A>& rule) {
  return rule.code.signals != Signals::kPlus;
}

// ---- what is done with a pair of sums

// P, N -> u, v. `column` is the output of run[0].
template <class T>
struct SignalsOfSums {
  const T *reward, *z;  // z: gamma
  const T* bias;        // may be null
  Acc<T>*u, *v;         // v: null where it is 0
  RuleCall<Acc<T>> rule;

  template <int V>
  __device__ __forceinline__ void operator()(const Run<V>& run, int64_t column, Acc<T> (&p)[V],
                                             Acc<T> (&n)[V]) const {
    using A = Acc<T>;
    A r[V], out[V] = {};
    run.load_from(reward, r);
    if (rule.code.signals == Signals::kGamma) run.load_from(z, out);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A b = bias && run.has(k) ? mapped_bias(rule.code, load(bias, column + k)) : A(0);
      const Sides<A> s = signals(rule.code.signals, r[k], out[k], p[k] + positive_part(b),
                                 n[k] + negative_part(b), rule.params);
      p[k] = s.u;
      n[k] = s.v;
    }
    run.store_to(u, p);
    if (v) run.store_to(v, n);
  }
};

// g1, g2 -> r_in = x_a g1 + x_b g2, times the derivative of the activation below
template <class T>
struct InputOfSums {
  const T* x;
  T* to;
  PartFunction<Acc<T>> part;
  int below;

  template <int V>
  __device__ __forceinline__ void operator()(const Run<V>& run, int64_t, Acc<T> (&first)[V],
                                             Acc<T> (&second)[V]) const {
    Acc<T> in[V];
    run.load_from(x, in);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Acc<T> reward = part(in[k], 0) * first[k] + part(in[k], 1) * second[k];
      first[k] = derivative(reward, in[k], below);
    }
    run.store_to(to, first);
  }
};

// f1, f2 -> feedback = sign(W) (Wp f1 + Wn f2), stored or applied. In an update only the last
// launch writes W: its signs are the same for both.
template <class T>
struct WeightOfSums {
  ParameterUpdate<T> to;
  PartFunction<Acc<T>> part;

  template <int V>
  __device__ __forceinline__ void operator()(const Run<V>& run, int64_t, Acc<T> (&first)[V],
                                             Acc<T> (&second)[V]) const {
    Acc<T> w[V];
    run.load_from(to.param, w);
#pragma unroll
    for (int k = 0; k < V; ++k)
      first[k] = sign(w[k]) * (part(w[k], 0) * first[k] + part(w[k], 1) * second[k]);
    take_feedback(to, run, first, w);
  }
};

enum class Pass { kOnly, kFirst, kSecond };

template <class T, class Finish>
struct PairSums {
  static constexpr int kWidth = kRunOf<T>;
  Finish finish_pair;
  Acc<T>* first;  // raw sums of the first launch; may be where the result goes
  Pass pass = Pass::kOnly;
  bool two = false;  // terms of this launch

  template <int V>
  __device__ __forceinline__ void finish(const Run<V>& run, int64_t column,
                                         Acc<T> (&sums)[V]) const {
    if (pass == Pass::kFirst) return run.store_to(first, sums);
    Acc<T> other[V] = {};
    if (pass == Pass::kOnly) return finish_pair(run, column, sums, other);
    run.load_from(first, other);
    finish_pair(run, column, other, sums);
  }
};

// ---- launches

// A pair of products of the factors (left 0, left 1) and (right 0, right 1), or only its first one.
// `memory`: where `items` raw sums may stay in between, null: in new memory.
template <class T, class Left, class Right, class Epilogue>
void pair_product(int64_t m, int64_t n, int64_t k, const Left& left, const Right& right,
                  Epilogue epilogue, bool second_left, bool second_right, bool wants_crossed,
                  Acc<T>* memory, int64_t items, const Tensor& like, const Device& device,
                  int64_t parts = 1) {
  const Terms straight(false, second_left, second_right), crossed(true, second_left, second_right);
  const auto launch = [&](const Terms& terms, Pass pass) {
    const bool two = terms.count == 2;
    epilogue.sums.pass = pass, epilogue.sums.two = two;
    const TermOperand<Left> a{left, terms.left[0], terms.left[1], two};
    const TermOperand<Right> b{right, terms.right[0], terms.right[1], two};
    product<PlainCore<T>>(m, n, depth_of_terms(two, k), a, b, epilogue, like, device, parts);
  };
  if (!wants_crossed || crossed.count == 0) return launch(straight, Pass::kOnly);
  Tensor raw;
  if (!memory) raw = torch::stable::new_empty(like, {items}, sum_type<T>());
  epilogue.sums.first = memory ? memory : data<Acc<T>>(raw);
  launch(straight, Pass::kFirst);
  launch(crossed, Pass::kSecond);
}

// Where the results themselves can hold the raw sums: in tensors of the arithmetic type.
template <class T>
Acc<T>* as_sums(T* p) {
  if constexpr (std::is_same_v<T, Acc<T>>) return p;
  return nullptr;
}

// ---- bias: feedback = sign(b) (max(b', 0) sum u + min(b', 0) sum v), b' its map

template <class T>
struct SplitBias {
  const Acc<T>*u, *v;  // [outer, channels, inner]; v may be null
  int64_t outer, channels, inner;
  RuleCall<Acc<T>> rule;
  ParameterUpdate<T> to;
};

constexpr int kBiasThreads = 256;

// Rewards of both signs cancel in a bias, so its sums are float64; the pass waits for memory
// anyway. inner > 1: a block works on one channel. inner = 1: on 32 channels, one per lane.
template <class T>
__global__ void __launch_bounds__(kBiasThreads) bias_feedback_kernel(SplitBias<T> f) {
  using A = Acc<T>;
  constexpr int kWarps = kBiasThreads / 32;
  __shared__ double shared[2][kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool across = f.inner == 1;
  const int64_t channel = across ? int64_t(blockIdx.x) * 32 + lane : blockIdx.x;
  const int64_t count = f.outer * f.inner;
  double sum[2] = {};
  if (channel < f.channels)
    for (int64_t i = across ? warp : threadIdx.x; i < count; i += across ? kWarps : kBiasThreads) {
      const int64_t sample = i / f.inner;
      const int64_t at = (sample * f.channels + channel) * f.inner + (i - sample * f.inner);
      sum[0] += f.u[at];
      if (f.v) sum[1] += f.v[at];
    }
#pragma unroll
  for (int side = 0; side < 2; ++side)
    shared[side][warp][lane] = across ? sum[side] : warp_sum(sum[side]);
  __syncthreads();
  if (channel >= f.channels || (across ? warp > 0 : threadIdx.x > 0)) return;
  double u = 0, v = 0;
  for (int w = 0; w < kWarps; ++w) u += shared[0][w][lane], v += shared[1][w][lane];
  A b[1] = {load(f.to.param, channel)};
  const A m = mapped_bias(f.rule.code, b[0]);
  A feedback[1] = {sign(b[0]) *
                   (positive_part(m) * static_cast<A>(u) + negative_part(m) * static_cast<A>(v))};
  take_feedback(f.to, Run<1>{{channel}, false}, feedback, b);
}

template <class T>
void split_bias(const SplitBias<T>& f, const Device& device) {
  if (f.channels == 0) return;
  const int64_t blocks = f.inner == 1 ? ceil_div<int64_t>(f.channels, 32) : f.channels;
  LFP_CHECK(blocks < (int64_t(1) << 31), "split_bias", "too many outputs: ", f.channels);
  bias_feedback_kernel<T><<<static_cast<unsigned>(blocks), kBiasThreads, 0, device.stream>>>(f);
  check_launch();
}

}  // namespace lfp::cuda
