// Bounds, alignment, initialisation and races of one access.
#include <cstring>

#include "engine.h"

namespace sim {

namespace {

std::string place(const Buffer& buffer, uintptr_t address) {
  return buffer.name + "+" + std::to_string(address - buffer.begin) + " of " +
         std::to_string(buffer.size());
}

std::string thread_name(uint32_t thread) {
  return "block " + std::to_string((thread - 1) / MAX_THREADS) + " thread " +
         std::to_string((thread - 1) % MAX_THREADS);
}

std::string bytes_at(unsigned bytes, const std::string& where) {
  return std::to_string(bytes) + " bytes at " + where;
}

const char* verb(unsigned flags) {
  return flags & Store ? "store" : flags & Atomic ? "atomic" : "load";
}

// Fresh tensor memory that nobody wrote. Written data can hold the pattern by accident (-73 as an
// int16), so whole words are compared where there are any.
bool holds_poison(uintptr_t address, unsigned bytes) {
  if (bytes == 2) {
    uint16_t half;
    memcpy(&half, (const void*)address, 2);
    return half == POISON;
  }
  for (unsigned i = 0; i + 4 <= bytes; i += 4) {
    uint32_t word;
    memcpy(&word, (const void*)(address + i), 4);
    if (word == (POISON | (uint32_t)POISON << 16)) return true;
  }
  return false;
}

struct Check {
  Buffer& buffer;
  uintptr_t address;
  unsigned bytes, flags, line;
  uint32_t self;
  bool writes, reads, harmless;

  uint8_t strength() const {
    if (!(flags & (Strong | Atomic))) return 0;
    return flags & BlockScope ? 1 : 2;
  }

  // Whether this access and a strong one synchronise instead of racing.
  bool both_strong(const Cell& cell) const {
    uint8_t weakest = std::min(strength(), cell.strength);
    bool same_block = (cell.strong_writer.thread - 1) / MAX_THREADS == engine.block_number;
    return weakest == 2 || (weakest == 1 && same_block);
  }

  void race(const char* kind, const Mark& other) const {
    finding("race",
            std::string(kind) + ": " + bytes_at(bytes, place(buffer, address)) +
                ", not ordered after " + thread_name(other.thread) + " at " +
                source_line(other.line),
            line);
  }

  static bool before(const Mark& mark) {
    return happens_before(mark.thread, mark.epoch, mark.time);
  }

  bool against_writers(Cell& cell) const {
    if (writes && cell.in_flight && !(flags & AsyncLand)) {
      race("write into an asynchronous copy in flight", cell.writer);
      return true;
    }
    if (writes && harmless) return false;
    bool plain = cell.writer.thread && !before(cell.writer);
    bool strong = cell.strong_writer.thread && !both_strong(cell) && !before(cell.strong_writer);
    if (!plain && !strong) return false;
    race(writes ? "write after write" : "read after write",
         plain ? cell.writer : cell.strong_writer);
    cell.writer.thread = cell.strong_writer.thread = 0;  // once is enough
    return true;
  }

  void against_readers(const Cell& cell) const {
    const Mark& reader = cell.reader;
    if (!reader.thread || harmless) return;
    bool ordered = cell.many_readers == 0 ? before(reader)
                   : cell.many_readers == 1
                       ? warps_before(reader.thread, cell.reader_warps, reader.epoch, reader.time)
                       : false;
    if (!ordered) race("write after read", reader);
  }

  Mark mark() const { return {self, engine.current->clock.time, engine.epoch, line}; }

  void note_write(Cell& cell) const {
    if (strength()) {
      cell.strong_writer = mark();
      cell.strength = strength();
      cell.reader.thread = 0;
      cell.initialised = true;
    } else {
      uint8_t in_flight = cell.in_flight + !!(flags & AsyncIssue) - !!(flags & AsyncLand);
      cell = {};
      cell.writer = mark();
      cell.in_flight = in_flight;
      cell.initialised = !(flags & AsyncIssue);
    }
  }

  // Keeps one reader exactly, several readers as the warps of one block and their latest time.
  void note_read(Cell& cell) const {
    Mark& reader = cell.reader;
    uint32_t warp = 1u << (engine.current->id / WARP);
    uint32_t time = engine.current->clock.time;
    bool same_block = reader.thread && (reader.thread - 1) / MAX_THREADS == engine.block_number;
    bool superseded = reader.thread && !same_block && cell.many_readers < 2 &&
                      warps_before(reader.thread, cell.reader_warps, reader.epoch, reader.time);
    if (reader.thread && !same_block && !superseded) {
      cell.many_readers = 2;
    } else if (cell.many_readers < 2) {
      bool fresh = !reader.thread || !same_block || reader.epoch != engine.epoch;
      cell.many_readers = !fresh && (cell.many_readers || reader.thread != self);
      cell.reader_warps = fresh ? warp : cell.reader_warps | warp;
      time = fresh ? time : std::max(reader.time, time);
    }
    reader = {self, time, engine.epoch, line};
  }

  void uninitialised(const char* what) const {
    finding("uninitialised", std::string(what) + ": " + bytes_at(bytes, place(buffer, address)),
            line);
  }

  void run() const {
    unsigned granule = buffer.granule;
    uintptr_t first = (address - buffer.begin) / granule;
    uintptr_t last = (address - buffer.begin + bytes - 1) / granule;
    bool reported = false, fresh = true;
    for (uintptr_t index = first; index <= last; ++index) {
      Cell& cell = buffer.cells[index];
      if (buffer.shared && reads && (!cell.initialised || cell.in_flight)) {
        if (!reported)
          uninitialised(cell.in_flight ? "asynchronous copy not waited for" : "shared memory read");
        reported = cell.initialised = true;
      }
      fresh &= !cell.writer.thread && !cell.strong_writer.thread;
      if (against_writers(cell)) reported = true;
      if (writes) {
        against_readers(cell);
        note_write(cell);
      } else if (!(flags & Strong)) {
        note_read(cell);
      }
    }
    if (buffer.poisoned && reads && fresh && !reported && holds_poison(address, bytes))
      uninitialised("global memory read");
  }
};

}  // namespace

void check_access(Buffer& buffer, uintptr_t address, unsigned bytes, unsigned flags, unsigned line,
                  const void* value) {
  if (!buffer.cells)
    buffer.make_shadow(buffer.shared ? engine.kernel->shared_granule
                                     : engine.kernel->global_granule);
  bool writes = flags & (Store | Atomic);
  // Storing what is there already harms nobody: flags that several threads set alike.
  bool harmless = value && !memcmp((const void*)address, value, bytes);
  uint32_t self = engine.block_number * MAX_THREADS + engine.current->id + 1;
  bool reads = !(flags & Store);
  Check{buffer, address, bytes, flags, line, self, writes, reads, harmless}.run();
}

char* access(Space space, uint64_t address, unsigned bytes, unsigned flags, unsigned line,
             const void* value) {
  uintptr_t real = space == Space::Shared ? (uintptr_t)shared_base + (uint32_t)address : address;
  if (space == Space::Local || (space == Space::Generic && is_local(real))) {
    if (!is_local(real) || !is_local(real + bytes - 1)) {
      finding("out of bounds", std::string(verb(flags)) + " outside local memory", line);
      return nullptr;
    }
    return (char*)real;
  }
  Buffer* buffer = space == Space::Shared ? &shared_buffer : find_buffer(real);
  if (!buffer || real < buffer->begin || real + bytes > buffer->end ||
      (space == Space::Global && buffer->shared)) {
    std::string where = buffer ? place(*buffer, real) : nearest_buffer(real);
    finding("out of bounds", std::string(verb(flags)) + " of " + bytes_at(bytes, where), line);
    return nullptr;
  }
  bool power_of_two = (bytes & (bytes - 1)) == 0;
  if (!(flags & AnyAlignment) && power_of_two && real % bytes) {
    finding("misaligned", std::string(verb(flags)) + " of " + bytes_at(bytes, place(*buffer, real)),
            line);
    return nullptr;
  }
  check_access(*buffer, real, bytes, flags, line, value);
  if (flags & (Strong | Atomic)) {
    Fiber& fiber = *engine.current;
    order_atomic(fiber, real, flags & (Store | Atomic), flags & Release);
    // A thread that loads the same address over and over waits for another thread.
    if (!(flags & (Store | Atomic)) && fiber.last_strong == real) poll(line);
    fiber.last_strong = flags & (Store | Atomic) ? 0 : real;
  }
  if (flags & (Store | Atomic)) ++engine.progress;
  if (engine.counting) count_access(*buffer, real, bytes, flags, line);
  return (char*)real;
}

void fence(bool in_block) { order_fence(*engine.current, in_block); }

}  // namespace sim
