// The backward scan of neurons (docs/math.md, section 6), and with what stands around it in an
// event-driven network: the membrane is computed again where the current is constant, the reward is
// taken from behind the max pool that the spikes went through, the signal replaces the membrane.
#include "lif.h"

namespace lfp::cpu {
namespace {

// Neurons [N, H, W, C] below a max pool whose windows do not overlap: [N, H / kh, W / kw, C].
struct Pool {
  int64_t n, h, w, c, kh, kw;
  int64_t rows() const { return h / kh; }
  int64_t columns() const { return w / kw; }
};

// A run of neurons of one pixel, and its place in the pooled reward (-1: no window holds it).
struct Segment {
  int64_t begin, count, pooled;
};

// The tile of `count` neurons from m on, cut into pixels; winner[plane][i] has the spikes of neuron
// i that are the first of their window.
template <class F>
void cut_tile(const Pool& pool, int64_t m, int64_t count, F f) {
  for (int64_t i = 0; i < count;) {
    const int64_t pixel = (m + i) / pool.c, channel = (m + i) % pool.c;
    const int64_t length = std::min(count - i, pool.c - channel);
    f(i, length, pixel, channel);
    i += length;
  }
}

LFP_CLONES void first_spikes(const uint8_t* bits, const Pool& pool, int64_t y, int64_t x,
                             int64_t count, uint8_t* winner) {
  const int64_t top = y / pool.kh * pool.kh, left = x / pool.kw * pool.kw;
  std::copy_n(bits, count, winner);
  for (int64_t yy = top; yy <= y; ++yy)
    for (int64_t xx = left; xx < (yy == y ? x : left + pool.kw); ++xx) {
      const uint8_t* other = bits + ((yy - y) * pool.w + xx - x) * pool.c;
      for (int64_t i = 0; i < count; ++i) winner[i] &= static_cast<uint8_t>(~other[i]);
    }
}

template <class T>
LFP_CLONES void take_rewards(const T* pooled, const uint8_t* winner, int shift, int64_t count,
                             T* reward) {
  for (int64_t i = 0; i < count; ++i)
    reward[i] = (winner[i] >> shift) & 1 ? pooled[i] : static_cast<T>(0);
}

struct Scan {
  Tensor reward, membrane, bits;
  std::optional<Tensor> state, carry;
  Tensor beta, threshold;
  int64_t inner, steps, neurons;
  std::optional<Pool> pool;
  bool constant, sums, as_reward, need_parameters, overwrite;
  double eps;
};

struct Results {
  Tensor signal, carry, beta, threshold;
};

template <class T, class N>
void scan_tiles(const Scan& s, const Results& out, int64_t a, int64_t b) {
  using A = Acc<T>;
  const int64_t steps = s.steps, neurons = s.neurons, planes = (steps + kPlane - 1) / kPlane;
  const T *rewards = data<T>(s.reward), *source = data<T>(s.membrane);
  const uint8_t* spikes = data<uint8_t>(s.bits);
  std::vector<T> again(s.constant ? static_cast<size_t>(steps * kTile) : 0);
  std::vector<uint8_t> winner(s.pool ? static_cast<size_t>(planes * kTile) : 0);
  const int64_t pooled = s.pool ? s.pool->n * s.pool->rows() * s.pool->columns() * s.pool->c : 0;
  for (int64_t tile = a; tile < b; ++tile) {
    const int64_t m = tile * kTile, count = std::min(kTile, neurons - m);
    const auto v = parameters_of<T>(s.beta, s.threshold, s.inner, m, count);
    std::array<T, kTile> rest{}, taken{};
    if (s.state) std::copy_n(data<T>(*s.state) + m, count, rest.begin());
    if (s.constant) {
      std::array<A, kTile> u{};
      std::array<uint8_t, kTile> unused{};
      for (int64_t i = 0; i < count; ++i) u[i] = static_cast<A>(rest[i]);
      for (int64_t t = 0; t < steps; ++t)
        forward_step<T, N>(source + m, v, count, 0, u.data(), unused.data(),
                           again.data() + t * kTile);
    }
    std::array<Segment, kTile> segments;
    int64_t parts = 0;
    if (s.pool)
      cut_tile(*s.pool, m, count, [&](int64_t i, int64_t length, int64_t pixel, int64_t channel) {
        const Pool& p = *s.pool;
        const int64_t x = pixel % p.w, y = pixel / p.w % p.h, n = pixel / p.w / p.h;
        const bool inside = y / p.kh < p.rows() && x / p.kw < p.columns();
        const int64_t window = (n * p.rows() + y / p.kh) * p.columns() + x / p.kw;
        segments[parts++] = {i, length, inside ? window * p.c + channel : -1};
        for (int64_t plane = 0; inside && plane < planes; ++plane)
          first_spikes(spikes + plane * neurons + m + i, p, y, x, length,
                       winner.data() + plane * kTile + i);
      });
    Backward<A> c;
    if (s.carry)
      for (int64_t i = 0; i < count; ++i) c.carry[i] = load(data<T>(*s.carry), m + i);
    T* signal = data<T>(s.overwrite ? s.membrane : out.signal);
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int shift = static_cast<int>(t % kPlane);
      const int64_t at = t * neurons + m;
      const T* u = s.constant ? again.data() + t * kTile : source + at;
      const T* before = t == 0 ? rest.data() : u - (s.constant ? kTile : neurons);
      const T* r = rewards + at;
      if (s.pool) {
        for (int64_t k = 0; k < parts; ++k) {
          const Segment& part = segments[k];
          if (part.pooled >= 0)
            take_rewards(rewards + t * pooled + part.pooled,
                         winner.data() + t / kPlane * kTile + part.begin, shift, part.count,
                         taken.data() + part.begin);
        }
        r = taken.data();
      }
      feedback_step<T, N>(r, u, before, spikes + t / kPlane * neurons + m, shift, v, A(s.eps),
                          count, c);
      if (s.need_parameters) add_parameters(count, c);
      hand_on(s.sums, s.as_reward, count, c, s.sums ? signal : signal + at);
    }
    for (int64_t i = 0; i < count; ++i) {
      store(data<T>(out.carry), m + i, c.carry[i]);
      if (s.sums) store(signal, m + i, c.total[i]);
      if (s.need_parameters) {
        store(data<T>(out.beta), m + i, c.beta[i]);
        store(data<T>(out.threshold), m + i, c.threshold[i]);
      }
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Scan& s, const Results& out, int64_t reset,
                                               const char* op) {
  dispatch_dtype(s.reward.scalar_type(), op, [&](auto element) {
    using T = decltype(element);
    const bool known = dispatch_reset<Acc<T>>(reset, [&](auto kind) {
      using N = decltype(kind);
      parallel_items((s.neurons + kTile - 1) / kTile, kTile * s.steps,
                     [&](int64_t a, int64_t b) { scan_tiles<T, N>(s, out, a, b); });
    });
    STD_TORCH_CHECK(known, "lfp_kernels::", op, ": unknown reset code ", reset);
  });
  return {out.signal, out.carry, out.beta, out.threshold};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spike_lif_feedback(
    Tensor reward, Tensor membrane, bool constant, Tensor bits, std::optional<Tensor> state,
    std::optional<Tensor> carry, Tensor beta, Tensor threshold, int64_t inner, Ints pool,
    int64_t steps, double eps, int64_t reset, bool sums, bool as_reward, bool need_parameters,
    bool overwrite) {
  const int64_t neurons = bits.size(1);
  Scan s{dense(reward),
         dense(membrane),
         dense(bits),
         state,
         carry,
         dense(beta),
         dense(threshold),
         inner,
         steps,
         neurons,
         std::nullopt,
         constant,
         sums,
         as_reward,
         need_parameters,
         overwrite,
         eps};
  if (state) s.state = dense(*state);
  if (carry) s.carry = dense(*carry);
  if (!pool.empty())
    s.pool = Pool{pool.at(0), pool.at(1), pool.at(2), pool.at(3), pool.at(4), pool.at(5)};
  LFP_CHECK(!overwrite || (membrane.is_contiguous() && !constant && !sums), "spike_lif_feedback",
            "overwrite: expected a contiguous membrane and signals of every step");
  const int64_t parameters = need_parameters ? neurons : 0;
  const Results out{overwrite ? none_like(reward) : empty_like(reward, {sums ? 1 : steps, neurons}),
                    empty_like(reward, {neurons}), empty_like(reward, {parameters}),
                    empty_like(reward, {parameters})};
  return run(s, out, reset, "spike_lif_feedback");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lif_feedback(Tensor reward, Tensor membrane, Tensor bits,
                                                        std::optional<Tensor> state,
                                                        std::optional<Tensor> carry, Tensor beta,
                                                        Tensor threshold, int64_t inner, double eps,
                                                        int64_t reset, bool sums, bool as_reward,
                                                        bool need_parameters) {
  const int64_t steps = reward.size(0);
  return spike_lif_feedback(reward, membrane, false, bits, state, carry, beta, threshold, inner, {},
                            steps, eps, reset, sums, as_reward, need_parameters, false);
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("lif_feedback", TORCH_BOX(&lfp::cpu::lif_feedback));
  m.impl("spike_lif_feedback", TORCH_BOX(&lfp::cpu::spike_lif_feedback));
}
