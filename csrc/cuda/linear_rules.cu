// Linear layer, rules beyond one product with W or B: matrices that are made on the way in
// (made_matrix.cuh) and rules with two signals (split.cuh). One tile, in the arithmetic type.
#include "epilogue.cuh"
#include "linear_rules.h"
#include "made_matrix.cuh"
#include "operand.cuh"
#include "split.cuh"

namespace lfp::cuda {
namespace {

template <class T>
bool wide_runs(int64_t cols) {
  return cols % kRunOf<T> == 0;
}

// M [O, I], its rows along k.
template <class T>
struct MadeOperand {
  static constexpr bool kAlongK = false;
  static constexpr int kWidth = kRunOf<T>;
  struct Raw {
    Pack<T, kWidth> w, given;
    Acc<T> draws[kWidth];
  };
  const T *w, *given;
  int64_t rows, cols;
  bool wide;
  RuleCall<Acc<T>> rule;

  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    Raw raw;
    if (rule.code.matrix != Matrix::kNoisy)
      raw.w = fetch_pack<T, kWidth>(w, rows, cols, row, col, wide);
    if (rule.code.takes_matrix())
      raw.given = fetch_pack<T, kWidth>(given, rows, cols, row, col, wide);
    if (rule.code.draws()) draw(row * cols + col, rule.params.seed, raw.draws);
    return raw;
  }
  __device__ __forceinline__ void convert(const Raw& raw, Acc<T> (&out)[kWidth]) const {
    using A = Acc<T>;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      out[j] = made(rule, static_cast<A>(raw.w.value[j]), static_cast<A>(raw.given.value[j]),
                    raw.draws[j]);
  }
};

// s = prologue(r, z), in the core's own packs.
template <class T>
using PlainSignal = SignalOperand<T, true, kRunOf<T>>;

// A part of x or W. Outside of the matrix it is 0, which is not the part of 0.
template <class T, bool kAlong>
struct PartOperand {
  static constexpr bool kAlongK = kAlong;
  static constexpr int kWidth = kRunOf<T>;
  using Value = Acc<T>;
  struct Raw {
    Pack<T, kWidth> value;
    int inside;  // elements, from the first one
    int part;
  };
  const T* p;
  int64_t rows, cols;
  bool wide;
  PartFunction<Acc<T>> function;

  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col, int part) const {
    const int64_t left = row < rows ? cols - col : 0;
    return {fetch_pack<T, kWidth>(p, rows, cols, row, col, wide),
            static_cast<int>(left < kWidth ? left : kWidth), part};
  }
  __device__ __forceinline__ void convert(const Raw& raw, Acc<T> (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      out[j] =
          j < raw.inside ? function(static_cast<Acc<T>>(raw.value.value[j]), raw.part) : Acc<T>(0);
  }
};

template <class T, bool kAlong>
PartOperand<T, kAlong> part_operand(const Tensor& t, const PartFunction<Acc<T>>& part) {
  const T* p = data<T>(t);
  const int64_t cols = t.size(1);
  return {p, t.size(0), cols, wide_runs<T>(cols) && aligned16(p), part};
}

// u or v.
template <class A, bool kAlong>
struct SidesOperand {
  static constexpr bool kAlongK = kAlong;
  static constexpr int kWidth = kWide<A>;
  using Value = A;
  using Raw = Pack<A, kWidth>;
  const A *u, *v;
  int64_t rows, cols;
  bool wide;

  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col, int part) const {
    return fetch_pack(part == 0 ? u : v, rows, cols, row, col, wide);
  }
  __device__ __forceinline__ void convert(const Raw& raw, A (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[j] = raw.value[j];
  }
};

// Pairs of sums of a row-major matrix.
template <class T, class Finish>
struct PairEpilogue {
  using Element = T;
  static constexpr int kWidth = kRunOf<T>;
  static constexpr bool wants_row_sums = false, kTakesRuns = true;
  PairSums<T, Finish> sums;
  int64_t cols;
  bool wide;

  template <int V>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, Acc<T> (&v)[V]) const {
    Run<V> run{{}, wide};
#pragma unroll
    for (int k = 0; k < V; ++k) run.at[k] = n + k < cols ? m * cols + n + k : -1;
    sums.finish(run, n, v);
  }
  __device__ __forceinline__ void row_sum(int64_t, Acc<T>) const {}
};

}  // namespace

template <class T>
void input_through_made_matrix(const LinearLayer& layer, const RuleCall<Acc<T>>& rule,
                               Tensor& reward, const Device& device) {
  const int64_t n = layer.n(), in = layer.in(), out = layer.out();
  const T *r = data<T>(layer.reward), *z = data<T>(layer.z), *x = data<T>(layer.x);
  const T *w = data<T>(layer.weight), *b = data<T>(layer.matrix);
  T* to = data<T>(reward);
  const PlainSignal<T> s{r, z, n, out, wide_runs<T>(out) && aligned16(r, z), rule};
  const MadeOperand<T> m{w, b, out, in, wide_runs<T>(in) && aligned16(w, b), rule};
  const bool wide = wide_runs<T>(in) && aligned16(x, to);
  const InputEpilogue<T, kRunOf<T>> epilogue{x, to, in, rule, wide};
  product<PlainCore<T>>(n, in, out, s, m, epilogue, layer.x, device);
}

template <class T>
void redistribute_split(const LinearLayer& layer, const T* bias, const RuleCall<Acc<T>>& rule,
                        bool nonnegative, Tensor* reward, const ParameterUpdate<T>& to_weight,
                        const ParameterUpdate<T>& to_bias, const Device& device) {
  using A = Acc<T>;
  const int64_t n = layer.n(), in = layer.in(), out = layer.out();
  const bool two_inputs = has_second_input(rule, nonnegative);
  const bool two_weights = has_second_weight(rule), two_signals = has_second_signal(rule);
  const auto x_parts = PartFunction<A>::of_input(rule), w_parts = PartFunction<A>::of_weight(rule);
  const T *x = data<T>(layer.x), *r = data<T>(layer.reward), *z = data<T>(layer.z);

  const Tensor u = torch::stable::new_empty(layer.z, {n, out}, sum_type<T>());
  Tensor v;
  if (two_signals) v = torch::stable::new_empty(layer.z, {n, out}, sum_type<T>());
  A *to_u = data<A>(u), *to_v = two_signals ? data<A>(v) : nullptr;
  const bool runs_out = wide_runs<T>(out) && aligned16(to_u, to_v);
  {
    const SignalsOfSums<T> finish{r, z, bias, to_u, to_v, rule};
    const PairEpilogue<T, SignalsOfSums<T>> epilogue{
        {finish, nullptr}, out, runs_out && aligned16(r, z)};
    pair_product<T>(n, out, in, part_operand<T, true>(layer.x, x_parts),
                    part_operand<T, true>(layer.weight, w_parts), epilogue, two_inputs, two_weights,
                    two_signals, to_u, 0, layer.x, device);
  }
  if (reward) {
    T* to = data<T>(*reward);
    const InputOfSums<T> finish{x, to, x_parts, rule.below};
    const PairEpilogue<T, InputOfSums<T>> epilogue{
        {finish, nullptr}, in, wide_runs<T>(in) && aligned16(x, to)};
    const SidesOperand<A, true> sides{to_u, to_v, n, out, runs_out};
    pair_product<T>(n, in, out, sides, part_operand<T, false>(layer.weight, w_parts), epilogue,
                    two_signals, two_weights, two_inputs, as_sums(to), n * in, layer.x, device);
  }
  if (to_weight.param) {
    const WeightOfSums<T> finish{to_weight, w_parts};
    const PairEpilogue<T, WeightOfSums<T>> epilogue{
        {finish, nullptr}, in, wide_runs<T>(in) && to_weight.aligned()};
    const SidesOperand<A, false> sides{to_u, to_v, n, out, runs_out};
    pair_product<T>(out, in, n, sides, part_operand<T, false>(layer.x, x_parts), epilogue,
                    two_signals, two_inputs, two_weights, as_sums(to_weight.feedback), out * in,
                    layer.x, device);
  }
  if (to_bias.param) split_bias<T>({to_u, to_v, n, out, 1, rule, to_bias}, device);
}

#define LFP_INSTANTIATE(T)                                                                         \
  template void input_through_made_matrix<T>(const LinearLayer&, const RuleCall<Acc<T>>&, Tensor&, \
                                             const Device&);                                       \
  template void redistribute_split<T>(const LinearLayer&, const T*, const RuleCall<Acc<T>>&, bool, \
                                      Tensor*, const ParameterUpdate<T>&,                          \
                                      const ParameterUpdate<T>&, const Device&);
LFP_INSTANTIATE(double)
LFP_INSTANTIATE(float)
LFP_INSTANTIATE(BFloat16)
LFP_INSTANTIATE(Half)
#undef LFP_INSTANTIATE

}  // namespace lfp::cuda
