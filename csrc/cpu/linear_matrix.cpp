// The linear layer's input product with a feedback matrix M(W, B, draw) that is formed while it is
// packed (csrc/rules.h: matrix): no more of it exists than a panel.
#include "linear_layer.h"
#include "matrix_range.h"
#include "operands.h"

namespace lfp::cpu {
namespace {

constexpr const char* kOp = "linear_redistribute";

// to[j][c] = M[k + j, first + c]; W and B [O, I].
template <Matrix kind, class T, class A>
LFP_CLONES void pack_matrix(const T* w, const T* given, int64_t in, const Panel& at,
                            RuleParams<A> p, A* to) {
  constexpr int64_t kWidth = kPanelColumns<A>;
  for (int64_t j = 0; j < at.depth; ++j, to += kWidth) {
    form_run<kind>(w, given, (at.k + j) * in + at.first, at.count, p, to);
    for (int64_t c = at.count; c < kWidth; ++c) to[c] = A(0);
  }
}

// s of the product type, as A.
template <class A>
std::function<void(const Panel&, A* const*)> rows_of_signal(const Tensor& s, int64_t out) {
  std::function<void(const Panel&, A* const*)> pack;
  dispatch_dtype(s.scalar_type(), kOp, [&](auto factor) {
    using P = decltype(factor);
    if constexpr (std::is_same_v<Acc<P>, A>)
      pack = rows_of(Operand<P, Whole<A>>{data<P>(s), out, {}, false});
  });
  return pack;
}

}  // namespace

Tensor linear_formed_input(const LinearLayer& layer, const Tensor& s) {
  const int64_t in = layer.in(), out = layer.out();
  Tensor result = torch::stable::empty_like(layer.x);
  dispatch_dtype(layer.x.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const auto p = rule_params<A>(layer.call.params);
    const T *w = data<T>(layer.weight), *x = data<T>(layer.x);
    const T* given = layer.matrix.has_value() ? data<T>(*layer.matrix) : nullptr;
    T* to = data<T>(result);
    PackedProduct<A> product{layer.n(), in, out, false};
    product.pack_a = rows_of_signal<A>(s, out);
    dispatch_formed_matrix(RuleCode(layer.call.rule).matrix, [&](auto kind) {
      product.pack_b = [=](const Panel& at, A* const* packed) {
        pack_matrix<decltype(kind)::value>(w, given, in, at, p, packed[0]);
        return 1;
      };
    });
    with_input_epilogue<T>(layer.call, [&](auto finish) {
      product.finish = [=](const Tile<A>& t) {
        for (int64_t r = 0; r < t.rows; ++r) {
          const int64_t at = (t.row + r) * in + t.column;
          const A* g = t.same + r * t.stride;
          serial_loop(0, t.columns,
                      [=](int64_t i) { store(to, at + i, finish(g[i], load(x, at + i))); });
        }
      };
    });
    product.run();
  });
  return result;
}

}  // namespace lfp::cpu
