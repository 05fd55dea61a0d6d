// What the producer warps of forward and backward share: filling a stage of a pipeline.
#pragma once

#include "common/blocks.cuh"
#include "common/tile.cuh"
#include "common/tma.cuh"

namespace hf_flashattn::sm90 {

// All chunks of a tile; one lane issues.
template <class Tile>
__device__ __forceinline__ void load_tile(CUtensorMap const& map, Mbarrier& full, Tile const& tile,
                                          int row, int head, int batch) {
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
    tma_load(&map, full, tile.chunk_address(chunk), chunk * Tile::kChunkStep, row, head, batch);
}

// The same tile on its way into the L2, before there is room for it.
template <class Tile>
__device__ __forceinline__ void prefetch_tile(CUtensorMap const& map, Tile const&, int row,
                                              int head, int batch) {
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
    tma_prefetch(&map, chunk * Tile::kChunkStep, row, head, batch);
}

// Zeroes the rows outside [begin, end): the whole warp works. The swizzle moves bytes within a row
// only.
template <class Tile>
__device__ __forceinline__ void zero_rows_outside(Tile const& tile, int begin, int end) {
  constexpr int kUnits = Tile::kChunkRowBytes / 16;
  int const lane = threadIdx.x % kWarpThreads;
  for (int row = lane / kUnits; row < Tile::kRows; row += kWarpThreads / kUnits) {
    if (row >= begin && row < end) continue;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
      store_shared_zero_16b(tile.chunk_address(chunk) + row * Tile::kChunkRowBytes +
                            lane % kUnits * 16);
  }
  fence_proxy_async();
  __syncwarp();
}

// Fills a tile and completes `full`, with the rows outside [begin, end) as zeros, whatever is in
// memory there: 0 * NaN must not reach a product. Such tiles are rare (the ends of a sequence), so
// the warp waits for TMA on `staging` and patches the tile before it lets the consumers in.
// The whole warp calls this; `staging_phase` is the parity of its next use.
template <class Tile>
__device__ __forceinline__ void load_tile_zero_outside(CUtensorMap const& map, Mbarrier& full,
                                                       Mbarrier& staging, uint32_t& staging_phase,
                                                       Tile const& tile, int row, int head,
                                                       int batch, int begin, int end) {
  bool const patch = begin > 0 || end < Tile::kRows;
  bool const leader = elect_one();
  if (leader) {
    Mbarrier& target = patch ? staging : full;
    target.arrive_expect(Tile::kBytes);
    load_tile(map, target, tile, row, head, batch);
  }
  __syncwarp();
  if (!patch) return;
  staging.wait(staging_phase);
  staging_phase ^= 1;
  zero_rows_outside(tile, begin, end);
  if (leader) full.arrive();
}

}  // namespace hf_flashattn::sm90
