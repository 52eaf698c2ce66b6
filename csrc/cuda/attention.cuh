// What the kernels of attention share: the description of a call, masks, dropout, and the ways of
// rows between global and shared memory.
#pragma once

#include "../philox.h"
#include "attention_core.cuh"

namespace lfp::cuda {

// Rows of the heads of a tensor [B, heads, rows, width], neighbouring elements beside each other.
template <class T>
struct Heads {
  T* data;
  int64_t batch, head, row;  // strides
  bool wide;                 // every row allows accesses of 16 bytes

  __device__ __forceinline__ T* of(int64_t b, int64_t h) const {
    return data + b * batch + h * head;
  }
};

enum class AttentionMask { kNone, kHides, kAdds };

template <class T>
struct Attention {
  using A = Acc<T>;
  Heads<const T> q, k, v;
  const void* mask;
  int64_t mask_b, mask_h, mask_i, mask_j;
  AttentionMask mask_kind;
  int64_t queries, keys, heads, shared;  // query heads that share a key head
  int width, values;                     // elements of q and k, of v
  bool causal, dropout;
  A scale, keep;  // keep: 1 / (1 - rate)
  float rate;
  uint64_t seed;

  // z, -inf where query i does not see key j.
  __device__ __forceinline__ A masked(A z, int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (i >= queries || j >= keys || (causal && j > i)) return A(-INFINITY);
    if (mask_kind == AttentionMask::kNone) return z;
    const int64_t at = b * mask_b + h * mask_h + i * mask_i + j * mask_j;
    if (mask_kind == AttentionMask::kHides)
      return static_cast<const bool*>(mask)[at] ? z : A(-INFINITY);
    return z + load(static_cast<const T*>(mask), at);
  }
  // What dropout multiplies the probability with.
  __device__ __forceinline__ A kept(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (!dropout) return A(1);
    const int64_t index = ((b * heads + h) * queries + i) * keys + j;
    const PhiloxBlock block = philox(static_cast<uint64_t>(index) >> 2, seed);
    // An index into the block would put it in local memory.
    const uint32_t low = index & 1 ? block.word[1] : block.word[0];
    const uint32_t high = index & 1 ? block.word[3] : block.word[2];
    return unit_interval<float>(index & 2 ? high : low) >= rate ? keep : A(0);
  }
  // Keys that the queries before `last` may see.
  __device__ __forceinline__ int64_t seen(int64_t last) const {
    return causal && last < keys ? last : keys;
  }
};

// Rows first ... of `count` x width to a tile, zeros around them.
template <int kThreads, class T, class Tile>
__device__ __forceinline__ void fetch(Tile& tile, const T* from, int64_t stride, bool wide,
                                      int64_t first, int64_t count, int width) {
  constexpr int V = kWide<T>;
  using A = Acc<T>;
  static_assert(Tile::kColumns % V == 0);
  for (int at = threadIdx.x; at < Tile::kRows * (Tile::kColumns / V); at += kThreads) {
    const int row = at / (Tile::kColumns / V), column = at % (Tile::kColumns / V) * V;
    A run[V] = {};
    if (first + row < count && column < width) {
      const T* source = from + (first + row) * stride + column;
      if (wide) {
        load<V>(source, 0, run);
      } else {
#pragma unroll
        for (int c = 0; c < V; ++c)
          if (column + c < width) run[c] = load(source, c);
      }
    }
#pragma unroll
    for (int c = 0; c < V; ++c) round_to(run[c], tile.value[row][column + c]);
  }
}

// The sums of a block to rows first ... of `to` through `stage`, times `factor` and, with `own`,
// times the rows of that tensor.
template <class B, class T>
__device__ __forceinline__ void put(typename B::Sums& sums, unsigned char* stage, T* to,
                                    int64_t stride, bool wide, int64_t first, int64_t count,
                                    int width, Acc<T> factor, const T* own, int64_t own_stride,
                                    bool own_wide) {
  constexpr int V = kWide<T>;
  using A = Acc<T>;
  auto& rows = *reinterpret_cast<Rows<A, B::kOwn, B::kWidth>*>(stage);
  __syncthreads();  // the memory has been read
  B::each_sum(sums, [&](int m, int n, A sum) { rows.value[m][n] = sum; });
  __syncthreads();
  for (int at = threadIdx.x; at < B::kOwn * (B::kWidth / V); at += B::kThreads) {
    const int row = at / (B::kWidth / V), column = at % (B::kWidth / V) * V;
    if (first + row >= count || column >= width) continue;
    A run[V], times[V] = {};
    const T* beside = own ? own + (first + row) * own_stride + column : nullptr;
    if (own && own_wide)
      load<V>(beside, 0, times);
    else if (own)
#pragma unroll
      for (int c = 0; c < V; ++c)
        if (column + c < width) times[c] = load(beside, c);
#pragma unroll
    for (int c = 0; c < V; ++c) {
      run[c] = rows.value[row][column + c] * factor;
      if (own) run[c] *= times[c];
    }
    T* target = to + (first + row) * stride + column;
    if (wide)
      store<V>(target, 0, run);
    else
#pragma unroll
      for (int c = 0; c < V; ++c)
        if (column + c < width) store(target, c, run[c]);
  }
}

// ---- host

template <class T>
Heads<T> heads_of(const Tensor& t) {
  constexpr int V = kWide<T>;
  const auto* start = data<T>(t);
  const int64_t width = t.size(3);
  const bool wide = width % V == 0 && (t.size(0) < 2 || t.stride(0) % V == 0) &&
                    (t.size(1) < 2 || t.stride(1) % V == 0) &&
                    (t.size(2) < 2 || t.stride(2) % V == 0) && aligned16(start);
  return {data<T>(t), t.stride(0), t.stride(1), t.stride(2), wide};
}
template <class T>
Heads<const T> constant(const Heads<T>& h) {
  return {h.data, h.batch, h.head, h.row, h.wide};
}

// Neighbouring elements of a head beside each other.
inline Tensor in_rows(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

// [B, H, L, E] whose memory is [B, L, H, E].
inline Tensor empty_heads(const Tensor& like, int64_t b, int64_t h, int64_t l, int64_t e) {
  return torch::stable::transpose(torch::stable::new_empty(like, {b, l, h, e}), 1, 2);
}

template <class T>
Attention<T> attention_of(const Tensor& q, const Tensor& k, const Tensor& v,
                          const std::optional<Tensor>& mask, bool causal, double scale, double rate,
                          int64_t seed) {
  using A = Acc<T>;
  Attention<T> a{};
  a.q = constant(heads_of<T>(q)), a.k = constant(heads_of<T>(k)), a.v = constant(heads_of<T>(v));
  a.mask_kind = AttentionMask::kNone;
  if (mask) {
    const bool hides = mask->scalar_type() == ScalarType::Bool;
    a.mask_kind = hides ? AttentionMask::kHides : AttentionMask::kAdds;
    a.mask = mask->data_ptr();
    a.mask_b = mask->stride(0), a.mask_h = mask->stride(1);
    a.mask_i = mask->stride(2), a.mask_j = mask->stride(3);
  }
  a.queries = q.size(2), a.keys = k.size(2), a.heads = q.size(1);
  a.shared = std::max<int64_t>(1, k.size(1) > 0 ? q.size(1) / k.size(1) : 1);
  a.width = static_cast<int>(q.size(3)), a.values = static_cast<int>(v.size(3));
  a.causal = causal, a.dropout = rate != 0;
  a.scale = A(scale), a.keep = A(1 / (1 - rate)), a.rate = static_cast<float>(rate);
  a.seed = static_cast<uint64_t>(seed);
  return a;
}

// f(constant W): the narrowest block that holds the rows.
template <class F>
void dispatch_head(int64_t width, const char* op, F&& f) {
  if (width <= 64) return f(std::integral_constant<int, 64>{});
  if (width <= 128) return f(std::integral_constant<int, 128>{});
  STD_TORCH_CHECK(width <= 256, "lfp_kernels::", op, ": heads of more than 256 elements do not ",
                  "fit a block, got ", width, "; fix: use_backend('reference')");
  return f(std::integral_constant<int, 256>{});
}

inline unsigned grid_of(int64_t rows, int64_t own, int64_t batch, int64_t heads, const char* op) {
  const int64_t blocks = ceil_div<int64_t>(rows, own) * batch * heads;
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "lfp_kernels::", op, ": too many blocks: ", blocks);
  return static_cast<unsigned>(blocks);
}

// Batch, head and block of rows of a thread block.
struct BlockPlace {
  int64_t b, h, first;
  __device__ __forceinline__ BlockPlace(int64_t rows, int own, int64_t heads, bool last_first) {
    const int64_t blocks = ceil_div<int64_t>(rows, own), head = blockIdx.x / blocks;
    const int64_t block = blockIdx.x % blocks;
    b = head / heads, h = head % heads;
    first = (last_first ? blocks - 1 - block : block) * own;
  }
};

}  // namespace lfp::cuda
