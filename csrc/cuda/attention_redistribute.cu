// Relevance through attention with the softmax computed again (docs/math.md, section 7):
//   s = reward, by AttnLRP reward / (2 stab(out));   delta_i = s_i out_i = sum_j p c (s_i v_j)
//   dz = p * (c * (s_i v_j) - delta_i), by AttnLRP times z / (2 stab(z))
//   r_v = sum_i p c s_i;   r_q = scale * sum_j dz k_j;   r_k = scale * sum_i dz q_i
// and by AttnLRP each of the three times its own tensor. c is what dropout multiplies p with.
//
// The first kernel owns queries: r_q, and s and delta for the second, which owns keys: r_k and r_v
// over the query heads that share them. Nothing is added by two blocks.
#include "attention.cuh"

namespace lfp::cuda {
namespace {

// s in memory: float16 does not hold 1 / eps.
template <class T>
using Signal = std::conditional_t<std::is_same_v<T, Half>, float, T>;

template <class T>
struct Redistribute : Attention<T> {
  using A = Acc<T>;
  Heads<const T> out, reward;
  Heads<Signal<T>> signal;  // by AttnLRP
  const A* lse;             // [B, H, L], as delta
  A* delta;
  Heads<T> to_q, to_k, to_v;
  bool attnlrp;
  A eps;

  // (p, what arrives at the logit) from the sums q_i k_j and s_i v_j; p is the dropped one.
  __device__ __forceinline__ A logit(A& sum, A to_p, A lse_i, A delta_i, int64_t b, int64_t h,
                                     int64_t i, int64_t j) const {
    const A z = sum * this->scale, x = this->masked(z, b, h, i, j);
    sum = A(0);
    if (x == A(-INFINITY)) return A(0);
    const A p = exp(x - lse_i), c = this->kept(b, h, i, j);
    sum = p * (c * to_p - delta_i);
    if (attnlrp) sum *= z / (2 * stabilize(z, eps));
    return p * c;
  }
};

template <class B>
struct RedistributeShared {
  using P = typename B::Operand;
  using A = typename B::A;
  Rows<P, B::kOwn, B::kWidth> own, own_values;
  Rows<P, B::kOther, B::kWidth> other, other_values;
  Rows<P, B::kOwn, B::kOther> to_z;
  A lse[B::kOwn > B::kOther ? B::kOwn : B::kOther];
  A delta[B::kOwn > B::kOther ? B::kOwn : B::kOther];
};
template <class B>
struct KeyShared : RedistributeShared<B> {
  Rows<typename B::Operand, B::kOwn, B::kOther> p;
};

template <class T, class B>
__global__ void __launch_bounds__(B::kThreads, 1) attention_queries_kernel(Redistribute<T> f) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& s = *reinterpret_cast<RedistributeShared<B>*>(memory);
  const BlockPlace place(f.queries, B::kOwn, f.heads, true);
  const int64_t b = place.b, h = place.h, kv = h / f.shared;
  const int64_t statistics = (b * f.heads + h) * f.queries;
  const T *keys = f.k.of(b, kv), *values = f.v.of(b, kv);
  fetch<B::kThreads>(s.own, f.q.of(b, h), f.q.row, f.q.wide, place.first, f.queries, f.width);
  // A warp makes s and delta of a row. s is rounded first: both kernels and delta have the same.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int row = warp; row < B::kOwn; row += B::kThreads / 32) {
    const int64_t i = place.first + row;
    const bool inside = i < f.queries;
    A delta = A(0);
    for (int column = lane; column < B::kWidth; column += 32) {
      A signal = A(0);
      if (inside && column < f.values) {
        const A out = load(f.out.of(b, h) + i * f.out.row, column);
        signal = load(f.reward.of(b, h) + i * f.reward.row, column);
        if (f.attnlrp) signal = signal / (2 * stabilize(out, f.eps));
        round_to(signal, s.own_values.value[row][column]);
        signal = widened(s.own_values.value[row][column]);
        if (f.attnlrp) store(f.signal.of(b, h) + i * f.signal.row, column, signal);
        delta += signal * out;
      } else {
        round_to(signal, s.own_values.value[row][column]);
      }
    }
    delta = warp_sum(delta);
    if (lane == 0) {
      s.delta[row] = delta;
      s.lse[row] = inside ? f.lse[statistics + i] : A(INFINITY);
      if (inside) f.delta[statistics + i] = delta;
    }
  }
  typename B::Sums sums = {};
  const int64_t end = f.seen(place.first + B::kOwn);
  for (int64_t first = 0; first < end; first += B::kOther) {
    fetch<B::kThreads>(s.other, keys, f.k.row, f.k.wide, first, f.keys, f.width);
    fetch<B::kThreads>(s.other_values, values, f.v.row, f.v.wide, first, f.keys, f.values);
    __syncthreads();
    typename B::Logits to_p = {}, z = {};
    B::logits(to_p, s.own_values, s.other_values, f.values);
    B::logits(z, s.own, s.other, f.width);
    B::each_pair(z, to_p, [&](int m, int n, A& sum, A given) {
      f.logit(sum, given, s.lse[m], s.delta[m], b, h, place.first + m, first + n);
      round_to(sum, s.to_z.value[m][n]);
    });
    __syncthreads();
    B::accumulate(sums, s.to_z, s.other);
    __syncthreads();
  }
  put<B, T>(sums, memory, f.to_q.of(b, h), f.to_q.row, f.to_q.wide, place.first, f.queries, f.width,
            f.scale, f.attnlrp ? f.q.of(b, h) : nullptr, f.q.row, f.q.wide);
}

template <class T, class B>
__global__ void __launch_bounds__(B::kThreads, 1) attention_keys_kernel(Redistribute<T> f) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& s = *reinterpret_cast<KeyShared<B>*>(memory);
  const int64_t key_heads = f.heads / f.shared;
  const BlockPlace place(f.keys, B::kOwn, key_heads, false);
  const int64_t b = place.b, kv = place.h;
  fetch<B::kThreads>(s.own, f.k.of(b, kv), f.k.row, f.k.wide, place.first, f.keys, f.width);
  fetch<B::kThreads>(s.own_values, f.v.of(b, kv), f.v.row, f.v.wide, place.first, f.keys, f.values);
  typename B::Sums to_k = {}, to_v = {};
  for (int64_t h = kv * f.shared; h < (kv + 1) * f.shared; ++h) {
    const int64_t statistics = (b * f.heads + h) * f.queries;
    const int64_t begin = f.causal ? place.first / B::kOther * B::kOther : 0;
    for (int64_t first = begin; first < f.queries; first += B::kOther) {
      fetch<B::kThreads>(s.other, f.q.of(b, h), f.q.row, f.q.wide, first, f.queries, f.width);
      if (f.attnlrp)
        fetch<B::kThreads>(s.other_values, static_cast<const Signal<T>*>(f.signal.of(b, h)),
                           f.signal.row, f.signal.wide, first, f.queries, f.values);
      else
        fetch<B::kThreads>(s.other_values, f.reward.of(b, h), f.reward.row, f.reward.wide, first,
                           f.queries, f.values);
      for (int n = threadIdx.x; n < B::kOther; n += B::kThreads) {
        const bool inside = first + n < f.queries;
        s.lse[n] = inside ? f.lse[statistics + first + n] : A(INFINITY);
        s.delta[n] = inside ? f.delta[statistics + first + n] : A(0);
      }
      __syncthreads();
      typename B::Logits to_p = {}, z = {};
      B::logits(to_p, s.own_values, s.other_values, f.values);
      B::logits(z, s.own, s.other, f.width);
      B::each_pair(z, to_p, [&](int m, int n, A& sum, A given) {
        const A p = f.logit(sum, given, s.lse[n], s.delta[n], b, h, first + n, place.first + m);
        round_to(sum, s.to_z.value[m][n]);
        round_to(p, s.p.value[m][n]);
      });
      __syncthreads();
      B::accumulate(to_k, s.to_z, s.other);
      B::accumulate(to_v, s.p, s.other_values);
      __syncthreads();
    }
  }
  put<B, T>(to_k, memory, f.to_k.of(b, kv), f.to_k.row, f.to_k.wide, place.first, f.keys, f.width,
            f.scale, f.attnlrp ? f.k.of(b, kv) : nullptr, f.k.row, f.k.wide);
  put<B, T>(to_v, memory, f.to_v.of(b, kv), f.to_v.row, f.to_v.wide, place.first, f.keys, f.values,
            A(1), f.attnlrp ? f.v.of(b, kv) : nullptr, f.v.row, f.v.wide);
}

template <class T, class B>
void launch(const Redistribute<T>& f, int64_t batch, const Device& device) {
  const char* op = "attention_redistribute";
  const unsigned queries = grid_of(f.queries, B::kOwn, batch, f.heads, op);
  if (queries > 0) {
    constexpr size_t bytes = sizeof(RedistributeShared<B>);
    allow_shared(attention_queries_kernel<T, B>, bytes);
    attention_queries_kernel<T, B><<<queries, B::kThreads, bytes, device.stream>>>(f);
    check_launch();
  }
  const unsigned keys = grid_of(f.keys, B::kOwn, batch, f.heads / f.shared, op);
  if (keys > 0) {
    constexpr size_t bytes = sizeof(KeyShared<B>);
    allow_shared(attention_keys_kernel<T, B>, bytes);
    attention_keys_kernel<T, B><<<keys, B::kThreads, bytes, device.stream>>>(f);
    check_launch();
  }
}

std::tuple<Tensor, Tensor, Tensor> attention_redistribute(Tensor q, Tensor k, Tensor v, Tensor out,
                                                          Tensor lse, Tensor reward,
                                                          std::optional<Tensor> mask, bool causal,
                                                          double scale, double dropout,
                                                          int64_t seed, bool attnlrp, double eps) {
  const Device device(q);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), values = v.size(3);
  Tensor to_q = empty_heads(q, batch, heads, queries, q.size(3));
  Tensor to_k = empty_heads(k, batch, k.size(1), k.size(2), k.size(3));
  Tensor to_v = empty_heads(v, batch, v.size(1), v.size(2), values);
  if (heads == 0) return {to_q, torch::stable::zero_(to_k), torch::stable::zero_(to_v)};
  q = in_rows(q), k = in_rows(k), v = in_rows(v), out = in_rows(out), reward = in_rows(reward);
  lse = dense(lse);
  Tensor delta = torch::stable::new_empty(q, {batch, heads, queries}, lse.scalar_type());
  dispatch_dtype(q.scalar_type(), "attention_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    Redistribute<T> f{};
    static_cast<Attention<T>&>(f) = attention_of<T>(q, k, v, mask, causal, scale, dropout, seed);
    Tensor signal = reward;
    if (attnlrp) {
      const auto dtype = std::is_same_v<T, Half> ? ScalarType::Float : q.scalar_type();
      signal = torch::stable::new_empty(q, {batch, heads, queries, values}, dtype);
      f.signal = heads_of<Signal<T>>(signal);
    }
    f.out = constant(heads_of<T>(out)), f.reward = constant(heads_of<T>(reward));
    f.lse = data<A>(lse), f.delta = data<A>(delta);
    f.to_q = heads_of<T>(to_q), f.to_k = heads_of<T>(to_k), f.to_v = heads_of<T>(to_v);
    f.attnlrp = attnlrp, f.eps = A(eps);
    dispatch_head(std::max(q.size(3), values), "attention_redistribute", [&](auto width) {
      using B = AttentionOf<typename OperandOf<T>::type, decltype(width)::value>;
      launch<T, B>(f, batch, device);
    });
  });
  return {to_q, to_k, to_v};
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) { m.impl("attention_redistribute", TORCH_BOX(&lfp::cuda::attention_redistribute)); }
