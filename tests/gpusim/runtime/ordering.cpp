#include "ordering.h"

#include <algorithm>
#include <map>
#include <unordered_map>

#include "engine.h"

namespace sim {

namespace {

uint32_t block_of(uint32_t thread) { return (thread - 1) / MAX_THREADS; }
uint32_t index_of(uint32_t thread) { return (thread - 1) % MAX_THREADS; }

// One thread published its block's writes with a fence and an atomic.
struct Publication {
  uint32_t block, thread, epoch, time;
  bool block_only;
  std::shared_ptr<Snapshot> knowledge;

  Snapshot as_snapshot() const {
    Snapshot snapshot;
    if (knowledge)
      snapshot = *knowledge;
    else
      snapshot.known.assign(engine.fibers.size(), 0);
    snapshot.epoch = epoch;
    snapshot.known[index_of(thread)] = time;
    return snapshot;
  }

  bool covers(uint32_t other, uint32_t other_epoch, uint32_t other_time) const {
    if (other_epoch < epoch) return true;  // a barrier of the publishing block lies between
    if (other == thread) return other_time <= time;
    return knowledge && knowledge->epoch == other_epoch &&
           index_of(other) < knowledge->known.size() &&
           knowledge->known[index_of(other)] >= other_time;
  }
};

struct Acquisition {
  std::shared_ptr<Publication> publication;
  uint32_t thread, epoch, time;  // of the acquiring thread in the current block
};

std::unordered_map<uintptr_t, std::vector<std::shared_ptr<Publication>>> published;
std::map<uint32_t, std::vector<Acquisition>> acquired;  // by publishing block
std::unordered_map<uintptr_t, size_t> seen;             // publications this block already took

uint32_t global_number(const Fiber& fiber) {
  return engine.block_number * MAX_THREADS + fiber.id + 1;
}

bool before_in_block(uint32_t thread, uint32_t epoch, uint32_t time) {
  const Fiber& fiber = *engine.current;
  if (thread == global_number(fiber) || epoch != engine.epoch) return true;
  const Snapshot& knowledge = fiber.clock.knowledge;
  return knowledge.epoch == epoch && !knowledge.known.empty() &&
         knowledge.known[index_of(thread)] >= time;
}

}  // namespace

void Snapshot::clear() {
  epoch = 0;
  known.clear();
}

void Snapshot::join(const Snapshot& other) {
  if (other.epoch != engine.epoch || other.known.empty())
    return;  // from before a barrier of all threads, which orders it anyway
  if (epoch != engine.epoch || known.empty()) {
    *this = other;
    return;
  }
  for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], other.known[i]);
}

void Clock::reset() {
  time = 1;
  knowledge.clear();
  fenced = false;
  fence_knowledge.reset();
}

Snapshot release(Fiber& fiber) {
  Snapshot snapshot = fiber.clock.knowledge;
  if (snapshot.epoch != engine.epoch || snapshot.known.empty()) {
    snapshot.epoch = engine.epoch;
    snapshot.known.assign(engine.fibers.size(), 0);
  }
  snapshot.known[fiber.id] = fiber.clock.time++;
  return snapshot;
}

void acquire(Fiber& fiber, const Snapshot& snapshot) {
  if (snapshot.epoch != engine.epoch || snapshot.known.empty()) return;
  fiber.clock.knowledge.join(snapshot);
  // Times of lanes stay close to each other, so that the latest time of several readers in a cell
  // stands for all of them.
  uint32_t latest = *std::max_element(snapshot.known.begin(), snapshot.known.end());
  fiber.clock.time = std::max(fiber.clock.time, latest + 1);
}

void new_epoch() {
  ++engine.epoch;
  uint32_t latest = 0;
  for (const Fiber* fiber : engine.fibers) latest = std::max(latest, fiber->clock.time);
  for (Fiber* fiber : engine.fibers) fiber->clock.time = latest + 1;
}

void reset_block_order() {
  acquired.clear();
  seen.clear();
}

void reset_launch_order() {
  reset_block_order();
  published.clear();
}

void order_fence(Fiber& fiber, bool in_block) {
  Clock& clock = fiber.clock;
  clock.fenced = true;
  clock.fence_in_block = in_block;
  clock.fence_epoch = engine.epoch;
  clock.fence_time = clock.time++;
  clock.fence_knowledge.reset();
  if (clock.knowledge.epoch == engine.epoch && !clock.knowledge.known.empty())
    clock.fence_knowledge = std::make_shared<Snapshot>(clock.knowledge);
}

void order_atomic(Fiber& fiber, uintptr_t address, bool writes, bool releases) {
  auto found = published.find(address);
  if (found != published.end()) {
    // Lenient: every atomic acquires, as the usual "last block" pattern needs no second fence.
    size_t& next = seen[address];
    for (size_t i = 0; i < found->second.size(); ++i) {
      const auto& publication = found->second[i];
      if (publication->block == engine.block_number)
        acquire(fiber, publication->as_snapshot());
      else if (i >= next && !publication->block_only)
        acquired[publication->block].push_back(
            {publication, global_number(fiber), engine.epoch, fiber.clock.time});
    }
    next = found->second.size();
  }
  if (releases) order_fence(fiber, false);
  const Clock& clock = fiber.clock;
  if (!clock.fenced || !writes) return;
  auto& list = published[address];
  uint32_t self = global_number(fiber);
  if (list.empty() || list.back()->thread != self || list.back()->time != clock.fence_time)
    list.push_back(std::make_shared<Publication>(
        Publication{engine.block_number, self, clock.fence_epoch, clock.fence_time,
                    clock.fence_in_block, clock.fence_knowledge}));
}

bool happens_before(uint32_t thread, uint32_t epoch, uint32_t time) {
  uint32_t block = block_of(thread);
  if (block == engine.block_number) return before_in_block(thread, epoch, time);
  auto found = acquired.find(block);
  if (found == acquired.end()) return false;
  return std::any_of(found->second.begin(), found->second.end(), [&](const Acquisition& item) {
    return item.publication->covers(thread, epoch, time) &&
           before_in_block(item.thread, item.epoch, item.time);
  });
}

bool warps_before(uint32_t any_thread, uint32_t warps, uint32_t epoch, uint32_t time) {
  uint32_t block = block_of(any_thread);
  if (block == engine.block_number && epoch != engine.epoch) return true;
  for (uint32_t index = 0; index < engine.fibers.size(); ++index)
    if ((warps >> (index / WARP) & 1) &&
        !happens_before(block * MAX_THREADS + index + 1, epoch, time))
      return false;
  return true;
}

}  // namespace sim
