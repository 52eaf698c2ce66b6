// The linear layer's rules with two signals (docs/math.md, section 3): Wp, Wn the positive and the
// negative part of the mapped W, x_a and x_b the parts of x.
//   P        = x_a Wp^T + x_b Wn^T + bias's positive part      N = x_b Wp^T + x_a Wn^T + negative
//   u, v     = signals(r, z, P, N)
//   r_in     = x_a * (u Wp + v Wn) + x_b * (u Wn + v Wp)
//   feedback = sign(W) * (Wp * (u^T x_a + v^T x_b) + Wn * (u^T x_b + v^T x_a))
// Three packed products; the parts of W and x are formed while they are packed.
#include <memory>

#include "linear_layer.h"
#include "operands.h"
#include "update.h"

namespace lfp::cpu {
namespace {

constexpr const char* kOp = "linear_redistribute";
constexpr int64_t kSignalRows = 16;  // outputs of a block whose signals are made together

// Memory that is written before it is read.
template <class A>
using Buffer = std::unique_ptr<A[]>;

template <class T>
class Split {
  using A = Acc<T>;

 public:
  // by_sample, by_output: which orders of the signals are wanted.
  Split(const LinearLayer& layer, bool by_sample, bool by_output)
      : layer_(layer),
        code_(layer.call.rule),
        p_(rule_params<A>(layer.call.params)),
        n_(layer.n()),
        in_(layer.in()),
        out_(layer.out()),
        sides_(code_.signals == Signals::kPlus ? 1 : 2),
        one_sign_(code_.map != Map::kValue),
        signed_input_(code_.parts == Parts::kBox ||
                      (code_.parts == Parts::kSign && !(layer.call.chain & kNonnegative))),
        x_(data<T>(layer.x)),
        w_(data<T>(layer.weight)) {
    for (int side = 0; side < sides_; ++side) {
      if (by_sample) by_sample_[side].reset(new A[n_ * out_]);
      if (by_output) by_output_[side].reset(new A[out_ * n_]);
    }
    signals();
  }

  Tensor input_reward() const {
    Tensor result = torch::stable::empty_like(layer_.x);
    T* to = data<T>(result);
    PackedProduct<A> product{n_, in_, out_, sides_ == 2};
    product.pack_a = rows(by_sample_, out_);
    with_weight_parts<A>(code_.map, [&](auto f) {
      const bool both = !one_sign_ && (sides_ == 2 || signed_input_);
      product.pack_b = columns_of(Operand<T, decltype(f)>{w_, in_, f, both});
    });
    if (signed_input_) product.wants_cross = [this](const Tile<A>& t) { return needs_cross(t); };
    with_input_parts<A>(code_.parts, p_, [&](auto f) {
      const int64_t chain = layer_.call.chain;
      product.finish = [this, to, f, chain](const Tile<A>& t) {
        for (int64_t r = 0; r < t.rows; ++r) {
          const int64_t at = (t.row + r) * in_ + t.column;
          const T* x = x_ + at;
          T* out = to + at;
          const A *a = t.same + r * t.stride, *b = t.cross ? t.cross + r * t.stride : nullptr;
          const auto finish = [=](int64_t i, A reward) {
            store(out, i, derivative_below(reward, load(x, i), chain));
          };
          if (b)
            serial_loop(0, t.columns, [=](int64_t i) {
              const Parted<A> part = f(load(x, i));
              finish(i, part.first * a[i] + part.second * b[i]);
            });
          else
            serial_loop(0, t.columns, [=](int64_t i) { finish(i, f(load(x, i)).first * a[i]); });
        }
      };
    });
    product.run();
    return result;
  }

  // visit(at, count, feedback) for runs of weights; `at` in the contiguous W.
  template <class Visit>
  void weight_feedback(Visit visit) const {
    PackedProduct<A> product{out_, in_, n_, sides_ == 2};
    product.pack_a = rows(by_output_, n_);
    with_input_parts<A>(code_.parts, p_, [&](auto f) {
      product.pack_b = columns_of(Operand<T, decltype(f)>{x_, in_, f, signed_input_});
    });
    if (!one_sign_ && (sides_ == 2 || signed_input_))
      product.wants_cross = [](const Tile<A>&) { return true; };
    with_weight_parts<A>(code_.map, [&](auto f) {
      product.finish = [=, this](const Tile<A>& t) {
        for (int64_t r = 0; r < t.rows; ++r) {
          const int64_t at = (t.row + r) * in_ + t.column;
          const T* w = w_ + at;
          A *a = t.same + r * t.stride, *b = t.cross ? t.cross + r * t.stride : nullptr;
          if (b)
            serial_loop(0, t.columns, [=](int64_t i) {
              const A weight = load(w, i);
              const Parted<A> part = f(weight);
              a[i] = sign(weight) * (part.first * a[i] + part.second * b[i]);
            });
          else
            serial_loop(0, t.columns, [=](int64_t i) {
              const A weight = load(w, i);
              a[i] *= sign(weight) * f(weight).first;
            });
          visit(at, t.columns, a);
        }
      };
    });
    product.run();
  }

  std::vector<A> bias_feedback() const {
    std::vector<A> result(out_);
    const T* b = data<T>(*layer_.bias);
    torch::stable::parallel_for(0, out_, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n_)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t o = begin; o < end; ++o)
                                    result[o] = bias_feedback_of(load(b, o), o);
                                });
    return result;
  }

 private:
  // u and v, rows of the signals in one of their two orders, as A of a product.
  auto rows(const Buffer<A>* signals, int64_t stride) const {
    return [first = signals[0].get(), second = signals[1].get(), stride](const Panel& at,
                                                                         A* const* to) {
      const int64_t from = at.first * stride + at.k;
      pack_rows<false>(first + from, stride, at.count, at.depth, to[0], to[1], Whole<A>{});
      if (second)
        pack_rows<false>(second + from, stride, at.count, at.depth, to[1], to[1], Whole<A>{});
    };
  }

  bool needs_cross(const Tile<A>& t) const {
    return code_.parts != Parts::kSign ||
           any_negative(x_ + t.row * in_ + t.column, in_, t.rows, t.columns);
  }

  // One product over W as A: P and, for rules with two signals that differ, N.
  void signals() {
    PackedProduct<A> product{out_, n_, in_, !one_sign_};
    with_weight_parts<A>(code_.map, [&](auto f) {
      product.pack_a = rows_of(Operand<T, decltype(f)>{w_, in_, f, !one_sign_});
    });
    with_input_parts<A>(code_.parts, p_, [&](auto f) {
      product.pack_b = transposed_of(Operand<T, decltype(f)>{x_, in_, f, signed_input_});
    });
    if (sides_ == 2) product.wants_cross = [](const Tile<A>&) { return true; };
    product.finish = [this](const Tile<A>& t) { finish_signals(t); };
    product.run();
  }

  // The tile is P^T (and N^T): outputs by samples.
  void finish_signals(const Tile<A>& t) {
    const T *reward = data<T>(layer_.reward), *z = data<T>(layer_.z);
    const T* b = layer_.bias.has_value() ? data<T>(*layer_.bias) : nullptr;
    for (int64_t first = 0; first < t.rows; first += kSignalRows) {
      const int64_t last = std::min(t.rows, first + kSignalRows);
      A above[kSignalRows] = {}, under[kSignalRows] = {};
      for (int64_t r = first; b && r < last; ++r) {
        const A mapped = mapped_bias(code_, load(b, t.row + r));
        above[r - first] = positive_part(mapped), under[r - first] = negative_part(mapped);
      }
      for (int64_t c = 0; c < t.columns; ++c)
        for (int64_t r = first; r < last; ++r) {
          const int64_t output = t.row + r, sample = t.column + c, at = sample * out_ + output;
          const A positive = t.same[r * t.stride + c] + above[r - first];
          const A negative = t.cross ? t.cross[r * t.stride + c] + under[r - first] : A(0);
          const Sides<A> s =
              lfp::signals(code_.signals, load(reward, at), load(z, at), positive, negative, p_);
          const A side[2] = {s.u, s.v};
          for (int k = 0; k < sides_; ++k) {
            if (by_sample_[k]) by_sample_[k][at] = side[k];
            if (by_output_[k]) by_output_[k][output * n_ + sample] = side[k];
          }
        }
    }
  }

  A bias_feedback_of(A b, int64_t o) const {
    double sum[2] = {0, 0};
    for (int k = 0; k < sides_; ++k)
      for (int64_t i = 0; i < n_; ++i) sum[k] += by_output_[k][o * n_ + i];
    const A mapped = mapped_bias(code_, b);
    return sign(b) * (positive_part(mapped) * A(sum[0]) + negative_part(mapped) * A(sum[1]));
  }

  const LinearLayer& layer_;
  const RuleCode code_;
  const RuleParams<A> p_;
  const int64_t n_, in_, out_;
  const int sides_;          // signals that may differ from 0
  const bool one_sign_;      // the mapped weight is nowhere negative
  const bool signed_input_;  // x_b may differ from 0
  const T *x_, *w_;
  Buffer<A> by_sample_[2], by_output_[2];  // [N, O], [O, N]
};

}  // namespace

Redistributed linear_redistribute_split(const LinearLayer& layer, bool need_input, bool need_weight,
                                        bool need_bias) {
  Redistributed result{none_like(layer.x), none_like(layer.weight), none_like(layer.weight)};
  need_bias = need_bias && layer.bias.has_value();
  if (!need_input && !need_weight && !need_bias) return result;
  dispatch_dtype(layer.x.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    const Split<T> split(layer, need_input, need_weight || need_bias);
    if (need_input) std::get<0>(result) = split.input_reward();
    const auto stored = [](T* to, int64_t count, const Acc<T>* from) {
      serial_loop(0, count, [=](int64_t i) { store(to, i, from[i]); });
    };
    if (need_weight) {
      T* to = data<T>(std::get<1>(result) = torch::stable::empty_like(layer.weight));
      split.weight_feedback([=](int64_t at, int64_t count, const Acc<T>* feedback) {
        stored(to + at, count, feedback);
      });
    }
    if (need_bias) {
      T* to = data<T>(std::get<2>(result) = torch::stable::empty_like(*layer.bias));
      stored(to, layer.out(), split.bias_feedback().data());
    }
  });
  return result;
}

Tensor linear_update_split(const LinearLayer& layer, bool need_input, const StepCall& weight,
                           const StepCall& bias) {
  Tensor result = none_like(layer.x);
  dispatch_dtype(layer.x.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    const Split<T> split(layer, need_input, true);
    // The input product reads W before any tile of it changes.
    if (need_input) result = split.input_reward();
    T* w = data<T>(layer.weight);
    split.weight_feedback([&](int64_t at, int64_t count, const Acc<T>* feedback) {
      step_range(weight, w, at, count, feedback, kOp);
    });
    if (layer.bias.has_value() && bias.optimizer != kFrozen)
      step_range(bias, data<T>(*layer.bias), 0, layer.out(), split.bias_feedback().data(), kOp);
  });
  return result;
}

}  // namespace lfp::cpu
