// Packed spikes as numbers, and noise (docs/math.md, section 6).
#include "elementwise.cuh"
#include "over_time.cuh"

namespace lfp::cuda {
namespace {

template <class A>
struct Noise {
  A scale;
  uint64_t seed;
  int64_t first;  // index of the first element

  // v += scale * N(0, 1) of the elements index .. index + V - 1; V > 1: index % min(V, 4) = 0, so
  // that a Philox block serves four elements. The draws of normal() in neuron.h, with an angle in
  // half turns: its reduction is exact, and needs no local memory as that of sin and cos does.
  template <int V>
  __device__ void add(int64_t index, A (&v)[V]) const {
    index += first;
    PhiloxBlock block;
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      if (k % 4 == 0) block = philox(static_cast<uint64_t>(index + k) >> 2, seed);
      const bool upper = ((index + k) & 2) != 0;
      const A u1 = unit_interval<A>(upper ? block.word[2] : block.word[0]) + A(1.0 / 16777216.0);
      const A u2 = unit_interval<A>(upper ? block.word[3] : block.word[1]);
      const A radius = scale * sqrt(A(-2) * log(u1));
      A sine, cosine;
      if constexpr (sizeof(A) == 8)
        sincospi(2 * u2, &sine, &cosine);
      else
        sincospif(2 * u2, &sine, &cosine);
      if constexpr (V == 1) {
        v[k] += radius * (index & 1 ? sine : cosine);
      } else {
        v[k] += radius * cosine;
        v[k + 1] += radius * sine;
      }
    }
  }
};

// Values of V neurons at every step: their spikes, or the same at all steps.
template <class T>
struct Spikes {
  const uint8_t* bits;
  static constexpr bool kStays = false;

  template <int V>
  struct Values {
    Word<V> word;
    __device__ void read(const Spikes& from, int64_t at) { word = spikes_at<V>(from.bits, at); }
    __device__ void get(int shift, Acc<T> (&v)[V]) const {
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = Acc<T>(static_cast<int>((word >> (8 * k + shift)) & 1));
    }
  };
};

template <class T>
struct Constant {
  const T* x;
  static constexpr bool kStays = true;

  template <int V>
  struct Values {
    Raw<T, V> raw;
    __device__ void read(const Constant& from, int64_t at) { raw.read(from.x + at); }
    __device__ void get(int, Acc<T> (&v)[V]) const { raw.get(v); }
  };
};

// y[t, m] = values(t, m) + noise, for the steps of the block's chunk, whole planes.
template <class T, int V, class Source>
__global__ void __launch_bounds__(kElementwiseThreads)
    over_steps_kernel(Source source, T* y, int64_t neurons, int64_t steps, int64_t chunk,
                      Noise<Acc<T>> noise) {
  const int64_t m = (int64_t(blockIdx.x) * kElementwiseThreads + threadIdx.x) * V;
  if (m >= neurons) return;
  const int64_t begin = blockIdx.y * chunk, end = min(begin + chunk, steps);
  typename Source::template Values<V> values;
#pragma unroll 1
  for (int64_t t = begin; t < end; ++t) {
    Acc<T> v[V];
    if (Source::kStays ? t == begin : t % kPlane == 0)
      values.read(source, Source::kStays ? m : t / kPlane * neurons + m);
    values.get(static_cast<int>(t % kPlane), v);
    if (noise.scale != 0) noise.add(t * neurons + m, v);
    store<V>(y, t * neurons + m, v);
  }
}

template <class T, class Source>
void over_steps(const Device& device, Source source, const uint8_t* bits, const T* x, T* y,
                int64_t neurons, int64_t steps, Noise<Acc<T>> noise) {
  if (neurons == 0 || steps == 0) return;
  const auto run = [&](auto width) {
    constexpr int V = decltype(width)::value;
    // Chunks of steps where the neurons alone leave processors idle: each reads the values again.
    const int64_t blocks = ceil_div<int64_t>(neurons / V, kElementwiseThreads);
    const int64_t planes = ceil_div<int64_t>(steps, kPlane);
    const int64_t most = std::min<int64_t>(planes, 65535);
    const int64_t wanted =
        std::clamp<int64_t>(ceil_div<int64_t>(4 * device.processors(), blocks), 1, most);
    const int64_t chunk = ceil_div(planes, wanted) * kPlane;
    over_steps_kernel<T, V, Source>
        <<<grid_over<V, kElementwiseThreads>(neurons, ceil_div(steps, chunk)), kElementwiseThreads,
           0, device.stream>>>(source, y, neurons, steps, chunk, noise);
  };
  dispatch_width<T>(neurons, bits, run, x, y);
  check_launch();
}

template <class T>
struct NoisyCopy {
  const T* x;
  T* y;
  Noise<Acc<T>> noise;

  template <int V>
  __device__ void operator()(int64_t i) const {
    Acc<T> v[V];
    load<V>(x, i, v);
    if (noise.scale != 0) noise.add(i, v);
    store<V>(y, i, v);
  }
};

Tensor add_noise(Tensor x, int64_t steps, double noise, int64_t seed, int64_t first) {
  const Device device(x);
  x = dense(x);
  const int64_t neurons = x.size(1), index = first * neurons;
  Tensor y = empty_like(x, {steps, neurons});
  dispatch_dtype(x.scalar_type(), "add_noise", [&](auto element) {
    using T = decltype(element);
    const T* from = data<T>(x);
    T* to = data<T>(y);
    const Noise<Acc<T>> draws{Acc<T>(noise), static_cast<uint64_t>(seed), index};
    if (x.size(0) != steps)
      return over_steps<T>(device, Constant<T>{from}, nullptr, from, to, neurons, steps, draws);
    const NoisyCopy<T> f{from, to, draws};
    if (aligned16(from, to) && index % 4 == 0)
      elementwise<kWide<T>>(y.numel(), device.stream, f);
    else
      elementwise<1>(y.numel(), device.stream, f);
  });
  return y;
}

Tensor spikes_unpack(Tensor bits, int64_t steps, ScalarType dtype, double noise, int64_t seed,
                     int64_t first) {
  const Device device(bits);
  bits = dense(bits);
  const int64_t neurons = bits.size(1);
  Tensor y = torch::stable::new_empty(bits, {steps, neurons}, dtype);
  dispatch_dtype(dtype, "spikes_unpack", [&](auto element) {
    using T = decltype(element);
    const uint8_t* from = data<uint8_t>(bits);
    T* to = data<T>(y);
    const Noise<Acc<T>> draws{Acc<T>(noise), static_cast<uint64_t>(seed), first * neurons};
    over_steps<T>(device, Spikes<T>{from}, from, to, to, neurons, steps, draws);
  });
  return y;
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("spikes_unpack", TORCH_BOX(&lfp::cuda::spikes_unpack));
  m.impl("add_noise", TORCH_BOX(&lfp::cuda::add_noise));
}
