// Geometry of max pools over x [N, C, D, H, W] (1-d and 2-d: leading axes of size 1), plain or
// channels last, and how their winners are remembered: in the shape and layout of the output, as
//   uint8         place inside the window, where windows of at most 256 places tile the input
//   int32, int64  place inside the input's [D, H, W]
// The dtype alone says which: windows that tile have the size input / output.
#pragma once

#include "../layout.h"
#include "loops.h"

namespace lfp::cpu {

constexpr int64_t kAxes = 3;
constexpr int64_t kVector = 16;  // loops over this many values compile to a few vector instructions
constexpr int64_t kMaxPlaces = 256;

struct Geometry {
  int64_t in[kAxes], out[kAxes], kernel[kAxes], stride[kAxes], padding[kAxes], dilation[kAxes];
  int64_t places() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t input() const { return in[0] * in[1] * in[2]; }
  int64_t output() const { return out[0] * out[1] * out[2]; }
  // Windows of 2 x 2 places that tile: the case worth its own loops.
  bool quads() const { return tiles() && kernel[0] == 1 && kernel[1] == 2 && kernel[2] == 2; }
  bool tiles() const {
    bool yes = places() <= kMaxPlaces;
    for (int64_t a = 0; a < kAxes; ++a)
      yes = yes && in[a] == out[a] * kernel[a] && stride[a] == kernel[a] && padding[a] == 0 &&
            dilation[a] == 1;
    return yes;
  }
};

// A row of a window that lies inside the input: which input row, and the first place in the window.
struct WindowRow {
  int64_t row, place;
};

inline void window_rows(const Geometry& g, int64_t od, int64_t oh, std::vector<WindowRow>& rows) {
  rows.clear();
  for (int64_t kd = 0; kd < g.kernel[0]; ++kd)
    for (int64_t kh = 0; kh < g.kernel[1]; ++kh) {
      const int64_t d = od * g.stride[0] - g.padding[0] + kd * g.dilation[0];
      const int64_t h = oh * g.stride[1] - g.padding[1] + kh * g.dilation[1];
      if (d >= 0 && d < g.in[0] && h >= 0 && h < g.in[1])
        rows.push_back({d * g.in[1] + h, (kd * g.kernel[1] + kh) * g.kernel[2]});
    }
}

// f(Index{}) for the integer type that remembers winners.
template <class F>
void dispatch_winner(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Byte: return f(uint8_t{});
    case ScalarType::Int: return f(int32_t{});
    case ScalarType::Long: return f(int64_t{});
    default: LFP_CHECK(false, "max_pool", "indices: expected uint8, int32 or int64");
  }
}

inline Tensor empty_output(const Tensor& like, const Ints& size, ScalarType dtype,
                           bool channels_last) {
  const auto format =
      size.size() < 4 || !channels_last
          ? MemoryFormat::Contiguous
          : (size.size() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
  return torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, format);
}

}  // namespace lfp::cpu
