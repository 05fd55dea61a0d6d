// After the backward: dQ from fp32 accumulators in the consumers' order to rows of 16-bit values.
#pragma once

#include "common/fragment.cuh"
#include "common/workspace.cuh"

namespace hf_flashattn::prep {

constexpr int kConvertThreads = 256;  // one for each consumer thread of the backward
constexpr int kPart = 64;             // a consumer's part of a dQ block is 64 x 64

// Grid (row blocks, query heads, sequences). Part w is rows 64w .. of the block when the block has
// 128 rows of 64, and columns 64w .. when it has 64 rows of 128.
template <class T, int HeadDim, int BlockM>
__global__ void __launch_bounds__(kConvertThreads)
    dq_convert_kernel(BackwardParams const __grid_constant__ p,
                      BackwardWorkspace const __grid_constant__ workspace) {
  static_assert(BlockM * HeadDim == 2 * kPart * kPart, "two parts make a dQ block");
  constexpr bool kSplitRows = BlockM == 2 * kPart;
  __shared__ SmemTile<T, 2 * kPart, kPart> tile;
  Sequence const s(p.problem, blockIdx.z);
  int const first_row = blockIdx.x * BlockM;
  if (first_row >= s.length_q) return;
  int64_t const slot = workspace.first_slot(s, blockIdx.y) + first_row;
  int const part = threadIdx.x / kWarpgroupThreads, thread = threadIdx.x % kWarpgroupThreads;
  int const warp_row = threadIdx.x % kWarpgroupThreads / kWarpThreads * 16;

  auto const* accumulator =
      reinterpret_cast<float4 const*>(workspace.dq + slot * HeadDim + part * kPart * kPart);
  float acc[kPart / 2];
#pragma unroll
  for (int i = 0; i < kPart / 8; ++i) {
    float4 const value = accumulator[i * kWarpgroupThreads + thread];
    acc[4 * i] = value.x;
    acc[4 * i + 1] = value.y;
    acc[4 * i + 2] = value.z;
    acc[4 * i + 3] = value.w;
  }
  int const row = first_row + warp_row + (kSplitRows ? part * kPart : 0);
  int const column = kSplitRows ? 0 : part * kPart;
  T* const global = row_pointer<T>(p.dq, s, s.first_q, row, blockIdx.y) + column;
  float const scale = p.problem.softmax_scale;
  store_rows(tile, part * kPart + warp_row, acc, scale, scale, global, p.dq.stride_seq,
             s.length_q - row);
}

}  // namespace hf_flashattn::prep
