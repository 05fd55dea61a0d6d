// TMA: bulk copies between global and shared memory that complete on an mbarrier or a bulk group.
#pragma once

#include <cuda.h>

#include "common/mbarrier.cuh"

namespace hf_flashattn {

__device__ __forceinline__ void prefetch_tensor_map(CUtensorMap const* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// A box of a tensor of four dimensions, the first of which are columns; what lies outside comes as
// zeros.
__device__ __forceinline__ void tma_load(CUtensorMap const* map, Mbarrier& full, uint32_t smem,
                                         int column, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(smem),
      "l"(map), "r"(full.address()), "r"(column), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Brings the same box into the L2 alone.
__device__ __forceinline__ void tma_prefetch(CUtensorMap const* map, int column, int x, int y,
                                             int z) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];\n" ::"l"(map),
      "r"(column), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// `bytes` contiguous bytes; both addresses and the size are multiples of 16.
__device__ __forceinline__ void bulk_load(void const* global, Mbarrier& full, uint32_t smem,
                                          uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(smem),
      "l"(global), "r"(bytes), "r"(full.address())
      : "memory");
}

// global[i] += smem[i] for bytes / 4 floats, in the L2.
__device__ __forceinline__ void bulk_reduce_add(float* global, uint32_t smem, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(global),
      "r"(smem), "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// The shared memory of all but the newest `Pending` groups may be written again.
template <int Pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(Pending) : "memory");
}

// The global writes of all but the newest `Pending` groups are done.
template <int Pending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(Pending) : "memory");
}

}  // namespace hf_flashattn
