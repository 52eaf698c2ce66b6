// Direct feedback alignment: the error of the output reaches a layer through a matrix of its own.
//   delta    = (error D) * f'(a)      [N, O], a the layer's activation
//   feedback = delta^T x              [O, I],  bias: sum_n delta
// and one optimizer step. delta exists a tile of outputs at a time; no other layer is involved.
#include "signal.h"
#include "update.h"
#include "weight_tiles.h"

namespace lfp::cpu {
namespace {

constexpr const char* kOp = "direct_update";

// Dense arguments, error, matrix and x in the product type.
struct Direct {
  Tensor x, error, matrix, activation;  // [N, I], [N, C], [C, O], [N, O]
  int64_t derivative;                   // chain bit of f, 0 for none
};

// columns[rows, N] = delta^T of outputs [begin, begin + rows), sums[rows] its row sums.
template <class T, class P>
void form_delta(const Direct& d, int64_t begin, int64_t rows, P* columns, double* sums) {
  const int64_t n = d.error.size(0), classes = d.error.size(1), out = d.matrix.size(1);
  std::vector<P> part(rows * classes);
  transpose_columns(data<P>(d.matrix), part.data(), classes, out, begin, rows);
  const Tensor product =
      product_nt(matrix_view(d.error, part.data(), rows, classes, classes, 1),
                 matrix_view(d.error, d.error.data_ptr(), n, classes, classes, 1), std::nullopt);
  const P* from = data<P>(product);
  const T* a = data<T>(d.activation);
  std::fill(sums, sums + rows, 0.0);
  for (int64_t o0 = 0; o0 < rows; o0 += kTransposeBlock) {
    const int64_t o1 = std::min(rows, o0 + kTransposeBlock);
    for (int64_t k = 0; k < n; ++k)
      for (int64_t o = o0; o < o1; ++o) {
        Acc<T> delta = load(from, o * n + k);
        if (d.derivative)
          delta = derivative_below(delta, load(a, k * out + begin + o), d.derivative);
        columns[o * n + k] = static_cast<P>(delta);
        sums[o] += delta;
      }
  }
}

template <class T, class P, class Optimizer>
std::vector<double> update_weight(const Direct& d, const Tensor& weight,
                                  const std::vector<Tensor>& states,
                                  OptimizerParams<Acc<T>> hyper) {
  T* w = data<T>(weight);
  const int64_t in = weight.size(1), out = weight.size(0);
  std::vector<double> sums(out, 0.0);
  if (in == 0 && d.x.size(0) > 0) {  // the bias alone
    std::vector<P> columns(out * d.x.size(0));
    form_delta<T, P>(d, 0, out, columns.data(), sums.data());
  }
  weight_tiles<P>(
      d.x, out,
      [&](int64_t begin, int64_t rows, P* columns) {
        form_delta<T, P>(d, begin, rows, columns, sums.data() + begin);
      },
      [&](int64_t begin, int64_t rows, const P* tile) {
        const int64_t at = begin * in;
        update_range<T, Gradient<Acc<T>>, Optimizer>(tile, w + at, state<T>(states, 0, at),
                                                     state<T>(states, 1, at), rows * in, {}, hyper);
      });
  return sums;
}

// f(T{}, P{}): fp16 products run in float32.
template <class F>
void dispatch_own_types(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Half) return f(Half{}, float{});
  dispatch_dtype(dtype, kOp, [&](auto element) { f(element, element); });
}

void direct_update(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor error, Tensor matrix,
                   Tensor activation, std::vector<Tensor> weight_state,
                   std::vector<Tensor> bias_state, int64_t derivative, int64_t optimizer,
                   Params hyper, int64_t bias_optimizer, Params bias_hyper) {
  LFP_CHECK(weight.is_contiguous(), "direct_update", "weight must be contiguous");
  dispatch_own_types(x.scalar_type(), [&](auto element, auto factor) {
    using T = decltype(element);
    using P = decltype(factor);
    using A = Acc<T>;
    const Direct d{as_product_type<T, P>(dense(x)), as_product_type<T, P>(dense(error)),
                   as_product_type<T, P>(dense(matrix)), dense(activation), derivative};
    std::vector<double> sums;
    dispatch_optimizer<A>(optimizer, kOp, [&](auto step) {
      sums =
          update_weight<T, P, decltype(step)>(d, weight, weight_state, optimizer_params<A>(hyper));
    });
    if (!bias.has_value()) return;
    dispatch_optimizer<A>(bias_optimizer, kOp, [&](auto step) {
      update_range<T, Gradient<A>, decltype(step)>(
          sums.data(), data<T>(*bias), state<T>(bias_state, 0), state<T>(bias_state, 1),
          bias->numel(), {}, optimizer_params<A>(bias_hyper));
    });
  });
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("direct_update", TORCH_BOX(&lfp::cpu::direct_update));
}
