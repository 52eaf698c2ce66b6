#include "aten.h"

#include <array>

// oneDNN's products by torch's C interface, not by the dispatcher: torch 2.13 loses 48 bytes at
// every string that is handed to that, which lie between the tensors and keep the heap from being
// reused. Weak: null in a build of torch without oneDNN.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* activation,
    const double** scalars, int64_t scalar_count, const char** algorithm, AtenTensorHandle* out);
__attribute__((weak)) AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const int64_t* padding,
    int64_t padding_count, const int64_t* stride, int64_t stride_count, const int64_t* dilation,
    int64_t dilation_count, int64_t groups, const char* activation, const double** scalars,
    int64_t scalar_count, const char** algorithm, AtenTensorHandle* out);
}

namespace lfp::cpu {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kSmallProduct = 1 << 18;  // multiply-adds

Tensor onednn_linear(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                     bool relu) {
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, out = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(a.get(), b.get(), bias ? &bias_handle : nullptr,
                                       relu ? "relu" : "none", nullptr, 0, nullptr, &out));
  return Tensor(out);
}

// Convolution with bias and ReLU in one pass over z.
Tensor onednn_convolution_relu(const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const ConvGeometry& g) {
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mkldnn__convolution_pointwise(
      x.get(), weight.get(), bias ? &bias_handle : nullptr, g.padding.data(), g.padding.size(),
      g.stride.data(), g.stride.size(), g.dilation.data(), g.dilation.size(), g.groups, "relu",
      nullptr, 0, nullptr, &out));
  return Tensor(out);
}

// oneDNN's AVX-512 and AMX products run at full width on every vendor's processors; MKL, behind
// aten::mm, takes a narrower path on some. A build of torch without oneDNN keeps aten.
bool probe_onednn() {
  if (!aoti_torch_cpu__linear_pointwise || !aoti_torch_cpu_mkldnn__convolution_pointwise)
    return false;
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
