// Max pools, forward (winners: max_pool.cuh). The first largest value of a window wins, the last
// NaN if there is one, as in torch.
#include "max_pool.cuh"

namespace lfp::cuda {
namespace {

int64_t output_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                    bool ceil_mode) {
  const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
  int64_t out = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // the last window has to start inside the input or the padding before it
  if (ceil_mode && (out - 1) * stride >= in + padding) --out;
  return out;
}

struct Window {
  int kernel[kPoolAxes], stride[kPoolAxes], padding[kPoolAxes], dilation[kPoolAxes];

  __device__ int begin(int axis, int o) const { return o * stride[axis] - padding[axis]; }
  LFP_HD int64_t extent(int axis) const { return int64_t(kernel[axis] - 1) * dilation[axis] + 1; }
};

template <class T>
struct MaxPool {
  const T* x;
  T* result;
  void* winner;
  int winner_bytes;
  bool tiles;  // a winner is its place in the window
  Plane in, out;
  Tiling tiling;
  Window window;
};

// The winners of kChannels neighbouring channels of one window. value(a, p, q, v) gives the values
// at a place; `place` numbers the places of a window as winners are remembered, from its beginning.
template <int kChannels, class T, class Value>
__device__ __forceinline__ void contest(const MaxPool<T>& call, const Position& at,
                                        Acc<T> (&best)[kChannels], int (&place)[kChannels],
                                        Value value) {
  const Window& w = call.window;
  const int a0 = w.begin(0, at.a), p0 = w.begin(1, at.p), q0 = w.begin(2, at.q);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) place[c] = -1;
  for (int ka = 0; ka < w.kernel[0]; ++ka) {
    const int da = ka * w.dilation[0];
    if (static_cast<unsigned>(a0 + da) >= call.in.size[0]) continue;
    for (int kp = 0; kp < w.kernel[1]; ++kp) {
      const int dp = kp * w.dilation[1];
      if (static_cast<unsigned>(p0 + dp) >= call.in.size[1]) continue;
      for (int kq = 0; kq < w.kernel[2]; ++kq) {
        const int dq = kq * w.dilation[2];
        if (static_cast<unsigned>(q0 + dq) >= call.in.size[2]) continue;
        const int candidate = call.tiles ? (ka * w.kernel[1] + kp) * w.kernel[2] + kq
                                         : (da * call.in.size[1] + dp) * call.in.size[2] + dq;
        Acc<T> v[kChannels];
        value(a0 + da, p0 + dp, q0 + dq, v);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          const bool take = place[c] < 0 || v[c] > best[c] || v[c] != v[c];
          best[c] = take ? v[c] : best[c];
          place[c] = take ? candidate : place[c];
        }
      }
    }
  }
}

// A tile is a region of the output; the stage holds the inputs in its windows.
template <class T, int V, bool kLast, bool kStaged>
__global__ void __launch_bounds__(kPoolThreads, 3)
    max_pool_kernel(const __grid_constant__ MaxPool<T> call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char stage_bytes[];
  T* stage = reinterpret_cast<T*>(stage_bytes);
  const Slab slab = call.tiling.channels();
  const Region region = call.tiling.region(call.out);
  const bool whole = region.end - region.begin == call.out.size[0];
  const int begin = max(call.window.begin(0, region.begin), 0);
  const int64_t end =
      min(call.window.begin(0, region.end - 1) + call.window.extent(0), int64_t(call.in.size[0]));
  const Region source(call.in, call.tiling.first_plane(), region.planes, whole ? 0 : begin,
                      whole ? call.in.size[0] : static_cast<int>(end));
  if constexpr (kStaged) {
    for_region<V, kLast>(source, source.count(call.in), slab, call.tiling.packs,
                         [&]<int N>(int position, int channel, int64_t offset) {
                           const auto pack = *reinterpret_cast<const Pack<T, N>*>(call.x + offset);
                           *reinterpret_cast<Pack<T, N>*>(stage + position * slab.width + channel) =
                               pack;
                         });
    __syncthreads();
  }
  for_region<V, kLast>(
      region, region.count(call.out), slab, call.tiling.packs,
      [&]<int N>(int position, int channel, int64_t offset) {
        constexpr int kPositions = kLast ? 1 : N, kChannels = kLast ? N : 1;
        A best[N];
        int64_t winner[N];
        Position at = region.decode(call.out, position);
#pragma unroll
        for (int k = 0; k < kPositions; ++k) {
          A value[kChannels];
          int place[kChannels];
          contest<kChannels>(call, at, value, place, [&](int a, int p, int q, A(&v)[kChannels]) {
            const int from = source.local(call.in, {at.plane, a, p, q});
            if constexpr (kStaged)
              load<kChannels>(stage, from * slab.width + channel, v);
            else
              load<kChannels>(call.x, (source.first + from) * slab.inner + slab.first + channel, v);
          });
          const int64_t begin_of_window =
              call.tiles ? 0
                         : (int64_t(call.window.begin(0, at.a)) * call.in.size[1] +
                            call.window.begin(1, at.p)) *
                                   call.in.size[2] +
                               call.window.begin(2, at.q);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            best[k + c] = value[c];
            winner[k + c] = begin_of_window + place[c];
          }
          if (!kLast) region.next(call.out, at);
        }
        store<N>(call.result, offset, best);
        store_winners<N>(call.winner, call.winner_bytes, offset, winner);
      });
}

template <int V, bool kLast, bool kStaged, class T>
void launch(const MaxPool<T>& call, cudaStream_t stream) {
  const auto kernel = max_pool_kernel<T, V, kLast, kStaged>;
  const size_t shared = kStaged ? call.tiling.shared : 0;
  allow_shared(kernel, shared);
  kernel<<<static_cast<unsigned>(call.tiling.blocks()), kPoolThreads, shared, stream>>>(call);
  check_launch();
}

std::tuple<Tensor, Tensor> max_pool_forward(Tensor x, Ints kernel, Ints stride, Ints padding,
                                            Ints dilation, bool ceil_mode) {
  const Device device(x);
  Axes in, out, k3, s3, p3, d3;
  Ints size{x.size(0), x.size(1)};
  for (int64_t a = 0; a < kPoolAxes; ++a) {
    const int64_t k = a - kPoolAxes + (x.dim() - 2);
    in[a] = k < 0 ? 1 : x.size(k + 2);
    k3[a] = k < 0 ? 1 : kernel[k];
    s3[a] = k < 0 ? 1 : stride[k];
    p3[a] = k < 0 ? 0 : padding[k];
    d3[a] = k < 0 ? 1 : dilation[k];
    out[a] = output_size(in[a], k3[a], s3[a], p3[a], d3[a], ceil_mode);
    if (k >= 0) size.push_back(out[a]);
  }
  const bool channels_last = strided_channels_last(x);
  const Tensor source = in_format(x, channels_last_or_plain(x, channels_last));
  const bool tiles = windows_tile(in, out, k3, s3, p3, d3);
  const auto type = tiles                                         ? ScalarType::Byte
                    : in[0] * in[1] * in[2] <= int64_t(INT32_MAX) ? ScalarType::Int
                                                                  : ScalarType::Long;
  const Tensor result = empty_output(x, size, x.scalar_type(), channels_last);
  const Tensor winner = empty_output(x, size, type, channels_last);
  if (result.numel() == 0) return {result, winner};

  const Axes order = leading_axes_first(in, out);
  Window window;
  bool overlap = false;
  for (int a = 0; a < kPoolAxes; ++a) {
    window.kernel[a] = static_cast<int>(k3[order[a]]);
    window.stride[a] = static_cast<int>(s3[order[a]]);
    window.padding[a] = static_cast<int>(p3[order[a]]);
    window.dilation[a] = static_cast<int>(d3[order[a]]);
    overlap = overlap || window.extent(a) > window.stride[a];
  }
  const Plane in_plane(reordered(in, order)), out_plane(reordered(out, order));
  const int64_t inner = channels_last ? x.size(1) : 1;
  const int64_t outer = x.size(0) * x.size(1) / inner;
  dispatch_dtype(x.scalar_type(), "max_pool_forward", [&](auto element) {
    using T = decltype(element);
    constexpr int V = kWide<T>;
    const auto tiling = [&](int64_t pack) {
      return Tiling(out_plane, outer, inner, pack, sizeof(T), false, [&](int64_t steps) {
        const int64_t rows = (steps - 1) * window.stride[0] + window.extent(0),
                      all = in_plane.size[0];
        return (steps == out_plane.size[0] ? all : std::min(rows, all)) * in_plane.step() *
               int64_t(sizeof(T));
      });
    };
    const bool packed = aligned16(data<T>(source), data<T>(result)) && winners_aligned(winner, V) &&
                        (inner == 1 || inner % V == 0);
    MaxPool<T> call{data<T>(source),
                    data<T>(result),
                    winner.data_ptr(),
                    static_cast<int>(winner.element_size()),
                    tiles,
                    in_plane,
                    out_plane,
                    tiling(packed ? V : 1),
                    window};
    // Channels last: windows that do not overlap read every value once, and in whole accesses.
    if (packed && inner > 1 && !overlap) return launch<V, true, false>(call, device.stream);
    const bool staged = call.tiling.shared != 0;
    if (packed && inner > 1 && staged) return launch<V, true, true>(call, device.stream);
    if (packed && inner == 1 && staged) return launch<V, false, true>(call, device.stream);
    call.tiling = tiling(1);
    if (call.tiling.shared) return launch<1, true, true>(call, device.stream);
    launch<1, true, false>(call, device.stream);
  });
  return {result, winner};
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) { m.impl("max_pool_forward", TORCH_BOX(&lfp::cuda::max_pool_forward)); }
