// Packed tensors may hold tokens of no sequence: before the first offset and after the last, as in
// a buffer of fixed size. Nobody computes them, so their results become 0 (LSE -inf) here instead
// of what the memory held before: by warps that have nothing else to do, in kernels that touch
// other rows alone.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace hf_flashattn {

// One packed (total, heads, head_dim) result, and the LSE (heads, total) that belongs to it or
// null.
struct PackedResult {
  TensorView view;
  float* lse;
  int32_t const* cu_seqlens;
  int total, heads;
};

// Rows number `warp`, warp + warps and so on, by one warp. It may have few registers.
__device__ __forceinline__ void clear_uncovered(PackedResult const& r, int batch, int head_dim,
                                                int warp, int warps) {
  int const begin = min(max(r.cu_seqlens[0], 0), r.total);
  int const end = min(max(r.cu_seqlens[batch], begin), r.total);
  int const units = head_dim / 8;  // of 16 bytes
#pragma unroll 1
  for (int row = warp < begin ? warp : warp + end - begin; row < r.total;
       row += row < begin && row + warps >= begin ? warps + end - begin : warps) {
#pragma unroll 1
    for (int i = threadIdx.x % kWarpThreads; i < r.heads * units; i += kWarpThreads) {
      int const head = i / units, unit = i % units;
      auto* const data = static_cast<uint16_t*>(r.view.data) + row * r.view.stride_seq +
                         head * r.view.stride_head + unit * 8;
      *reinterpret_cast<uint4*>(data) = make_uint4(0, 0, 0, 0);
      if (unit == 0 && r.lse != nullptr) r.lse[int64_t{head} * r.total + row] = -infinity();
    }
  }
}

}  // namespace hf_flashattn
