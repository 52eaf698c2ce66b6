// cuTensorMapEncodeTiled, with the restrictions that the driver checks.
#include "../runtime/tensor_map.h"

#include <cstring>
#include <iterator>

#include "state.h"

using namespace standin;

namespace {

// Bytes of an element, in the order of CUtensorMapDataType.
const uint32_t ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
constexpr uint32_t UNLIMITED = 1u << 30;
const uint32_t SWIZZLE_BYTES[] = {UNLIMITED, 32, 64, 128};

bool encode_dimensions(sim::TensorMap& out, const cuuint64_t* extents, const cuuint64_t* strides,
                       const cuuint32_t* box, const cuuint32_t* element_strides) {
  for (unsigned i = 0; i < out.rank; ++i) {
    if (!extents[i] || !box[i] || box[i] > 256 || element_strides[i] != 1) return false;
    out.extent[i] = extents[i];
    out.box[i] = box[i];
    if (i == 0) continue;
    uint64_t stride = strides[i - 1];
    if (stride % 16 || stride >= 1ull << 40) return false;
    out.stride[i - 1] = stride;
  }
  return true;
}

}  // namespace

extern "C" {

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* base, const cuuint64_t* extents, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (rank < 1 || rank > 5 || (unsigned)type >= std::size(ELEMENT_BYTES) ||
      (unsigned)swizzle >= std::size(SWIZZLE_BYTES) || interleave || (uintptr_t)base % 16 ||
      (uintptr_t)map % 64)
    return CUDA_ERROR_INVALID_VALUE;
  sim::TensorMap out{};
  out.magic = sim::TENSOR_MAP_MAGIC;
  out.base = (uint64_t)base;
  out.rank = rank;
  out.element_bytes = ELEMENT_BYTES[type];
  out.swizzle = swizzle;
  out.nan_fill = fill;
  uint32_t inner_bytes = box[0] * out.element_bytes;
  if (!encode_dimensions(out, extents, strides, box, element_strides) || inner_bytes % 16 ||
      inner_bytes > SWIZZLE_BYTES[swizzle])
    return CUDA_ERROR_INVALID_VALUE;
  memset(map, 0, sizeof *map);
  memcpy(map, &out, sizeof out);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  bool known = !strcmp(symbol, "cuTensorMapEncodeTiled");
  *function = known ? (void*)cuTensorMapEncodeTiled : nullptr;
  if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
