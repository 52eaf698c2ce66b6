// Relevance through group norms of x [N, C, M].
#include "layer_norm.cuh"

namespace lfp::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> group_norm_redistribute(Tensor x, std::optional<Tensor> weight,
                                                           std::optional<Tensor> bias,
                                                           Tensor reward, int64_t groups,
                                                           double eps, double stabilizer,
                                                           bool identity) {
  const Device device(x);
  x = dense(x), reward = dense(reward);
  if (weight) weight = dense(*weight);
  if (bias) bias = dense(*bias);
  const int64_t channels = x.size(1);
  LFP_CHECK(groups > 0 && channels % groups == 0, "group_norm_redistribute",
            "groups: expected a divisor of ", channels, " channels, got ", groups);
  Tensor found = torch::stable::empty_like(x);
  Tensor weight_sum = new_sums(x, {channels}), bias_sum = new_sums(x, {channels});
  if (x.numel() == 0) {
    torch::stable::zero_(weight_sum), torch::stable::zero_(bias_sum);
    return {found, weight_sum, bias_sum};
  }
  dispatch_dtype(x.scalar_type(), "group_norm_redistribute", [&](auto element) {
    using T = decltype(element);
    const Norm<T> f{data<T>(x),
                    weight ? data<T>(*weight) : nullptr,
                    bias ? data<T>(*bias) : nullptr,
                    data<T>(reward),
                    data<T>(found),
                    x.size(0),
                    channels,
                    x.size(2),
                    groups,
                    Acc<T>(eps),
                    Acc<T>(stabilizer),
                    true,
                    identity};
    if (is_wide(f))
      launch_norm<T, kWide<T>>(f, x, weight_sum, bias_sum, device.stream);
    else
      launch_norm<T, 1>(f, x, weight_sum, bias_sum, device.stream);
  });
  return {found, weight_sum, bias_sum};
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("group_norm_redistribute", TORCH_BOX(&lfp::cuda::group_norm_redistribute));
}
