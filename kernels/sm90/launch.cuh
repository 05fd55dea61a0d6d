// Host side of the Hopper kernels: tensor maps, grids, and the entry points that dispatch.cpp
// calls.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "common/status.h"
#include "common/tile.cuh"
#include "common/tma.cuh"
#include "sm90/entries.h"

namespace hf_flashattn::sm90 {

inline Status check(cudaError_t error, char const* what) {
  if (error == cudaSuccess) return success();
  return failure("%s: %s (%s)", what, cudaGetErrorName(error), cudaGetErrorString(error));
}

// cuTensorMapEncodeTiled through the runtime, so that the library does not link libcuda.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
inline EncodeTiled encode_tiled() {
  static EncodeTiled const function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t const error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(pointer)
               : nullptr;
  }();
  return function;
}

// How a (B, S, H, D) tensor is cut into the chunks of `Tile`. What lies outside reads as zeros, so
// that a kernel serves every head_dim below its own.
template <class Tile>
Status make_map(CUtensorMap& map, TensorView const& view, Problem const& p, int64_t rows,
                int heads) {
  EncodeTiled const encode = encode_tiled();
  if (encode == nullptr)
    return failure("expected a CUDA driver >= 12.0 with cuTensorMapEncodeTiled, got none");
  bool const packed = p.cu_seqlens_q != nullptr;
  cuuint64_t const sizes[4] = {cuuint64_t(p.head_dim), cuuint64_t(rows), cuuint64_t(heads),
                               cuuint64_t(packed ? 1 : p.batch)};
  // The stride of a dimension of size 1 is never used, but must be valid.
  cuuint64_t const row_bytes = 2 * cuuint64_t(p.head_dim);
  auto const bytes = [&](cuuint64_t size, int64_t stride) {
    return size == 1 ? row_bytes : 2 * cuuint64_t(stride);
  };
  cuuint64_t const strides[3] = {bytes(sizes[1], view.stride_seq),
                                 bytes(sizes[2], view.stride_head),
                                 bytes(sizes[3], view.stride_batch)};
  cuuint32_t const box[4] = {Tile::kChunkColumns, Tile::kRows, 1, 1};
  cuuint32_t const element_strides[4] = {1, 1, 1, 1};
  CUtensorMapDataType const type = p.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUresult const result = encode(
      &map, type, 4, view.data, sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      Tile::kChunkRowBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return success();
  return failure(
      "TMA expects 16-byte aligned data and strides that are multiples of 16 bytes; got address "
      "%p and strides (batch %lld, seq %lld, head %lld) elements. Next step: .contiguous() (error "
      "%d)",
      view.data, (long long)view.stride_batch, (long long)view.stride_seq,
      (long long)view.stride_head, int(result));
}

// Launches a kernel that may start while the one before it in the stream still runs, and waits for
// it on the device (wait_for_previous_kernel).
template <class... Parameters>
cudaError_t launch_overlapped(void (*kernel)(Parameters...), int grid, int threads, int smem_bytes,
                              cudaStream_t stream, Parameters const&... parameters) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, parameters...);
  return cudaGetLastError();
}

// Raises a kernel's shared-memory limit once per device.
template <auto Kernel>
Status allow_shared_memory(int bytes) {
  constexpr int kDevices = 128;
  static std::atomic<bool> done[kDevices];
  int device = 0;
  Status status = check(cudaGetDevice(&device), "asking for the current device");
  if (!status.ok() || (device < kDevices && done[device].load(std::memory_order_relaxed)))
    return status;
  status = check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                 "setting the shared-memory size of a kernel");
  if (!status.ok()) cudaGetLastError();  // or the next launch would report it again
  if (status.ok() && device < kDevices) done[device].store(true, std::memory_order_relaxed);
  return status;
}

}  // namespace hf_flashattn::sm90
