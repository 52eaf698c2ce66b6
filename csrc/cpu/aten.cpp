#include "aten.h"

#include <array>
#include <string>

namespace lfp::cpu {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kSmallProduct = 1 << 18;  // multiply-adds

Tensor onednn_linear(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                     bool relu) {
  std::array<StableIValue, 6> stack{from(a),
                                    from(b),
                                    from(bias),
                                    from(std::string(relu ? "relu" : "none")),
                                    from(std::vector<std::optional<double>>{}),
                                    from(std::optional<std::string>(""))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// Convolution with bias and ReLU in one pass over z.
Tensor onednn_convolution_relu(const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const ConvGeometry& g) {
  std::array<StableIValue, 10> stack{from(x),
                                     from(weight),
                                     from(bias),
                                     from(g.padding),
                                     from(g.stride),
                                     from(g.dilation),
                                     from(g.groups),
                                     from(std::string("relu")),
                                     from(std::vector<std::optional<double>>{}),
                                     from(std::optional<std::string>(""))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("mkldnn::_convolution_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// oneDNN's AVX-512 and AMX products run at full width on every vendor's processors; MKL, behind
// aten::mm, takes a narrower path on some. A build of torch without oneDNN keeps aten.
bool probe_onednn() {
  try {
    const Tensor a = torch::stable::full({1, 1}, 1.0, ScalarType::Float, std::nullopt,
                                         torch::stable::Device(torch::headeronly::DeviceType::CPU));
    onednn_linear(a, a, std::nullopt, false);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

bool has_onednn() {
  static const bool present = probe_onednn();
  return present;
}

Tensor relu_(const Tensor& t) {
  std::array<StableIValue, 1> stack{from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu_", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// The bias gradient is never asked for: oneDNN would compute the weight gradient again for it.
std::array<Tensor, 2> convolution_backward(const Tensor& s, const Tensor& x, const Tensor& weight,
                                           const ConvGeometry& g, bool input) {
  const std::array<bool, 3> mask{input, !input, false};
  std::array<StableIValue, 11> stack{
      from(s),
      from(x),
      from(weight),
      from(std::optional<Ints>()),
      from(g.stride),
      from(g.padding),
      from(g.dilation),
      from(g.transposed),
      from(g.output_padding),
      from(g.groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[2]);  // undefined; taken to be released
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace

Tensor product_nt(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool relu) {
  const auto dtype = a.scalar_type();
  // oneDNN wakes every thread, however small the product; the small ones stay on this one.
  const bool small = a.numel() * b.size(0) < kSmallProduct;
  if ((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && !small && has_onednn())
    return onednn_linear(a, b, bias, relu);
  std::array<StableIValue, 3> stack{from(a), from(b), from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor out = to<Tensor>(stack[0]);
  return relu ? relu_(out) : out;
}

Tensor matrix_view(const Tensor& like, void* data, int64_t rows, int64_t cols, int64_t row_stride,
                   int64_t col_stride) {
  return torch::stable::from_blob(data, {rows, cols}, {row_stride, col_stride}, like.device(),
                                  like.scalar_type());
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const ConvGeometry& g, bool relu) {
  if (relu && x.scalar_type() == ScalarType::Float && x.dim() > 3 && x.numel() > 0 &&
      !g.transposed && has_onednn())
    return onednn_convolution_relu(x, weight, bias, g);
  std::array<StableIValue, 9> stack{
      from(x),         from(weight),     from(bias),         from(g.stride),
      from(g.padding), from(g.dilation), from(g.transposed), from(g.output_padding),
      from(g.groups)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor out = to<Tensor>(stack[0]);
  return relu ? relu_(out) : out;
}

Tensor convolution_input(const Tensor& s, const Tensor& x, const Tensor& weight,
                         const ConvGeometry& geometry) {
  return convolution_backward(s, x, weight, geometry, true)[0];
}

Tensor convolution_weight(const Tensor& s, const Tensor& x, const Tensor& weight,
                          const ConvGeometry& geometry) {
  return convolution_backward(s, x, weight, geometry, false)[1];
}

}  // namespace lfp::cpu
