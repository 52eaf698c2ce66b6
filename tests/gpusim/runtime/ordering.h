// Which memory accesses happen before which. Within a block a barrier of all threads starts a new
// epoch; narrower synchronisation (warps, named barriers, mbarriers) exchanges vector clocks inside
// the epoch. Between blocks order comes only from a fence and an atomic that release what an atomic
// of the other block acquires.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace sim {

struct Fiber;

// What a thread knew when it released: `known[t]` is the last time of thread t that it orders.
struct Snapshot {
  uint32_t epoch = 0;
  std::vector<uint32_t> known;
  void join(const Snapshot& other);
  void clear();
};

struct Clock {
  uint32_t time = 1;
  Snapshot knowledge;  // about other threads, within the current epoch
  bool fenced = false, fence_in_block = false;
  uint32_t fence_time = 0, fence_epoch = 0;
  std::shared_ptr<Snapshot> fence_knowledge;
  void reset();
};

// Everything this thread has done and knows, and starts a new time of the thread.
Snapshot release(Fiber& fiber);
void acquire(Fiber& fiber, const Snapshot& snapshot);
void new_epoch();  // a barrier of all threads
void reset_block_order();
void reset_launch_order();
void order_fence(Fiber& fiber, bool in_block);
void order_atomic(Fiber& fiber, uintptr_t address, bool writes, bool releases);

// Whether an access is ordered before what the current thread does now.
bool happens_before(uint32_t thread, uint32_t epoch, uint32_t time);
// The same for all lanes of some warps of one block.
bool warps_before(uint32_t any_thread, uint32_t warps, uint32_t epoch, uint32_t time);

}  // namespace sim
