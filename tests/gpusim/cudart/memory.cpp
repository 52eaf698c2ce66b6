// Device memory, copies and module variables.
#include <cstdlib>
#include <cstring>

#include "state.h"

using namespace standin;

namespace {

constexpr size_t RED_ZONE = 256;
constexpr uint16_t POISON = 0xffb7;

char* symbol_address(const void* symbol) {
  auto found = state().variables.find(symbol);
  if (found == state().variables.end()) {
    fail(cudaErrorInvalidSymbol, "gpusim: unknown symbol");
    return nullptr;
  }
  const Variable& variable = found->second;
  char message[1024] = "";
  void* address = state().resolve_variable(variable.module->ptx, variable.module->bytes,
                                           variable.name.c_str(), message, sizeof message);
  if (!address) fail(cudaErrorInvalidSymbol, std::string("gpusim: ") + message);
  return (char*)address;
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** address, size_t bytes) {
  size_t total = (bytes + 3 * RED_ZONE) / RED_ZONE * RED_ZONE;
  auto* memory = (char*)aligned_alloc(RED_ZONE, total);
  if (!memory) return fail(cudaErrorMemoryAllocation, "gpusim: out of memory");
  for (size_t i = 0; i < total / 2; ++i) ((uint16_t*)memory)[i] = POISON;
  *address = memory + RED_ZONE;
  sim_register(*address, bytes, "cudaMalloc", 1);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  if (address) {
    sim_unregister(address);
    free((char*)address - RED_ZONE);
  }
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) {
  return cudaMalloc(address, bytes);
}

cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }

cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(address, value, bytes);
}

cudaError_t cudaMemcpy(void* dest, const void* source, size_t bytes, cudaMemcpyKind) {
  memcpy(dest, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* dest, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(dest, source, bytes, kind);
}

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = symbol_address(symbol);
  return *address ? cudaSuccess : cudaErrorInvalidSymbol;
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* source, size_t bytes, size_t offset,
                               cudaMemcpyKind) {
  char* address = symbol_address(symbol);
  if (!address) return cudaErrorInvalidSymbol;
  memcpy(address + offset, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* source, size_t bytes,
                                    size_t offset, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, source, bytes, offset, kind);
}

cudaError_t cudaMemcpyFromSymbol(void* dest, const void* symbol, size_t bytes, size_t offset,
                                 cudaMemcpyKind) {
  char* address = symbol_address(symbol);
  if (!address) return cudaErrorInvalidSymbol;
  memcpy(dest, address + offset, bytes);
  return cudaSuccess;
}
}
