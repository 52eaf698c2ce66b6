// Residual sum a + b: s = prologue(r, a + b), r_a = a * s, r_b = b * s, in one pass.
// Dropout: the reward times the mask, times 1 / (1 - p) where the mask scaled the activation.
#include "../layout.h"
#include "loops.h"
#include "signal.h"

namespace lfp::cpu {
namespace {

std::tuple<Tensor, Tensor> sum_redistribute(Tensor a, Tensor b, Tensor reward, int64_t rule,
                                            Params params, int64_t chain) {
  reward = dense_any_order(reward);
  a = arranged_like(reward, a), b = arranged_like(reward, b);
  Tensor first = torch::stable::empty_like(reward), second = torch::stable::empty_like(reward);
  dispatch_dtype(reward.scalar_type(), "sum_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const auto p = rule_params<A>(params);
    const T *ap = data<T>(a), *bp = data<T>(b), *r = data<T>(reward);
    T *fp = data<T>(first), *sp = data<T>(second);
    const bool signal_in = chain & kSignalIn;
    dispatch_rule<A>(rule, "sum_redistribute", [&](auto functor) {
      using Rule = decltype(functor);
      parallel_loop(reward.numel(), [=](int64_t i) {
        const A va = load(ap, i), vb = load(bp, i), vr = load(r, i);
        const A s = signal_in ? vr : Rule::prologue(vr, va + vb, p);
        store(fp, i, Rule::input_epilogue(s, va, p));
        store(sp, i, Rule::input_epilogue(s, vb, p));
      });
    });
  });
  return {first, second};
}

Tensor dropout_redistribute(Tensor reward, Tensor mask, double scale) {
  reward = dense_any_order(reward);
  mask = arranged_like(reward, mask);
  Tensor out = torch::stable::empty_like(reward);
  dispatch_dtype(reward.scalar_type(), "dropout_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const T* r = data<T>(reward);
    const uint8_t* m = data<uint8_t>(mask);
    T* to = data<T>(out);
    const A factor = A(scale);
    // A select, not a product: what the mask drops is 0 whatever stood there.
    parallel_loop(reward.numel(),
                  [=](int64_t i) { store(to, i, m[i] ? load(r, i) * factor : A(0)); });
  });
  return out;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("sum_redistribute", TORCH_BOX(&lfp::cpu::sum_redistribute));
  m.impl("dropout_redistribute", TORCH_BOX(&lfp::cpu::dropout_redistribute));
}
