// What a translated kernel sees of the executor. Everything here is called by the running fiber.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sim {

struct Dim3 {
  uint32_t x, y, z;
};

struct Context {
  Dim3 thread, block, block_dim, grid;
};

struct Param {
  unsigned offset, size;
};

// From this PTX line on, instructions belong to this source line.
struct Location {
  unsigned ptx_line, file, line;
};

// One per translated kernel, exported as `gpusim_kernel`.
struct Kernel {
  const char* name;
  void (*body)();
  unsigned static_shared;  // bytes before dynamic shared memory
  unsigned param_bytes, param_count;
  const Param* params;
  unsigned location_count;
  const Location* locations;
  const char* const* files;
  unsigned max_threads;                     // from __launch_bounds__, 0: no limit
  unsigned global_granule, shared_granule;  // smallest access, in bytes
};

extern Context* context;   // of the running CUDA thread
extern char* shared_base;  // shared address 0 of the running block
extern char* param_base;   // kernel parameters

// ---- memory

enum class Space : uint8_t { Global, Shared, Local, Generic };

// How an access behaves; combined with |.
enum Access : unsigned {
  Load = 0,
  Store = 1,
  Atomic = 2,  // read-modify-write
  Strong = 4,  // volatile, relaxed and stronger: does not race with other strong accesses
  Acquire = 8,
  Release = 16,
  BlockScope = 32,  // .cta: strong only towards threads of the same block
  AsyncIssue = 64,  // an asynchronous copy starts: it races from now on, its data come later
  AsyncLand = 128,  // the data of an asynchronous copy arrive
  BulkUnit = 256,   // by the copy or tensor unit: bytes, but no request of the warp
  AnyAlignment = 512,
};

// The checked pointer for an access, or null when the checker refused it. `address` counts in the
// numbering of `space`. `value` points to what a plain store writes.
char* access(Space space, uint64_t address, unsigned bytes, unsigned flags, unsigned line,
             const void* value = nullptr);
void local_memory(char* base, size_t bytes);  // declares the thread's local variables
bool is_shared(uint64_t address);
bool is_local(uint64_t address);
bool is_param(uint64_t address);
bool is_const(uint64_t address);
bool is_global(uint64_t address);
void fence(bool in_block);  // membar; in_block: orders only towards threads of the block

// ---- control

[[noreturn]] void trap(unsigned line);
void check_time(unsigned line);  // ends the launch when it has run for too long
void poll(unsigned line);        // the thread waits for another one: let others run
uint64_t clock();
uint32_t thread_number();  // within the block
uint32_t lane();
uint32_t warp_count();
uint32_t dynamic_shared_bytes();
uint32_t total_shared_bytes();

enum class BarrierOp { And, Or, Count };
void barrier(unsigned id, unsigned count, bool aligned, unsigned line);
void barrier_arrive(unsigned id, unsigned count, unsigned line);
uint32_t barrier_reduce(bool predicate, BarrierOp op, unsigned id, unsigned count, unsigned line);
void warp_barrier(uint32_t mask, unsigned line);

// ---- warp collectives

enum class Shuffle { Butterfly, Up, Down, Index };
enum class Reduce { Add, Min, Max, And, Or, Xor };
uint32_t shuffle(Shuffle mode, uint32_t value, uint32_t distance, uint32_t clamp, uint32_t mask,
                 bool& in_range, unsigned line);
uint32_t ballot(uint32_t mask, bool predicate, uint32_t& participants, unsigned line);
uint32_t active_mask(unsigned line);
uint32_t elect(uint32_t mask, unsigned line);
int64_t reduce(int64_t value, uint32_t mask, Reduce op, unsigned line);
float reduce_float(float value, uint32_t mask, bool maximum, bool absolute, bool nan,
                   unsigned line);
uint32_t match(uint64_t value, uint32_t mask, bool all, unsigned line);

// ---- asynchronous copies

void cp_async(uint32_t shared, uint64_t source, unsigned bytes, unsigned source_bytes,
              unsigned line);
void cp_async_commit();
void cp_async_wait(unsigned pending);

void mbarrier_init(uint32_t shared, uint32_t count, unsigned line);
void mbarrier_invalidate(uint32_t shared, unsigned line);
void mbarrier_expect(uint32_t shared, uint32_t bytes, unsigned line);
uint64_t mbarrier_arrive(uint32_t shared, uint32_t count, uint32_t bytes, unsigned line);
bool mbarrier_test(uint32_t shared, uint64_t parity, unsigned line);

void bulk_load(uint32_t shared, uint64_t source, uint32_t bytes, uint32_t barrier, unsigned line);
void bulk_store(uint64_t dest, uint32_t shared, uint32_t bytes, unsigned line);
void bulk_commit();
void bulk_wait(unsigned pending);
void tensor_load(uint32_t shared, uint64_t map, const int32_t* at, unsigned rank, uint32_t barrier,
                 unsigned line);
void tensor_store(uint64_t map, const int32_t* at, unsigned rank, uint32_t shared, unsigned line);

// ---- tensor cores

enum class Element { Half, Bfloat, Tf32 };
void load_matrix(uint32_t* registers, unsigned count, bool transposed, uint32_t shared,
                 unsigned line);
void store_matrix(const uint32_t* registers, unsigned count, bool transposed, uint32_t shared,
                  unsigned line);
void mma(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, unsigned depth,
         Element element, bool half_accumulator, unsigned line);
void wmma_load(uint32_t* registers, unsigned rows, unsigned columns, bool column_major,
               unsigned width, Space space, uint64_t address, uint32_t stride, unsigned line);
void wmma_store(const uint32_t* registers, unsigned rows, unsigned columns, bool column_major,
                Space space, uint64_t address, uint32_t stride, unsigned line);
void wmma_mma(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, unsigned m,
              unsigned n, unsigned k, Element element, unsigned line);
void wgmma(uint32_t* d, unsigned columns, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, Element element, bool accumulate, int sign_a, int sign_b,
           bool transpose_a, bool transpose_b, unsigned line);

}  // namespace sim

// C interface, for ctypes, the CUDA runtime stand-in and the torch allocator.
extern "C" {
// Runs a kernel; returns the number of findings. `params` is laid out as the PTX declares it.
int sim_launch(const sim::Kernel* kernel, const unsigned grid[3], const unsigned block[3],
               unsigned dynamic_shared, const char* params);
const char* sim_report();  // findings of the last launch, one per line
void sim_register(const void* base, size_t bytes, const char* name, int poisoned);
void sim_unregister(const void* base);
void sim_rename(const void* address, const char* name);
// Storage of a __device__ or __constant__ variable: created by the first call with a size.
void* sim_variable_create(const char* key, size_t bytes, const void* init);
uint64_t sim_variable(const char* key);
void sim_seed(uint64_t seed);  // 0: threads and blocks in their natural order
void sim_time_limit(double seconds);
void sim_count(int enable);
const char* sim_counts();  // JSON of what was counted since the last call
}
