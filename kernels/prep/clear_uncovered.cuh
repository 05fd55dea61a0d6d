// Packed tensors may hold tokens of no sequence: before the first offset and after the last, as in
// a buffer of fixed size. Nobody computes them, so their results become 0 (LSE -inf) here instead
// of what the memory held before.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace hf_flashattn::prep {

constexpr int kClearThreads = 256, kClearBlocks = 32;

// One packed (total, heads, head_dim) result, and the LSE (heads, total) that belongs to it or
// null.
struct PackedResult {
  TensorView view;
  float* lse;
  int32_t const* cu_seqlens;
  int total, heads;
};

struct PackedResults {
  PackedResult result[3];
};

// The part of `block` of `blocks` of one result.
__device__ __forceinline__ void clear_uncovered(PackedResult const& r, int batch, int head_dim,
                                                int block, int blocks) {
  int const begin = min(max(r.cu_seqlens[0], 0), r.total);
  int const end = min(max(r.cu_seqlens[batch], begin), r.total);
  int64_t const uncovered = r.total - (end - begin);
  int const units = head_dim / 8;  // of 16 bytes
  int64_t const stride = int64_t{blocks} * blockDim.x;
  for (int64_t i = int64_t{block} * blockDim.x + threadIdx.x; i < uncovered * r.heads * units;
       i += stride) {
    int const unit = i % units, head = i / units % r.heads;
    int64_t const skipped = i / units / r.heads;
    int64_t const row = skipped < begin ? skipped : skipped + (end - begin);
    auto* const data = static_cast<uint16_t*>(r.view.data) + row * r.view.stride_seq +
                       head * r.view.stride_head + unit * 8;
    *reinterpret_cast<uint4*>(data) = make_uint4(0, 0, 0, 0);
    if (unit == 0 && r.lse != nullptr) r.lse[int64_t{head} * r.total + row] = -infinity();
  }
}

// Grid (kClearBlocks, results). What is launched to overlap with it touches other rows alone.
static __global__ void __launch_bounds__(kClearThreads)
    clear_uncovered_kernel(PackedResults const __grid_constant__ results, int batch, int head_dim) {
  launch_dependents();
  clear_uncovered(results.result[blockIdx.y], batch, head_dim, blockIdx.x, gridDim.x);
}

}  // namespace hf_flashattn::prep
