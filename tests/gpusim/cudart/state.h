// State of the CUDA runtime stand-in. It is linked into the library under test with hidden
// visibility: as a library of its own, the real libcudart of a CUDA build of torch would take its
// symbols.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "../runtime/sim.h"

namespace standin {

// Asks Python for a translated kernel, or for the address of a module variable. On failure they
// return null and write a message.
using KernelResolver = const sim::Kernel* (*)(const char* ptx, size_t bytes, const char* name,
                                              char* message, size_t capacity);
using VariableResolver = void* (*)(const char* ptx, size_t bytes, const char* name, char* message,
                                   size_t capacity);

// The PTX that nvcc --no-compress left in a fat binary.
struct Module {
  const char* ptx = nullptr;
  size_t bytes = 0;
};

constexpr int DEFAULT_DYNAMIC_SHARED = 48 << 10;

struct Function {
  Module* module = nullptr;
  std::string name;  // mangled
  const sim::Kernel* kernel = nullptr;
  int max_dynamic_shared = DEFAULT_DYNAMIC_SHARED;
};

struct Variable {
  Module* module = nullptr;
  std::string name;
  size_t size = 0;
};

struct State {
  KernelResolver resolve_kernel = nullptr;
  VariableResolver resolve_variable = nullptr;
  cudaDeviceProp properties = {};
  cudaError_t last_error = cudaSuccess;
  std::string message;
  std::map<const void*, Function> functions;
  std::map<const void*, Variable> variables;
};

// Function-local, because the fat binary registers itself before other constructors run.
State& state();

cudaError_t fail(cudaError_t error, const std::string& message);
// The kernel behind a host stub or a handle; null after fail().
Function* find_function(const void* handle);
const sim::Kernel* kernel_of(Function& function);

}  // namespace standin
