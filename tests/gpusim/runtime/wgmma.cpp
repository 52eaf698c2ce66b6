// wgmma: a warpgroup multiplies a 64 x K tile by a K x N tile that lie in shared memory behind
// descriptors. Each warp computes its own 16 rows, at once: a missing wgmma wait is not seen.
#include "engine.h"
#include "floating.h"

namespace sim {

using namespace ptx;

namespace {

constexpr unsigned CHUNK = 16;
const char zeros[CHUNK] = {};

// A matrix descriptor: start, two strides and the swizzle of an operand in shared memory.
struct Operand {
  uint32_t start, leading, stride;
  unsigned swizzle;  // 0 none, 1: 128 bytes, 2: 64 bytes, 3: 32 bytes
  bool transposed;   // contiguous along M or N instead of K
  unsigned element_bytes;

  Operand(uint64_t descriptor, bool transposed, unsigned element_bytes)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        swizzle(descriptor >> 62),
        transposed(transposed),
        element_bytes(element_bytes) {}

  // Shared address of element (mn, k).
  uint32_t address(unsigned mn, unsigned k) const {
    static const uint32_t row_bytes[] = {16, 128, 64, 32}, masks[] = {0, 0x70, 0x30, 0x10};
    uint32_t row = row_bytes[swizzle], offset;
    if (transposed) {
      uint32_t per_row = row / element_bytes;
      offset = k / 8 * stride + mn / per_row * leading + k % 8 * row + mn % per_row * element_bytes;
    } else if (swizzle) {
      offset = mn / 8 * stride + mn % 8 * row + k * element_bytes;
    } else {
      uint32_t per_core = 16 / element_bytes;
      offset =
          mn / 8 * stride + k / per_core * leading + mn % 8 * 16 + k % per_core * element_bytes;
    }
    uint32_t plain = start + offset;
    return plain ^ (plain >> 3 & masks[swizzle]);
  }

  // Calls visit(mn, k, 16 bytes) for every chunk that this lane checks and reads.
  template <class Visit>
  void for_chunks(unsigned first, unsigned count, unsigned depth, unsigned line,
                  Visit visit) const {
    unsigned per_chunk = CHUNK / element_bytes;
    unsigned inner = (transposed ? count : depth) / per_chunk;
    unsigned outer = transposed ? depth : count;
    for (unsigned i = 0; i < inner * outer; ++i) {
      unsigned along = i % inner * per_chunk, across = i / inner;
      unsigned mn = first + (transposed ? along : across), k = transposed ? across : along;
      const char* p = zeros;
      if (i % WARP == lane())
        p = access(Space::Shared, address(mn, k), CHUNK, Load | BulkUnit, line);
      visit(mn - first, k, p ? p : zeros);
    }
  }
};

float element_at(const char* p, unsigned index, Element element) {
  if (element == Element::Tf32) return tf32_value(peek<uint32_t>(p + 4 * index));
  uint16_t bits = peek<uint16_t>(p + 2 * index);
  return (float)(element == Element::Half ? widen(Half{bits}) : widen(Bfloat{bits}));
}

struct WgmmaLane {
  uint32_t* d;
  const uint32_t* a;  // null: A lies in shared memory
  uint64_t a_descriptor, b_descriptor;
  unsigned columns;
  Element element;
  bool accumulate;
  int sign;
  bool transpose_a, transpose_b;
  unsigned warp_row;

  unsigned element_bytes() const { return element == Element::Tf32 ? 4 : 2; }
  unsigned depth() const { return 32 / element_bytes(); }
};

constexpr unsigned MAX_DEPTH = 16, MAX_COLUMNS = 256;
float tile_a[16][MAX_DEPTH], tile_b[MAX_DEPTH][MAX_COLUMNS];

void read_a_registers(WgmmaLane** lanes) {
  bool wide = lanes[0]->element == Element::Tf32;
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      int row = l / 4 + i % 2 * 8, column = l % 4;
      uint32_t bits = lanes[l]->a[i];
      const char* p = (const char*)&bits;
      if (wide)
        tile_a[row][column + i / 2 * 4] = element_at(p, 0, lanes[0]->element);
      else
        for (int e = 0; e < 2; ++e)
          tile_a[row][column * 2 + e + i / 2 * 8] = element_at(p, e, lanes[0]->element);
    }
}

void read_shared(const Operand& operand, unsigned first, unsigned count, const WgmmaLane& lane,
                 auto store) {
  for (unsigned mn = 0; mn < count; ++mn)
    for (unsigned k = 0; k < lane.depth(); ++k) {
      uint32_t address = operand.address(first + mn, k);
      bool inside = address + operand.element_bytes <= shared_buffer.size();
      store(mn, k, element_at(inside ? shared_base + address : zeros, 0, lane.element));
    }
}

void wgmma_lanes(void** arguments, uint32_t) {
  auto lanes = (WgmmaLane**)arguments;
  const WgmmaLane& first = *lanes[0];
  unsigned bytes = first.element_bytes(), depth = first.depth();
  if (first.a)
    read_a_registers(lanes);
  else
    read_shared(Operand(first.a_descriptor, first.transpose_a, bytes), first.warp_row, 16, first,
                [](unsigned m, unsigned k, float x) { tile_a[m][k] = x; });
  read_shared(Operand(first.b_descriptor, first.transpose_b, bytes), 0, first.columns, first,
              [](unsigned n, unsigned k, float x) { tile_b[k][n] = x; });
  for (int l = 0; l < 32; ++l)
    for (unsigned i = 0; i < first.columns / 2; ++i) {
      int row = l / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
      float sum = 0;
      for (unsigned k = 0; k < depth; ++k) sum += tile_a[row][k] * tile_b[k][column];
      float start = first.accumulate ? from_bits<float>(lanes[l]->d[i]) : 0;
      lanes[l]->d[i] = to_bits(start + first.sign * sum);
    }
}

// The lanes share the work of checking what the warp reads.
void check(const Operand& operand, unsigned first, unsigned count, unsigned depth, unsigned line) {
  operand.for_chunks(first, count, depth, line, [](unsigned, unsigned, const char*) {});
}

}  // namespace

void wgmma(uint32_t* d, unsigned columns, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, Element element, bool accumulate, int sign_a, int sign_b,
           bool transpose_a, bool transpose_b, unsigned line) {
  unsigned warp_row = thread_number() / WARP % 4 * 16;
  WgmmaLane argument{d,           a,           a_descriptor, b_descriptor,
                     columns,     element,     accumulate,   sign_a * sign_b,
                     transpose_a, transpose_b, warp_row};
  unsigned bytes = argument.element_bytes(), depth = argument.depth();
  if (!a) check(Operand(a_descriptor, transpose_a, bytes), warp_row, 16, depth, line);
  check(Operand(b_descriptor, transpose_b, bytes), 0, columns, depth, line);
  collective(~0u, &argument, wgmma_lanes, line);
}

}  // namespace sim
