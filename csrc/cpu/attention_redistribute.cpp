// Relevance (or the gradient's reward) through attention, the probabilities made again from `lse`:
//   s   = reward | reward / (2 stab(out))        D_i = sum_f s_if out_if
//   dP  = K (s v^T)                              dZ  = scale P (dP - D) [ Z / (2 stab(Z)) ]
//   r_v = (P K)^T s [v]     r_q = dZ k [q]       r_k = dZ^T q [k]
// (docs/math.md, section 7; what stands in brackets is AttnLRP's). D is the sum of P dP over the
// keys, so one walk is enough.
#include "attention.h"

namespace lfp::cpu {
namespace {

// Z and s v^T of one query against a block of keys become P K and dZ, zeros beside.
template <class A>
LFP_CLONES void feedback_row(A* z, A* d, const A* masked, const A* keep, int64_t count,
                             int64_t wide, A lse, A along, A scale, bool attnlrp, A eps) {
  const auto walk = [&](auto kept_of, auto share_of) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      const A p = fast_exp(masked[j] - lse), kept = kept_of(j);
      d[j] = share_of(z[j]) * p * (kept * d[j] - along);
      z[j] = p * kept;
    }
  };
  const auto all = [](int64_t) { return A(1); };
  const auto some = [&](int64_t j) { return keep[j]; };
  const auto plain = [&](A) { return scale; };
  const auto half = [&](A logit) { return A(0.5) * scale * logit / stabilize(logit, eps); };
  if (keep)
    attnlrp ? walk(some, half) : walk(some, plain);
  else
    attnlrp ? walk(all, half) : walk(all, plain);
  for (int64_t j = count; j < wide; ++j) z[j] = d[j] = A(0);
}

// s[width padded] of one query from its reward and output; returns D.
template <class T, class A>
LFP_CLONES A signal_row(const T* reward, const T* out, int64_t width, bool attnlrp, A eps, A* s) {
  if (attnlrp)
    for (int64_t i = 0; i < width; ++i)
      s[i] = A(0.5) * load(reward, i) / stabilize(static_cast<A>(load(out, i)), eps);
  else
    for (int64_t i = 0; i < width; ++i) s[i] = load(reward, i);
  for (int64_t i = width; i < padded<A>(width); ++i) s[i] = A(0);
  constexpr int64_t kParts = 8;
  double parts[kParts] = {};  // dP - D cancels
  const int64_t whole = width - width % kParts;
  for (int64_t i = 0; i < whole; i += kParts)
    for (int64_t j = 0; j < kParts; ++j) parts[j] += double(s[i + j]) * double(load(out, i + j));
  for (int64_t i = whole; i < width; ++i) parts[i - whole] += double(s[i]) * double(load(out, i));
  double along = 0;
  for (double part : parts) along += part;
  return static_cast<A>(along);
}

// to[width] = from[width], times x for AttnLRP.
template <class T, class A>
LFP_CLONES void finish_row(const A* from, const T* x, int64_t width, bool attnlrp, T* to) {
  if (attnlrp)
    for (int64_t i = 0; i < width; ++i) store(to, i, from[i] * static_cast<A>(load(x, i)));
  else
    for (int64_t i = 0; i < width; ++i) store(to, i, from[i]);
}

template <class T>
struct Tensors {
  HeadView<const T> q, k, v, out, reward;
  const Acc<T>* lse;
  Mask<T> mask;
  HeadView<T> of_q;
  bool attnlrp;
  Acc<T> eps;
};

template <class T>
class Backward {
  using A = Acc<T>;

 public:
  Backward(const Attention& call, const Tensors<T>& tensors, A* scratch)
      : c_(call),
        t_(tensors),
        wide_(padded<A>(call.width)),
        out_wide_(padded<A>(call.out_width)),
        multiply_(small_product<A>()) {
    const int64_t rows = part_rows(call);
    for (auto [field, size] : {std::pair{&query_, rows * wide_},
                               {&s_, rows * out_wide_},
                               {&of_query_, rows * wide_},
                               {&along_, rows},
                               {&keys_, kKeys * wide_},
                               {&keys_transposed_, kKeys * c_.width},
                               {&values_transposed_, kKeys * c_.out_width},
                               {&z_, kQueries * kKeys},
                               {&d_, kQueries * kKeys},
                               {&masked_, kKeys},
                               {&keep_, kKeys}})
      *field = scratch, scratch += size;
  }

  static int64_t scratch(const Attention& c) {
    const int64_t wide = padded<A>(c.width), out_wide = padded<A>(c.out_width);
    return part_rows(c) * (2 * wide + out_wide + 1) + kKeys * (wide + c.width + c.out_width) +
           2 * kQueries * kKeys + 2 * kKeys;
  }

  // of_k [keys][width padded] and of_v [keys][out_width padded] grow by this task's share.
  void run(int64_t task, A* of_k, A* of_v) {
    const int64_t part = task % c_.parts, head = task / c_.parts % c_.kv;
    const int64_t b = task / c_.parts / c_.kv;
    for (int64_t h = head * c_.shared; h < (head + 1) * c_.shared; ++h) {
      begin(b, h, part);
      for (int64_t key = 0; key < c_.keys; key += kKeys) {
        const int64_t count = std::min(kKeys, c_.keys - key);
        pack_rows(t_.k.rows(b, head) + key * t_.k.row, t_.k.row, count, c_.width, keys_);
        pack_transposed(t_.k.rows(b, head) + key * t_.k.row, t_.k.row, count, c_.width,
                        keys_transposed_);
        pack_transposed(t_.v.rows(b, head) + key * t_.v.row, t_.v.row, count, c_.out_width,
                        values_transposed_);
        int64_t at = 0;
        for (int64_t block = part; block < c_.blocks; block += c_.parts, at += kQueries) {
          const int64_t rows = std::min(kQueries, c_.queries - block * kQueries);
          const int64_t seen = std::min(count, c_.seen(block * kQueries + rows) - key);
          if (seen > 0)
            one_block(b, h, block * kQueries, rows, at, key, seen, of_k + key * wide_,
                      of_v + key * out_wide_);
        }
      }
      end(b, h, part);
    }
  }

 private:
  // Query rows of the largest part: every part'th block.
  static int64_t part_rows(const Attention& c) {
    return (c.blocks + c.parts - 1) / c.parts * kQueries;
  }

  void begin(int64_t b, int64_t h, int64_t part) {
    int64_t at = 0;
    for (int64_t block = part; block < c_.blocks; block += c_.parts, at += kQueries) {
      const int64_t row = block * kQueries, rows = std::min(kQueries, c_.queries - row);
      pack_rows(t_.q.rows(b, h) + row * t_.q.row, t_.q.row, rows, c_.width, query_ + at * wide_);
      std::fill(of_query_ + at * wide_, of_query_ + (at + rows) * wide_, A(0));
      for (int64_t r = 0; r < rows; ++r)
        along_[at + r] = signal_row(t_.reward.rows(b, h) + (row + r) * t_.reward.row,
                                    t_.out.rows(b, h) + (row + r) * t_.out.row, c_.out_width,
                                    t_.attnlrp, t_.eps, s_ + (at + r) * out_wide_);
    }
  }

  void one_block(int64_t b, int64_t h, int64_t row, int64_t rows, int64_t at, int64_t key,
                 int64_t count, A* of_k, A* of_v) {
    const int64_t columns = padded<A>(count);
    const A *query = query_ + at * wide_, *s = s_ + at * out_wide_;
    multiply_({query, wide_, 1}, rows, keys_transposed_, kKeys, c_.width, z_, kKeys, columns,
              false);
    multiply_({s, out_wide_, 1}, rows, values_transposed_, kKeys, c_.out_width, d_, kKeys, columns,
              false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = row + r, index = (b * c_.heads + h) * c_.queries + i;
      const int64_t visible = c_.causal ? std::clamp<int64_t>(i + 1 - key, 0, count) : count;
      A* z = z_ + r * kKeys;
      serial_loop(0, visible, [=, scale = A(c_.scale)](int64_t j) { z[j] *= scale; });
      const A* masked = z;
      if (t_.mask) {
        std::copy_n(z, visible, masked_);
        t_.mask.apply(b, h, i, key, visible, masked_);
        masked = masked_;
      }
      if (c_.rate > 0) keep_row(index * c_.keys + key, visible, c_.rate, c_.seed, keep_);
      feedback_row(z, d_ + r * kKeys, masked, c_.rate > 0 ? keep_ : nullptr, visible, columns,
                   t_.lse[index], along_[at + r], A(c_.scale), t_.attnlrp, t_.eps);
    }
    multiply_({z_, 1, kKeys}, count, s, out_wide_, rows, of_v, out_wide_, out_wide_, true);
    multiply_({d_, 1, kKeys}, count, query, wide_, rows, of_k, wide_, wide_, true);
    multiply_({d_, kKeys, 1}, rows, keys_, wide_, count, of_query_ + at * wide_, wide_, wide_,
              true);
  }

  void end(int64_t b, int64_t h, int64_t part) {
    int64_t at = 0;
    for (int64_t block = part; block < c_.blocks; block += c_.parts, at += kQueries)
      for (int64_t r = 0; r < std::min(kQueries, c_.queries - block * kQueries); ++r) {
        const int64_t i = block * kQueries + r;
        finish_row(of_query_ + (at + r) * wide_, t_.q.rows(b, h) + i * t_.q.row, c_.width,
                   t_.attnlrp, t_.of_q.rows(b, h) + i * t_.of_q.row);
      }
  }

  const Attention& c_;
  const Tensors<T>& t_;
  int64_t wide_, out_wide_;
  SmallProduct<A> multiply_;
  A *query_, *s_, *of_query_, *along_, *keys_, *keys_transposed_, *values_transposed_, *z_, *d_,
      *masked_, *keep_;
};

// Adds up the parts' shares of one key head and writes its rewards.
template <class T, class A>
void finish_keys(const Attention& c, A* shares, int64_t wide, HeadView<const T> x, HeadView<T> to,
                 int64_t width, bool attnlrp, int64_t b, int64_t head) {
  const int64_t size = c.keys * wide;
  for (int64_t part = 1; part < c.parts; ++part)
    serial_loop(0, size, [=](int64_t i) { shares[i] += shares[part * size + i]; });
  for (int64_t j = 0; j < c.keys; ++j)
    finish_row(shares + j * wide, x.rows(b, head) + j * x.row, width, attnlrp,
               to.rows(b, head) + j * to.row);
}

std::tuple<Tensor, Tensor, Tensor> attention_redistribute(Tensor q, Tensor k, Tensor v, Tensor out,
                                                          Tensor lse, Tensor reward,
                                                          std::optional<Tensor> mask, bool causal,
                                                          double scale, double dropout,
                                                          int64_t seed, bool attnlrp, double eps) {
  q = rows_contiguous(q), k = rows_contiguous(k), v = rows_contiguous(v);
  out = rows_contiguous(out), reward = rows_contiguous(reward), lse = dense(lse);
  const Attention call(q, k, v, causal, scale, dropout, seed);
  Tensor of_q = empty_heads(q, call.batch, call.heads, call.queries, call.width);
  Tensor of_k = empty_heads(q, call.batch, call.kv, call.keys, call.width);
  Tensor of_v = empty_heads(q, call.batch, call.kv, call.keys, call.out_width);
  dispatch_dtype(q.scalar_type(), "attention_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const Tensors<T> tensors{HeadView<const T>(q),
                             HeadView<const T>(k),
                             HeadView<const T>(v),
                             HeadView<const T>(out),
                             HeadView<const T>(reward),
                             data<const A>(lse),
                             Mask<T>(mask),
                             HeadView<T>(of_q),
                             attnlrp,
                             A(eps)};
    const int64_t wide = padded<A>(call.width), out_wide = padded<A>(call.out_width);
    const int64_t share = call.keys * (wide + out_wide);
    // All parts of one head in one task's memory where heads are many; else every part has its own.
    const int64_t heads = call.batch * call.kv;
    const bool cut = call.parts > 1;
    Tensor shares = torch::stable::new_empty(q, {cut ? call.tasks() * share : 0}, type_of<A>());
    const auto write = [&](int64_t head, A* of_keys, A* of_values) {
      const int64_t b = head / call.kv, h = head % call.kv;
      finish_keys<T, A>(call, of_keys, wide, tensors.k, HeadView<T>(of_k), call.width, attnlrp, b,
                        h);
      finish_keys<T, A>(call, of_values, out_wide, tensors.v, HeadView<T>(of_v), call.out_width,
                        attnlrp, b, h);
    };
    parallel_items(call.tasks(), kGrain, [&](int64_t first, int64_t last) {
      const Tensor scratch = torch::stable::new_empty(
          q, {Backward<T>::scratch(call) + (cut ? 0 : share)}, type_of<A>());
      Backward<T> worker(call, tensors, data<A>(scratch));
      for (int64_t task = first; task < last; ++task) {
        // of_k of all parts of a head, then of_v of all its parts
        const int64_t head = task / call.parts, part = task % call.parts;
        A* base = cut ? data<A>(shares) + head * call.parts * share
                      : data<A>(scratch) + Backward<T>::scratch(call);
        A* of_keys = base + part * call.keys * wide;
        A* of_values = base + call.parts * call.keys * wide + part * call.keys * out_wide;
        std::fill_n(of_keys, call.keys * wide, A(0));
        std::fill_n(of_values, call.keys * out_wide, A(0));
        worker.run(task, of_keys, of_values);
        if (!cut) write(head, of_keys, of_values);
      }
    });
    if (cut)
      parallel_items(heads, kGrain, [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; ++head) {
          A* base = data<A>(shares) + head * call.parts * share;
          write(head, base, base + call.parts * call.keys * wide);
        }
      });
  });
  return {of_q, of_k, of_v};
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("attention_redistribute", TORCH_BOX(&lfp::cpu::attention_redistribute));
}
