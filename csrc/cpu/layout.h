// Memory layouts of activations. A dense tensor x [N, C, *], whatever the order of its axes in
// memory, is [outer, C, inner] around its channel axis: inner = 1 for channels_last.
#pragma once

#include "aten.h"
#include "loops.h"

namespace lfp::cpu {

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

// parallel_for over items of `elements` elements each, serial when the whole is small.
template <class F>
void parallel_items(int64_t items, int64_t elements, F f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  if (items <= grain) {
    if (items > 0) f(int64_t(0), items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, f);
}

}  // namespace lfp::cpu
