// Bulk copies and TMA tiles. A load lands when somebody looks at its mbarrier, a store happens when
// its group is waited for: as late as hardware could do it, so that a missing wait shows.
#include <algorithm>
#include <cstring>

#include "engine.h"
#include "tensor_map.h"

namespace sim {

namespace {

constexpr unsigned CHUNK = 16;  // swizzles move whole chunks of 16 bytes

struct PendingLoad {
  Fiber* issuer;
  uint32_t barrier;
  BulkCopy copy;
};

std::vector<PendingLoad> loads;

uint32_t swizzled(uint32_t shared, uint32_t mode) {
  static const uint32_t masks[] = {0, 0x10, 0x30, 0x70};
  return shared ^ (shared >> 3 & masks[mode & 3]);
}

const TensorMap& map_of(const BulkCopy& copy) { return *(const TensorMap*)copy.global; }

// Calls visit(shared chunk, global address of the chunk, first byte inside the tensor, byte past
// the last one inside) for every chunk of a tile.
template <class Visit>
void for_tile(const BulkCopy& copy, Visit visit) {
  const TensorMap& map = map_of(copy);
  uint32_t row_bytes = map.box[0] * map.element_bytes, rows = copy.bytes / row_bytes;
  for (uint32_t row = 0; row < rows; ++row) {
    int64_t offset = 0;
    bool inside = true;
    for (uint32_t i = 1, rest = row; i < map.rank; rest /= map.box[i], ++i) {
      int64_t x = copy.at[i] + (int64_t)(rest % map.box[i]);
      inside &= x >= 0 && x < (int64_t)map.extent[i];
      offset += x * (int64_t)map.stride[i - 1];
    }
    for (uint32_t byte = 0; byte < row_bytes; byte += CHUNK) {
      int64_t start = (int64_t)copy.at[0] * map.element_bytes + byte;
      int64_t end = (int64_t)map.extent[0] * map.element_bytes - start;
      int64_t first = std::clamp<int64_t>(-start, 0, CHUNK);
      int64_t last = inside ? std::clamp<int64_t>(end, first, CHUNK) : first;
      visit(swizzled(copy.shared + row * row_bytes + byte, map.swizzle), map.base + offset + start,
            (unsigned)first, (unsigned)last);
    }
  }
}

template <class Visit>
void for_chunks(const BulkCopy& copy, Visit visit) {
  if (copy.rank) return for_tile(copy, visit);
  for (uint32_t i = 0; i < copy.bytes; i += CHUNK)
    visit(copy.shared + i, copy.global + i, 0u, CHUNK);
}

BulkCopy contiguous(uint64_t global, uint32_t shared, uint32_t bytes, unsigned line) {
  if ((shared | global | bytes) % CHUNK)
    fatal("misaligned", "cp.async.bulk needs multiples of 16 bytes", line);
  return {global, shared, bytes, 0, {}, line};
}

BulkCopy tile(uint64_t map_address, const int32_t* at, unsigned rank, uint32_t shared,
              unsigned line) {
  const auto& map = *(const TensorMap*)map_address;
  if (map.magic != TENSOR_MAP_MAGIC || map.rank != rank)
    fatal("invalid tensor map", "not a tiled map of rank " + std::to_string(rank), line);
  if (shared % 128)
    fatal("misaligned", "TMA tile at shared address " + std::to_string(shared), line);
  BulkCopy copy{map_address, shared, map.element_bytes, rank, {}, line};
  for (unsigned i = 0; i < rank; ++i) {
    copy.bytes *= map.box[i];
    copy.at[i] = at[i];
  }
  return copy;
}

void start_load(const BulkCopy& copy, uint32_t barrier) {
  for_chunks(copy, [&](uint32_t shared, uint64_t, unsigned, unsigned) {
    access(Space::Shared, shared, CHUNK, Store | AsyncIssue | BulkUnit, copy.line);
  });
  loads.push_back({engine.current, barrier, copy});
}

void land(const BulkCopy& copy) {
  for_chunks(copy, [&](uint32_t shared, uint64_t global, unsigned first, unsigned last) {
    char data[CHUNK];
    memset(data, copy.rank && map_of(copy).nan_fill ? 0xff : 0, CHUNK);
    unsigned inside = last - first, flags = Load | BulkUnit | AnyAlignment;
    if (inside)
      if (const char* p = access(Space::Global, global + first, inside, flags, copy.line))
        memcpy(data + first, p, inside);
    if (char* p = access(Space::Shared, shared, CHUNK, Store | AsyncLand | BulkUnit, copy.line))
      memcpy(p, data, CHUNK);
  });
}

void start_store(const BulkCopy& copy) {
  for_chunks(copy, [&](uint32_t shared, uint64_t, unsigned, unsigned) {
    access(Space::Shared, shared, CHUNK, Load | BulkUnit, copy.line);
  });
  auto& groups = engine.current->stores;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(copy);
}

void finish_store(const BulkCopy& copy) {
  for_chunks(copy, [&](uint32_t shared, uint64_t global, unsigned first, unsigned last) {
    unsigned inside = last - first, flags = Store | BulkUnit | AnyAlignment;
    if (inside)
      if (char* p = access(Space::Global, global + first, inside, flags, copy.line))
        memcpy(p, shared_base + shared + first, inside);
  });
}

}  // namespace

void reset_bulk() { loads.clear(); }

void bulk_load(uint32_t shared, uint64_t source, uint32_t bytes, uint32_t barrier, unsigned line) {
  start_load(contiguous(source, shared, bytes, line), barrier);
}

void tensor_load(uint32_t shared, uint64_t map, const int32_t* at, unsigned rank, uint32_t barrier,
                 unsigned line) {
  start_load(tile(map, at, rank, shared, line), barrier);
}

void bulk_store(uint64_t dest, uint32_t shared, uint32_t bytes, unsigned line) {
  start_store(contiguous(dest, shared, bytes, line));
}

void tensor_store(uint64_t map, const int32_t* at, unsigned rank, uint32_t shared, unsigned line) {
  start_store(tile(map, at, rank, shared, line));
}

void land_loads(uint32_t barrier) {
  Fiber* asking = engine.current;
  for (size_t i = 0; i < loads.size();) {
    if (loads[i].barrier != barrier) {
      ++i;
      continue;
    }
    PendingLoad load = loads[i];
    loads.erase(loads.begin() + i);
    engine.current = load.issuer;
    land(load.copy);
    mbarrier_complete(barrier, load.copy.bytes, load.copy.line);
  }
  engine.current = asking;
}

void bulk_commit() {
  auto& groups = engine.current->stores;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void bulk_wait(unsigned pending) {
  auto& groups = engine.current->stores;
  size_t committed = groups.empty() ? 0 : groups.size() - 1;
  size_t ready = committed > pending ? committed - pending : 0;
  for (size_t i = 0; i < ready; ++i)
    for (const BulkCopy& copy : groups[i]) finish_store(copy);
  groups.erase(groups.begin(), groups.begin() + ready);
}

void finish_block() {
  for (const PendingLoad& load : loads) {
    engine.current = load.issuer;
    finding("missing wait", "the block ended while a bulk load was in flight", load.copy.line);
  }
  for (Fiber* fiber : engine.fibers)
    for (const auto& group : fiber->stores)
      for (const BulkCopy& copy : group) {
        engine.current = fiber;
        finding("missing wait", "the block ended while a bulk store read its shared memory",
                copy.line);
      }
}

}  // namespace sim
