// Spiking neurons forward in time, packed spikes, and noise (docs/math.md, section 6).
//
// Currents are read once, the membrane is written once, spikes leave as bits.
#include "lif.h"

#include "noise.h"

namespace lfp::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> lif_forward(Tensor current, std::optional<Tensor> state,
                                               Tensor beta, Tensor threshold, int64_t inner,
                                               int64_t steps, int64_t reset, bool keep) {
  current = dense(current), beta = dense(beta), threshold = dense(threshold);
  const int64_t neurons = current.size(1), planes = (steps + kPlane - 1) / kPlane;
  const bool moves = current.size(0) == steps;
  Tensor bits = torch::stable::new_empty(current, {planes, neurons}, ScalarType::Byte);
  Tensor membrane = keep ? empty_like(current, {steps, neurons}) : none_like(current);
  Tensor last = empty_like(current, {neurons});
  if (state) state = dense(*state);
  dispatch_dtype(current.scalar_type(), "lif_forward", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const bool known = dispatch_reset<A>(reset, [&](auto kind) {
      using N = decltype(kind);
      const T* from = data<T>(current);
      const T* before = state ? data<T>(*state) : nullptr;
      uint8_t* to = data<uint8_t>(bits);
      T* kept = keep ? data<T>(membrane) : nullptr;
      T* end = data<T>(last);
      parallel_items((neurons + kTile - 1) / kTile, kTile * steps, [&](int64_t a, int64_t b) {
        for (int64_t tile = a; tile < b; ++tile) {
          const int64_t m = tile * kTile, count = std::min(kTile, neurons - m);
          const auto v = parameters_of<T>(beta, threshold, inner, m, count);
          std::array<A, kTile> u{};
          if (before)
            for (int64_t i = 0; i < count; ++i) u[i] = load(before, m + i);
          for (int64_t plane = 0; plane < planes; ++plane) {
            std::array<uint8_t, kTile> packed{};
            const int64_t stop = std::min<int64_t>(steps, (plane + 1) * kPlane);
            for (int64_t t = plane * kPlane; t < stop; ++t)
              forward_step<T, N>(from + (moves ? t * neurons : 0) + m, v, count,
                                 static_cast<int>(t % kPlane), u.data(), packed.data(),
                                 kept ? kept + t * neurons + m : nullptr);
            std::copy_n(packed.begin(), count, to + plane * neurons + m);
          }
          for (int64_t i = 0; i < count; ++i) store(end, m + i, u[i]);
        }
      });
    });
    LFP_CHECK(known, "lif_forward", "unknown reset code ", reset);
  });
  return {bits, membrane, last};
}

Tensor add_noise(Tensor x, int64_t steps, double noise, int64_t seed, int64_t first) {
  x = dense(x);
  const int64_t neurons = x.size(1);
  const bool moves = x.size(0) == steps;
  Tensor y = empty_like(x, {steps, neurons});
  dispatch_dtype(x.scalar_type(), "add_noise", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const A scale = A(noise);
    const T* from = data<T>(x);
    T* to = data<T>(y);
    for (int64_t t = 0; t < steps; ++t) {
      const T* row = from + (moves ? t * neurons : 0);
      T* out = to + t * neurons;
      parallel_items(neurons, 16, [&](int64_t begin, int64_t end) {
        if (noise == 0)
          std::copy(row + begin, row + end, out + begin);
        else
          with_noise<A>(begin, end, (first + t) * neurons, static_cast<uint64_t>(seed),
                        [=](int64_t i, A z) { store(out, i, load(row, i) + scale * z); });
      });
    }
  });
  return y;
}

Tensor spikes_unpack(Tensor bits, int64_t steps, ScalarType dtype, double noise, int64_t seed,
                     int64_t first) {
  bits = dense(bits);
  const int64_t neurons = bits.size(1);
  Tensor y = torch::stable::new_empty(bits, {steps, neurons}, dtype);
  dispatch_dtype(dtype, "spikes_unpack", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const uint8_t* from = data<uint8_t>(bits);
    T* to = data<T>(y);
    for (int64_t t = 0; t < steps; ++t) {
      const uint8_t* plane = from + t / kPlane * neurons;
      const int shift = static_cast<int>(t % kPlane);
      T* out = to + t * neurons;
      if (noise == 0) {
        parallel_loop(neurons, [=](int64_t i) { store(out, i, A((plane[i] >> shift) & 1)); });
        continue;
      }
      const int64_t index = (first + t) * neurons;
      const A scale = A(noise);
      parallel_items(neurons, 16, [&](int64_t begin, int64_t end) {
        with_noise<A>(begin, end, index, static_cast<uint64_t>(seed), [=](int64_t i, A z) {
          store(out, i, A((plane[i] >> shift) & 1) + scale * z);
        });
      });
    }
  });
  return y;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("lif_forward", TORCH_BOX(&lfp::cpu::lif_forward));
  m.impl("spikes_unpack", TORCH_BOX(&lfp::cpu::spikes_unpack));
  m.impl("add_noise", TORCH_BOX(&lfp::cpu::add_noise));
}
