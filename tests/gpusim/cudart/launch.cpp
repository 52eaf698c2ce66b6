// Kernel launches, their attributes and occupancy.
#include <algorithm>
#include <cstring>
#include <vector>

#include "state.h"

using namespace standin;

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;  // of <<< >>> expressions

cudaError_t check_shared_memory(const Function& function, const sim::Kernel& kernel,
                                size_t dynamic) {
  const cudaDeviceProp& p = state().properties;
  size_t allowed = std::max<int>(function.max_dynamic_shared, 0);
  std::string needs = "gpusim: " + function.name + " needs " +
                      std::to_string(kernel.static_shared) + " + " + std::to_string(dynamic) +
                      " bytes of shared memory";
  if (dynamic > allowed || (kernel.static_shared + dynamic > (size_t)DEFAULT_DYNAMIC_SHARED &&
                            function.max_dynamic_shared <= DEFAULT_DYNAMIC_SHARED))
    return fail(cudaErrorInvalidValue,
                needs + " without cudaFuncAttributeMaxDynamicSharedMemorySize (missing opt-in)");
  if (kernel.static_shared + dynamic > p.sharedMemPerBlockOptin)
    return fail(cudaErrorInvalidValue,
                needs + ", the device has " + std::to_string(p.sharedMemPerBlockOptin));
  return cudaSuccess;
}

cudaError_t run(const void* handle, dim3 grid, dim3 block, void** arguments, size_t shared) {
  Function* function = find_function(handle);
  const sim::Kernel* kernel = function ? kernel_of(*function) : nullptr;
  if (!kernel) return state().last_error;
  if (cudaError_t error = check_shared_memory(*function, *kernel, shared)) return error;
  std::vector<char> params(kernel->param_bytes);
  for (unsigned i = 0; i < kernel->param_count; ++i)
    memcpy(params.data() + kernel->params[i].offset, arguments[i], kernel->params[i].size);
  unsigned grid_size[3] = {grid.x, grid.y, grid.z}, block_size[3] = {block.x, block.y, block.z};
  if (!sim_launch(kernel, grid_size, block_size, (unsigned)shared, params.data()))
    return cudaSuccess;
  return fail(cudaErrorLaunchFailure, std::string("gpusim: ") + sim_report());
}

}  // namespace

extern "C" {

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *(void**)stream = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  Function* function = find_function(stub);
  *kernel = (cudaKernel_t)function;
  return function ? cudaSuccess : state().last_error;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  return run(kernel, grid, block, arguments, shared);
}

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return run(stub, grid, block, arguments, shared);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub,
                                void** arguments) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    const auto& cluster = attribute.val.clusterDim;
    if (attribute.id == cudaLaunchAttributeClusterDimension &&
        cluster.x * cluster.y * cluster.z > 1)
      return fail(cudaErrorNotSupported, "gpusim: thread block clusters are not modelled");
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative)
      return fail(cudaErrorNotSupported, "gpusim: cooperative launches are not modelled");
  }
  return run(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  Function* function = find_function(stub);
  if (!function) return state().last_error;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;  // a hint
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return fail(cudaErrorNotSupported, "gpusim: function attribute " + std::to_string(attribute));
  if (value < 0 || value > (int)state().properties.sharedMemPerBlockOptin)
    return fail(cudaErrorInvalidValue, "gpusim: shared memory opt-in of " + std::to_string(value));
  function->max_dynamic_shared = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  Function* function = find_function(stub);
  const sim::Kernel* kernel = function ? kernel_of(*function) : nullptr;
  if (!kernel) return state().last_error;
  memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = kernel->static_shared;
  attributes->maxThreadsPerBlock = kernel->max_threads ? kernel->max_threads : 1024;
  attributes->maxDynamicSharedSizeBytes = function->max_dynamic_shared;
  attributes->numRegs = 64;  // only ptxas knows
  attributes->ptxVersion = state().properties.major * 10 + state().properties.minor;
  return cudaSuccess;
}

// By threads and shared memory; registers are not known here.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* stub,
                                                                   int block_size, size_t dynamic,
                                                                   unsigned) {
  Function* function = find_function(stub);
  const sim::Kernel* kernel = function ? kernel_of(*function) : nullptr;
  if (!kernel) return state().last_error;
  const cudaDeviceProp& p = state().properties;
  size_t shared = kernel->static_shared + dynamic + p.reservedSharedMemPerBlock;
  *blocks = std::min<int>({p.maxBlocksPerMultiProcessor, p.maxThreadsPerMultiProcessor / block_size,
                           (int)(p.sharedMemPerMultiprocessor / shared)});
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub,
                                                          int block_size, size_t dynamic) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, block_size, dynamic,
                                                                0);
}
}
