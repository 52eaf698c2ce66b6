// Residual sum a + b: s = prologue(r, a + b), r_a = a * s, r_b = b * s, in one pass.
// Dropout: the reward times the mask, times 1 / (1 - p) where the mask scaled the activation.
#include "elementwise.cuh"

namespace lfp::cuda {
namespace {

template <class T, class Rule>
struct SumRedistribute {
  const T *a, *b, *reward;
  T *reward_a, *reward_b;
  RuleParams<Acc<T>> params;
  bool signal_in;

  template <int V>
  __device__ void operator()(int64_t i) const {
    Acc<T> va[V], vb[V], r[V];
    load<V>(a, i, va);
    load<V>(b, i, vb);
    load<V>(reward, i, r);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Acc<T> s = signal_in ? r[k] : Rule::prologue(r[k], va[k] + vb[k], params);
      va[k] = Rule::input_epilogue(s, va[k], params);
      vb[k] = Rule::input_epilogue(s, vb[k], params);
    }
    store<V>(reward_a, i, va);
    store<V>(reward_b, i, vb);
  }
};

std::tuple<Tensor, Tensor> sum_redistribute(Tensor a, Tensor b, Tensor reward, int64_t rule,
                                            Params params, int64_t chain) {
  const Device device(reward);
  reward = dense_any_order(reward);
  a = arranged_like(reward, a), b = arranged_like(reward, b);
  Tensor first = torch::stable::empty_like(reward), second = torch::stable::empty_like(reward);
  dispatch_dtype(reward.scalar_type(), "sum_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    dispatch_rule<A>(rule, "sum_redistribute", [&](auto functor) {
      const SumRedistribute<T, decltype(functor)> f{data<T>(a),
                                                    data<T>(b),
                                                    data<T>(reward),
                                                    data<T>(first),
                                                    data<T>(second),
                                                    rule_params<A>(params),
                                                    (chain & kSignalIn) != 0};
      elementwise_wide<T>(reward.numel(), device.stream, f, f.a, f.b, f.reward, f.reward_a,
                          f.reward_b);
    });
  });
  return {first, second};
}

template <class T>
struct DropoutRedistribute {
  const T* reward;
  const uint8_t* mask;
  T* out;
  Acc<T> scale;

  // A select, not a product: what the mask drops is 0 whatever stood there.
  template <int V>
  __device__ void operator()(int64_t i) const {
    Acc<T> r[V];
    load<V>(reward, i, r);
    const auto keep = *reinterpret_cast<const Pack<uint8_t, V>*>(mask + i);
#pragma unroll
    for (int k = 0; k < V; ++k) r[k] = keep.value[k] ? r[k] * scale : Acc<T>(0);
    store<V>(out, i, r);
  }
};

Tensor dropout_redistribute(Tensor reward, Tensor mask, double scale) {
  const Device device(reward);
  reward = dense_any_order(reward);
  mask = arranged_like(reward, mask);
  Tensor out = torch::stable::empty_like(reward);
  dispatch_dtype(reward.scalar_type(), "dropout_redistribute", [&](auto element) {
    using T = decltype(element);
    const DropoutRedistribute<T> f{data<T>(reward), data<uint8_t>(mask), data<T>(out),
                                   Acc<T>(scale)};
    elementwise_wide<T>(reward.numel(), device.stream, f, f.reward, f.mask, f.out);
  });
  return out;
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("sum_redistribute", TORCH_BOX(&lfp::cuda::sum_redistribute));
  m.impl("dropout_redistribute", TORCH_BOX(&lfp::cuda::dropout_redistribute));
}
