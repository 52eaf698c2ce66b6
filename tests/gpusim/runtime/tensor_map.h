// What stands in the 128 bytes of a CUtensorMap here: the arguments of cuTensorMapEncodeTiled,
// written by the CUDA runtime stand-in or the Triton driver.
#pragma once
#include <cstdint>

namespace sim {

constexpr uint64_t TENSOR_MAP_MAGIC = 0x70616d74;

struct TensorMap {
  uint64_t magic, base;
  uint32_t rank, element_bytes;
  uint32_t swizzle;  // 0 none, 1: 32 bytes, 2: 64 bytes, 3: 128 bytes
  uint32_t nan_fill;
  uint64_t extent[5];
  uint64_t stride[4];  // bytes, of dimensions 1 and up
  uint32_t box[5];
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace sim
