// What the kernels of one stream share, as they run one after the other: a counter of ragged tiles,
// which they leave as they found it, and room for log-sum-exps that nobody reads. For
// torch_binding.cpp alone.
#pragma once

#include <deque>
#include <mutex>

#include "torch_tensors.h"

namespace hf_flashattn {

// Whether what is launched on a stream is recorded into a graph, which may be replayed on another
// one beside it.
inline bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // The legacy stream has no answer while another stream is captured, and is not captured itself.
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

class StreamMemory {
  static constexpr int64_t kMostUnread = 4 << 20;  // floats; more would be lost to everybody else
  int32_t const device_;
  unsigned long long const stream_;
  int32_t* const counter_;
  std::mutex mutex_;
  Tensor unread_;
  int64_t unread_floats_ = 0;

 public:
  // number: how many others there are. Of the current device.
  StreamMemory(int32_t device, unsigned long long stream, size_t number)
      : device_(device), stream_(stream),
        counter_(number < kTileCounters ? hf_flashattn::tile_counter(int32_t(number)) : nullptr) {}

  // Of a stream, for good; null if what it launches may run beside anything.
  static StreamMemory* of(int32_t device, cudaStream_t stream) {
    unsigned long long id = 0;  // handles come again
    if (is_captured(stream)) return nullptr;
    if (cudaStreamGetId(stream, &id) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    static std::mutex mutex;
    static auto* const known = new std::deque<StreamMemory>;  // torch may be gone when statics are
    std::scoped_lock const lock(mutex);
    for (StreamMemory& memory : *known)
      if (memory.device_ == device && memory.stream_ == id) return &memory;
    return &known->emplace_back(device, id, known->size());
  }

  // A 0 for the next launch, or null: there are more streams than counters. Not torch's memory,
  // which may belong to a pool that somebody means to drop.
  int32_t* tile_counter() const { return counter_; }

  // Memory for so many floats that are written and not read.
  Tensor unread(int64_t floats) {
    if (floats > kMostUnread) return empty({floats}, aoti_torch_dtype_float32(), device_);
    {
      std::scoped_lock const lock(mutex_);
      if (floats <= unread_floats_) return unread_;
    }
    Tensor const larger = empty({floats}, aoti_torch_dtype_float32(), device_);
    std::scoped_lock const lock(mutex_);
    unread_ = larger;
    unread_floats_ = floats;
    return larger;
  }
};

// A 0 for the next launch on a stream: the stream's own, or `own`, which then has to live until the
// launch.
inline int32_t* counter_of_call(StreamMemory const* memory, int32_t device, cudaStream_t stream,
                                std::optional<Tensor>& own) {
  int32_t* const kept = memory != nullptr ? memory->tile_counter() : nullptr;
  if (kept != nullptr) return kept;
  own = empty({1}, aoti_torch_dtype_int32(), device);
  auto* const counter = static_cast<int32_t*>(own->data_ptr());
  cudaError_t const error = cudaMemsetAsync(counter, 0, sizeof *counter, stream);
  HFA_CHECK(error == cudaSuccess, "clearing the counter of tiles: ", cudaGetErrorString(error));
  return counter;
}

}  // namespace hf_flashattn
