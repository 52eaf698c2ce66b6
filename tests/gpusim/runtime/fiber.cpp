// Fibers: a stack per CUDA thread and a switch between them.
#include <sys/mman.h>

#include <cstdlib>

#include "engine.h"

#if defined(__x86_64__) && !defined(GPUSIM_UCONTEXT)
#define GPUSIM_FAST_SWITCH
#else
#include <ucontext.h>
#endif

namespace sim {

namespace {

// Entered once per CUDA thread. A fiber that is done is never resumed.
void run_thread() {
  engine.kernel->body();
  Fiber* fiber = engine.current;
  fiber->done = true;
  fiber->warp->alive &= ~(1u << fiber->lane);
  --engine.alive;
  ++engine.progress;
  for (;;) suspend();
}

char* make_stack() {
  void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  mprotect(memory, 4096, PROT_NONE);  // an overflow faults instead of writing elsewhere
  return (char*)memory;
}

}  // namespace

#ifdef GPUSIM_FAST_SWITCH

// Saves the callee-saved registers and exchanges stacks; swapcontext would also make a system call.
extern "C" void gpusim_switch(void** save, void* to);
asm(R"(
.text
.globl gpusim_switch
.type gpusim_switch, @function
gpusim_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

static void* scheduler_stack;

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = make_stack();
  void** top = (void**)(fiber.stack + STACK_BYTES - 64);
  *--top = nullptr;  // return address of run_thread, which never returns; keeps the stack aligned
  *--top = (void*)run_thread;
  fiber.stack_pointer = top - 6;  // the registers that the first switch pops
}

void resume(Fiber& fiber) {
  engine.current = &fiber;
  context = &fiber.context;
  gpusim_switch(&scheduler_stack, fiber.stack_pointer);
}

void suspend() { gpusim_switch(&engine.current->stack_pointer, scheduler_stack); }

#else

static ucontext_t scheduler_context;

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    fiber.stack = make_stack();
    fiber.stack_pointer = new ucontext_t;
  }
  auto* machine = (ucontext_t*)fiber.stack_pointer;
  getcontext(machine);
  machine->uc_stack.ss_sp = fiber.stack;
  machine->uc_stack.ss_size = STACK_BYTES;
  machine->uc_link = nullptr;
  makecontext(machine, run_thread, 0);
}

void resume(Fiber& fiber) {
  engine.current = &fiber;
  context = &fiber.context;
  swapcontext(&scheduler_context, (ucontext_t*)fiber.stack_pointer);
}

void suspend() { swapcontext((ucontext_t*)engine.current->stack_pointer, &scheduler_context); }

#endif

}  // namespace sim
