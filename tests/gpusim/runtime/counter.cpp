// Counts memory traffic: bytes, distinct bytes, 32-byte sectors per request of a warp and conflicts
// of shared memory banks. The n-th execution of an instruction by each lane of a warp is taken as
// one request, which holds for code that does not diverge around it.
#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <sstream>
#include <unordered_map>

#include "engine.h"

namespace sim {

namespace {

constexpr unsigned SECTOR = 32, BANKS = 32, WORD = 4;

struct ByteSet {
  std::vector<uint64_t> words;

  void add(size_t begin, size_t end) {
    if (words.size() < (end + 63) / 64) words.resize((end + 63) / 64);
    for (size_t i = begin; i < end; ++i) words[i / 64] |= 1ull << i % 64;
  }
  uint64_t size() const {
    uint64_t total = 0;
    for (uint64_t word : words) total += __builtin_popcountll(word);
    return total;
  }
};

struct Direction {
  uint64_t bytes = 0, requests = 0, sectors = 0, ideal_sectors = 0;
  ByteSet distinct;
};

struct BufferCount {
  std::string name;
  size_t size = 0;
  Direction load, store, atomic;
};

struct SharedCount {
  uint64_t load_bytes = 0, store_bytes = 0, requests = 0, wavefronts = 0, ideal_wavefronts = 0;
};

struct Request {
  uintptr_t buffer = 0;
  unsigned flags = 0, bytes = 0;
  std::vector<std::pair<unsigned, uintptr_t>> lanes;
};

using RequestKey = std::array<unsigned, 4>;  // warp, PTX line, shared or global, n-th time

std::map<uintptr_t, BufferCount> buffers;
SharedCount shared;
std::map<RequestKey, Request> requests;
std::map<std::array<unsigned, 3>, unsigned> executions;  // thread, PTX line, shared or global
std::string finished;                                    // JSON of past launches

Direction& direction(BufferCount& count, unsigned flags) {
  return flags & Atomic ? count.atomic : flags & Store ? count.store : count.load;
}

void count_sectors(const Request& request) {
  std::set<uintptr_t> sectors, bytes;
  for (const auto& [lane, address] : request.lanes)
    for (unsigned i = 0; i < request.bytes; ++i) {
      sectors.insert((address + i) / SECTOR);
      bytes.insert(address + i);
    }
  Direction& total = direction(buffers[request.buffer], request.flags);
  ++total.requests;
  total.sectors += sectors.size();
  total.ideal_sectors += (bytes.size() + SECTOR - 1) / SECTOR;
}

// A wavefront serves 128 bytes, at most one word of each bank.
void count_wavefronts(const Request& request) {
  unsigned lanes_per_wave = std::clamp(BANKS * WORD / request.bytes, 1u, WARP);
  std::map<unsigned, std::map<unsigned, std::set<uintptr_t>>> waves;  // wave, bank, words
  for (const auto& [lane, address] : request.lanes)
    for (uintptr_t word = address / WORD; word <= (address + request.bytes - 1) / WORD; ++word)
      waves[lane / lanes_per_wave][word % BANKS].insert(word);
  ++shared.requests;
  shared.ideal_wavefronts += waves.size();
  for (const auto& [wave, banks] : waves) {
    size_t deepest = 0;
    for (const auto& [bank, words] : banks) deepest = std::max(deepest, words.size());
    shared.wavefronts += deepest;
  }
}

void write(std::ostream& out, const char* name, const Direction& d) {
  out << "\"" << name << "\": {\"bytes\": " << d.bytes
      << ", \"unique_bytes\": " << d.distinct.size() << ", \"requests\": " << d.requests
      << ", \"sectors\": " << d.sectors << ", \"ideal_sectors\": " << d.ideal_sectors << "}";
}

}  // namespace

void count_access(const Buffer& buffer, uintptr_t address, unsigned bytes, unsigned flags,
                  unsigned line) {
  size_t offset = address - buffer.begin;
  bool is_request = !(flags & BulkUnit);
  if (buffer.shared) {
    if (!is_request) return;
    if (flags & (Store | Atomic)) shared.store_bytes += bytes;
    if (!(flags & Store)) shared.load_bytes += bytes;
  } else {
    BufferCount& count = buffers[buffer.begin];
    count.name = buffer.name;
    count.size = buffer.size();
    Direction& total = direction(count, flags);
    total.bytes += bytes;
    total.distinct.add(offset, offset + bytes);
    if (!is_request) return;
  }
  const Fiber& fiber = *engine.current;
  unsigned time = executions[{fiber.id, line, buffer.shared}]++;
  Request& request = requests[{fiber.id / WARP, line, buffer.shared, time}];
  request.buffer = buffer.shared ? 0 : buffer.begin;
  request.flags = flags;
  request.bytes = bytes;
  request.lanes.push_back({fiber.lane, buffer.shared ? offset : address});
}

void count_block_end() {
  for (const auto& [key, request] : requests)
    request.buffer ? count_sectors(request) : count_wavefronts(request);
  requests.clear();
  executions.clear();
}

void count_launch_end() {
  count_block_end();
  std::ostringstream out;
  out << "{\"kernel\": \"" << engine.kernel->name
      << "\", \"shared\": {\"load_bytes\": " << shared.load_bytes
      << ", \"store_bytes\": " << shared.store_bytes << ", \"requests\": " << shared.requests
      << ", \"wavefronts\": " << shared.wavefronts
      << ", \"ideal_wavefronts\": " << shared.ideal_wavefronts << "}, \"buffers\": [";
  bool first = true;
  for (const auto& [begin, count] : buffers) {
    out << (first ? "" : ", ") << "{\"name\": \"" << count.name << "\", \"size\": " << count.size
        << ", ";
    write(out, "load", count.load);
    out << ", ";
    write(out, "store", count.store);
    out << ", ";
    write(out, "atomic", count.atomic);
    out << "}";
    first = false;
  }
  out << "]}";
  finished += (finished.empty() ? "" : ", ") + out.str();
  buffers.clear();
  shared = {};
}

}  // namespace sim

using namespace sim;

extern "C" void sim_count(int enable) { engine.counting = enable; }

extern "C" const char* sim_counts() {
  static std::string answer;
  answer = "[" + finished + "]";
  finished.clear();
  return answer.c_str();
}
