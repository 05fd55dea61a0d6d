// After the backward: dQ from fp32 accumulators in the consumers' order to rows of 16-bit values.
#pragma once

#include "common/fragment.cuh"
#include "common/workspace.cuh"

namespace hf_flashattn::prep {

// How a dQ block of BlockM rows is cut: into parts of 64 rows x PartColumns, as a consumer
// accumulated them. Part i is rows 64i .. when it is as wide as the block, and columns
// i * PartColumns .. when it is as high. HeadDim: of the kernel, at least the problem's.
template <int HeadDim, int BlockM, int PartColumns>
struct DqParts {
  static_assert(BlockM == 64 || PartColumns == HeadDim,
                "parts divide either the rows or the columns");
  static_assert(BlockM % 64 == 0 && HeadDim % PartColumns == 0, "a block has whole parts");
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kBlockM = BlockM;
  static constexpr bool kSplitRows = BlockM > 64;
  static constexpr int kColumns = PartColumns;
  static constexpr int kParts = BlockM / 64 * (HeadDim / PartColumns);
  static constexpr int kThreads = kParts * kWarpgroupThreads;
};

// Grid (row blocks, query heads, sequences), a warpgroup for each part.
template <class T, class Parts>
__global__ void __launch_bounds__(Parts::kThreads)
    dq_convert_kernel(BackwardParams const __grid_constant__ p,
                      BackwardWorkspace const __grid_constant__ workspace) {
  constexpr int kColumns = Parts::kColumns;
  __shared__ SmemTile<T, 64 * Parts::kParts, kColumns, kColumns> tile;  // a part under the other
  Sequence const s(p.problem, blockIdx.z);
  int const first_row = blockIdx.x * Parts::kBlockM;
  if (first_row >= s.length_q) return;
  int64_t const slot = workspace.first_slot(s, blockIdx.y) + first_row;
  int const part = threadIdx.x / kWarpgroupThreads, thread = threadIdx.x % kWarpgroupThreads;
  int const warp_row = threadIdx.x % kWarpgroupThreads / kWarpThreads * 16;

  auto const* accumulator =
      reinterpret_cast<float4 const*>(workspace.dq + slot * Parts::kHeadDim + part * 64 * kColumns);
  float acc[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
    float4 const value = accumulator[i * kWarpgroupThreads + thread];
    acc[4 * i] = value.x;
    acc[4 * i + 1] = value.y;
    acc[4 * i + 2] = value.z;
    acc[4 * i + 3] = value.w;
  }
  int const row = first_row + warp_row + (Parts::kSplitRows ? part * 64 : 0);
  int const column = Parts::kSplitRows ? 0 : part * kColumns;
  T* const global = row_pointer<T>(p.dq, s, s.first_q, row, blockIdx.y) + column;
  float const scale = p.problem.softmax_scale;
  store_rows(tile, part * 64 + warp_row, acc, scale, scale, global, p.dq.stride_seq,
             s.length_q - row, p.problem.head_dim - column);
}

}  // namespace hf_flashattn::prep
