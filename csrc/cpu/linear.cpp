// Linear layer: z = x W^T + b.
//   s        = prologue(r, z)                 [N, O]
//   r_in     = input_epilogue(s W, x)         [N, I]
//   feedback = weight_epilogue(s^T x, W)      [O, I],  bias: weight_epilogue(sum_n s, b)
// The update form applies feedback to W tile by tile, right behind the product of that tile.
#include <array>

#include "input_product.h"
#include "linear_layer.h"
#include "one_pass.h"
#include "update.h"
#include "weight_tiles.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kColumnBlock = 512;  // columns of W converted at a time

constexpr const char* kOp = "linear_redistribute";

using Layer = LinearLayer;

// r_in[N,I] with the products in the element type: one library product, epilogue in place.
template <class T>
Tensor input_whole(const Layer& layer, const Tensor& s, const Tensor& m) {
  Tensor g = product_nt(s, matrix_view(m, m.data_ptr(), layer.in(), layer.out(), 1, layer.in()),
                        std::nullopt);
  T* gp = data<T>(g);
  const T* x = data<T>(layer.x);
  with_input_epilogue<T>(layer.call, [&](auto finish) {
    parallel_loop(g.numel(), [=](int64_t i) { store(gp, i, finish(load(gp, i), load(x, i))); });
  });
  return g;
}

// r_in[N,I] with the products in another type: m is converted a block of columns at a time.
template <class T, class P>
Tensor input_converted(const Layer& layer, const Tensor& s, const Tensor& m) {
  const int64_t n = layer.n(), in = layer.in(), out = layer.out();
  Tensor g = torch::stable::empty_like(layer.x);
  T* gp = data<T>(g);
  const T *x = data<T>(layer.x), *w = data<T>(m);
  const int64_t blocks = (in + kColumnBlock - 1) / kColumnBlock;
  with_input_epilogue<T>(layer.call, [&](auto finish) {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      std::vector<P> columns(out * std::min(in, kColumnBlock));
      for (int64_t k = first; k < last; ++k) {
        const int64_t begin = k * kColumnBlock, width = std::min(kColumnBlock, in - begin);
        P* to = columns.data();
        for (int64_t o = 0; o < out; ++o)
          serial_loop(0, width, [=](int64_t i) {
            to[o * width + i] = static_cast<P>(load(w, o * in + begin + i));
          });
        const Tensor tile = product_nt(s, matrix_view(s, to, width, out, 1, width), std::nullopt);
        const P* t = data<P>(tile);
        for (int64_t r = 0; r < n; ++r)
          serial_loop(0, width, [=](int64_t i) {
            const int64_t at = r * in + begin + i;
            store(gp, at, finish(static_cast<Acc<T>>(t[r * width + i]), load(x, at)));
          });
      }
    });
  });
  return g;
}

template <class T, class P>
Tensor redistribute_input(const Layer& layer, const Tensor& s) {
  if (layer.x.numel() == 0 || layer.out() == 0)
    return torch::stable::new_zeros(layer.x, layer.x.sizes());
  const Matrix kind = RuleCode(layer.call.rule).matrix;
  if (kind != Matrix::kWeight && kind != Matrix::kGiven) return linear_formed_input(layer, s);
  const Tensor& m = kind == Matrix::kGiven ? *layer.matrix : layer.weight;
#if LFP_WIDE
  if constexpr (kHasWide<P>)
    if (input_product_pays<P>(layer.n(), layer.in(), layer.out())) {
      Tensor g = torch::stable::empty_like(layer.x);
      with_input_epilogue<T>(layer.call, [&](auto finish) {
        input_product(data<P>(s), data<T>(m), data<T>(layer.x), data<T>(g), layer.n(), layer.in(),
                      layer.out(), finish);
      });
      return g;
    }
#endif
  if constexpr (std::is_same_v<T, P>) return input_whole<T>(layer, s, m);
  return input_converted<T, P>(layer, s, m);
}

// The arguments as the kernels read them.
Layer layer_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const Tensor& z, const Tensor& reward, const std::optional<Tensor>& matrix,
               const RuleCall& call) {
  const auto dense_or_none = [](const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
  };
  return {dense(x),      dense(weight),       dense(z),
          dense(reward), dense_or_none(bias), dense_or_none(matrix),
          call};
}

// sums[O] = sum_n s[N,O], where no tile of the weight makes it.
template <class P>
void column_sums(const Tensor& s, double* sums) {
  const int64_t n = s.size(0), out = s.size(1);
  const P* sp = data<P>(s);
  torch::stable::parallel_for(0, out, std::max<int64_t>(64, kGrain / std::max<int64_t>(n, 1)),
                              [&](int64_t begin, int64_t end) {
                                add_column_sums(sp + begin, out, n, end - begin, sums + begin);
                              });
}

// The feedback of weight i goes into the optimizer's step of W and its states a, b (null where the
// optimizer has none).
template <class T, class Rule, class Optimizer>
struct UpdateWeight {
  using Element = T;
  T *w, *a, *b;
  RuleParams<Acc<T>> p;
  OptimizerParams<Acc<T>> h;
  static constexpr int64_t kArrays = 1 + Optimizer::kStates;
  std::array<const T*, 3> read() const { return {w, a, b}; }
  LFP_HD void operator()(Acc<T> raw, int64_t i) const {
    update_one<Rule, Optimizer>(raw, w, a, b, i, p, h);
  }
};

// It is stored.
template <class T, class Rule>
struct StoreFeedback {
  using Element = T;
  const T* w;
  T* feedback;
  RuleParams<Acc<T>> p;
  static constexpr int64_t kArrays = 1;
  std::array<const T*, 1> read() const { return {w}; }
  LFP_HD void operator()(Acc<T> raw, int64_t i) const {
    store(feedback, i, Rule::weight_epilogue(raw, load(w, i), p));
  }
};

// finish(raw, i) for the elements i of s^T x [O, I], a tile at a time, while it is in cache. Where
// `sums` is not null it gets sum_n s.
template <class T, class P, class Finish>
void weight_product(const Layer& layer, const Tensor& s, Finish finish, double* sums) {
  const int64_t n = layer.n(), in = layer.in(), out = layer.out();
#if LFP_WIDE
  if constexpr (kHasWide<P>)
    if (one_pass_pays<P>(n, in, out)) {
      if (sums) column_sums<P>(s, sums);
      return one_pass<P>(data<P>(s), data<T>(layer.x), finish, n, in, out);
    }
#endif
  if (sums && in == 0) column_sums<P>(s, sums);
  signal_tiles<P>(
      s, as_product_type<T, P>(layer.x), sums, [=](int64_t begin, int64_t rows, const P* tile) {
        const int64_t at = begin * in;
        serial_loop(0, rows * in, [=](int64_t i) { finish(static_cast<Acc<T>>(tile[i]), at + i); });
      });
}

Redistributed linear_redistribute(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                  Tensor reward, std::optional<Tensor> matrix, int64_t rule,
                                  Params params, bool need_input, bool need_weight, bool need_bias,
                                  int64_t chain, ScalarType product) {
  const Layer layer = layer_of(x, weight, bias, z, reward, matrix, {rule, chain, params});
  if (RuleCode(rule).split())
    return linear_redistribute_split(layer, need_input, need_weight, need_bias);
  Redistributed result{none_like(x), none_like(weight), none_like(weight)};
  dispatch_types(x.scalar_type(), product, kOp, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    using A = Acc<T>;
    const Tensor s = signal<T, P>(layer.reward, layer.z, layer.call, kOp);
    const auto p = rule_params<A>(params);
    if (need_input) std::get<0>(result) = redistribute_input<T, P>(layer, s);
    dispatch_weight_epilogue<A>(RuleCode(rule).weight, kOp, [&](auto functor) {
      using Rule = decltype(functor);
      std::vector<double> sums(need_bias && bias ? layer.out() : 0, 0.0);
      double* to_bias = sums.empty() ? nullptr : sums.data();
      if (need_weight) {
        const Tensor& w = layer.weight;
        const Tensor& feedback = std::get<1>(result) = torch::stable::empty_like(w);
        weight_product<T, P>(layer, s, StoreFeedback<T, Rule>{data<T>(w), data<T>(feedback), p},
                             to_bias);
      }
      if (to_bias) {
        if (!need_weight) column_sums<P>(s, to_bias);
        const Tensor& b = *layer.bias;
        Tensor& feedback = std::get<2>(result) = torch::stable::empty_like(b);
        feedback_range<T, Rule>(sums.data(), data<T>(b), data<T>(feedback), layer.out(), p);
      }
    });
  });
  return result;
}

Tensor linear_redistribute_update(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                  Tensor reward, std::optional<Tensor> matrix,
                                  std::vector<Tensor> weight_state, std::vector<Tensor> bias_state,
                                  int64_t rule, Params params, int64_t optimizer, Params hyper,
                                  int64_t bias_optimizer, Params bias_hyper, bool need_input,
                                  int64_t chain, ScalarType product) {
  LFP_CHECK(weight.is_contiguous(), "linear_redistribute_update", "weight must be contiguous");
  const Layer layer = layer_of(x, weight, bias, z, reward, matrix, {rule, chain, params});
  if (RuleCode(rule).split())
    return linear_update_split(layer, need_input, {optimizer, hyper, weight_state},
                               {bias_optimizer, bias_hyper, bias_state});
  Tensor input_reward = none_like(x);
  const char* op = "linear_redistribute_update";
  dispatch_types(x.scalar_type(), product, op, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    using A = Acc<T>;
    const Tensor s = signal<T, P>(layer.reward, layer.z, layer.call, kOp);
    const auto p = rule_params<A>(params);
    // The input product reads W before any tile of it changes.
    if (need_input) input_reward = redistribute_input<T, P>(layer, s);
    std::vector<double> sums(bias ? layer.out() : 0, 0.0);
    dispatch_weight_epilogue<A>(RuleCode(rule).weight, op, [&](auto functor) {
      dispatch_optimizer<A>(optimizer, op, [&](auto step) {
        using Rule = decltype(functor);
        using Optimizer = decltype(step);
        const UpdateWeight<T, Rule, Optimizer> update{
            data<T>(layer.weight), state<T>(weight_state, 0), state<T>(weight_state, 1), p,
            optimizer_params<A>(hyper)};
        weight_product<T, P>(layer, s, update, bias ? sums.data() : nullptr);
      });
      if (!bias.has_value()) return;
      dispatch_optimizer<A>(bias_optimizer, op, [&](auto step) {
        update_range<T, decltype(functor), decltype(step)>(
            sums.data(), data<T>(*bias), state<T>(bias_state, 0), state<T>(bias_state, 1),
            layer.out(), p, optimizer_params<A>(bias_hyper));
      });
    });
  });
  return input_reward;
}

Tensor linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu) {
  return product_nt(x, weight, bias, relu);
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&lfp::cpu::linear_forward));
  m.impl("linear_redistribute", TORCH_BOX(&lfp::cpu::linear_redistribute));
  m.impl("linear_redistribute_update", TORCH_BOX(&lfp::cpu::linear_redistribute_update));
}
