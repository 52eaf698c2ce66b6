// Which of the two layouts of [N, C, ...] tensors an operator works in: plain or channels last.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../common.h"

namespace lfp::cpu {

using torch::headeronly::MemoryFormat;

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

}  // namespace lfp::cpu
