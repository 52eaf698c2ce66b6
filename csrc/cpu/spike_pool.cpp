// Max pools over packed spikes: a window fires at a step where one of its neurons does, which for
// the eight steps of a byte is the OR of its bytes. And the number of spikes.
//
// bits [P, N, C, H, W] of any strides, results channels last in memory: the loops run over C.
#include <bit>
#include <cstring>

#include "../layout.h"
#include "loops.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kSteps = 8;  // time steps in a byte of packed spikes

struct Axis {
  int64_t in, out, kernel, stride, padding;

  // The part of a window that lies inside the input.
  int64_t begin(int64_t o) const { return std::max<int64_t>(0, o * stride - padding); }
  int64_t end(int64_t o) const { return std::min(in, o * stride - padding + kernel); }
};

Axis axis(int64_t in, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t room = in + 2 * padding - kernel;
  int64_t out = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (out - 1) * stride >= in + padding) --out;  // it would start behind the input
  LFP_CHECK(room >= 0 && out > 0, "spike_max_pool2d", "no window fits into the input");
  return {in, out, kernel, stride, padding};
}

struct SpikePool {
  Axis y, x;
  int64_t planes, samples, channels;
  const uint8_t* bits;
  int64_t plane_stride, sample_stride, channel_stride, row_stride, pixel_stride;

  SpikePool(const Tensor& b, const Ints& kernel, const Ints& stride, const Ints& padding,
            bool ceil_mode)
      : y(axis(b.size(3), kernel[0], stride[0], padding[0], ceil_mode)),
        x(axis(b.size(4), kernel[1], stride[1], padding[1], ceil_mode)),
        planes(b.size(0)),
        samples(b.size(1)),
        channels(b.size(2)),
        bits(data<uint8_t>(b)),
        plane_stride(b.stride(0)),
        sample_stride(b.stride(1)),
        channel_stride(b.stride(2)),
        row_stride(b.stride(3)),
        pixel_stride(b.stride(4)) {}

  int64_t in() const { return y.in * x.in * channels; }
  int64_t out() const { return y.out * x.out * channels; }
};

LFP_CLONES void pool_image(const SpikePool& pool, const uint8_t* from, uint8_t* to) {
  const int64_t C = pool.channels;
  for (int64_t oy = 0; oy < pool.y.out; ++oy)
    for (int64_t ox = 0; ox < pool.x.out; ++ox, to += C) {
      std::memset(to, 0, C);
      for (int64_t y = pool.y.begin(oy); y < pool.y.end(oy); ++y)
        for (int64_t x = pool.x.begin(ox); x < pool.x.end(ox); ++x) {
          const uint8_t* at = from + y * pool.row_stride + x * pool.pixel_stride;
          if (pool.channel_stride == 1)
            for (int64_t c = 0; c < C; ++c) to[c] |= at[c];
          else
            for (int64_t c = 0; c < C; ++c) to[c] |= at[c * pool.channel_stride];
        }
    }
}

// The reward of an output goes to the first of its window's neurons that fired; `left` is what
// nobody has taken yet.
template <class A>
LFP_CLONES void redistribute_image(const SpikePool& pool, const uint8_t* from, int shift,
                                   const A* reward, const int64_t* stride, A* left, A* to) {
  const int64_t C = pool.channels;
  std::fill_n(to, pool.in(), A(0));
  for (int64_t oy = 0; oy < pool.y.out; ++oy)
    for (int64_t ox = 0; ox < pool.x.out; ++ox) {
      const A* r = reward + oy * stride[3] + ox * stride[4];
      if (stride[2] == 1)
        std::copy_n(r, C, left);
      else
        for (int64_t c = 0; c < C; ++c) left[c] = r[c * stride[2]];
      for (int64_t y = pool.y.begin(oy); y < pool.y.end(oy); ++y)
        for (int64_t x = pool.x.begin(ox); x < pool.x.end(ox); ++x) {
          const uint8_t* at = from + y * pool.row_stride + x * pool.pixel_stride;
          A* out = to + (y * pool.x.in + x) * C;
          const auto take = [&](int64_t c, uint8_t byte) {
            const bool fired = (byte >> shift) & 1;
            out[c] += fired ? left[c] : A(0);
            left[c] = fired ? A(0) : left[c];
          };
          if (pool.channel_stride == 1)
#pragma GCC ivdep
            for (int64_t c = 0; c < C; ++c) take(c, at[c]);
          else
            for (int64_t c = 0; c < C; ++c) take(c, at[c * pool.channel_stride]);
        }
    }
}

// [P, N, H', W', C]
Tensor spike_max_pool2d(Tensor bits, Ints kernel, Ints stride, Ints padding, bool ceil_mode) {
  const SpikePool pool(bits, kernel, stride, padding, ceil_mode);
  Tensor out = empty_like(bits, {pool.planes, pool.samples, pool.y.out, pool.x.out, pool.channels});
  uint8_t* to = data<uint8_t>(out);
  parallel_items(pool.planes * pool.samples, pool.in(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pool_image(
          pool,
          pool.bits + i / pool.samples * pool.plane_stride + i % pool.samples * pool.sample_stride,
          to + i * pool.out());
  });
  return out;
}

// [T, N, H, W, C]
Tensor spike_max_pool2d_redistribute(Tensor bits, Tensor reward, Ints kernel, Ints stride,
                                     Ints padding, bool ceil_mode) {
  const SpikePool pool(bits, kernel, stride, padding, ceil_mode);
  const int64_t steps = reward.size(0);
  Tensor out = empty_like(reward, {steps, pool.samples, pool.y.in, pool.x.in, pool.channels});
  const int64_t strides[] = {reward.stride(0), reward.stride(1), reward.stride(2), reward.stride(3),
                             reward.stride(4)};
  const auto run = [&](auto element) {
    using A = decltype(element);
    parallel_items(steps * pool.samples, pool.in(), [&](int64_t begin, int64_t end) {
      std::vector<A> left(pool.channels);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / pool.samples, n = i % pool.samples;
        redistribute_image<A>(
            pool, pool.bits + t / kSteps * pool.plane_stride + n * pool.sample_stride,
            static_cast<int>(t % kSteps), data<A>(reward) + t * strides[0] + n * strides[1],
            strides, left.data(), data<A>(out) + i * pool.in());
      }
    });
  };
  switch (reward.scalar_type()) {
    case ScalarType::Float: run(float{}); break;
    case ScalarType::Double: run(double{}); break;
    default: LFP_CHECK(false, "spike_max_pool2d_redistribute", "expected float32 or float64");
  }
  return out;
}

LFP_CLONES int64_t count_bits(const uint8_t* bits, int64_t count) {
  int64_t sum = 0, i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, 8);
    sum += std::popcount(word);
  }
  for (; i < count; ++i) sum += std::popcount(bits[i]);
  return sum;
}

// []
Tensor spike_count(Tensor bits) {
  bits = dense_any_order(bits);
  const uint8_t* from = data<uint8_t>(bits);
  constexpr int64_t kPiece = 1 << 16;
  const int64_t count = bits.numel(), pieces = (count + kPiece - 1) / kPiece;
  std::vector<int64_t> sums(pieces);
  parallel_items(pieces, kPiece / 8, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      sums[p] = count_bits(from + p * kPiece, std::min(kPiece, count - p * kPiece));
  });
  Tensor out = torch::stable::new_empty(bits, Ints{}, ScalarType::Long);
  *data<int64_t>(out) = 0;
  for (const int64_t sum : sums) *data<int64_t>(out) += sum;
  return out;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("spike_max_pool2d", TORCH_BOX(&lfp::cpu::spike_max_pool2d));
  m.impl("spike_max_pool2d_redistribute", TORCH_BOX(&lfp::cpu::spike_max_pool2d_redistribute));
  m.impl("spike_count", TORCH_BOX(&lfp::cpu::spike_count));
}
