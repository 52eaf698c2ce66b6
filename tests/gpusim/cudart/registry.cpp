// What runs when the library is loaded: fat binaries, kernels and variables register themselves.
#include <cstring>

#include "state.h"

namespace standin {

State& state() {
  static State* instance = new State;  // never destroyed: destructors of the library may use it
  return *instance;
}

cudaError_t fail(cudaError_t error, const std::string& message) {
  state().last_error = error;
  state().message = message;
  return error;
}

Function* find_function(const void* handle) {
  auto& functions = state().functions;
  auto found = functions.find(handle);
  if (found != functions.end()) return &found->second;
  for (auto& [stub, function] : functions)
    if (&function == handle) return &function;  // a cudaKernel_t
  fail(cudaErrorInvalidDeviceFunction, "gpusim: unknown kernel");
  return nullptr;
}

const sim::Kernel* kernel_of(Function& function) {
  if (function.kernel) return function.kernel;
  if (!function.module->ptx || !state().resolve_kernel) {
    fail(cudaErrorInvalidDeviceFunction,
         "gpusim: " + function.name +
             (function.module->ptx ? ": the library was not loaded by gpusim.cuda.load"
                                   : ": no PTX in the library (compile with --no-compress)"));
    return nullptr;
  }
  char message[4096] = "";
  const Module& module = *function.module;
  function.kernel = state().resolve_kernel(module.ptx, module.bytes, function.name.c_str(), message,
                                           sizeof message);
  if (!function.kernel) fail(cudaErrorInvalidDeviceFunction, std::string("gpusim: ") + message);
  return function.kernel;
}

namespace {

constexpr uint16_t PTX_ENTRY = 1;

// The wrapper that nvcc emits, and the headers inside the fat binary.
struct Wrapper {
  int magic, version;
  const char* data;
  void* file;
};

template <class T>
T field(const char* p, size_t offset) {
  T value;
  memcpy(&value, p + offset, sizeof value);
  return value;
}

}  // namespace

}  // namespace standin

using namespace standin;

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  const char* data = ((const Wrapper*)wrapper)->data;
  const char* entry = data + field<uint16_t>(data, 6);
  const char* end = entry + field<uint64_t>(data, 8);
  auto* module = new Module;
  while (entry < end) {
    uint16_t kind = field<uint16_t>(entry, 0);
    const char* content = entry + field<uint32_t>(entry, 4);
    uint64_t bytes = field<uint64_t>(entry, 8);
    if (kind == PTX_ENTRY && !module->ptx) {
      module->ptx = content;
      module->bytes = strnlen(content, bytes);
    }
    entry = content + bytes;
  }
  return (void**)module;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void** module, const char* stub, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  Function function;
  function.module = (Module*)module;
  function.name = name;
  state().functions[stub] = function;
}

void __cudaRegisterVar(void** module, char* host, char*, const char* name, int, size_t size, int,
                       int) {
  state().variables[host] = {(Module*)module, name, size};
}

// Called by gpusim.cuda.load.
__attribute__((visibility("default"))) void gpusim_init(KernelResolver kernel,
                                                        VariableResolver variable, int capability,
                                                        int processors, int shared_optin) {
  State& s = state();
  s.resolve_kernel = kernel;
  s.resolve_variable = variable;
  cudaDeviceProp& p = s.properties;
  strcpy(p.name, "gpusim");
  p.major = capability / 10;
  p.minor = capability % 10;
  p.multiProcessorCount = processors;
  p.warpSize = 32;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiProcessor =
      capability == 80 || capability == 90 || capability == 100 ? 2048 : 1536;
  p.maxBlocksPerMultiProcessor =
      capability == 80 || capability == 90 || capability == 100 ? 32 : 24;
  p.sharedMemPerBlock = DEFAULT_DYNAMIC_SHARED;
  p.sharedMemPerBlockOptin = shared_optin;
  p.sharedMemPerMultiprocessor = shared_optin + 1024;
  p.reservedSharedMemPerBlock = 1024;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.totalGlobalMem = 80ull << 30;
  p.l2CacheSize = 40 << 20;
}
}
