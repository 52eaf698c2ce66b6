// cp.async and mbarriers. Data land as late as the program allows, so that a missing wait shows.
#include <cstring>
#include <map>

#include "engine.h"

namespace sim {

namespace {

struct Mbarrier {
  int32_t count, pending;
  int64_t bytes;
  uint32_t phase;
  Snapshot arriving, completed;
};

std::map<uint32_t, Mbarrier> mbarriers;  // by shared address

void land(const CopyGroup::Copy& copy) {
  char* shared =
      access(Space::Shared, copy.shared, copy.bytes, Store | AsyncLand | BulkUnit, copy.line);
  if (!shared) return;
  memcpy(shared, copy.source, copy.source_bytes);
  memset(shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

void cp_async(uint32_t shared, uint64_t source, unsigned bytes, unsigned source_bytes,
              unsigned line) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fatal("invalid cp.async", std::to_string(bytes) + " bytes", line);
  if (shared % bytes || (source_bytes && source % bytes)) {
    finding("misaligned", "cp.async of " + std::to_string(bytes) + " bytes", line);
    return;
  }
  source_bytes = source_bytes < bytes ? source_bytes : bytes;
  if (source_bytes && !access(Space::Global, source, source_bytes, Load, line)) source_bytes = 0;
  if (!access(Space::Shared, shared, bytes, Store | AsyncIssue, line)) return;
  auto& groups = engine.current->copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().copies.push_back({shared, (const char*)source, bytes, source_bytes, line});
}

void cp_async_commit() {
  auto& groups = engine.current->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();  // collects what is issued from now on
}

void cp_async_wait(unsigned pending) {
  auto& groups = engine.current->copies;
  size_t committed = groups.empty() ? 0 : groups.size() - 1;
  size_t ready = committed > pending ? committed - pending : 0;
  for (size_t i = 0; i < ready; ++i)
    for (const CopyGroup::Copy& copy : groups[i].copies) land(copy);
  groups.erase(groups.begin(), groups.begin() + ready);
}

// ---- mbarriers

namespace {

// The barrier word is shared memory like any other: its initialisation can race with its use.
void touch(uint32_t shared, unsigned flags, unsigned line) {
  if (shared % 8 || shared + 8 > shared_buffer.size())
    fatal("out of bounds", "mbarrier at shared address " + std::to_string(shared), line);
  check_access(shared_buffer, (uintptr_t)shared_base + shared, 8, flags, line, nullptr);
}

Mbarrier& find(uint32_t shared, unsigned flags, unsigned line) {
  auto found = mbarriers.find(shared);
  if (found == mbarriers.end())
    fatal("uninitialised", "mbarrier at shared address " + std::to_string(shared), line);
  touch(shared, flags, line);
  return found->second;
}

void settle(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.completed = std::move(barrier.arriving);
  barrier.arriving = Snapshot();
  ++engine.progress;
}

}  // namespace

void reset_mbarriers() {
  mbarriers.clear();
  reset_bulk();
}

void mbarrier_init(uint32_t shared, uint32_t count, unsigned line) {
  touch(shared, Store, line);
  mbarriers[shared] = {(int32_t)count, (int32_t)count, 0, 0, {}, {}};
}

void mbarrier_invalidate(uint32_t shared, unsigned line) {
  find(shared, Store, line);
  mbarriers.erase(shared);
}

void mbarrier_expect(uint32_t shared, uint32_t bytes, unsigned line) {
  find(shared, Atomic, line).bytes += bytes;
}

uint64_t mbarrier_arrive(uint32_t shared, uint32_t count, uint32_t bytes, unsigned line) {
  Mbarrier& barrier = find(shared, Atomic, line);
  uint64_t phase = barrier.phase;
  barrier.arriving.join(release(*engine.current));
  barrier.bytes += bytes;
  barrier.pending -= (int32_t)count;
  if (barrier.pending < 0)
    fatal("invalid mbarrier", "more arrivals than the barrier was initialised for", line);
  settle(barrier);
  return phase;
}

// Bytes of a bulk copy have arrived; the current thread is the one that issued the copy.
void mbarrier_complete(uint32_t shared, uint32_t bytes, unsigned line) {
  Mbarrier& barrier = find(shared, Atomic, line);
  barrier.arriving.join(release(*engine.current));
  barrier.bytes -= bytes;
  settle(barrier);
}

bool mbarrier_test(uint32_t shared, uint64_t parity, unsigned line) {
  find(shared, Strong, line);
  land_loads(shared);
  Mbarrier& barrier = find(shared, Strong, line);
  bool passed = (barrier.phase & 1) != (parity & 1);
  if (passed)
    acquire(*engine.current, barrier.completed);
  else
    poll(line);
  return passed;
}

}  // namespace sim
