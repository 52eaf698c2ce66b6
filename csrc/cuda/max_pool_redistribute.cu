// Max pools, redistribute: the winner takes the reward of its window, overlapping windows add
// (winners: max_pool.cuh). Every input gathers, in the order of the outputs: no atomics.
//
// Windows that tile are known from the shapes. Of others only the winners are known, so a block
// first finds how far the winners of its planes lie from where a proportional map would put them;
// that bounds the outputs which an input has to ask. For strided pools the bounds are the windows.
// A plane's rewards and winners wait in shared memory for the gathering. Where they do not fit they
// are read again.
//
// The device cannot raise an error that the caller sees in time: winners outside the input make the
// inputs of their block NaN.
#include <numeric>

#include "max_pool.cuh"

namespace lfp::cuda {
namespace {

constexpr int64_t kUnstagedElements = 1 << 23;
constexpr int64_t kNarrowPositions = 1 << 16;  // planes whose places fit into 16 bits

template <class T>
struct Give {
  const T* reward;
  const void* winner;
  T* result;
  int winner_bytes;
  bool tiles, narrow;  // windows tile; staged winners have 16 bits
  Plane in, out;
  Tiling tiling;
  Cover cover[kPoolAxes];  // bounds still open unless the windows tile
  int kernel[kPoolAxes];   // of windows that tile
};

// scale * input - divisor * output of a cover: 0 where the proportional map puts the winner.
template <class Int>
struct Deviation {
  Int low[kPoolAxes], high[kPoolAxes];

  __device__ Deviation() {
#pragma unroll
    for (int k = 0; k < kPoolAxes; ++k) {
      low[k] = std::numeric_limits<Int>::max();
      high[k] = std::numeric_limits<Int>::lowest();
    }
  }
  __device__ void add(const Cover (&cover)[kPoolAxes], const Position& in, const Position& out) {
    const int from[] = {in.a, in.p, in.q}, to[] = {out.a, out.p, out.q};
#pragma unroll
    for (int k = 0; k < kPoolAxes; ++k) {
      const Int d =
          from[k] * static_cast<Int>(cover[k].scale) - to[k] * static_cast<Int>(cover[k].divisor);
      low[k] = min(low[k], d), high[k] = max(high[k], d);
    }
  }
  // Over all threads of the block: the bounds `low` and `high` of the covers.
  __device__ void bound(const Cover (&cover)[kPoolAxes], int64_t* bounds_low,
                        int64_t* bounds_high) {
    __shared__ Int scratch[2 * kPoolAxes][kPoolThreads / 32];
#pragma unroll
    for (int k = 0; k < kPoolAxes; ++k) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        low[k] = min(low[k], __shfl_xor_sync(0xffffffffu, low[k], step));
        high[k] = max(high[k], __shfl_xor_sync(0xffffffffu, high[k], step));
      }
      if (threadIdx.x % 32 == 0) {
        scratch[k][threadIdx.x / 32] = low[k];
        scratch[kPoolAxes + k][threadIdx.x / 32] = high[k];
      }
    }
    __syncthreads();
    if (threadIdx.x < kPoolAxes) {
      const int k = threadIdx.x;
      Int least = scratch[k][0], most = scratch[kPoolAxes + k][0];
      for (int w = 1; w < kPoolThreads / 32; ++w) {
        least = min(least, scratch[k][w]);
        most = max(most, scratch[kPoolAxes + k][w]);
      }
      const bool none = most < least;  // no winner lies inside: no output covers anything
      bounds_low[k] = none ? 0 : cover[k].divisor - 1 - int64_t(most);
      bounds_high[k] = none ? 0 : cover[k].divisor - int64_t(least);
    }
    __syncthreads();
  }
};

// A tile is a region of the input; the stage holds rewards and winners of its windows.
template <class T, int V, bool kLast, bool kStaged>
__global__ void __launch_bounds__(kPoolThreads, 3)
    give_kernel(const __grid_constant__ Give<T> call) {
  using A = Acc<T>;
  using Int = std::conditional_t<kStaged, int, int64_t>;
  extern __shared__ __align__(16) unsigned char stage_bytes[];
  const Slab slab = call.tiling.channels();
  const Region region = call.tiling.region(call.in);
  const bool all = !call.tiles || region.end - region.begin == call.in.size[0];
  const Region windows(call.out, call.tiling.first_plane(), region.planes,
                       all ? 0 : call.cover[0].template first<true>(region.begin),
                       all ? call.out.size[0] : call.cover[0].template last<true>(region.end - 1));
  const int count = windows.count(call.out);
  T* rewards = reinterpret_cast<T*>(stage_bytes);
  unsigned char* behind = stage_bytes + (count * slab.width * sizeof(T) + 15) / 16 * 16;
  uint16_t* narrow = reinterpret_cast<uint16_t*>(behind);
  int32_t* wide = reinterpret_cast<int32_t*>(behind);

  __shared__ int64_t low[kPoolAxes], high[kPoolAxes];  // bounds of the covers
  if (call.tiles && threadIdx.x < kPoolAxes) {
    low[threadIdx.x] = call.cover[threadIdx.x].low;
    high[threadIdx.x] = call.cover[threadIdx.x].high;
  }
  Deviation<Int> deviation;
  bool outside = false;
  if (kStaged || !call.tiles)
    for_region<V, kLast>(windows, count, slab, call.tiling.packs,
                         [&]<int N>(int position, int channel, int64_t offset) {
                           int64_t winner[N];
                           load_winners<N>(call.winner, call.winner_bytes, offset, winner);
                           Position at = windows.decode(call.out, position);
#pragma unroll
                           for (int k = 0; k < N && !call.tiles; ++k) {
                             const int64_t place = winner[k];
                             if (place < 0 || place >= call.in.positions())
                               outside = true;
                             else if constexpr (kStaged)
                               deviation.add(call.cover,
                                             Region(call.in, 0, 1, 0, call.in.size[0])
                                                 .decode(call.in, static_cast<int>(place)),
                                             at);
                             else
                               deviation.add(
                                   call.cover,
                                   {0, static_cast<int>(place / call.in.step()),
                                    static_cast<int>(place / call.in.size[2] % call.in.size[1]),
                                    static_cast<int>(place % call.in.size[2])},
                                   at);
                             if (!kLast) windows.next(call.out, at);
                           }
                           if constexpr (kStaged) {
                             const int to = position * slab.width + channel;
                             *reinterpret_cast<Pack<T, N>*>(rewards + to) =
                                 *reinterpret_cast<const Pack<T, N>*>(call.reward + offset);
#pragma unroll
                             for (int k = 0; k < N; ++k)
                               if (call.narrow)
                                 narrow[to + k] = static_cast<uint16_t>(winner[k]);
                               else
                                 wide[to + k] = static_cast<int32_t>(winner[k]);
                           }
                         });
  outside = __syncthreads_or(outside);
  if (!call.tiles) deviation.bound(call.cover, low, high);

  for_region<V, kLast>(
      region, region.count(call.in), slab, call.tiling.packs,
      [&]<int N>(int position, int channel, int64_t offset) {
        constexpr int kPositions = kLast ? 1 : N, kChannels = kLast ? N : 1;
        A sum[N] = {};
        Position at = region.decode(call.in, position);
        Covering covering;
#pragma unroll
        for (int k = 0; k < kPositions; ++k) {
          covering.move<kStaged>(call.cover, low, high, at);
          const Int flat = (Int(at.a) * call.in.size[1] + at.p) * call.in.size[2] + at.q;
          covering.for_each(at.plane, [&](const Position& from) {
            const Int place = call.tiles ? ((at.a - from.a * call.kernel[0]) * call.kernel[1] +
                                            at.p - from.p * call.kernel[1]) *
                                                   call.kernel[2] +
                                               at.q - from.q * call.kernel[2]
                                         : flat;
            const int window = windows.local(call.out, from);
            if constexpr (kStaged) {
              const int source = window * slab.width + channel;
#pragma unroll
              for (int c = 0; c < kChannels; ++c) {
                const int winner = call.narrow ? narrow[source + c] : wide[source + c];
                if (winner == place) sum[k + c] += load(rewards, source + c);
              }
            } else {
              const int64_t source = (windows.first + window) * slab.inner + slab.first + channel;
              int64_t winner[kChannels];
              load_winners<kChannels>(call.winner, call.winner_bytes, source, winner);
#pragma unroll
              for (int c = 0; c < kChannels; ++c)
                if (winner[c] == place) sum[k + c] += load(call.reward, source + c);
            }
          });
          if (!kLast) region.next(call.in, at);
        }
        if (outside) {
#pragma unroll
          for (int k = 0; k < N; ++k) sum[k] = static_cast<A>(NAN);
        }
        store<N>(call.result, offset, sum);
      });
}

template <int V, bool kLast, bool kStaged, class T>
void launch(const Give<T>& call, cudaStream_t stream) {
  const auto kernel = give_kernel<T, V, kLast, kStaged>;
  const size_t shared = kStaged ? call.tiling.shared + 16 : 0;  // 16: see `behind`
  allow_shared(kernel, shared);
  kernel<<<static_cast<unsigned>(call.tiling.blocks()), kPoolThreads, shared, stream>>>(call);
  check_launch();
}

// Of the proportional map; both sides of its inequality are divided by what they share.
Cover open_cover(int64_t in, int64_t out) {
  const int64_t common = std::gcd(in, out), scale = out / common, divisor = in / common;
  return Cover(in, out, scale, 0, in * scale + divisor, divisor);
}

Tensor max_pool_redistribute(Tensor reward, Tensor indices, Ints input_shape) {
  const Device device(reward);
  Axes in, out, kernel;
  bool tiles = true;
  for (int64_t a = 0; a < kPoolAxes; ++a) {
    const int64_t d = a - kPoolAxes + reward.dim();
    in[a] = d < 2 ? 1 : input_shape[d];
    out[a] = d < 2 ? 1 : reward.size(d);
    kernel[a] = out[a] ? in[a] / out[a] : 1;
  }
  const ScalarType type = indices.scalar_type();
  LFP_CHECK(type == ScalarType::Byte || type == ScalarType::Int || type == ScalarType::Long,
            "max_pool", "indices: expected uint8, int32 or int64");
  const bool channels_last = strided_channels_last(indices);
  const auto format = channels_last_or_plain(indices, channels_last);
  const Tensor r = in_format(reward, format), winner = in_format(indices, format);
  const Tensor result = empty_output(reward, input_shape, reward.scalar_type(), channels_last);
  if (result.numel() == 0) return result;
  tiles = type == ScalarType::Byte;
  LFP_CHECK(!tiles || windows_tile(in, out, kernel, kernel, {0, 0, 0}, {1, 1, 1}),
            "max_pool_redistribute", "windows of these indices tile the input");

  const Axes order = leading_axes_first(in, out);
  const Axes in3 = reordered(in, order), out3 = reordered(out, order),
             k3 = reordered(kernel, order);
  const Plane in_plane(in3), out_plane(out3);
  const int64_t inner = channels_last ? reward.size(1) : 1;
  const int64_t outer = reward.size(0) * reward.size(1) / inner;
  const bool narrow = tiles || in_plane.positions() <= kNarrowPositions;
  std::array<Cover, kPoolAxes> cover;
  bool wide = in_plane.positions() >= INT_MAX;
  for (int a = 0; a < kPoolAxes; ++a) {
    cover[a] = tiles ? Cover(in3[a], out3[a], 1, 0, k3[a], k3[a]) : open_cover(in3[a], out3[a]);
    wide = wide || cover[a].wide;
  }
  dispatch_dtype(reward.scalar_type(), "max_pool_redistribute", [&](auto element) {
    using T = decltype(element);
    constexpr int V = kWide<T>, kSlabPack = std::min(V, 4);
    const auto tiling = [&](int64_t pack, bool staged) {
      return Tiling(
          in_plane, outer, inner, pack, sizeof(T), staged && !tiles,
          [&](int64_t steps) -> int64_t {
            if (!staged) return 0;
            const int64_t rows =
                tiles && steps != in_plane.size[0] ? cover[0].reach(steps) : out_plane.size[0];
            return rows * out_plane.step() * int64_t(sizeof(T) + (narrow ? 2 : 4));
          },
          staged ? kTileElements : kUnstagedElements);
    };
    const int pack = inner == 1 ? V : kSlabPack;
    const bool packed = aligned16(data<T>(r), data<T>(result)) && winners_aligned(winner, pack) &&
                        (inner == 1 || inner % pack == 0);
    Give<T> call{data<T>(r),
                 winner.data_ptr(),
                 data<T>(result),
                 static_cast<int>(winner.element_size()),
                 tiles,
                 narrow,
                 in_plane,
                 out_plane,
                 tiling(packed ? pack : 1, true),
                 {cover[0], cover[1], cover[2]},
                 {static_cast<int>(k3[0]), static_cast<int>(k3[1]), static_cast<int>(k3[2])}};
    const bool staged = call.tiling.shared != 0 && !wide;
    if (packed && staged && inner == 1) return launch<V, false, true>(call, device.stream);
    if (packed && staged) return launch<kSlabPack, true, true>(call, device.stream);
    call.tiling = tiling(1, true);
    if (call.tiling.shared && !wide) return launch<1, true, true>(call, device.stream);
    call.tiling = tiling(1, false);
    launch<1, true, false>(call, device.stream);
  });
  return result;
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) { m.impl("max_pool_redistribute", TORCH_BOX(&lfp::cuda::max_pool_redistribute)); }
