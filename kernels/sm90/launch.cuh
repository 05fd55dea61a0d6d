// Host side of the Hopper kernels: tensor maps, grids, and the entry points that dispatch.cpp
// calls.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstring>

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

// All that a tensor map is made of: equal keys give equal maps, whatever lives at the address now.
struct MapKey {
  void* data;
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box_columns, box_rows;
  CUtensorMapDataType type;
  CUtensorMapSwizzle swizzle;

  size_t slot(size_t slots) const {
    uint64_t const mixed =
        (reinterpret_cast<uintptr_t>(data) >> 4) + 31 * box_rows + 131 * (sizes[1] + sizes[2]);
    return mixed * 0x9e3779b97f4a7c15 >> 32 & (slots - 1);
  }
};
static_assert(sizeof(MapKey) == 8 + 4 * 8 + 3 * 8 + 4 * 4, "compared as bytes: no padding");

// Encodes a map, unless this thread has it from before: the layers of a model and the steps of a
// loop come back to the same addresses.
inline CUresult encode_once(CUtensorMap& map, MapKey const& key, EncodeTiled encode) {
  struct Entry {
    CUtensorMap map;
    MapKey key;  // all zero: empty, for sizes are at least 1
  };
  constexpr size_t kSlots = 128;
  thread_local Entry entries[kSlots];
  Entry& entry = entries[key.slot(kSlots)];
  if (std::memcmp(&entry.key, &key, sizeof key) != 0) {
    entry.key = {};
    cuuint32_t const box[4] = {key.box_columns, key.box_rows, 1, 1};
    cuuint32_t const element_strides[4] = {1, 1, 1, 1};
    CUresult const result =
        encode(&entry.map, key.type, 4, key.data, key.sizes, key.strides, box, element_strides,
               CU_TENSOR_MAP_INTERLEAVE_NONE, key.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return result;
    entry.key = key;
  }
  map = entry.map;
  return CUDA_SUCCESS;
}

// With which rows a tile of a packed tensor ends (TilePlace in sm90/producer.cuh).
enum class TileEnd { kTensor, kSequence };

// How a (B, S, H, D) tensor is cut into the chunks of `Tile`. What lies outside reads as zeros, so
// that a kernel serves every head_dim below its own.
//
// Tiles that end with the sequence have rows of two coordinates with the same stride, whose sum
// they are: the first is below the rows of a tile, and what the tile has from there on is outside.
// The tensor begins as many rows earlier, where there need be no memory: nothing is read there.
template <class Tile>
MapKey map_key(TensorView const& view, Problem const& p, int64_t rows, int heads, TileEnd end) {
  bool const packed = p.cu_seqlens_q != nullptr;
  bool const two = packed && end == TileEnd::kSequence;  // coordinates of a row
  // The stride of a dimension of size 1 is never used, but must be valid.
  auto const bytes = [&](int64_t size, int64_t stride) {
    return 2 * cuuint64_t(size == 1 ? p.head_dim : stride);
  };
  cuuint64_t const row = bytes(rows, view.stride_seq), head = bytes(heads, view.stride_head);
  MapKey key{};
  key.data = static_cast<char*>(view.data) - (two ? Tile::kRows * row : 0);
  key.sizes[0] = p.head_dim;
  key.strides[0] = row;
  if (two) {
    key.sizes[1] = Tile::kRows;
    key.sizes[2] = rows + 1;
    key.sizes[3] = heads;
    key.strides[1] = row;
    key.strides[2] = head;
  } else {
    int64_t const batch = packed ? 1 : p.batch;
    key.sizes[1] = rows;
    key.sizes[2] = heads;
    key.sizes[3] = batch;
    key.strides[1] = head;
    key.strides[2] = bytes(batch, view.stride_batch);
  }
  key.box_columns = Tile::kChunkColumns;
  key.box_rows = Tile::kRows;
  key.type = p.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  key.swizzle =
      Tile::kChunkRowBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return key;
}

template <class Tile>
Status make_map(CUtensorMap& map, TensorView const& view, Problem const& p, int64_t rows, int heads,
                TileEnd end) {
  EncodeTiled const encode = encode_tiled();
  if (encode == nullptr)
    return failure("expected a CUDA driver >= 12.0 with cuTensorMapEncodeTiled, got none");
  MapKey const key = map_key<Tile>(view, p, rows, heads, end);
  CUresult result = encode_once(map, key, encode);
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    // A thread that has not used this device yet, such as one of autograd's: the driver, unlike the
    // runtime, does not make the context current by itself.
    Status const status = check(cudaSetDevice(p.device), "making a device current");
    if (!status.ok()) return status;
    result = encode_once(map, key, encode);
  }
  if (result == CUDA_SUCCESS) return success();
  if (result != CUDA_ERROR_INVALID_VALUE)
    return failure("cuTensorMapEncodeTiled failed with CUDA driver error %d", int(result));
  return failure(
      "TMA expects 16-byte aligned data and strides that are multiples of 16 bytes; got address "
      "%p and strides (batch %lld, seq %lld, head %lld) elements. Next step: .contiguous()",
      view.data, (long long)view.stride_batch, (long long)view.stride_seq,
      (long long)view.stride_head);
}

// Launches a kernel that may start while the one before it in the stream still runs, and waits for
// it on the device (wait_for_previous_kernel).
template <class... Parameters>
cudaError_t launch_overlapped(void (*kernel)(Parameters...), dim3 grid, int threads, int smem_bytes,
                              cudaStream_t stream, Parameters const&... parameters) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
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
Status allow_shared_memory(int32_t device, int bytes) {
  constexpr int kDevices = 128;
  static std::atomic<bool> done[kDevices];
  bool const known = device >= 0 && device < kDevices;
  if (known && done[device].load(std::memory_order_relaxed)) return success();
  Status const status =
      check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
            "setting the shared-memory size of a kernel");
  if (!status.ok()) cudaGetLastError();  // or the next launch would report it again
  if (status.ok() && known) done[device].store(true, std::memory_order_relaxed);
  return status;
}

}  // namespace hf_flashattn::sm90
