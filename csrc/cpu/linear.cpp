// Linear layer: z = x W^T + b.
//   s        = prologue(r, z)                 [N, O]
//   r_in     = input_epilogue(s W, x)         [N, I]
//   feedback = weight_epilogue(s^T x, W)      [O, I],  bias: weight_epilogue(sum_n s, b)
// The update form applies feedback to W tile by tile, right behind the product of that tile.
#include "one_pass.h"
#include "signal.h"
#include "update.h"

namespace lfp::cpu {
namespace {

// Elements of a tile of s^T x: at most about 1 MB, a core's own cache. A layer gives each thread at
// least four tiles, so that its feedback is never held whole, down to tiles not worth a call.
constexpr int64_t kLargestTile = 1 << 18;
constexpr int64_t kSmallestTile = 1 << 16;
constexpr int64_t kColumnBlock = 512;  // columns of W converted at a time
constexpr int64_t kTransposeBlock = 16;

constexpr const char* kOp = "linear_redistribute";

using Redistributed = std::tuple<Tensor, Tensor, Tensor>;

// One call's arguments, checked in Python and dense.
struct Layer {
  Tensor x, weight, z, reward;  // [N, I], [O, I], [N, O], [N, O]
  std::optional<Tensor> bias;   // [O]
  RuleCall call;
  int64_t n() const { return x.size(0); }
  int64_t in() const { return weight.size(1); }
  int64_t out() const { return weight.size(0); }
};

// r_in[N,I] with the products in the element type: one library product, epilogue in place.
template <class T>
Tensor input_whole(const Layer& layer, const Tensor& s) {
  Tensor g = product_nt(
      s, matrix_view(layer.weight, layer.weight.data_ptr(), layer.in(), layer.out(), 1, layer.in()),
      std::nullopt);
  T* gp = data<T>(g);
  const T* x = data<T>(layer.x);
  with_input_epilogue<T>(layer.call, kOp, [&](auto finish) {
    parallel_loop(g.numel(), [=](int64_t i) { store(gp, i, finish(load(gp, i), load(x, i))); });
  });
  return g;
}

// r_in[N,I] with the products in another type: W is converted a block of columns at a time.
template <class T, class P>
Tensor input_converted(const Layer& layer, const Tensor& s) {
  const int64_t n = layer.n(), in = layer.in(), out = layer.out();
  Tensor g = torch::stable::empty_like(layer.x);
  T* gp = data<T>(g);
  const T *x = data<T>(layer.x), *w = data<T>(layer.weight);
  const int64_t blocks = (in + kColumnBlock - 1) / kColumnBlock;
  with_input_epilogue<T>(layer.call, kOp, [&](auto finish) {
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
  if constexpr (std::is_same_v<T, P>) return input_whole<T>(layer, s);
  return input_converted<T, P>(layer, s);
}

// out[rows,N] = transpose of s[N, begin : begin+rows]
template <class P>
void transpose_columns(const P* s, P* out, int64_t n, int64_t stride, int64_t begin, int64_t rows) {
  for (int64_t o0 = 0; o0 < rows; o0 += kTransposeBlock) {
    const int64_t o1 = std::min(rows, o0 + kTransposeBlock);
    for (int64_t k = 0; k < n; ++k)
      for (int64_t o = o0; o < o1; ++o) out[o * n + k] = s[k * stride + begin + o];
  }
}

// visit(first row, rows, tile): tile[rows, I] = s[:, rows]^T x, tiles spread over the threads.
template <class P, class Visit>
void weight_tiles(const Tensor& s, const Tensor& x, Visit visit) {
  const int64_t n = x.size(0), in = x.size(1), out = s.size(1);
  if (in == 0 || out == 0) return;
  const int64_t work = std::max<int64_t>(n, 8) * in * out;
  const int64_t threads =
      std::clamp<int64_t>(work / kProductGrain, 1, torch::stable::get_num_threads());
  const int64_t share = (out + threads - 1) / threads;
  // Every thread gets the same number of tiles, of one height.
  const int64_t target = std::clamp(share * in / 4, kSmallestTile, kLargestTile);
  const int64_t each = std::max<int64_t>(1, (share * in + target / 2) / target);
  const int64_t rows = std::max<int64_t>((share + each - 1) / each, std::min<int64_t>(share, 16));
  const int64_t tiles = (out + rows - 1) / rows;
  const P* sp = data<P>(s);
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    if (n == 0) {  // an empty batch: feedback is zero, weight decay and momentum still act
      const std::vector<P> zeros(rows * in, P(0));
      for (int64_t t = first; t < last; ++t)
        visit(t * rows, std::min(rows, out - t * rows), zeros.data());
      return;
    }
    std::vector<P> columns(rows * n);
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = t * rows, count = std::min(rows, out - begin);
      transpose_columns(sp, columns.data(), n, out, begin, count);
      const Tensor a = matrix_view(s, columns.data(), count, n, n, 1);
      const Tensor b = matrix_view(x, x.data_ptr(), in, n, 1, in);
      const Tensor tile = product_nt(a, b, std::nullopt);
      visit(begin, count, data<P>(tile));
    }
  });
}

// sum_n s[N,O]
template <class P>
std::vector<Acc<P>> column_sums(const Tensor& s) {
  const int64_t n = s.size(0), out = s.size(1);
  const P* sp = data<P>(s);
  std::vector<Acc<P>> result(out, Acc<P>(0));
  Acc<P>* sums = result.data();
  torch::stable::parallel_for(0, out, std::max<int64_t>(64, kGrain / std::max<int64_t>(n, 1)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t k = 0; k < n; ++k)
                                  serial_loop(begin, end,
                                              [=](int64_t o) { sums[o] += load(sp, k * out + o); });
                              });
  return result;
}

Redistributed linear_redistribute(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                  Tensor reward, int64_t rule, Params params, bool need_input,
                                  bool need_weight, bool need_bias, int64_t chain,
                                  ScalarType product) {
  const Layer layer{dense(x), dense(weight), dense(z), dense(reward), bias, {rule, chain, params}};
  Redistributed result{none_like(x), none_like(weight), none_like(weight)};
  dispatch_types(x.scalar_type(), product, kOp, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    using A = Acc<T>;
    const Tensor s = signal<T, P>(layer.reward, layer.z, layer.call, kOp);
    const auto p = rule_params<A>(params);
    const int64_t in = layer.in();
    if (need_input) std::get<0>(result) = redistribute_input<T, P>(layer, s);
    dispatch_rule<A>(rule, kOp, [&](auto functor) {
      using Rule = decltype(functor);
      if (need_weight) {
        Tensor& feedback = std::get<1>(result) = torch::stable::empty_like(layer.weight);
        T* f = data<T>(feedback);
        const T* w = data<T>(layer.weight);
        weight_tiles<P>(
            s, as_product_type<T, P>(layer.x), [=](int64_t begin, int64_t rows, const P* tile) {
              feedback_range<T, Rule>(tile, w + begin * in, f + begin * in, rows * in, p);
            });
      }
      if (need_bias && bias.has_value()) {
        const auto sums = column_sums<P>(s);
        const Tensor b = dense(*bias);
        Tensor& feedback = std::get<2>(result) = torch::stable::empty_like(b);
        feedback_range<T, Rule>(sums.data(), data<T>(b), data<T>(feedback), layer.out(), p);
      }
    });
  });
  return result;
}

// W and its states take one optimizer step along weight_epilogue(s^T x, W).
template <class T, class P, class Rule, class Optimizer>
void update_weight(const Layer& layer, const Tensor& s, const std::vector<Tensor>& states,
                   RuleParams<Acc<T>> p, OptimizerParams<Acc<T>> h) {
  T* w = data<T>(layer.weight);
  const int64_t n = layer.n(), in = layer.in(), out = layer.out();
#if LFP_ONE_PASS
  if constexpr (std::is_same_v<T, float> && std::is_same_v<P, float>) {
    if (one_pass_pays(n, in, out)) {
      const int64_t groups = (out + kRows - 1) / kRows;
      const int64_t grain = std::max<int64_t>(1, kProductGrain / (n * in * kRows));
      torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
        one_pass_rows<Rule, Optimizer>(data<T>(s), data<T>(layer.x), w, state<T>(states, 0),
                                       state<T>(states, 1), n, in, out, first * kRows,
                                       std::min(out, last * kRows), p, h);
      });
      return;
    }
  }
#endif
  weight_tiles<P>(s, as_product_type<T, P>(layer.x),
                  [&](int64_t begin, int64_t rows, const P* tile) {
                    const int64_t at = begin * in;
                    update_range<T, Rule, Optimizer>(tile, w + at, state<T>(states, 0, at),
                                                     state<T>(states, 1, at), rows * in, p, h);
                  });
}

Tensor linear_redistribute_update(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z,
                                  Tensor reward, std::vector<Tensor> weight_state,
                                  std::vector<Tensor> bias_state, int64_t rule, Params params,
                                  int64_t optimizer, Params hyper, int64_t bias_optimizer,
                                  Params bias_hyper, bool need_input, int64_t chain,
                                  ScalarType product) {
  LFP_CHECK(weight.is_contiguous(), "linear_redistribute_update", "weight must be contiguous");
  const Layer layer{dense(x), weight, dense(z), dense(reward), bias, {rule, chain, params}};
  Tensor input_reward = none_like(x);
  const char* op = "linear_redistribute_update";
  dispatch_types(x.scalar_type(), product, op, [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    using A = Acc<T>;
    const Tensor s = signal<T, P>(layer.reward, layer.z, layer.call, kOp);
    const auto p = rule_params<A>(params);
    const int64_t in = layer.in();
    // The input product reads W before any tile of it changes.
    if (need_input) input_reward = redistribute_input<T, P>(layer, s);
    dispatch_rule<A>(rule, op, [&](auto functor) {
      dispatch_optimizer<A>(optimizer, op, [&](auto step) {
        using Rule = decltype(functor);
        using Optimizer = decltype(step);
        const auto h = optimizer_params<A>(hyper);
        update_weight<T, P, Rule, Optimizer>(layer, s, weight_state, p, h);
      });
      if (!bias.has_value()) return;
      const auto sums = column_sums<P>(s);
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
