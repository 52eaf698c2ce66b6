#include "spike_events.h"

#include <array>
#include <utility>

#include "wide.h"

namespace lfp::cpu {

namespace {

#define LFP_INLINE __attribute__((always_inline))

template <class V, class A>
LFP_HD const V& get(const A* p) {
  return *reinterpret_cast<const V*>(p);
}

template <class V, class A>
LFP_HD void put(A* p, const V& v) {
  *reinterpret_cast<V*>(p) = v;
}

// v's halves added until four lanes are left.
template <class A, int64_t kBytes>
LFP_HD void four_lanes(const typename VectorOf<A, kBytes>::type& v,
                       typename VectorOf<A, 4 * sizeof(A)>::type& to) {
  if constexpr (kBytes == 4 * sizeof(A)) {
    to = v;
  } else {
    using Half = typename VectorOf<A, kBytes / 2>::type;
    union {
      typename VectorOf<A, kBytes>::type whole;
      Half half[2];
    } u = {v};
    four_lanes<A, kBytes / 2>(u.half[0] + u.half[1], to);
  }
}

// to[k] += the sum of the lanes of v[k], for four vectors.
template <class A, int64_t kBytes>
LFP_HD void add_lane_sums(const typename VectorOf<A, kBytes>::type* v, A* to) {
  using Four = typename VectorOf<A, 4 * sizeof(A)>::type;
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Index
      __attribute__((vector_size(4 * sizeof(A))));
  Four a, b, c, d;
  four_lanes<A, kBytes>(v[0], a);
  four_lanes<A, kBytes>(v[1], b);
  four_lanes<A, kBytes>(v[2], c);
  four_lanes<A, kBytes>(v[3], d);
  constexpr Index even = {0, 4, 2, 6}, odd = {1, 5, 3, 7};  // a0 b0 a2 b2, a1 b1 a3 b3
  const Four ab = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  const Four cd = __builtin_shuffle(c, d, even) + __builtin_shuffle(c, d, odd);
  constexpr Index low = {0, 1, 4, 5}, high = {2, 3, 6, 7};
  put(to, get<Four>(to) + __builtin_shuffle(ab, cd, low) + __builtin_shuffle(ab, cd, high));
}

// `part` lanes of each vector, from lane `lane` on: sums of V such parts, for each pixel.
template <int64_t V, int64_t kBytes, class A>
LFP_HD void add_body(const int32_t* starts, const int32_t* rows, int64_t pixels, int64_t lane,
                     const A* w, const A* start, int64_t count, int64_t stride, A* z) {
  using Part = typename VectorOf<A, kBytes>::type;
  constexpr int64_t kLanes = kSpikeLanes<A>, kPart = kBytes / sizeof(A);
  // Sums over every kWays-th row: additions that wait for each other would be too few at a time.
  constexpr int64_t kWays = V >= 4 ? 2 : kRowUnroll;
  for (int64_t p = 0; p < pixels; ++p, z += stride) {
    Part sum[kWays][V] = {};
    for (int64_t v = 0; v < V; ++v) sum[0][v] = get<Part>(start + v * kLanes + lane);
    for (int32_t i = starts[p]; i < starts[p + 1]; i += kWays)
#pragma GCC unroll 4
      for (int64_t u = 0; u < kWays; ++u) {
        const A* row = w + int64_t(rows[i + u]) * (V * kLanes) + lane;
#pragma GCC unroll 8
        for (int64_t v = 0; v < V; ++v) sum[u][v] += get<Part>(row + v * kLanes);
      }
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) {
      Part total = sum[0][v];
      for (int64_t u = 1; u < kWays; ++u) total += sum[u][v];
      const int64_t at = v * kLanes + lane, left = count - at;
      if (left >= kPart)
        put(z + at, total);
      else
        for (int64_t j = 0; j < left; ++j) z[at + j] = total[j];
    }
  }
}

template <int64_t S, int64_t kBytes, class A>
LFP_HD void collect_body(const int32_t* places, int64_t count, const int64_t* offsets, const A* w,
                         const A* s, A* dw, A* dots) {
  using V = typename VectorOf<A, kBytes>::type;
  V weight[S], sum[S] = {};
  int64_t offset[S];
#pragma GCC unroll 16
  for (int64_t k = 0; k < S; ++k) {
    weight[k] = get<V>(w + k * kSpikeLanes<A>);
    offset[k] = offsets[k];
  }
  const auto visit = [&](int64_t i, V& dot) LFP_INLINE {
    const A* at = s + places[i];
#pragma GCC unroll 16
    for (int64_t k = 0; k < S; ++k) {
      const V v = get<V>(at + offset[k]);
      sum[k] += v;
      dot += v * weight[k];
    }
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    V four[4] = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k) visit(i + k, four[k]);
    add_lane_sums<A, kBytes>(four, dots + i);
  }
  if (i < count) {
    V rest[4] = {};
    for (int64_t k = 0; i + k < count; ++k) visit(i + k, rest[k]);
    add_lane_sums<A, kBytes>(rest, dots + i);
  }
#pragma GCC unroll 16
  for (int64_t k = 0; k < S; ++k)
    put(dw + k * kSpikeLanes<A>, get<V>(dw + k * kSpikeLanes<A>) + sum[k]);
}

// Half a vector at a time: what 16 registers of 32 bytes hold.
template <int64_t V, class A>
LFP_CLONES void add_portable(const int32_t* starts, const int32_t* rows, int64_t pixels, const A* w,
                             const A* start, int64_t count, int64_t stride, A* z) {
  for (int64_t h = 0; h < kSpikeLanes<A>; h += kSpikeLanes<A> / 2)
    add_body<V, 32>(starts, rows, pixels, h, w, start, count, stride, z);
}

template <int64_t S, class A>
LFP_CLONES void collect_portable(const int32_t* places, int64_t count, const int64_t* offsets,
                                 const A* w, const A* s, A* dw, A* dots) {
  for (int64_t h = 0; h < kSpikeLanes<A>; h += kSpikeLanes<A> / 2)
    collect_body<S, 32>(places, count, offsets, w + h, s + h, dw + h, dots);
}

#if LFP_WIDE
template <int64_t V, class A>
LFP_V4 void add_v4(const int32_t* starts, const int32_t* rows, int64_t pixels, const A* w,
                   const A* start, int64_t count, int64_t stride, A* z) {
  add_body<V, 64>(starts, rows, pixels, 0, w, start, count, stride, z);
}

template <int64_t S, class A>
LFP_V4 void collect_v4(const int32_t* places, int64_t count, const int64_t* offsets, const A* w,
                       const A* s, A* dw, A* dots) {
  collect_body<S, 64>(places, count, offsets, w, s, dw, dots);
}
#endif

template <class A>
using Add = void (*)(const int32_t*, const int32_t*, int64_t, const A*, const A*, int64_t, int64_t,
                     A*);
template <class A>
using Collect = void (*)(const int32_t*, int64_t, const int64_t*, const A*, const A*, A*, A*);

// [number of vectors or slots - 1]
template <class A, bool kWide, int64_t... k>
constexpr auto add_table(std::integer_sequence<int64_t, k...>) {
#if LFP_WIDE
  if constexpr (kWide) return std::array<Add<A>, sizeof...(k)>{add_v4<k + 1, A>...};
#endif
  if constexpr (!kWide) return std::array<Add<A>, sizeof...(k)>{add_portable<k + 1, A>...};
}

template <class A, bool kWide, int64_t... k>
constexpr auto collect_table(std::integer_sequence<int64_t, k...>) {
#if LFP_WIDE
  if constexpr (kWide) return std::array<Collect<A>, sizeof...(k)>{collect_v4<k + 1, A>...};
#endif
  if constexpr (!kWide) return std::array<Collect<A>, sizeof...(k)>{collect_portable<k + 1, A>...};
}

// f(first, count) over groups of slots that fit into registers.
template <class F>
LFP_HD void for_each_group(int64_t slots, F f) {
  const int64_t groups = (slots + kMostSlots - 1) / kMostSlots;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = slots * g / groups;
    f(first, slots * (g + 1) / groups - first);
  }
}

template <class A, bool kWide>
void add(const int32_t* starts, const int32_t* rows, int64_t pixels, int64_t vectors, const A* w,
         const A* start, int64_t count, int64_t stride, A* z) {
  static const auto table = add_table<A, kWide>(std::make_integer_sequence<int64_t, kMostSums>{});
  table[vectors - 1](starts, rows, pixels, w, start, count, stride, z);
}

template <class A, bool kWide>
void collect(const int32_t* places, int64_t count, const int64_t* offsets, int64_t slots,
             const A* w, const A* s, A* dw, A* dots) {
  static const auto table =
      collect_table<A, kWide>(std::make_integer_sequence<int64_t, kMostSlots>{});
  if (count)
    for_each_group(slots, [&](int64_t first, int64_t n) {
      const int64_t at = first * kSpikeLanes<A>;
      table[n - 1](places, count, offsets + first, w + at, s, dw + at, dots);
    });
}

}  // namespace

template <class A>
SpikeWalks<A> spike_walks_of_this_processor() {
#if LFP_WIDE
  if (has_wide_vectors()) return {add<A, true>, collect<A, true>};
#endif
  return {add<A, false>, collect<A, false>};
}

template SpikeWalks<float> spike_walks_of_this_processor<float>();
template SpikeWalks<double> spike_walks_of_this_processor<double>();

}  // namespace lfp::cpu
