// ldmatrix, stmatrix, mma and wmma. Every lane brings its registers; the last one to arrive
// computes for all. Products are summed in float in the order of k: the summation order and the
// truncation of real tensor cores are not modelled.
#include "engine.h"
#include "floating.h"

namespace sim {

using namespace ptx;

namespace {

constexpr uint32_t ALL = ~0u;
const char zeros[16] = {};

struct MatrixLane {
  uint32_t* registers;
  char* row;  // 16 bytes
  unsigned count;
  bool transposed;
};

// Lane l of an 8x8 matrix of 16-bit elements holds row l/4, columns 2(l%4) and the next.
void load_matrices(void** arguments, uint32_t) {
  auto lanes = (MatrixLane**)arguments;
  for (unsigned matrix = 0; matrix < lanes[0]->count; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) memcpy(elements[row], lanes[matrix * 8 + row]->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      int row = lane / 4, column = lane % 4 * 2;
      bool transposed = lanes[lane]->transposed;
      uint32_t low = transposed ? elements[column][row] : elements[row][column];
      uint32_t high = transposed ? elements[column + 1][row] : elements[row][column + 1];
      lanes[lane]->registers[matrix] = high << 16 | low;
    }
  }
}

void store_matrices(void** arguments, uint32_t) {
  auto lanes = (MatrixLane**)arguments;
  for (unsigned matrix = 0; matrix < lanes[0]->count; ++matrix) {
    uint16_t elements[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      int row = lane / 4, column = lane % 4 * 2;
      uint32_t pair = lanes[lane]->registers[matrix];
      bool transposed = lanes[lane]->transposed;
      (transposed ? elements[column][row] : elements[row][column]) = (uint16_t)pair;
      (transposed ? elements[column + 1][row] : elements[row][column + 1]) = (uint16_t)(pair >> 16);
    }
    for (int row = 0; row < 8; ++row)
      if (lanes[matrix * 8 + row]->row) memcpy(lanes[matrix * 8 + row]->row, elements[row], 16);
  }
}

float half_of(uint32_t pair, int high, Element element) {
  uint16_t bits = (uint16_t)(pair >> (16 * high));
  return element == Element::Half ? (float)widen(Half{bits}) : (float)widen(Bfloat{bits});
}

struct MmaLane {
  uint32_t* d;
  const uint32_t *a, *b, *c;
  unsigned depth;
  Element element;
  bool half_accumulator;
};

float accumulator(const MmaLane& lane, int i) {
  return lane.half_accumulator ? half_of(lane.c[i / 2], i % 2, Element::Half)
                               : from_bits<float>(lane.c[i]);
}

void mma_lanes(void** arguments, uint32_t) {
  auto lanes = (MmaLane**)arguments;
  unsigned depth = lanes[0]->depth;
  Element element = lanes[0]->element;
  bool wide = element == Element::Tf32;  // one element per register instead of two
  unsigned per_register = wide ? 1 : 2, step = wide ? 4 : 8;
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    int group = l / 4, member = l % 4;
    for (unsigned i = 0; i < depth / step * 2; ++i)
      for (unsigned e = 0; e < per_register; ++e) {
        uint32_t bits = lanes[l]->a[i];
        a[group + i % 2 * 8][member * per_register + e + i / 2 * step] =
            wide ? tf32_value(bits) : half_of(bits, e, element);
      }
    for (unsigned i = 0; i < depth / step; ++i)
      for (unsigned e = 0; e < per_register; ++e) {
        uint32_t bits = lanes[l]->b[i];
        b[member * per_register + e + i * step][group] =
            wide ? tf32_value(bits) : half_of(bits, e, element);
      }
  }
  for (int l = 0; l < 32; ++l) {
    float results[4];
    for (int i = 0; i < 4; ++i) {
      int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      float sum = 0;
      for (unsigned k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      results[i] = accumulator(*lanes[l], i) + sum;
    }
    for (int i = 0; i < 4; ++i)
      if (!lanes[l]->half_accumulator)
        lanes[l]->d[i] = to_bits(results[i]);
      else if (i % 2)
        lanes[l]->d[i / 2] = (uint32_t)to_bits(nearest<Half>(results[i])) << 16 |
                             to_bits(nearest<Half>(results[i - 1]));
  }
}

// ---- wmma: element e of lane l is number l * per_lane + e of the tile, in row-major order

struct WmmaLane {
  uint32_t* d;
  const uint32_t *a, *b, *c;
  unsigned m, n, k;
  Element element;
};

template <class Unpack>
std::vector<float> gather(WmmaLane** lanes, const uint32_t* WmmaLane::* operand, unsigned elements,
                          Unpack unpack) {
  std::vector<float> tile(elements);
  unsigned per_lane = elements / 32;
  for (unsigned i = 0; i < elements; ++i)
    tile[i] = unpack(lanes[i / per_lane]->*operand, i % per_lane);
  return tile;
}

void wmma_lanes(void** arguments, uint32_t) {
  auto lanes = (WmmaLane**)arguments;
  auto [m, n, k] = std::tuple(lanes[0]->m, lanes[0]->n, lanes[0]->k);
  auto pairs = [&](const uint32_t* registers, unsigned i) {
    return half_of(registers[i / 2], i % 2, lanes[0]->element);
  };
  auto a = gather(lanes, &WmmaLane::a, m * k, pairs);
  auto b = gather(lanes, &WmmaLane::b, k * n, pairs);
  auto c = gather(lanes, &WmmaLane::c, m * n, [](const uint32_t* registers, unsigned i) {
    return from_bits<float>(registers[i]);
  });
  unsigned per_lane = m * n / 32;
  for (unsigned i = 0; i < m * n; ++i) {
    float sum = 0;
    for (unsigned j = 0; j < k; ++j) sum += a[i / n * k + j] * b[j * n + i % n];
    lanes[i / per_lane]->d[i % per_lane] = to_bits(c[i] + sum);
  }
}

void synchronise(void**, uint32_t) {}

template <class Visit>
void for_elements(unsigned rows, unsigned columns, bool column_major, unsigned width,
                  uint32_t stride, Visit visit) {
  unsigned per_lane = rows * columns / 32;
  for (unsigned e = 0; e < per_lane; ++e) {
    unsigned index = lane() * per_lane + e, row = index / columns, column = index % columns;
    visit(e, (uint64_t)(column_major ? column * stride + row : row * stride + column) * width);
  }
}

}  // namespace

void load_matrix(uint32_t* registers, unsigned count, bool transposed, uint32_t shared,
                 unsigned line) {
  MatrixLane argument{registers, (char*)zeros, count, transposed};
  if (lane() < count * 8)  // the other lanes bring no address
    if (char* row = access(Space::Shared, shared, 16, Load, line)) argument.row = row;
  collective(ALL, &argument, load_matrices, line);
}

void store_matrix(const uint32_t* registers, unsigned count, bool transposed, uint32_t shared,
                  unsigned line) {
  MatrixLane argument{(uint32_t*)registers, nullptr, count, transposed};
  if (lane() < count * 8) argument.row = access(Space::Shared, shared, 16, Store, line);
  collective(ALL, &argument, store_matrices, line);
}

void mma(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, unsigned depth,
         Element element, bool half_accumulator, unsigned line) {
  MmaLane argument{d, a, b, c, depth, element, half_accumulator};
  collective(ALL, &argument, mma_lanes, line);
}

void wmma_load(uint32_t* registers, unsigned rows, unsigned columns, bool column_major,
               unsigned width, Space space, uint64_t address, uint32_t stride, unsigned line) {
  for_elements(rows, columns, column_major, width, stride, [&](unsigned e, uint64_t offset) {
    const char* p = access(space, address + offset, width, Load, line);
    if (!p) return;
    if (width == 4)
      registers[e] = peek<uint32_t>(p);
    else
      registers[e / 2] |= (uint32_t)peek<uint16_t>(p) << (e % 2 * 16);
  });
  collective(ALL, nullptr, synchronise, line);
}

void wmma_store(const uint32_t* registers, unsigned rows, unsigned columns, bool column_major,
                Space space, uint64_t address, uint32_t stride, unsigned line) {
  for_elements(rows, columns, column_major, 4, stride, [&](unsigned e, uint64_t offset) {
    if (char* p = access(space, address + offset, 4, Store, line)) poke(p, registers[e]);
  });
  collective(ALL, nullptr, synchronise, line);
}

void wmma_mma(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, unsigned m,
              unsigned n, unsigned k, Element element, unsigned line) {
  WmmaLane argument{d, a, b, c, m, n, k, element};
  collective(ALL, &argument, wmma_lanes, line);
}

}  // namespace sim
