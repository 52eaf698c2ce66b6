// Pools over planes. Max pooling (1-d and 2-d) keeps the winner's flat index in its plane; its
// redistribution scatters into planes that stay in cache. Average pools use ATen's transposes
// between the two elementwise passes of the rule.
#include <array>
#include <cmath>
#include <limits>

#include "layout.h"
#include "memory_format.h"
#include "signal.h"

namespace lfp::cpu {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

struct Window {
  int64_t kernel, stride, padding, dilation, in, out;
  int64_t start(int64_t o) const { return o * stride - padding; }
  // Taps [first, last) of the window at output o that fall inside the input.
  int64_t first(int64_t o) const {
    const int64_t s = start(o);
    return s < 0 ? (-s + dilation - 1) / dilation : 0;
  }
  int64_t last(int64_t o) const {
    return std::min(kernel, (in - start(o) + dilation - 1) / dilation);
  }
};

// One plane [H, W] -> [h, w], row-major.
template <class T>
void max_pool_plane(const T* x, T* z, int32_t* winner, const Window& rows, const Window& cols) {
  for (int64_t i = 0; i < rows.out; ++i)
    for (int64_t j = 0; j < cols.out; ++j) {
      Acc<T> best = -std::numeric_limits<Acc<T>>::infinity();
      int32_t at = -1;
      for (int64_t a = rows.first(i); a < rows.last(i); ++a)
        for (int64_t b = cols.first(j); b < cols.last(j); ++b) {
          const int64_t k = (rows.start(i) + a * rows.dilation) * cols.in + cols.start(j) +
                            b * cols.dilation;
          const Acc<T> v = load(x, k);
          if (at < 0 || v > best || std::isnan(v)) best = v, at = static_cast<int32_t>(k);
        }
      store(z, i * cols.out + j, best);
      winner[i * cols.out + j] = at;
    }
}

// The common plane: windows of 2 x 2 side by side, without branches.
template <class T>
LFP_CLONES void max_pool_plane_2x2(const T* x, T* z, int32_t* winner, int64_t height,
                                   int64_t width, int64_t stride) {
  for (int64_t i = 0; i < height; ++i) {
    const int64_t top = 2 * i * stride;
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      const int64_t k = top + 2 * j;
      Acc<T> best = load(x, k);
      int32_t at = static_cast<int32_t>(k);
      const Acc<T> v1 = load(x, k + 1), v2 = load(x, k + stride), v3 = load(x, k + stride + 1);
      bool take = v1 > best || v1 != v1;
      best = take ? v1 : best, at = take ? static_cast<int32_t>(k + 1) : at;
      take = v2 > best || v2 != v2;
      best = take ? v2 : best, at = take ? static_cast<int32_t>(k + stride) : at;
      take = v3 > best || v3 != v3;
      best = take ? v3 : best, at = take ? static_cast<int32_t>(k + stride + 1) : at;
      store(z, i * width + j, best);
      winner[i * width + j] = at;
    }
  }
}

// One tap of a channels-last window, all channels at once.
template <class T>
LFP_CLONES void max_pool_tap(const T* x, T* z, int32_t* winner, int64_t channels, int32_t k,
                             bool first) {
  if (first) {
    for (int64_t c = 0; c < channels; ++c) z[c] = x[c], winner[c] = k;
    return;
  }
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    const Acc<T> v = load(x, c), best = load(z, c);
    const bool take = v > best || v != v;
    store(z, c, take ? v : best);
    winner[c] = take ? k : winner[c];
  }
}

// One image [H, W, C] -> [h, w, C].
template <class T>
void max_pool_image(const T* x, T* z, int32_t* winner, int64_t channels, const Window& rows,
                    const Window& cols) {
  for (int64_t i = 0; i < rows.out; ++i)
    for (int64_t j = 0; j < cols.out; ++j) {
      const int64_t to = (i * cols.out + j) * channels;
      bool first = true;
      for (int64_t a = rows.first(i); a < rows.last(i); ++a)
        for (int64_t b = cols.first(j); b < cols.last(j); ++b, first = false) {
          const int64_t k = (rows.start(i) + a * rows.dilation) * cols.in + cols.start(j) +
                            b * cols.dilation;
          max_pool_tap(x + k * channels, z + to, winner + to, channels, static_cast<int32_t>(k),
                       first);
        }
    }
}

Tensor new_in_format(const Tensor& like, const Ints& size, ScalarType dtype, bool channels_last) {
  Tensor out = torch::stable::new_empty(like, size, dtype);
  return channels_last ? torch::stable::empty_like(
                             torch::stable::contiguous(out, MemoryFormat::ChannelsLast))
                       : out;
}

// x [N,C,H,W] -> (z [N,C,h,w], winner [N,C,h,w] int32: flat index in the plane)
std::tuple<Tensor, Tensor> max_pool_forward(Tensor x, Ints kernel, Ints stride, Ints padding,
                                            Ints dilation, Ints out) {
  const bool channels_last = strided_channels_last(x);
  x = in_format(x, channels_last_or_plain(x, channels_last));
  const Window rows{kernel[0], stride[0], padding[0], dilation[0], x.size(2), out[0]};
  const Window cols{kernel[1], stride[1], padding[1], dilation[1], x.size(3), out[1]};
  const int64_t n = x.size(0), channels = x.size(1);
  const Ints size{n, channels, rows.out, cols.out};
  Tensor z = new_in_format(x, size, x.scalar_type(), channels_last);
  Tensor winner = new_in_format(x, size, ScalarType::Int, channels_last);
  if (z.numel() == 0) return {z, winner};
  const auto square = [](const Window& w) {
    return w.kernel == 2 && w.stride == 2 && w.padding == 0 && w.dilation == 1 &&
           2 * w.out <= w.in;
  };
  const bool two = square(rows) && square(cols);
  const int64_t plane = rows.in * cols.in, pooled = rows.out * cols.out;
  dispatch_dtype(x.scalar_type(), "max_pool_forward", [&](auto element) {
    using T = decltype(element);
    const T* from = data<T>(x);
    T* to = data<T>(z);
    int32_t* at = data<int32_t>(winner);
    if (channels_last) {
      parallel_items(n, plane * channels, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k)
          max_pool_image(from + k * plane * channels, to + k * pooled * channels,
                         at + k * pooled * channels, channels, rows, cols);
      });
      return;
    }
    parallel_items(n * channels, plane, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        if (two)
          max_pool_plane_2x2(from + k * plane, to + k * pooled, at + k * pooled, rows.out,
                             cols.out, cols.in);
        else
          max_pool_plane(from + k * plane, to + k * pooled, at + k * pooled, rows, cols);
      }
    });
  });
  return {z, winner};
}

// reward, winner [N,C,*] of `pooled` elements per plane -> [N,C,*] of `plane` elements per plane.
Tensor max_pool_redistribute(Tensor reward, Tensor winner, Ints size) {
  const bool channels_last = strided_channels_last(reward) && size.size() == 4;
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  reward = in_format(reward, format);
  winner = in_format(winner, format);
  Tensor out = new_in_format(reward, size, reward.scalar_type(), channels_last);
  const int64_t n = size[0], channels = size[1];
  const int64_t items = channels_last ? n : n * channels;
  if (items == 0 || out.numel() == 0) return out;
  const int64_t width = channels_last ? channels : 1;
  const int64_t plane = out.numel() / items / width, pooled = reward.numel() / items / width;
  dispatch_dtype(reward.scalar_type(), "max_pool_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const T* r = data<T>(reward);
    const int32_t* at = data<int32_t>(winner);
    T* to = data<T>(out);
    parallel_items(items, plane * width, [&](int64_t begin, int64_t end) {
      // Overlapping windows add up in the arithmetic type and are rounded once.
      std::vector<A> sums(std::is_same_v<T, A> ? 0 : plane * width);
      for (int64_t k = begin; k < end; ++k) {
        T* image = to + k * plane * width;
        A* into;
        if constexpr (std::is_same_v<T, A>) into = image;
        else into = sums.data();
        std::fill(into, into + plane * width, A(0));
        for (int64_t j = 0; j < pooled; ++j)
          for (int64_t c = 0; c < width; ++c) {
            const int64_t from = (k * pooled + j) * width + c;
            into[at[from] * width + c] += load(r, from);
          }
        if constexpr (!std::is_same_v<T, A>)
          for (int64_t i = 0; i < plane * width; ++i) store(image, i, into[i]);
      }
    });
  });
  return out;
}

// The transpose of an average pool; `dims` names ATen's operator.
Tensor avg_pool_transpose(const Tensor& s, const Tensor& x, const Ints& kernel, const Ints& stride,
                          const Ints& padding, bool ceil_mode, bool count_include_pad,
                          std::optional<int64_t> divisor) {
  std::array<StableIValue, 8> stack{
      from(s),         from(x),         from(kernel),            from(stride),
      from(padding),   from(ceil_mode), from(count_include_pad), from(divisor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      kernel.size() == 2 ? "aten::avg_pool2d_backward" : "aten::avg_pool3d_backward", "",
      stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor adaptive_transpose(const Tensor& s, const Tensor& x, int64_t dims) {
  std::array<StableIValue, 2> stack{from(s), from(x)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(dims == 2 ? "aten::_adaptive_avg_pool2d_backward"
                                                         : "aten::_adaptive_avg_pool3d_backward",
                                               "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// signal -> transpose(s, x) -> input epilogue
template <class Transpose>
Tensor avg_redistribute(Tensor x, Tensor z, Tensor reward, const RuleCall& call, const char* op,
                        Transpose transpose) {
  x = dense_any_order(x);
  reward = dense_any_order(reward);
  z = (call.chain & kSignalIn) ? reward : arranged_like(reward, z);
  Tensor out = torch::stable::empty_like(x);
  // 16-bit signals overflow or lose eps: the transpose runs in float32.
  dispatch_types(x.scalar_type(), ScalarType::Undefined, op, [&](auto element, auto) {
    using T = decltype(element);
    using A = Acc<T>;
    const Tensor s = signal<T, A>(reward, z, call, op);
    const Tensor g = arranged_like(x, transpose(s, as_product_type<T, A>(x)));
    const A* gp = data<A>(g);
    const T* xp = data<T>(x);
    T* to = data<T>(out);
    with_input_epilogue<T>(call, op, [&](auto finish) {
      parallel_loop(x.numel(), [=](int64_t i) { store(to, i, finish(gp[i], load(xp, i))); });
    });
  });
  return out;
}

Tensor avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, Ints kernel, Ints stride,
                             Ints padding, bool ceil_mode, bool count_include_pad,
                             std::optional<int64_t> divisor, int64_t rule, Params params,
                             int64_t chain) {
  return avg_redistribute(x, z, reward, {rule, chain, params}, "avg_pool_redistribute",
                          [&](const Tensor& s, const Tensor& like) {
                            return avg_pool_transpose(s, like, kernel, stride, padding, ceil_mode,
                                                      count_include_pad, divisor);
                          });
}

Tensor adaptive_avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, int64_t rule,
                                      Params params, int64_t chain) {
  return avg_redistribute(x, z, reward, {rule, chain, params}, "adaptive_avg_pool_redistribute",
                          [&](const Tensor& s, const Tensor& like) {
                            return adaptive_transpose(s, like, like.dim() - 2);
                          });
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("max_pool_forward", TORCH_BOX(&lfp::cpu::max_pool_forward));
  m.impl("max_pool_redistribute", TORCH_BOX(&lfp::cpu::max_pool_redistribute));
  m.impl("avg_pool_redistribute", TORCH_BOX(&lfp::cpu::avg_pool_redistribute));
  m.impl("adaptive_avg_pool_redistribute", TORCH_BOX(&lfp::cpu::adaptive_avg_pool_redistribute));
}
