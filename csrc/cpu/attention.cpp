// Scaled dot-product attention, forward: blocks of queries against blocks of keys with the softmax
// of what has been seen so far (Milakov & Gimelshein, arXiv 1805.02867), so that nothing of the
// size [L, S] exists.
#include "attention.h"

namespace lfp::cpu {
namespace {

// One query's row of Z against a block of keys: z[0, count) becomes probabilities relative to the
// largest logit seen so far, zeros beside; returns what its sums so far are to be multiplied by.
template <class A>
LFP_CLONES A softmax_step(A* z, int64_t count, int64_t wide, A& top, A& total) {
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  constexpr int64_t kParts = 32;
  const int64_t whole = count - count % kParts;
  A tops[kParts];
  for (A& t : tops) t = top;
  for (int64_t j = 0; j < whole; j += kParts)
    for (int64_t i = 0; i < kParts; ++i) tops[i] = z[j + i] > tops[i] ? z[j + i] : tops[i];
  for (int64_t j = whole; j < count; ++j) tops[0] = z[j] > tops[0] ? z[j] : tops[0];
  A highest = top;
  for (A t : tops) highest = t > highest ? t : highest;
  // NaN is no maximum, but it must not be lost.
  const A base = highest == kLowest ? A(0) : highest;
  const A factor = fast_exp(top - base);
  A sums[kParts] = {};
  for (int64_t j = 0; j < whole; j += kParts)
    for (int64_t i = 0; i < kParts; ++i) sums[i] += z[j + i] = fast_exp(z[j + i] - base);
  for (int64_t j = whole; j < count; ++j) sums[j - whole] += z[j] = fast_exp(z[j] - base);
  for (int64_t j = count; j < wide; ++j) z[j] = A(0);
  A sum = 0;
  for (A part : sums) sum += part;
  top = highest;
  total = total * factor + sum;
  return factor;
}

template <class A>
LFP_CLONES void scale_row(A* row, int64_t count, A factor) {
  for (int64_t i = 0; i < count; ++i) row[i] *= factor;
}

template <class T>
class Forward {
  using A = Acc<T>;

 public:
  Forward(const Attention& call, HeadView<const T> q, HeadView<const T> k, HeadView<const T> v,
          Mask<T> mask, HeadView<T> out, A* lse, A* scratch)
      : c_(call),
        q_(q),
        k_(k),
        v_(v),
        mask_(mask),
        out_(out),
        lse_(lse),
        multiply_(small_product<A>()) {
    for (auto [field, size] : {std::pair{&keys_, key_blocks() * kKeys * c_.width},
                               {&values_, c_.keys * padded<A>(c_.out_width)},
                               {&query_, kQueries * padded<A>(c_.width)},
                               {&z_, kQueries * kKeys},
                               {&sum_, kQueries * padded<A>(c_.out_width)},
                               {&keep_, kKeys}})
      *field = scratch, scratch += size;
  }

  static int64_t scratch(const Attention& c) {
    return (c.keys + kKeys) * c.width + c.keys * padded<A>(c.out_width) +
           kQueries * (padded<A>(c.width) + padded<A>(c.out_width) + kKeys) + kKeys;
  }

  void run(int64_t task) {
    const int64_t part = task % c_.parts, head = task / c_.parts % c_.kv;
    const int64_t b = task / c_.parts / c_.kv;
    for (int64_t i = 0; i < key_blocks(); ++i)
      pack_transposed(k_.rows(b, head) + i * kKeys * k_.row, k_.row,
                      std::min(kKeys, c_.keys - i * kKeys), c_.width, keys_ + i * kKeys * c_.width);
    pack_rows(v_.rows(b, head), v_.row, c_.keys, c_.out_width, values_);
    for (int64_t h = head * c_.shared; h < (head + 1) * c_.shared; ++h)
      for (int64_t block = part; block < c_.blocks; block += c_.parts) queries(b, h, block);
  }

 private:
  int64_t key_blocks() const { return (c_.keys + kKeys - 1) / kKeys; }

  void queries(int64_t b, int64_t h, int64_t block) {
    const int64_t row = block * kQueries, rows = std::min(kQueries, c_.queries - row);
    const int64_t wide = padded<A>(c_.width), out_wide = padded<A>(c_.out_width);
    pack_rows(q_.rows(b, h) + row * q_.row, q_.row, rows, c_.width, query_);
    std::fill(sum_, sum_ + rows * out_wide, A(0));
    A top[kQueries], total[kQueries];
    std::fill(top, top + rows, -std::numeric_limits<A>::infinity());
    std::fill(total, total + rows, A(0));
    const int64_t seen = c_.seen(row + rows);
    for (int64_t key = 0; key < seen; key += kKeys) {
      const int64_t count = std::min(kKeys, seen - key), columns = padded<A>(count);
      multiply_({query_, wide, 1}, rows, keys_ + key * c_.width, kKeys, c_.width, z_, kKeys,
                columns, false);
      for (int64_t r = 0; r < rows; ++r) {
        A* z = z_ + r * kKeys;
        const int64_t i = row + r;
        const int64_t visible = c_.causal ? std::clamp<int64_t>(i + 1 - key, 0, count) : count;
        scale_row(z, visible, A(c_.scale));
        if (mask_) mask_.apply(b, h, i, key, visible, z);
        const A factor = softmax_step(z, visible, columns, top[r], total[r]);
        if (factor != A(1) && key) scale_row(sum_ + r * out_wide, out_wide, factor);
        if (c_.rate > 0) drop(z, ((b * c_.heads + h) * c_.queries + i) * c_.keys + key, visible);
      }
      multiply_({z_, kKeys, 1}, rows, values_ + key * out_wide, out_wide, count, sum_, out_wide,
                out_wide, true);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = row + r;
      T* to = out_.rows(b, h) + i * out_.row;
      const A share = total[r] == A(0) ? A(1) : total[r];
      const A* from = sum_ + r * out_wide;
      for (int64_t j = 0; j < c_.out_width; ++j) store(to, j, from[j] / share);
      lse_[(b * c_.heads + h) * c_.queries + i] =
          total[r] == A(0) ? std::numeric_limits<A>::infinity() : top[r] + std::log(total[r]);
    }
  }

  void drop(A* z, int64_t index, int64_t count) {
    keep_row(index, count, c_.rate, c_.seed, keep_);
    for (int64_t j = 0; j < count; ++j) z[j] *= keep_[j];
  }

  const Attention& c_;
  HeadView<const T> q_, k_, v_;
  Mask<T> mask_;
  HeadView<T> out_;
  A* lse_;
  SmallProduct<A> multiply_;
  A *keys_, *values_, *query_, *z_, *sum_, *keep_;
};

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v,
                                             std::optional<Tensor> mask, bool causal, double scale,
                                             double dropout, int64_t seed) {
  q = rows_contiguous(q), k = rows_contiguous(k), v = rows_contiguous(v);
  const Attention call(q, k, v, causal, scale, dropout, seed);
  Tensor out = empty_heads(q, call.batch, call.heads, call.queries, call.out_width), lse = q;
  dispatch_dtype(q.scalar_type(), "attention_forward", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    lse = torch::stable::new_empty(q, {call.batch, call.heads, call.queries}, type_of<A>());
    if (lse.numel() == 0) return;
    parallel_items(call.tasks(), kGrain, [&](int64_t first, int64_t last) {
      const Tensor scratch = torch::stable::new_empty(q, {Forward<T>::scratch(call)}, type_of<A>());
      Forward<T> worker(call, HeadView<const T>(q), HeadView<const T>(k), HeadView<const T>(v),
                        Mask<T>(mask), HeadView<T>(out), data<A>(lse), data<A>(scratch));
      for (int64_t task = first; task < last; ++task) worker.run(task);
    });
  });
  return {out, lse};
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&lfp::cpu::attention_forward));
}
