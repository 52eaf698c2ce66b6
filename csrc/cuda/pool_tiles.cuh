// How the pools cut their work. A plane has the axes [A, P, Q]: those of the pool, leading axes of
// size 1 moved to the end. Tensors are [outer, A, P, Q, inner]: inner = 1, or the channels where
// they come last.
//
// A block owns a tile of one side of the pool: whole planes, or some steps along A of one plane,
// times (channels last) a slab of channels. What its windows need of the other side it stages in
// shared memory, so that overlapping windows read it once; only the steps that two tiles share are
// read twice. Where the stage does not fit, windows read global memory, and the caches help.
#pragma once

#include "common.cuh"

namespace lfp::cuda {

constexpr int kPoolThreads = 256;
constexpr int kPoolAxes = 3;
constexpr int64_t kMaxStage = 96 * 1024;  // what every architecture from sm_80 on grants a block
constexpr int64_t kPlaneStage = 32 * 1024,
                  kSlabStage = 64 * 1024;  // wanted: several blocks at once
constexpr int64_t kTileElements = 8192;    // wanted, of the side that the tile owns
constexpr int64_t kSlabBytes = 32;         // one sector of each position
constexpr int64_t kPoolBlocks = 512;       // below this many blocks tiles stay small

// n / divisor for 0 <= n < 2^31: a multiplication and a shift.
struct Divider {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((int64_t(1) << shift) < d) ++shift;
    magic = static_cast<uint32_t>((uint64_t((int64_t(1) << shift) - d) << 32) / d + 1);
  }
  __device__ int operator()(int n) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(n), magic) + n) >> shift);
  }
};

// The outputs first .. last - 1 are those whose windows may hold input i:
//   first = floor((i * scale + low) / divisor),  last = floor((i * scale + high) / divisor)
struct Cover {
  int64_t scale = 1, low = 0, high = 1, divisor = 1;
  int out = 1;
  bool wide = false;  // 32 bits do not hold the products
  Divider divide;

  Cover() = default;
  Cover(int64_t in, int64_t outputs, int64_t scale, int64_t low, int64_t high, int64_t divisor)
      : scale(scale), low(low), high(high), divisor(divisor), out(static_cast<int>(outputs)) {
    wide = in * scale + std::max<int64_t>(high, 0) >= INT_MAX || divisor >= INT_MAX;
    if (!wide) divide = Divider(divisor);
  }
  // floor((i * scale + add) / divisor), not below 0. kNarrow: `wide` is known to be false.
  template <bool kNarrow>
  __device__ __forceinline__ int quotient(int i, int64_t add) const {
    if (!kNarrow && wide) return static_cast<int>(max(i * scale + add, int64_t(0)) / divisor);
    return divide(max(i * static_cast<int>(scale) + static_cast<int>(add), 0));
  }
  template <bool kNarrow>
  __device__ int first(int i) const {
    return quotient<kNarrow>(i, low);
  }
  template <bool kNarrow>
  __device__ int last(int i) const {
    return min(quotient<kNarrow>(i, high), out);
  }
  // At most so many outputs have to do with `steps` neighbouring inputs.
  int64_t reach(int64_t steps) const {
    return std::min<int64_t>(((steps - 1) * scale + high - low) / divisor + 1, out);
  }
};

// One side of the pool: sizes of a plane, and how a position among planes decomposes.
struct Plane {
  int size[kPoolAxes];
  Divider plane, row, column;

  explicit Plane(const std::array<int64_t, kPoolAxes>& sizes) {
    for (int k = 0; k < kPoolAxes; ++k) {
      LFP_CHECK(sizes[k] < INT_MAX, "pool", "axis too long: ", sizes[k]);
      size[k] = static_cast<int>(sizes[k]);
    }
    // Where a plane has more positions a tile is a part of it, and `plane` is not asked.
    plane = Divider(std::clamp<int64_t>(positions(), 1, INT_MAX));
    row = Divider(std::clamp<int64_t>(step(), 1, INT_MAX)), column = Divider(std::max(size[2], 1));
  }
  LFP_HD int64_t step() const { return int64_t(size[1]) * size[2]; }
  LFP_HD int64_t positions() const { return size[0] * step(); }
};

struct Position {
  int plane, a, p, q;
};

// The ranges of outputs that cover a position, for positions that come one after the other.
struct Covering {
  int at[kPoolAxes] = {-1, -1, -1}, first[kPoolAxes], last[kPoolAxes];

  // low, high: in place of those of the covers.
  template <bool kNarrow>
  __device__ __forceinline__ void move(const Cover (&cover)[kPoolAxes], const int64_t* low,
                                       const int64_t* high, const Position& to) {
    const int axis[kPoolAxes] = {to.a, to.p, to.q};
#pragma unroll
    for (int k = 0; k < kPoolAxes; ++k) {
      if (axis[k] == at[k]) continue;
      at[k] = axis[k];
      first[k] = cover[k].quotient<kNarrow>(axis[k], low[k]);
      last[k] = min(cover[k].quotient<kNarrow>(axis[k], high[k]), cover[k].out);
    }
  }
  template <bool kNarrow>
  __device__ __forceinline__ void move(const Cover (&cover)[kPoolAxes], const Position& to) {
    const int64_t low[] = {cover[0].low, cover[1].low, cover[2].low};
    const int64_t high[] = {cover[0].high, cover[1].high, cover[2].high};
    move<kNarrow>(cover, low, high, to);
  }
  // f(position) for every such output of plane `plane`, in the order of memory.
  template <class F>
  __device__ __forceinline__ void for_each(int plane, F f) const {
    for (int a = first[0]; a < last[0]; ++a)
      for (int p = first[1]; p < last[1]; ++p)
        for (int q = first[2]; q < last[2]; ++q) f(Position{plane, a, p, q});
  }
};

// Positions [begin, end) along A of `planes` planes: all of A where there are several.
struct Region {
  int64_t first;  // position in the tensor
  int planes, begin, end;

  __device__ Region(const Plane& plane, int64_t first_plane, int planes, int begin, int end)
      : first(first_plane * plane.positions() + begin * plane.step()),
        planes(planes),
        begin(begin),
        end(end) {}
  __device__ int count(const Plane& plane) const {
    return planes * (end - begin) * static_cast<int>(plane.step());
  }
  __device__ Position decode(const Plane& plane, int local) const {
    Position at;
    at.plane = planes > 1 ? plane.plane(local) : 0;
    local -= at.plane * static_cast<int>(plane.positions());
    at.a = plane.row(local);
    local -= at.a * static_cast<int>(plane.step());
    at.p = plane.column(local);
    at.q = local - at.p * plane.size[2];
    at.a += begin;
    return at;
  }
  __device__ void next(const Plane& plane, Position& at) const {
    if (++at.q < plane.size[2]) return;
    at.q = 0;
    if (++at.p < plane.size[1]) return;
    at.p = 0;
    if (++at.a < end) return;
    at.a = begin;
    ++at.plane;
  }
  __device__ int local(const Plane& plane, const Position& at) const {
    return ((at.plane * (end - begin) + at.a - begin) * plane.size[1] + at.p) * plane.size[2] +
           at.q;
  }
};

// The channels of a block and where they begin.
struct Slab {
  int64_t inner, first;
  int width, size;  // of the stage's rows; of these, those inside the tensor
};

// f.operator()<N>(position, channel, offset) for the elements of a region: N positions, or with
// kLast (channels last) N channels, from there on; `offset` is their place in the tensor.
template <int V, bool kLast, class F>
__device__ __forceinline__ void for_region(const Region& region, int count, const Slab& slab,
                                           const Divider& packs, F f) {
  if constexpr (V > 1 && !kLast) {
    const int whole = region.first % V == 0 ? count - count % V : 0;
    for (int i = threadIdx.x * V; i < whole; i += kPoolThreads * V)
      f.template operator()<V>(i, 0, region.first + i);
    for (int i = whole + threadIdx.x; i < count; i += kPoolThreads)
      f.template operator()<1>(i, 0, region.first + i);
  } else {
    const int total = count * static_cast<int>(packs.divisor);
    for (int i = threadIdx.x; i < total; i += kPoolThreads) {
      const int position = packs(i), channel = (i - position * static_cast<int>(packs.divisor)) * V;
      if (channel < slab.size)
        f.template operator()<V>(position, channel,
                                 (region.first + position) * slab.inner + slab.first + channel);
    }
  }
}

// How the blocks cut [outer, A, P, Q, inner] of the side that they own.
struct Tiling {
  int64_t outer, inner;
  int planes = 1, step = 1, slab = 1;
  int64_t groups, cuts, slabs, shared;  // blocks per axis; bytes of the stage, 0: does not fit
  Divider packs;                        // of V channels in a slab

  // stage(steps): bytes that the windows of so many steps along A need, per plane and channel.
  // whole_planes: a tile must not be a part of a plane.
  template <class Stage>
  Tiling(const Plane& own, int64_t outer, int64_t inner, int64_t V, int64_t element_bytes,
         bool whole_planes, Stage stage, int64_t elements = kTileElements)
      : outer(outer), inner(inner) {
    slab = static_cast<int>(std::min(inner, std::max(V, kSlabBytes / element_bytes)));
    const int64_t wanted = inner == 1 ? kPlaneStage : kSlabStage, A = own.size[0];
    int64_t steps = A;
    if (!whole_planes) {
      while (steps > 1 &&
             (stage(steps) * slab > wanted || steps * own.step() * slab > 2 * elements))
        steps -= std::max<int64_t>(steps / 8, 1);
      steps = ceil_div(A, ceil_div(A, steps));
      // A tile starts where a pack may start.
      while (steps < A && inner == 1 && steps * own.step() % V != 0 && A * own.step() % V == 0 &&
             stage(steps + 1) <= kMaxStage)
        ++steps;
    }
    while (whole_planes && inner > 1 && slab > V && stage(steps) * slab > kMaxStage) slab /= 2;
    step = static_cast<int>(steps);
    if (steps == A && inner == 1) {
      const int64_t most =
          std::min({kTileElements / std::max<int64_t>(own.positions(), 1),
                    wanted / std::max<int64_t>(stage(steps), 1), outer / kPoolBlocks});
      planes = static_cast<int>(std::max<int64_t>(most, 1));
      if (planes >= V) planes -= planes % static_cast<int>(V);
    }
    groups = ceil_div<int64_t>(outer, planes);
    cuts = ceil_div(A, steps);
    slabs = ceil_div<int64_t>(inner, slab);
    packs = Divider(ceil_div<int64_t>(slab, inner == 1 ? 1 : V));
    const int64_t bytes = stage(steps) * slab * planes;
    shared = bytes <= kMaxStage ? bytes : 0;
    LFP_CHECK(blocks() < (int64_t(1) << 31) && steps * own.step() * slab < INT_MAX, "pool",
              "tensor too large");
  }
  int64_t blocks() const { return groups * cuts * slabs; }

  __device__ Slab channels() const {
    const int64_t first = blockIdx.x % slabs * slab;
    return {inner, first, slab, static_cast<int>(min(int64_t(slab), inner - first))};
  }
  __device__ int64_t first_plane() const { return blockIdx.x / slabs / cuts * planes; }
  __device__ Region region(const Plane& own) const {
    const int begin = static_cast<int>(blockIdx.x / slabs % cuts) * step;
    const int here = static_cast<int>(min(int64_t(planes), outer - first_plane()));
    return Region(own, first_plane(), here, begin, min(begin + step, own.size[0]));
  }
};

// The axes D, H, W in their order in memory, those of size 1 on both sides last where they lead.
inline std::array<int64_t, kPoolAxes> leading_axes_first(
    const std::array<int64_t, kPoolAxes>& in, const std::array<int64_t, kPoolAxes>& out) {
  std::array<int64_t, kPoolAxes> order{0, 1, 2};
  for (int k = 0; k < kPoolAxes - 1 && in[order[0]] == 1 && out[order[0]] == 1; ++k)
    std::rotate(order.begin(), order.begin() + 1, order.end() - k);
  return order;
}

}  // namespace lfp::cuda
