// Runs the blocks of a launch, and the threads of a block until all have exited.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>

#include "engine.h"

namespace sim {

Engine engine;
std::recursive_mutex& memory_mutex();

namespace {

// So many rounds in which threads only polled mean that nobody will ever help them.
constexpr unsigned IDLE_ROUNDS = 1000;

constexpr size_t GUARD_BYTES = 1024;

void make_shared_memory(size_t bytes) {
  static char* arena;
  static size_t capacity;
  size_t wanted = (bytes + 2 * GUARD_BYTES) / 1024 * 1024 + 1024;
  if (wanted > capacity) {
    free(arena);
    arena = (char*)aligned_alloc(1024, wanted);
    capacity = wanted;
  }
  shared_base = arena;
  shared_buffer.begin = (uintptr_t)arena;
  shared_buffer.end = shared_buffer.begin + bytes;
  shared_buffer.name = "shared memory";
  shared_buffer.shared = true;
}

Dim3 unflatten(unsigned index, const Dim3& extent) {
  return {index % extent.x, index / extent.x % extent.y, index / extent.x / extent.y};
}

void prepare_block(const Dim3& block, const Dim3& block_dim, const Dim3& grid) {
  unsigned threads = engine.fibers.size();
  memset(shared_base, 0xff, shared_buffer.size());  // NaN
  shared_buffer.drop_shadow();
  engine.warps.assign((threads + WARP - 1) / WARP, Warp());
  for (NamedBarrier& barrier : engine.barriers) barrier = NamedBarrier();
  engine.alive = threads;
  reset_block_order();
  reset_mbarriers();
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *engine.fibers[i];
    fiber.context = {unflatten(i, block_dim), block, block_dim, grid};
    fiber.id = i;
    fiber.lane = i % WARP;
    fiber.warp = &engine.warps[i / WARP];
    fiber.warp->lanes |= 1u << fiber.lane;
    fiber.warp->alive = fiber.warp->lanes;
    fiber.done = fiber.polled = false;
    fiber.wait = Wait::None;
    fiber.local = nullptr;
    fiber.local_bytes = 0;
    fiber.last_strong = 0;
    fiber.clock.reset();
    fiber.copies.clear();
    fiber.stores.clear();
    prepare(fiber);
  }
}

bool can_run(Fiber& fiber) {
  if (fiber.done) return false;
  if (fiber.wait == Wait::Barrier && fiber.generation == engine.barriers[fiber.slot].generation) {
    // The others may have exited since.
    if (!barrier_ready(engine.barriers[fiber.slot])) return false;
    barrier_open(fiber.slot);
  }
  if (fiber.wait == Wait::Collective) {
    Rendezvous& place = fiber.warp->rendezvous[fiber.slot];
    if (place.generation == fiber.generation) {
      if (!rendezvous_ready(place, *fiber.warp)) return false;
      engine.current = &fiber;
      rendezvous_complete(place);
    }
  }
  return true;
}

void report_deadlock() {
  std::string text;
  for (Fiber* fiber : engine.fibers) {
    if (fiber->done) continue;
    engine.current = fiber;
    const char* at = fiber->wait == Wait::Barrier      ? "a barrier"
                     : fiber->wait == Wait::Collective ? "a warp collective"
                                                       : "an mbarrier or a memory location";
    finding("deadlock", std::string("threads wait at ") + at + " that others never reach",
            fiber->barrier_line);
  }
}

void run_block(const std::vector<unsigned>& order) {
  unsigned idle_rounds = 0;
  while (engine.alive && !engine.aborted) {
    bool ran = false, only_polled = true;
    uint64_t progress = engine.progress;
    for (unsigned index : order) {
      Fiber& fiber = *engine.fibers[index];
      if (!can_run(fiber)) continue;
      ran = true;
      fiber.polled = false;
      resume(fiber);
      if (engine.aborted) return;
      only_polled &= fiber.polled;
    }
    idle_rounds = ran && only_polled && progress == engine.progress ? idle_rounds + 1 : 0;
    if (!ran || idle_rounds == IDLE_ROUNDS) {
      report_deadlock();
      engine.aborted = true;
    }
  }
  if (!engine.aborted) finish_block();
}

std::string invalid_configuration(const Kernel& kernel, const unsigned* grid,
                                  const unsigned* block) {
  uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
  if (!threads || threads > MAX_THREADS || block[2] > 64)
    return "block of " + std::to_string(threads) + " threads";
  if (kernel.max_threads && threads > kernel.max_threads)
    return "block of " + std::to_string(threads) + " threads, launch bounds allow " +
           std::to_string(kernel.max_threads);
  if (!grid[0] || !grid[1] || !grid[2]) return "empty grid";
  if (grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535) return "grid too large";
  return "";
}

std::vector<unsigned> order_of(size_t count, std::mt19937_64& random) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (engine.seed) std::shuffle(order.begin(), order.end(), random);
  return order;
}

}  // namespace

void check_time(unsigned line) {
  if (std::chrono::steady_clock::now() > engine.deadline)
    fatal("timeout",
          "the launch ran for more than " + std::to_string((int)engine.time_limit) +
              " s (a wait for another block cannot end: blocks run one after another)",
          line);
}

void poll(unsigned line) {
  engine.current->polled = true;
  engine.current->barrier_line = line;
  check_time(line);
  suspend();
}

void trap(unsigned line) { fatal("trap", "the kernel executed a trap instruction", line); }

uint64_t clock() {
  static uint64_t ticks;
  return ticks += 1000;
}

uint32_t thread_number() { return engine.current->id; }
uint32_t lane() { return engine.current->lane; }
uint32_t warp_count() { return engine.warps.size(); }
uint32_t dynamic_shared_bytes() { return engine.dynamic_shared; }
uint32_t total_shared_bytes() { return engine.shared_bytes; }

}  // namespace sim

using namespace sim;

extern "C" void sim_seed(uint64_t seed) {
  engine.seed = seed;
  engine.launches = 0;
}

extern "C" void sim_time_limit(double seconds) { engine.time_limit = seconds; }

extern "C" int sim_launch(const Kernel* kernel, const unsigned* grid, const unsigned* block,
                          unsigned dynamic_shared, const char* params) {
  std::lock_guard lock(memory_mutex());
  clear_report();
  engine.kernel = kernel;
  engine.current = nullptr;
  engine.aborted = false;
  std::string invalid = invalid_configuration(*kernel, grid, block);
  if (!invalid.empty()) {
    finding("invalid configuration", invalid, 0);
    return 1;
  }
  Dim3 grid_dim{grid[0], grid[1], grid[2]}, block_dim{block[0], block[1], block[2]};
  unsigned threads = block[0] * block[1] * block[2];
  while (engine.pool.size() < threads) engine.pool.push_back(new Fiber);
  engine.fibers.assign(engine.pool.begin(), engine.pool.begin() + threads);
  engine.dynamic_shared = dynamic_shared;
  engine.shared_bytes = kernel->static_shared + dynamic_shared;
  engine.deadline = std::chrono::steady_clock::now() +
                    std::chrono::microseconds((int64_t)(engine.time_limit * 1e6));
  make_shared_memory(engine.shared_bytes);
  // The launch owns its parameters: kernels may take their address.
  std::vector<char> storage(kernel->param_bytes + 256);
  param_base = (char*)(((uintptr_t)storage.data() + 127) & ~(uintptr_t)127);
  memcpy(param_base, params, kernel->param_bytes);
  if (kernel->param_bytes) sim_register(param_base, kernel->param_bytes, "kernel parameters", 0);
  reset_launch_order();
  std::mt19937_64 random(engine.seed + 0x9e3779b97f4a7c15 * ++engine.launches);
  std::vector<unsigned> thread_order = order_of(threads, random);
  for (unsigned index : order_of((size_t)grid[0] * grid[1] * grid[2], random)) {
    engine.block_number = index;
    prepare_block(unflatten(index, grid_dim), block_dim, grid_dim);
    run_block(thread_order);
    if (engine.counting) count_block_end();
    if (engine.aborted) break;
  }
  if (engine.counting) count_launch_end();
  sim_unregister(param_base);
  drop_all_shadows();
  engine.current = nullptr;
  return has_findings();
}
