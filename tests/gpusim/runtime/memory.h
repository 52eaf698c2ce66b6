// Buffers known to the checker, and their shadow memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace sim {

// Who accessed a granule, when (see ordering.h) and at which PTX line. Threads are numbered over
// the grid and from 1; 0 means nobody.
struct Mark {
  uint32_t thread, time, epoch, line;
};

// What the checker remembers about a granule of memory. All zero: untouched in this launch. Plain
// and strong (volatile, atomic) writers are kept apart: a strong access may follow another thread's
// strong write unordered, but not its plain one.
struct Cell {
  Mark writer, strong_writer, reader;
  uint32_t reader_warps;  // of the block of `reader`
  uint8_t strength;       // of strong_writer: 1 within its block, 2 everywhere
  uint8_t many_readers;   // 0 one thread, 1 one block, 2 several blocks
  uint8_t initialised;
  uint8_t in_flight;  // asynchronous copies that have started and not landed
};

struct Buffer {
  uintptr_t begin = 0, end = 0;
  std::string name;
  bool shared = false;
  bool poisoned = false;  // fresh memory carries the poison pattern
  unsigned granule = 4;
  Cell* cells = nullptr;
  size_t cell_bytes = 0;

  size_t size() const { return end - begin; }
  void make_shadow(unsigned granularity);
  void drop_shadow();
};

// Fresh tensor memory holds this 16-bit pattern: a NaN in fp16, bf16, fp32 and fp64.
constexpr uint16_t POISON = 0xffb7;

extern Buffer shared_buffer;
Buffer* find_buffer(uintptr_t address);
std::string nearest_buffer(uintptr_t address);
void drop_all_shadows();

}  // namespace sim
