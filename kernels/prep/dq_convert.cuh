// After the backward: dQ from fp32 accumulators in the consumers' order to rows of 16-bit values.
#pragma once

#include "common/fragment.cuh"
#include "common/workspace.cuh"

namespace hf_flashattn::prep {

constexpr int kConvertThreads = 256;  // one for each consumer thread of the backward

// Grid (row blocks, query heads, sequences). Part w is rows 64w .. of the block when it has 128
// rows, and one half of the columns when it has 64. HeadDim: of the kernel, at least the problem's.
template <class T, int HeadDim, int BlockM>
__global__ void __launch_bounds__(kConvertThreads)
    dq_convert_kernel(BackwardParams const __grid_constant__ p,
                      BackwardWorkspace const __grid_constant__ workspace) {
  static_assert(BlockM == 64 || BlockM == 128, "two parts of 64 rows make a dQ block");
  constexpr bool kSplitRows = BlockM == 128;
  constexpr int kColumns = kSplitRows ? HeadDim : HeadDim / 2;  // of a part
  __shared__ SmemTile<T, 128, kColumns, kColumns> tile;         // a part under the other
  Sequence const s(p.problem, blockIdx.z);
  int const first_row = blockIdx.x * BlockM;
  if (first_row >= s.length_q) return;
  int64_t const slot = workspace.first_slot(s, blockIdx.y) + first_row;
  int const part = threadIdx.x / kWarpgroupThreads, thread = threadIdx.x % kWarpgroupThreads;
  int const warp_row = threadIdx.x % kWarpgroupThreads / kWarpThreads * 16;

  auto const* accumulator =
      reinterpret_cast<float4 const*>(workspace.dq + slot * HeadDim + part * 64 * kColumns);
  float acc[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
    float4 const value = accumulator[i * kWarpgroupThreads + thread];
    acc[4 * i] = value.x;
    acc[4 * i + 1] = value.y;
    acc[4 * i + 2] = value.z;
    acc[4 * i + 3] = value.w;
  }
  int const row = first_row + warp_row + (kSplitRows ? part * 64 : 0);
  int const column = kSplitRows ? 0 : part * kColumns;
  T* const global = row_pointer<T>(p.dq, s, s.first_q, row, blockIdx.y) + column;
  float const scale = p.problem.softmax_scale;
  store_rows(tile, part * 64 + warp_row, acc, scale, scale, global, p.dq.stride_seq,
             s.length_q - row, p.problem.head_dim - column);
}

}  // namespace hf_flashattn::prep
