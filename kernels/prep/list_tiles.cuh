// Before a kernel whose sequence lengths only the device knows: the list of its tiles, and zeros
// for tokens of no sequence. One launch does both.
#pragma once

#include "common/tile_list.cuh"
#include "prep/clear_uncovered.cuh"

namespace hf_flashattn::prep {

constexpr int kListThreads = 1024, kListClearBlocks = 8;
static_assert(kListThreads == kCostBuckets, "each thread adds up one bucket");

// Calls visit(sequence, row block, bucket) for every unit, each in one thread of the block.
template <int BlockM, int BlockN, class Visit>
__device__ __forceinline__ void for_each_unit(Problem const& p, Visit const& visit) {
  int lanes = 1;  // threads of a sequence
  while (2 * lanes * p.batch <= kListThreads) lanes *= 2;
  for (int i = threadIdx.x; i < p.batch * lanes; i += kListThreads) {
    Sequence const s(p, i / lanes);
    int const row_blocks = ceil_div(s.length_q, BlockM);
    for (int row_block = i % lanes; row_block < row_blocks; row_block += lanes)
      visit(s, row_block, cost_bucket(unit_cost<BlockM, BlockN>(s, p.causal, row_block)));
  }
}

// The sum of `value` over this thread and those before it.
__device__ __forceinline__ int scan_block(int value) {
  __shared__ int warp_sum[kListThreads / kWarpThreads];
  int const lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  auto const scan_warp = [&](int x) {
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      int const before = __shfl_up_sync(0xffffffff, x, distance);
      if (lane >= distance) x += before;
    }
    return x;
  };
  value = scan_warp(value);
  if (lane == kWarpThreads - 1) warp_sum[warp] = value;
  __syncthreads();
  if (warp == 0) warp_sum[lane] = scan_warp(warp_sum[lane]);
  __syncthreads();
  return value + (warp > 0 ? warp_sum[warp - 1] : 0);
}

// A counting sort by cost. Within a bucket the order is that of arrival: it decides when a tile is
// computed, never what comes out of it.
template <int BlockM, int BlockN>
__device__ void list_tiles(Problem const& p, TileList const& list) {
  __shared__ int cursor[kCostBuckets];
  cursor[threadIdx.x] = 0;
  __syncthreads();
  for_each_unit<BlockM, BlockN>(
      p, [&](Sequence const&, int, int bucket) { atomicAdd(&cursor[bucket], 1); });
  __syncthreads();
  int const bucket = kCostBuckets - 1 - threadIdx.x;  // the most expensive first
  int const size = cursor[bucket], end = scan_block(size);
  cursor[bucket] = end - size;
  if (bucket == 0) {
    *list.units_listed = min(end, list.capacity);
    *list.claimed = 0;
  }
  __syncthreads();
  for_each_unit<BlockM, BlockN>(p, [&](Sequence const& s, int row_block, int bucket) {
    int const place = atomicAdd(&cursor[bucket], 1);
    if (place < list.capacity) list.units[place] = {s.index, row_block};
  });
}

// Grid: a block for the list, then kListClearBlocks for each packed result.
template <int BlockM, int BlockN>
__global__ void __launch_bounds__(kListThreads)
    list_tiles_kernel(Problem const __grid_constant__ p, TileList const __grid_constant__ list,
                      PackedResults const __grid_constant__ results) {
  launch_dependents();
  if (blockIdx.x == 0) list_tiles<BlockM, BlockN>(p, list);
  else
    clear_uncovered(results.result[(blockIdx.x - 1) / kListClearBlocks], p.batch, p.head_dim,
                    (blockIdx.x - 1) % kListClearBlocks, kListClearBlocks);
}

}  // namespace hf_flashattn::prep
