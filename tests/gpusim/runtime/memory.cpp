#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "engine.h"

namespace sim {

Context* context;
char *shared_base, *param_base;
Buffer shared_buffer;

namespace {

std::map<uintptr_t, Buffer> buffers;
Buffer* recent[4];  // the last buffers found: most accesses hit one of them
unsigned next_recent;
std::map<std::string, std::pair<char*, size_t>> variables;

void forget_recent() {
  for (Buffer*& buffer : recent) buffer = nullptr;
}

}  // namespace

// Launches hold it too: another thread may allocate tensors meanwhile.
std::recursive_mutex& memory_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

void Buffer::make_shadow(unsigned granularity) {
  granule = granularity;
  cell_bytes = (size() / granule + 2) * sizeof(Cell);
  void* memory = mmap(nullptr, cell_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  cells = memory == MAP_FAILED ? nullptr : (Cell*)memory;
}

void Buffer::drop_shadow() {
  if (cells) munmap(cells, cell_bytes);
  cells = nullptr;
}

void drop_all_shadows() {
  shared_buffer.drop_shadow();
  for (auto& [begin, buffer] : buffers) buffer.drop_shadow();
}

Buffer* find_buffer(uintptr_t address) {
  if (address >= shared_buffer.begin && address < shared_buffer.end) return &shared_buffer;
  for (Buffer* buffer : recent)
    if (buffer && address >= buffer->begin && address < buffer->end) return buffer;
  auto after = buffers.upper_bound(address);
  if (after == buffers.begin()) return nullptr;
  Buffer& buffer = std::prev(after)->second;
  if (address >= buffer.end) return nullptr;
  return recent[next_recent++ % 4] = &buffer;
}

std::string nearest_buffer(uintptr_t address) {
  constexpr uintptr_t NEAR = 1 << 20;
  auto after = buffers.upper_bound(address);
  const Buffer* below = after == buffers.begin() ? nullptr : &std::prev(after)->second;
  const Buffer* above = after == buffers.end() ? nullptr : &after->second;
  uintptr_t past = below ? address - below->end : NEAR;
  uintptr_t before = above ? above->begin - address : NEAR;
  if (std::min(past, before) >= NEAR) return "no buffer near";
  if (before < past) return std::to_string(before) + " bytes before " + above->name;
  return std::to_string(past) + " bytes past the end of " + below->name + " (" +
         std::to_string(below->size()) + " bytes)";
}

void local_memory(char* base, size_t bytes) {
  engine.current->local = base;
  engine.current->local_bytes = bytes;
  memset(base, 0xff, bytes);  // NaN: an uninitialised local variable shows in the results
}

bool is_shared(uint64_t address) {
  return address >= shared_buffer.begin && address < shared_buffer.end;
}

bool is_local(uint64_t address) {
  const Fiber& fiber = *engine.current;
  return address >= (uintptr_t)fiber.local && address < (uintptr_t)fiber.local + fiber.local_bytes;
}

bool is_param(uint64_t address) {
  return address >= (uintptr_t)param_base &&
         address < (uintptr_t)param_base + engine.kernel->param_bytes;
}

bool is_const(uint64_t) { return false; }
bool is_global(uint64_t address) { return !is_shared(address) && !is_local(address); }

}  // namespace sim

using namespace sim;

extern "C" void sim_register(const void* base, size_t bytes, const char* name, int poisoned) {
  std::lock_guard lock(memory_mutex());
  Buffer& buffer = buffers[(uintptr_t)base];
  buffer.drop_shadow();
  buffer.begin = (uintptr_t)base;
  buffer.end = buffer.begin + bytes;
  buffer.name = name;
  buffer.poisoned = poisoned;
}

extern "C" void sim_unregister(const void* base) {
  std::lock_guard lock(memory_mutex());
  auto found = buffers.find((uintptr_t)base);
  if (found == buffers.end()) return;
  found->second.drop_shadow();
  buffers.erase(found);
  forget_recent();
}

extern "C" void sim_rename(const void* address, const char* name) {
  std::lock_guard lock(memory_mutex());
  if (Buffer* buffer = find_buffer((uintptr_t)address)) buffer->name = name;
}

extern "C" void* sim_variable_create(const char* key, size_t bytes, const void* init) {
  std::lock_guard lock(memory_mutex());
  auto& [storage, size] = variables[key];
  if (!storage && bytes) {
    storage = (char*)aligned_alloc(256, (bytes + 255) / 256 * 256);
    size = bytes;
    if (init)
      memcpy(storage, init, bytes);
    else
      memset(storage, 0, bytes);
    sim_register(storage, bytes, key, 0);
  }
  return storage;
}

extern "C" uint64_t sim_variable(const char* key) {
  return (uint64_t)sim_variable_create(key, 0, nullptr);
}
