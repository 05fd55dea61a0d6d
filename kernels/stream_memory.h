// Device memory that the kernels of one stream share, as they run one after the other: the counter
// of ragged tiles, which they leave as they found it, and room for log-sum-exps that nobody reads.
// For torch_binding.cpp alone.
#pragma once

#include <mutex>
#include <vector>

#include "torch_tensors.h"

namespace hf_flashattn {

// Whether what is launched on a stream is recorded into a graph, which may be replayed on another
// one beside it. Of a thread's default stream, whose handle all threads share, as if it were.
inline bool shares_nothing(cudaStream_t stream) {
  if (stream == cudaStreamPerThread) return true;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // The legacy stream has no answer while another stream is captured, and is not captured itself.
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

// Of one stream, for good: torch has a fixed number of them. An empty one serves the call alone
// that makes it.
struct StreamMemory {
  int32_t device;
  void* stream;
  Tensor counter;
  Tensor unread;
  int64_t unread_floats = 0;

  // A 0 for the next launch.
  Tensor tile_counter() {
    if (counter.defined()) return counter;
    Tensor const zero = empty({1}, aoti_torch_dtype_int32(), device);
    cudaError_t const error =
        cudaMemsetAsync(zero.data_ptr(), 0, sizeof(int32_t), static_cast<cudaStream_t>(stream));
    HFA_CHECK(error == cudaSuccess, "clearing the counter of tiles: ", cudaGetErrorString(error));
    return counter = zero;
  }

  // Memory for so many floats that are written and not read.
  Tensor unread_memory(int64_t floats) {
    if (floats > unread_floats) {
      unread = empty({floats}, aoti_torch_dtype_float32(), device);
      unread_floats = floats;
    }
    return unread;
  }
};

// Calls use(memory of the stream).
template <class Use>
void with_stream_memory(int32_t device, void* stream, Use const& use) {
  if (shares_nothing(static_cast<cudaStream_t>(stream))) {
    StreamMemory own{device, stream};
    return use(own);
  }
  static std::mutex mutex;
  static auto* const known = new std::vector<StreamMemory>;  // torch may be gone when statics are
  std::scoped_lock const lock(mutex);
  for (StreamMemory& memory : *known)
    if (memory.device == device && memory.stream == stream) return use(memory);
  use(known->emplace_back(StreamMemory{device, stream}));
}

}  // namespace hf_flashattn
