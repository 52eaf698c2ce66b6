// Convolutions of few channels per group, depthwise ones above all: a tile of a product would be
// filled with zeros, so every sum is formed directly. Their sums are short, and neighbouring
// threads read neighbouring elements (channels last: 16 bytes of channels per thread where groups
// are single channels); what neighbours share comes from the cache.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_operand.cuh"
#include "product.cuh"
#include "product_mma.cuh"

namespace lfp::cuda {

// Groups with this many pairs of channels or fewer.
constexpr int64_t kDirectPairs = 16;
constexpr int kDirectThreads = 256;

// v in the precision of the product type P.
template <class P>
__device__ __forceinline__ P rounded(P v) {
  return v;
}
template <class P>
  requires(!std::is_arithmetic_v<P>)
__device__ __forceinline__ float rounded(float v) {
  P narrow;
  round_to(v, narrow);
  return widen(narrow);
}

// ---- the sums at positions

template <class T, bool kPixels>
struct DirectSums {
  ElementSource<T> source;
  const T* kernel;  // [small channels, large channels / groups, taps]
  Window window;
  Strides strides;  // of the target
  int channels;     // of the target
  FastDivide64 by_packs;
  FastDivide by_targets;  // channels of the target, of one group
  PositionSums<T> sums;
  bool up;
};

// A thread makes V channels of one position of the phase blockIdx.y. The 64 registers of four
// blocks do not hold two of float64 or eight of 16 bits.
template <class T, class P, int V, bool kPixels>
__global__ void __launch_bounds__(kDirectThreads, V > 1 && sizeof(T) != 4 ? 3 : 4)
    direct_sums_kernel(int64_t items, DirectSums<T, kPixels> f) {
  using A = Acc<T>;
  const int64_t item = int64_t(blockIdx.x) * kDirectThreads + threadIdx.x;
  if (item >= items) return;
  Window& window = f.window;
  window.select(int64_t(blockIdx.y) * window.groups);
  // Memory order: (position, channel) or (sample, channel, position of the sample).
  Position q;
  int channel;
  if constexpr (kPixels) {
    const int64_t position = f.by_packs.divide(item);
    channel = static_cast<int>(item - position * (f.channels / V)) * V;
    q = window.positions(position);
  } else {
    q = window.positions(item);
    const int64_t line = q.sample;
    q.sample = f.by_packs.divide(line);
    channel = static_cast<int>(line - q.sample * f.channels);
  }
  int64_t to = window.target_offset(q, f.strides);
  if (to < 0) return;
  to += channel * f.strides.channel;
  const int targets = f.by_targets.divisor;
  window.group = f.by_targets.divide(channel);

  A sum[V] = {};
  const int64_t taps = window.kernel_taps();
  for (int c = 0; c < window.channels; ++c) {
    const int64_t source = int64_t(window.group) * window.channels + c;
    const int64_t line = f.up ? source * targets + channel - int64_t(window.group) * targets
                              : int64_t(channel) * window.channels + c;
    Tap tap{c, {0, 0, 0}, true};
    for (tap.at[0] = 0; tap.at[0] < window.axis[0].taps; ++tap.at[0])
      for (tap.at[1] = 0; tap.at[1] < window.axis[1].taps; ++tap.at[1])
        for (tap.at[2] = 0; tap.at[2] < window.axis[2].taps; ++tap.at[2]) {
          const int64_t from = window.offset(q, tap);
          if (from < 0) continue;
          const T* w = f.kernel + line * taps + window.kernel_index(tap);
          A s[V];
          if constexpr (V == 1) {
            s[0] = f.source(from);
          } else {
            auto raw = f.source.outside();
            f.source.read_wide(from, raw);
            f.source.convert(raw, s);
          }
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += rounded<P>(s[v]) * rounded<P>(load(w, v * taps));
        }
  }
  A add[V] = {};
  if (f.sums.bias) load<V>(f.sums.bias, channel, add);
  f.sums.template finish<V>(Run<V>{{to}, true}, add, sum);
}

template <class P, int V, class T, bool kPixels>
void launch_direct_sums(DirectSums<T, kPixels> f, const Device& device) {
  f.by_packs = FastDivide64(kPixels ? f.channels / V : f.channels);
  const int64_t items = f.window.positions.count() * (f.channels / V);
  const int64_t blocks = ceil_div<int64_t>(items, kDirectThreads);
  if (blocks == 0) return;
  LFP_CHECK(blocks < (int64_t(1) << 31), "conv", "tensor too large: ", items, " elements");
  LFP_CHECK(f.window.phases < (1 << 16), "conv", "stride too large: ", f.window.phases, " phases");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(f.window.phases));
  direct_sums_kernel<T, P, V, kPixels><<<grid, kDirectThreads, 0, device.stream>>>(items, f);
  check_launch();
}

template <class P, class T, bool kPixels>
void direct_sums(const DirectSums<T, kPixels>& f, const Device& device) {
  const bool depthwise = f.window.channels == 1 && f.by_targets.divisor == 1;
  if constexpr (kPixels)
    if (depthwise && allows_packs<T>(f.channels) && f.source.aligned() && f.sums.aligned())
      return launch_direct_sums<P, kWide<T>>(f, device);
  launch_direct_sums<P, 1>(f, device);
}

// ---- the sums over positions

// For every pair (row channel, channel of the window): sum over positions of row * window, and for
// every row channel the sum of row.
template <class T, bool kPixels>
struct DirectKernelSums {
  ElementSource<T> rows, source;
  Window window;
  Strides strides;                  // of rows, at the window's positions
  FastDivide by_channels, by_rows;  // channels of the window and of rows, of one group
  int64_t pairs, taps;              // no taps: the sums of the rows alone
  int64_t positions_per_split;
};

constexpr int kTapsAtOnce = 8;

// Plain layout: a block works on one pair. Channels last: on 32 pairs, one per lane.
template <class T, class P, bool kPixels>
__global__ void __launch_bounds__(kDirectThreads)
    direct_kernel_sums_kernel(DirectKernelSums<T, kPixels> f, Acc<T>* partial,
                              Acc<T>* partial_rows) {
  using A = Acc<T>;
  constexpr int kWarps = kDirectThreads / 32;
  __shared__ A shared[kWarps][32];
  Window& window = f.window;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t pair = kPixels ? int64_t(blockIdx.x) * 32 + lane : blockIdx.x;
  const bool active = pair < f.pairs;
  const auto row = f.by_channels.divide(static_cast<uint32_t>(pair));
  const int channel = static_cast<int>(pair - int64_t(row) * f.by_channels.divisor);
  window.group = f.by_rows.divide(row);
  const int64_t first_tap = int64_t(blockIdx.y) * kTapsAtOnce;
  const int64_t begin = blockIdx.z * f.positions_per_split;
  const int64_t end = min(window.positions.count(), begin + f.positions_per_split);

  A sums[kTapsAtOnce] = {}, row_sum = A(0);
  if (active)
    for (int64_t k = begin + (kPixels ? warp : threadIdx.x); k < end;
         k += kPixels ? kWarps : kDirectThreads) {
      const Position q = window.positions(k);
      const A s =
          rounded<P>(f.rows(window.target_offset(q, f.strides) + int64_t(row) * f.strides.channel));
      row_sum += s;
#pragma unroll
      for (int t = 0; t < kTapsAtOnce; ++t) {
        if (first_tap + t >= f.taps) break;
        Tap tap{channel, {0, 0, 0}, true};
        window.split_tap(static_cast<uint32_t>(first_tap + t), tap);
        const int64_t from = window.offset(q, tap);
        if (from >= 0) sums[t] += s * rounded<P>(f.source(from));
      }
    }
  // Sum over the threads of a pair; thread or lane 0 of it has the result.
  const auto total = [&](A v) {
    if (!kPixels) v = warp_sum(v);
    __syncthreads();  // the sums before have been read
    shared[warp][lane] = v;
    __syncthreads();
    A sum = A(0);
    for (int w = 0; w < kWarps; ++w) sum += shared[w][lane];
    return sum;
  };
  const bool writes = active && (kPixels ? warp == 0 : threadIdx.x == 0);
#pragma unroll
  for (int t = 0; t < kTapsAtOnce; ++t) {
    if (first_tap + t >= f.taps) break;
    const A sum = total(sums[t]);
    if (writes) partial[(blockIdx.z * f.pairs + pair) * f.taps + first_tap + t] = sum;
  }
  if (!partial_rows || blockIdx.y > 0) return;
  const A sum = total(row_sum);
  if (writes && channel == 0)
    partial_rows[blockIdx.z * (f.pairs / f.by_channels.divisor) + row] = sum;
}

// Partial sums by splits of the positions, then the epilogue.
template <class P, class T, bool kPixels>
void direct_kernel_sums(DirectKernelSums<T, kPixels> f, const KernelEpilogue<T>& epilogue,
                        const Tensor& like, const Device& device) {
  using A = Acc<T>;
  if (f.pairs == 0) return;
  constexpr int64_t kLeastPositions = 4 * kDirectThreads;
  const int64_t blocks = kPixels ? ceil_div<int64_t>(f.pairs, 32) : f.pairs;
  const int64_t chunks = std::max<int64_t>(ceil_div<int64_t>(f.taps, kTapsAtOnce), 1);
  const int64_t count = f.window.positions.count();
  const int64_t wanted = ceil_div<int64_t>(4 * device.processors(), blocks * chunks);
  const int64_t most = ceil_div<int64_t>(count, kLeastPositions);
  const int64_t bound = std::clamp<int64_t>(std::min(wanted, most), 1, 256);
  f.positions_per_split = std::max<int64_t>(ceil_div(count, bound), 1);
  const int64_t splits = std::max<int64_t>(ceil_div(count, f.positions_per_split), 1);

  const int64_t rows = f.pairs / f.by_channels.divisor;
  const int64_t columns = f.by_channels.divisor * f.taps;
  const auto type = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor sums = torch::stable::new_empty(like, {splits, rows, columns}, type);
  const Tensor row_sums = torch::stable::new_empty(like, {splits, rows}, type);
  A* partial_rows = epilogue.wants_row_sums ? data<A>(row_sums) : nullptr;
  LFP_CHECK(blocks < (int64_t(1) << 31) && chunks < (1 << 16), "conv",
            "kernel too large: ", f.pairs, " channel pairs of ", f.taps, " taps");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(chunks),
                  static_cast<unsigned>(splits));
  direct_kernel_sums_kernel<T, P, kPixels>
      <<<grid, kDirectThreads, 0, device.stream>>>(f, data<A>(sums), partial_rows);
  check_launch();
  Problem<A> whole{rows, columns};
  const int64_t items = std::max(rows * ceil_div<int64_t>(columns, kWide<T>), rows);
  reduce_splits_kernel<A, KernelEpilogue<T>>
      <<<static_cast<unsigned>(ceil_div<int64_t>(items, kReduceThreads)), kReduceThreads, 0,
         device.stream>>>(whole, static_cast<int>(splits), data<A>(sums), partial_rows, epilogue);
  check_launch();
}

}  // namespace lfp::cuda
