// Attention with the softmax over blocks of keys (docs/math.md, section 7): a running maximum and
// sum per query, out and the logarithm of the sum of exponentials at the end.
//
// Relevance divides by out, also where large terms cancel in it: probabilities rounded once to the
// type of a 16-bit product would make such outputs wrong by many times their own rounding. They
// are multiplied in two parts, the rounded value and what the rounding left.
#include "attention.cuh"

namespace lfp::cuda {
namespace {

template <class B>
inline constexpr bool kExact = std::is_same_v<typename B::Operand, typename B::A>;

template <class B>
struct ForwardShared {
  using P = typename B::Operand;
  using A = typename B::A;
  Rows<P, B::kOwn, B::kWidth> q;
  Rows<P, B::kOther, B::kWidth> k, v;
  A logits[B::kOwn][B::kOther + 1];
  Rows<P, B::kOwn, B::kOther> p;
  struct None {};
  std::conditional_t<kExact<B>, None, Rows<P, B::kOwn, B::kOther>> rest;
  A factor[B::kOwn];
};

template <class T, class B>
__global__ void __launch_bounds__(B::kThreads, 1)
    attention_kernel(Attention<T> f, Heads<T> out, Acc<T>* lse) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& s = *reinterpret_cast<ForwardShared<B>*>(memory);
  // By the causal mask the last queries take longest: they go first.
  const BlockPlace place(f.queries, B::kOwn, f.heads, true);
  const int64_t b = place.b, h = place.h, kv = h / f.shared;
  const T *keys = f.k.of(b, kv), *values = f.v.of(b, kv);
  fetch<B::kThreads>(s.q, f.q.of(b, h), f.q.row, f.q.wide, place.first, f.queries, f.width);
  typename B::Sums sums = {};
  // kPart neighbouring threads work on a row of logits.
  constexpr int kPart = B::kThreads / B::kOwn;
  const int row = threadIdx.x / kPart, part = threadIdx.x % kPart;
  A most = A(-INFINITY), total = A(0);
  const int64_t end = f.seen(place.first + B::kOwn);
  for (int64_t first = 0; first < end; first += B::kOther) {
    fetch<B::kThreads>(s.k, keys, f.k.row, f.k.wide, first, f.keys, f.width);
    fetch<B::kThreads>(s.v, values, f.v.row, f.v.wide, first, f.keys, f.values);
    __syncthreads();
    typename B::Logits z = {};
    B::logits(z, s.q, s.k, f.width);
    B::each_logit(z, [&](int m, int n, A sum) {
      s.logits[m][n] = f.masked(sum * f.scale, b, h, place.first + m, first + n);
    });
    __syncthreads();
    A highest = most;
    for (int n = part; n < B::kOther; n += kPart)
      if (!(s.logits[row][n] <= highest)) highest = s.logits[row][n];  // NaN stays
#pragma unroll
    for (int step = kPart / 2; step > 0; step /= 2) {
      const A there = __shfl_xor_sync(0xffffffffu, highest, step);
      if (!(there <= highest)) highest = there;
    }
    const A shift = highest == A(-INFINITY) ? A(0) : highest;  // no key seen yet
    A sum = A(0);
    for (int n = part; n < B::kOther; n += kPart) {
      A p = exp(s.logits[row][n] - shift);
      sum += p;
      if (p != A(0)) p *= f.kept(b, h, place.first + row, first + n);
      round_to(p, s.p.value[row][n]);
      if constexpr (!kExact<B>) round_to(p - widened(s.p.value[row][n]), s.rest.value[row][n]);
    }
#pragma unroll
    for (int step = kPart / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    const A fade = exp(most - shift);
    most = highest;
    total = total * fade + sum;
    if (part == 0) s.factor[row] = fade;
    __syncthreads();
    B::each_sum(sums, [&](int m, int, A& value) { value *= s.factor[m]; });
    B::accumulate(sums, s.p, s.v);
    if constexpr (!kExact<B>) B::accumulate(sums, s.rest, s.v);
    __syncthreads();
  }
  const bool seen = total != A(0);
  if (part == 0) {
    s.factor[row] = seen ? A(1) / total : A(1);
    if (place.first + row < f.queries)
      lse[(b * f.heads + h) * f.queries + place.first + row] =
          seen ? most + log(total) : A(INFINITY);
  }
  __syncthreads();
  B::each_sum(sums, [&](int m, int, A& value) { value *= s.factor[m]; });
  put<B, T>(sums, memory, out.of(b, h), out.row, out.wide, place.first, f.queries, f.values, A(1),
            nullptr, 0, false);
}

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v,
                                             std::optional<Tensor> mask, bool causal, double scale,
                                             double dropout, int64_t seed) {
  const Device device(q);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  Tensor out = empty_heads(q, batch, heads, queries, v.size(3));
  const bool wide = q.scalar_type() == ScalarType::Double;
  Tensor lse = torch::stable::new_empty(q, {batch, heads, queries},
                                        wide ? ScalarType::Double : ScalarType::Float);
  q = in_rows(q), k = in_rows(k), v = in_rows(v);
  dispatch_dtype(q.scalar_type(), "attention_forward", [&](auto element) {
    using T = decltype(element);
    const auto f = attention_of<T>(q, k, v, mask, causal, scale, dropout, seed);
    dispatch_head(std::max(q.size(3), v.size(3)), "attention_forward", [&](auto width) {
      using B = AttentionOf<typename OperandOf<T>::type, decltype(width)::value>;
      const unsigned grid = grid_of(queries, B::kOwn, batch, heads, "attention_forward");
      if (grid == 0) return;
      constexpr size_t bytes = sizeof(ForwardShared<B>);
      allow_shared(attention_kernel<T, B>, bytes);
      attention_kernel<T, B>
          <<<grid, B::kThreads, bytes, device.stream>>>(f, heads_of<T>(out), data<Acc<T>>(lse));
      check_launch();
    });
  });
  return {out, lse};
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) { m.impl("attention_forward", TORCH_BOX(&lfp::cuda::attention_forward)); }
