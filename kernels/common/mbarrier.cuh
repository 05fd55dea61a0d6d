// mbarrier: the shared-memory barrier that TMA completes and that pipelines hand stages over with.
#pragma once

#include "common/ptx.cuh"

namespace hf_flashattn {

struct Mbarrier {
  uint64_t state;

  __device__ __forceinline__ uint32_t address() const { return smem_address(&state); }

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(address()), "r"(arrivals));
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(address()) : "memory");
  }

  // Arrives, and makes the phase wait for `bytes` more from TMA.
  __device__ __forceinline__ void arrive_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
  }

  // Returns when the phase of this parity has completed.
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(address()),
        "r"(parity)
        : "memory");
  }
};

// One arrival for a whole warp that has done with a buffer.
__device__ __forceinline__ void release(Mbarrier& empty) {
  __syncwarp();
  if (threadIdx.x % kWarpThreads == 0) empty.arrive();
}

// Makes initialised mbarriers visible to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// Where a user of a ring of `Stages` buffers stands: which buffer, and the parity of its next
// phase. A consumer waits `full` with parity(); a producer waits `empty` with parity() ^ 1, so that
// the first pass over the ring does not wait.
template <int Stages>
struct PipelineState {
  int place = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ int stage() const { return place; }
  __device__ __forceinline__ uint32_t parity() const { return phase; }
  __device__ __forceinline__ void next() {
    if (++place == Stages) {
      place = 0;
      phase ^= 1;
    }
  }
  // Where it stood before the last next().
  __device__ __forceinline__ int previous_stage() const {
    return (place == 0 ? Stages : place) - 1;
  }
};

}  // namespace hf_flashattn
