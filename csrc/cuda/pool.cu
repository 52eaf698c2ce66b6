// Average pools over x [N, C, D, H, W] (1-d and 2-d: leading axes of size 1), plain or channels
// last.
//   s    = prologue(r, z)
//   dx   = sum over the windows that cover the position: s / divisor of the window
//   r_in = input_epilogue(dx, x)
// Along each axis the windows that cover a position are a range of outputs. That holds for strided
// and for adaptive pools alike, so both share one gathering kernel, which adds in a fixed order.
#include "pool_tiles.cuh"

namespace lfp::cuda {
namespace {

using Axes = std::array<int64_t, kPoolAxes>;

// One axis of the pool.
struct Axis {
  int64_t in = 1, out = 1;
  Cover outputs, inputs;  // of an input, the outputs; of an output, the inputs in its window
  // With padding counted in the divisor a window has min(kernel, limit - o * stride) places.
  bool count_padding = false;
  int kernel = 1, stride = 1, limit = 1;

  template <bool kNarrow>
  __device__ int places(int o) const {
    return count_padding ? min(kernel, limit - o * stride)
                         : inputs.last<kNarrow>(o) - inputs.first<kNarrow>(o);
  }
};

Axis strided_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                  bool count_padding) {
  return {in,
          out,
          Cover(in, out, 1, padding - kernel + stride, padding + stride, stride),
          Cover(out, in, stride, -padding, kernel - padding, 1),
          count_padding,
          static_cast<int>(kernel),
          static_cast<int>(stride),
          static_cast<int>(in + 2 * padding)};
}

// Window o holds the inputs floor(o * in / out) .. ceil((o + 1) * in / out) - 1.
Axis adaptive_axis(int64_t in, int64_t out) {
  return {in, out, Cover(in, out, out, 0, out + in - 1, in),
          Cover(out, in, in, 0, in + out - 1, out)};
}

template <class T>
struct Spread {
  const T *x, *z, *reward;
  T* result;
  Plane in, out;
  Tiling tiling;
  Axis axes[kPoolAxes];
  Cover outputs[kPoolAxes];
  int64_t divisor;  // of every window, in place of its places, unless 0
  RuleParams<Acc<T>> params;
  bool signal_in, signal_out;
};

// What windows pass on of their signals: s / divisor.
template <class Rule, int N, bool kLast, bool kNarrow, class T>
__device__ __forceinline__ void window_signals(const Spread<T>& call, const Region& region,
                                               int position, int64_t offset, Acc<T> (&s)[N]) {
  using A = Acc<T>;
  A z[N];
  load<N>(call.reward, offset, s);
  if (!call.signal_in) load<N>(call.z, offset, z);
  Position at = region.decode(call.out, position);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int64_t places = call.divisor ? call.divisor
                                        : int64_t(call.axes[0].template places<kNarrow>(at.a)) *
                                              call.axes[1].template places<kNarrow>(at.p) *
                                              call.axes[2].template places<kNarrow>(at.q);
    if (!call.signal_in) s[k] = Rule::prologue(s[k], z[k], call.params);
    s[k] *= A(1) / A(places);
    if (!kLast) region.next(call.out, at);
  }
}

// A tile is a region of the input; the stage holds the signals of the windows that cover it.
// Staged kernels are compiled for covers that are not wide.
template <class T, class Rule, int V, bool kLast, bool kStaged>
__global__ void __launch_bounds__(kPoolThreads, 2)
    spread_kernel(const __grid_constant__ Spread<T> call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char stage_bytes[];
  A* stage = reinterpret_cast<A*>(stage_bytes);
  const Slab slab = call.tiling.channels();
  const Region region = call.tiling.region(call.in);
  const bool whole = region.end - region.begin == call.in.size[0];
  const Region windows(
      call.out, call.tiling.first_plane(), region.planes,
      whole ? 0 : call.outputs[0].template first<kStaged>(region.begin),
      whole ? call.out.size[0] : call.outputs[0].template last<kStaged>(region.end - 1));
  if constexpr (kStaged) {
    for_region<V, kLast>(windows, windows.count(call.out), slab, call.tiling.packs,
                         [&]<int N>(int position, int channel, int64_t offset) {
                           A s[N];
                           window_signals<Rule, N, kLast, kStaged>(call, windows, position, offset,
                                                                   s);
#pragma unroll
                           for (int k = 0; k < N; ++k)
                             stage[position * slab.width + channel + k] = s[k];
                         });
    __syncthreads();
  }
  for_region<V, kLast>(region, region.count(call.in), slab, call.tiling.packs,
                       [&]<int N>(int position, int channel, int64_t offset) {
                         A x[N], g[N] = {};
                         load<N>(call.x, offset, x);
                         Position at = region.decode(call.in, position);
                         Covering covering;
                         constexpr int kPositions = kLast ? 1 : N, kChannels = kLast ? N : 1;
#pragma unroll
                         for (int k = 0; k < kPositions; ++k) {
                           covering.move<kStaged>(call.outputs, at);
                           covering.for_each(at.plane, [&](const Position& from) {
                             const int window = windows.local(call.out, from);
                             A s[kChannels];
                             if constexpr (kStaged) {
#pragma unroll
                               for (int c = 0; c < kChannels; ++c)
                                 s[c] = stage[window * slab.width + channel + c];
                             } else {
                               window_signals<Rule, kChannels, true, false>(
                                   call, windows, window,
                                   (windows.first + window) * slab.inner + slab.first + channel, s);
                             }
#pragma unroll
                             for (int c = 0; c < kChannels; ++c) g[k + c] += s[c];
                           });
                           if (!kLast) region.next(call.in, at);
                         }
#pragma unroll
                         for (int k = 0; k < N; ++k)
                           g[k] = call.signal_out ? chain_epilogue(g[k], x[k], call.params)
                                                  : Rule::input_epilogue(g[k], x[k], call.params);
                         store<N>(call.result, offset, g);
                       });
}

template <int V, bool kLast, bool kStaged, class Rule, class T>
void launch(const Spread<T>& call, cudaStream_t stream) {
  const auto kernel = spread_kernel<T, Rule, V, kLast, kStaged>;
  const size_t shared = kStaged ? call.tiling.shared : 0;
  allow_shared(kernel, shared);
  kernel<<<static_cast<unsigned>(call.tiling.blocks()), kPoolThreads, shared, stream>>>(call);
  check_launch();
}

Tensor redistribute(const std::array<Axis, kPoolAxes>& given, std::optional<int64_t> divisor,
                    const Tensor& x, const Tensor& z, const Tensor& reward, int64_t rule,
                    const Params& params, int64_t chain, const char* op) {
  const Device device(x);
  const bool channels_last = strided_channels_last(x), signal_in = chain & kSignalIn;
  const auto format = channels_last_or_plain(x, channels_last);
  const Tensor xd = in_format(x, format), r = in_format(reward, format);
  const Tensor zd = signal_in ? r : in_format(z, format);
  Tensor result = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(),
                                       std::nullopt, format);
  if (x.numel() == 0) return result;
  const Axes order = leading_axes_first({given[0].in, given[1].in, given[2].in},
                                        {given[0].out, given[1].out, given[2].out});
  const Axis axes[] = {given[order[0]], given[order[1]], given[order[2]]};
  const Plane in({axes[0].in, axes[1].in, axes[2].in});
  const Plane out({axes[0].out, axes[1].out, axes[2].out});
  const int64_t inner = channels_last ? x.size(1) : 1, outer = x.numel() / in.positions() / inner;
  bool wide = false;
  for (const Axis& axis : axes) wide = wide || axis.outputs.wide || axis.inputs.wide;
  dispatch_dtype(x.scalar_type(), op, [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    constexpr int V = kWide<T>;
    const T *xp = data<T>(xd), *zp = data<T>(zd), *rp = data<T>(r);
    T* to = data<T>(result);
    const auto tiling = [&](int64_t pack) {
      return Tiling(in, outer, inner, pack, sizeof(T), false, [&](int64_t steps) {
        const int64_t rows = steps == in.size[0] ? out.size[0] : axes[0].outputs.reach(steps);
        return rows * out.step() * int64_t(sizeof(A));
      });
    };
    const bool packed = aligned16(xp, zp, rp, to) && (inner == 1 || inner % V == 0);
    Spread<T> call{xp,
                   zp,
                   rp,
                   to,
                   in,
                   out,
                   tiling(packed ? V : 1),
                   {axes[0], axes[1], axes[2]},
                   {axes[0].outputs, axes[1].outputs, axes[2].outputs},
                   divisor.value_or(0),
                   rule_params<A>(params),
                   signal_in,
                   (chain & kSignalOut) != 0};
    dispatch_rule<A>(rule, op, [&](auto functor) {
      using Rule = decltype(functor);
      const bool staged = call.tiling.shared != 0 && !wide;
      if (packed && staged && inner == 1) return launch<V, false, true, Rule>(call, device.stream);
      if (packed && staged) return launch<V, true, true, Rule>(call, device.stream);
      call.tiling = tiling(1);
      if (call.tiling.shared && !wide) return launch<1, true, true, Rule>(call, device.stream);
      launch<1, true, false, Rule>(call, device.stream);
    });
  });
  return result;
}

Tensor avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, Ints kernel, Ints stride,
                             Ints padding, bool count_include_pad, std::optional<int64_t> divisor,
                             int64_t rule, Params params, int64_t chain) {
  std::array<Axis, kPoolAxes> axes;
  for (int64_t a = 0; a < kPoolAxes; ++a) {
    const int64_t k = a - kPoolAxes + (x.dim() - 2), d = k + 2;
    axes[a] = k < 0 ? strided_axis(1, 1, 1, 1, 0, true)
                    : strided_axis(x.size(d), reward.size(d), kernel[k], stride[k], padding[k],
                                   count_include_pad);
  }
  return redistribute(axes, divisor, x, z, reward, rule, params, chain, "avg_pool_redistribute");
}

Tensor adaptive_avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, int64_t rule,
                                      Params params, int64_t chain) {
  std::array<Axis, kPoolAxes> axes;
  for (int64_t a = 0; a < kPoolAxes; ++a) {
    const int64_t d = a - kPoolAxes + x.dim();
    axes[a] = d < 2 ? adaptive_axis(1, 1) : adaptive_axis(x.size(d), reward.size(d));
  }
  return redistribute(axes, std::nullopt, x, z, reward, rule, params, chain,
                      "adaptive_avg_pool_redistribute");
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("avg_pool_redistribute", TORCH_BOX(&lfp::cuda::avg_pool_redistribute));
  m.impl("adaptive_avg_pool_redistribute", TORCH_BOX(&lfp::cuda::adaptive_avg_pool_redistribute));
}
