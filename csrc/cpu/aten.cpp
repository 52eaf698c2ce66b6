#include "aten.h"

#include <array>
#include <string>

namespace lfp::cpu {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

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

}  // namespace

Tensor product_nt(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool relu) {
  const auto dtype = a.scalar_type();
  const bool empty = a.numel() == 0 || b.numel() == 0;
  if ((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && !empty && has_onednn())
    return onednn_linear(a, b, bias, relu);
  std::array<StableIValue, 3> stack{from(a), from(b), from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  Tensor out = to<Tensor>(stack[0]);
  if (relu) {
    std::array<StableIValue, 1> relu_stack{from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::relu_", "", relu_stack.data(), TORCH_ABI_VERSION));
    out = to<Tensor>(relu_stack[0]);
  }
  return out;
}

Tensor matrix_view(const Tensor& like, void* data, int64_t rows, int64_t cols, int64_t row_stride,
                   int64_t col_stride) {
  return torch::stable::from_blob(data, {rows, cols}, {row_stride, col_stride}, like.device(),
                                  like.scalar_type());
}

}  // namespace lfp::cpu
