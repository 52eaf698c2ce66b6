// CPU tensor storage with exact bounds for the checker, poisoned and between red zones.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <new>

extern "C" {
void sim_register(const void* base, size_t bytes, const char* name, int poisoned);
void sim_unregister(const void* base);
}

namespace {

constexpr size_t RED_ZONE = 4096;
constexpr uint16_t POISON = 0xffb7;  // a NaN in every floating-point format
constexpr uint8_t PRIORITY = 255;

void release(void* data) {
  if (!data) return;
  sim_unregister(data);
  free((char*)data - RED_ZONE);
}

struct CheckedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device cpu(c10::kCPU);
    if (!bytes) return {nullptr, nullptr, release, cpu};
    size_t total = (bytes + 3 * RED_ZONE - 1) / RED_ZONE * RED_ZONE;
    auto* memory = (char*)aligned_alloc(RED_ZONE, total);
    if (!memory) throw std::bad_alloc();
    for (size_t i = 0; i < total / 2; ++i) ((uint16_t*)memory)[i] = POISON;
    char* data = memory + RED_ZONE;
    sim_register(data, bytes, "tensor", 1);
    return {data, data, release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* dest, const void* source, size_t bytes) const override {
    default_copy_data(dest, source, bytes);
  }
};

CheckedAllocator checked;
c10::Allocator* original;

}  // namespace

extern "C" void gpusim_hook_torch() {
  if (c10::GetCPUAllocator() != &checked) original = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&checked, PRIORITY);
}

extern "C" void gpusim_unhook_torch() {
  if (original) c10::SetCPUAllocator(original, PRIORITY);
}
