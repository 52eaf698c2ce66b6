// Memory layouts of tensors, shared by the CPU and the GPU code. A dense tensor x [N, C, *],
// whatever the order of its axes in memory, is [outer, C, inner] around its channel axis: inner = 1
// for channels_last.
#pragma once

#include <algorithm>
#include <array>

#include "common.h"

namespace lfp {

using torch::headeronly::MemoryFormat;

// An uninitialised tensor with the sizes and, where t is dense, the strides of t.
inline Tensor empty_like_as(const Tensor& t, ScalarType dtype) {
  using torch::headeronly::Layout;
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(t),
                                    from(std::optional<ScalarType>(dtype)),
                                    from(std::optional<Layout>()),
                                    from(std::optional<torch::stable::Device>()),
                                    from(std::optional<bool>()),
                                    from(std::optional<MemoryFormat>())};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Every element of the storage range belongs to exactly one element of t.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size)
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) axes.emplace_back(t.stride(d), t.size(d));
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// t itself when dense, else a copy that keeps the order of its axes, as torch.empty_like does.
inline Tensor dense_any_order(const Tensor& t) {
  if (is_dense(t)) return t;
  Tensor out = torch::stable::empty_like(t);
  torch::stable::copy_(out, t);
  return out;
}

// t, in its own dtype, with its elements where the dense tensor `like` of the same shape has them.
inline Tensor arranged_like(const Tensor& like, const Tensor& t) {
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d)
    same = same && (t.size(d) == 1 || t.stride(d) == like.stride(d));
  if (same || t.numel() == 0) return t;
  Tensor out = empty_like_as(like, t.scalar_type());
  torch::stable::copy_(out, t);
  return out;
}

struct ChannelView {
  int64_t outer, channels, inner;
};

// View of a dense x [N, C, *].
inline ChannelView channel_view(const Tensor& x) {
  const int64_t channels = x.size(1);
  if (channels <= 1 || x.numel() == 0) return {1, channels, channels ? x.numel() / channels : 0};
  return {x.numel() / (channels * x.stride(1)), channels, x.stride(1)};
}

// Whether the strides say channels last. The rule of at::Tensor::suggest_memory_format, which
// goes by the strides where sizes of 1 make both layouts the same memory; the fakes follow the
// same rule in lfp_kernels/ops/conv/layout.py.
inline bool strided_channels_last(const Tensor& t) {
  if ((t.dim() != 4 && t.dim() != 5) || t.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t k = 0; k < t.dim(); ++k) {
    const int64_t d = k == 0 ? 1 : (k == t.dim() - 1 ? 0 : t.dim() - k);  // channels, ..., batch
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * t.size(d);
  }
  return true;
}

inline MemoryFormat channels_last_or_plain(const Tensor& t, bool channels_last) {
  if (!channels_last) return MemoryFormat::Contiguous;
  return t.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// t itself when it has the format, else a copy that has.
inline Tensor in_format(const Tensor& t, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous && t.is_contiguous()) return t;
  return torch::stable::contiguous(t, format);
}

}  // namespace lfp
