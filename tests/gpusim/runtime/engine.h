// State of the executor. One OS thread runs one launch at a time; its blocks run one after another
// and each CUDA thread is a fiber, switched at barriers and warp collectives.
#pragma once
#include <chrono>
#include <string>
#include <vector>

#include "memory.h"
#include "ordering.h"
#include "sim.h"

namespace sim {

constexpr unsigned WARP = 32, MAX_THREADS = 1024, BARRIERS = 16;
constexpr size_t STACK_BYTES = 256 << 10;

using CollectiveFunction = void (*)(void** lane_arguments, uint32_t mask);

// A warp collective that lanes are arriving at. Divergent parts of a warp can be at several.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0, generation = 0;
  unsigned line = 0;
  CollectiveFunction function = nullptr;
  void* arguments[WARP];
};

struct Warp {
  Rendezvous rendezvous[4];
  uint32_t lanes = 0;  // that exist
  uint32_t alive = 0;  // that have not exited
};

struct NamedBarrier {
  unsigned arrived = 0, wanted = 0, generation = 0, arrivals_only = 0;
  bool aligned = false;
  uint32_t accumulated = 0, result = 0;
  Snapshot released;
};

struct CopyGroup {
  struct Copy {
    uint32_t shared;
    const char* source;
    unsigned bytes, source_bytes, line;
  };
  std::vector<Copy> copies;
};

// A copy by the bulk unit between shared memory and a global range or a tile of a tensor.
struct BulkCopy {
  uint64_t global;  // address, or that of the tensor map
  uint32_t shared, bytes;
  unsigned rank;  // 0: contiguous
  int32_t at[5];
  unsigned line;
};

enum class Wait : uint8_t { None, Barrier, Collective };

struct Fiber {
  Context context;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  unsigned id = 0, lane = 0;
  Warp* warp = nullptr;
  bool done = false, polled = false;
  Wait wait = Wait::None;
  unsigned slot = 0, generation = 0, barrier_line = 0;
  char* local = nullptr;
  size_t local_bytes = 0;
  uint64_t last_strong = 0;  // address of the last strong load, to notice spinning
  Clock clock;
  std::vector<CopyGroup> copies;
  std::vector<std::vector<BulkCopy>> stores;
};

struct Engine {
  const Kernel* kernel = nullptr;
  Fiber* current = nullptr;
  std::vector<Fiber*> pool, fibers;  // all stacks; those of the running launch
  std::vector<Warp> warps;
  NamedBarrier barriers[BARRIERS];
  unsigned alive = 0;
  uint32_t block_number = 0;
  uint32_t epoch = 1;  // full barriers passed, over all blocks
  uint64_t progress = 0;
  bool aborted = false, counting = false;
  unsigned dynamic_shared = 0, shared_bytes = 0;
  std::chrono::steady_clock::time_point deadline;
  double time_limit = 120;
  uint64_t seed = 0, launches = 0;
};

extern Engine engine;

// ---- fibers (fiber.cpp)
void prepare(Fiber& fiber);
void resume(Fiber& fiber);  // from the scheduler
void suspend();             // back to the scheduler

// ---- scheduling helpers
void wait_for(Wait kind, unsigned slot, unsigned generation);
void collective(uint32_t mask, void* argument, CollectiveFunction function, unsigned line);
bool rendezvous_ready(const Rendezvous& place, const Warp& warp);
void rendezvous_complete(Rendezvous& place);
bool barrier_ready(const NamedBarrier& barrier);
void barrier_open(unsigned id);

// ---- per-block state of the asynchronous units (async.cpp, bulk.cpp)
void reset_mbarriers();
void finish_block();                // reports copies that nobody waited for
void land_loads(uint32_t barrier);  // bulk loads that complete on this mbarrier
void mbarrier_complete(uint32_t shared, uint32_t bytes, unsigned line);
void reset_bulk();

// ---- reports (report.cpp)
void clear_report();
std::string source_line(unsigned line);
std::string describe_thread();
void finding(const std::string& kind, const std::string& text, unsigned line);
// Ends the launch, not the process: the fiber never runs again.
[[noreturn]] void fatal(const std::string& kind, const std::string& text, unsigned line);
bool has_findings();

// ---- checker and counter
void check_access(Buffer& buffer, uintptr_t address, unsigned bytes, unsigned flags, unsigned line,
                  const void* value);
void count_access(const Buffer& buffer, uintptr_t address, unsigned bytes, unsigned flags,
                  unsigned line);
void count_block_end();
void count_launch_end();

}  // namespace sim
