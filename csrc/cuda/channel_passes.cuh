// Passes over x [outer, C, inner] that reduce to, or take, one value per channel.
//
// A pass loads every element once. It sums a pair of values per channel, or writes an output, or
// does both. Sums have two steps: each block writes float64 partial sums, a second kernel adds them
// in a fixed order, so there are no atomics and the bits depend on the shape alone.
#pragma once

#include "common.cuh"

namespace lfp::cuda {

constexpr int kPassThreads = 256, kPassWarps = kPassThreads / 32;
// Below so many contiguous elements a plane is a part of a row: [outer, C * inner] is read by rows.
constexpr int64_t kNarrow = 32;
constexpr int64_t kMaxLanes = 8;        // threads that stand side by side on a row: 128 bytes
constexpr int64_t kPassBlocks = 4096;   // wanted: a few per place on the largest device
constexpr int64_t kMinChunk = 4096;     // elements of a block of planes
constexpr int64_t kPartialShare = 800;  // bytes of a column for each partial sum of it: 16 / 800

struct Pair {
  double first = 0, second = 0;
};

// How the blocks cut [outer, C, inner].
//   planes: a block takes `chunk` of the outer * inner elements of one channel; block = c, split
//   rows:   a block takes `chunk` rows of lanes * V columns of C * inner;  block = split, columns
struct Cut {
  int64_t outer, channels, inner, width;
  bool rows;
  int64_t chunk, splits, blocks;
  int64_t step_inner, step_offset;  // planes: from a thread's pack to its next
  int lanes;                        // rows: threads side by side
  int64_t column_blocks;

  // V: elements of an access, a divisor of inner (planes) or C * inner (rows). Sizes may be 0.
  Cut(const ChannelView& view, int64_t V, int64_t element_bytes)
      : outer(view.outer), channels(view.channels), inner(view.inner) {
    rows = inner < kNarrow;
    width = channels * inner;
    if (rows) {
      lanes = 1;
      while (lanes < kMaxLanes && lanes * V < width) lanes *= 2;
      column_blocks = std::max<int64_t>(ceil_div(width, lanes * V), 1);
      splits = std::min(kPassBlocks / column_blocks, outer * element_bytes / kPartialShare);
    } else {
      const int64_t step = kPassThreads * V;
      step_inner = step % inner;
      step_offset = step / inner * width + step_inner;
      splits = std::min(kPassBlocks / channels, outer * inner / kMinChunk);
    }
    splits = std::max<int64_t>(splits, 1);
    chunk = std::max<int64_t>(ceil_div(rows ? outer : outer * inner, splits), 1);
    if (!rows) chunk = ceil_div(chunk, V) * V;
    splits = ceil_div(rows ? outer : outer * inner, chunk);
    blocks = splits * (rows ? column_blocks : channels);
  }
  double count() const { return double(outer) * double(inner); }  // values per channel

  // Partial sums: of channel c the parts 0 .. parts() - 1.
  LFP_HD int64_t parts() const { return rows ? splits * inner : splits; }
  LFP_HD int64_t part(int64_t c, int64_t k) const {
    return rows ? k / inner * width + c * inner + k % inner : c * splits + k;
  }
  int64_t partials() const { return parts() * channels; }
};

// What a pass is to do: sum where `partial` is given, write where `write` is set.
struct Pass {
  Pair* partial;
  bool write;
};

// A Body has
//   Element                    the operands of one element
//   kPacks<V>, kRowPacks<V>    packs of V elements in flight, by planes and by rows
//   channel(c)                 what it must know of the channel
//   load<V>(offset, e)         V neighbouring elements
//   add<B>(channel, e, pair)   sums of B elements of one channel
//   value(channel, e), out     what is written
template <int V, class Body>
__global__ void __launch_bounds__(kPassThreads, 2)
    planes_kernel(const Cut cut, const Body body, const Pass pass) {
  using Element = typename Body::Element;
  constexpr int64_t kStep = kPassThreads * V;
  const int64_t c = blockIdx.x / cut.splits, split = blockIdx.x % cut.splits;
  __shared__ typename Body::Channel shared_channel;  // read once for all threads
  if (threadIdx.x == 0) shared_channel = body.channel(c);
  __syncthreads();
  const typename Body::Channel channel = shared_channel;
  Pair sums;
  int64_t e = split * cut.chunk + threadIdx.x * V;  // among the elements of the channel
  const int64_t end = min((split + 1) * cut.chunk, cut.outer * cut.inner);
  int64_t i = e % cut.inner, offset = e / cut.inner * cut.width + c * cut.inner + i;
  const auto handle = [&]<int U>(std::integral_constant<int, U>) {
    Element elements[U * V];
    int64_t at[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      at[u] = offset;
      body.template load<V>(offset, elements + u * V);
      e += kStep, i += cut.step_inner, offset += cut.step_offset;
      if (i >= cut.inner) i -= cut.inner, offset += cut.width - cut.inner;
    }
    if (pass.partial) body.template add<U * V>(channel, elements, sums);
    if (!pass.write) return;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      typename Body::Value v[V];
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = body.value(channel, elements[u * V + k]);
      store<V>(body.out, at[u], v);
    }
  };
  constexpr int kPacks = Body::template kPacks<V>;
  while (e + (kPacks - 1) * kStep < end) handle(std::integral_constant<int, kPacks>{});
  while (e < end) handle(std::integral_constant<int, 1>{});

  if (!pass.partial) return;
  __shared__ double scratch[2][kPassWarps];
  sums.first = block_sum<kPassThreads>(sums.first, scratch[0]);
  sums.second = block_sum<kPassThreads>(sums.second, scratch[1]);
  if (threadIdx.x == 0) pass.partial[cut.part(c, split)] = sums;
}

template <int V, class Body>
__global__ void __launch_bounds__(kPassThreads, 2)
    rows_kernel(const Cut cut, const Body body, const Pass pass) {
  using Element = typename Body::Element;
  const int lane = threadIdx.x % cut.lanes, high = kPassThreads / cut.lanes;
  const int64_t split = blockIdx.x / cut.column_blocks;
  const int64_t first_column = blockIdx.x % cut.column_blocks * cut.lanes * V;
  const int64_t column = first_column + lane * V;
  const bool active = column < cut.width;
  __shared__ typename Body::Channel shared_channels[kMaxLanes * V];  // read once for all threads
  if (threadIdx.x < cut.lanes * V && first_column + threadIdx.x < cut.width)
    shared_channels[threadIdx.x] = body.channel((first_column + threadIdx.x) / cut.inner);
  __syncthreads();
  typename Body::Channel channels[V] = {};
  Pair sums[V];
  if (active) {
#pragma unroll
    for (int k = 0; k < V; ++k) channels[k] = shared_channels[lane * V + k];
  }
  int64_t row = split * cut.chunk + threadIdx.x / cut.lanes;
  const int64_t end = active ? min((split + 1) * cut.chunk, cut.outer) : 0;
  const auto handle = [&]<int U>(std::integral_constant<int, U>) {
    Element elements[U][V];
#pragma unroll
    for (int u = 0; u < U; ++u)
      body.template load<V>((row + u * high) * cut.width + column, elements[u]);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (!pass.partial) break;
      Element of_column[U];
#pragma unroll
      for (int u = 0; u < U; ++u) of_column[u] = elements[u][k];
      body.template add<U>(channels[k], of_column, sums[k]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!pass.write) break;
      typename Body::Value v[V];
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = body.value(channels[k], elements[u][k]);
      store<V>(body.out, (row + u * high) * cut.width + column, v);
    }
    row += U * high;
  };
  constexpr int kPacks = Body::template kRowPacks<V>;
  while (row + (kPacks - 1) * high < end) handle(std::integral_constant<int, kPacks>{});
  while (row < end) handle(std::integral_constant<int, 1>{});

  if (!pass.partial) return;
  // The threads of a column: in the warp first, then over the warps.
  __shared__ Pair scratch[kPassWarps][kMaxLanes * V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    for (int step = 16; step >= cut.lanes; step /= 2) {
      sums[k].first += __shfl_xor_sync(0xffffffffu, sums[k].first, step);
      sums[k].second += __shfl_xor_sync(0xffffffffu, sums[k].second, step);
    }
    if (threadIdx.x % 32 < cut.lanes) scratch[threadIdx.x / 32][lane * V + k] = sums[k];
  }
  __syncthreads();
  const int64_t mine = first_column + threadIdx.x;
  if (threadIdx.x >= cut.lanes * V || mine >= cut.width) return;
  Pair total;
#pragma unroll
  for (int w = 0; w < kPassWarps; ++w) {
    total.first += scratch[w][threadIdx.x].first;
    total.second += scratch[w][threadIdx.x].second;
  }
  pass.partial[split * cut.width + mine] = total;
}

template <int V, class Body>
void run_pass(const Cut& cut, const Body& body, const Pass& pass, cudaStream_t stream) {
  LFP_CHECK(cut.blocks < (int64_t(1) << 31), "batch_norm", "too many channels");
  const unsigned blocks = static_cast<unsigned>(cut.blocks);
  if (cut.rows)
    rows_kernel<V><<<blocks, kPassThreads, 0, stream>>>(cut, body, pass);
  else
    planes_kernel<V><<<blocks, kPassThreads, 0, stream>>>(cut, body, pass);
  check_launch();
}

// Whether accesses of V elements stay inside a plane or a row.
inline bool divides(int64_t V, const ChannelView& view) {
  return (view.inner < kNarrow ? view.channels * view.inner : view.inner) % V == 0;
}

// The sums of channel c, by one warp; every lane gets them.
__device__ __forceinline__ Pair channel_sums(const Cut& cut, const Pair* partial, int64_t c) {
  Pair sums;
  for (int64_t k = threadIdx.x % 32; partial && k < cut.parts(); k += 32) {
    const Pair part = partial[cut.part(c, k)];
    sums.first += part.first;
    sums.second += part.second;
  }
  return {warp_sum(sums.first), warp_sum(sums.second)};
}

// A per-channel tensor [C] of x's dtype T or of float32; `absent` stands for the values of none.
template <class T>
struct ChannelVector {
  void* data;
  int64_t stride;
  bool single;

  explicit ChannelVector(const std::optional<Tensor>& t, const char* name)
      : data(t.has_value() && t->numel() ? t->data_ptr() : nullptr),
        stride(data ? t->stride(0) : 0),
        single(data && t->scalar_type() == ScalarType::Float) {
    const bool known = !t.has_value() || single || t->element_size() == sizeof(T) || !data;
    LFP_CHECK(known, "batch_norm", name, ": expected the dtype of x or float32");
  }
  __device__ double at(int64_t c, double absent) const {
    if (!data) return absent;
    return single ? double(static_cast<const float*>(data)[c * stride])
                  : double(load(static_cast<const T*>(data), c * stride));
  }
  __device__ void put(int64_t c, double value) const {
    if (single)
      static_cast<float*>(data)[c * stride] = float(value);
    else if (data)
      store(static_cast<T*>(data), c * stride, Acc<T>(value));
  }
};

}  // namespace lfp::cuda
