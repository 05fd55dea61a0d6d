// What the producer warps of forward and backward share: filling a stage of a pipeline.
#pragma once

#include <type_traits>

#include "common/blocks.cuh"
#include "common/key_bits.cuh"
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

// The rows of a tile that come as they are in memory: those of [begin, end).
struct RowRange {
  int begin, end;

  template <int Rows>
  __device__ __forceinline__ bool holds_all() const {
    return begin <= 0 && end >= Rows;
  }
  // Rows first .. first + 31, a bit for each.
  __device__ __forceinline__ uint32_t from(int first) const {
    return ones_from(begin - first) & ~ones_from(end - first);
  }
};

// The same, of the keys that rows may see.
struct VisibleRows {
  BlockKeys const& keys;
  bool all;

  template <int>
  __device__ __forceinline__ bool holds_all() const {
    return all;
  }
  __device__ __forceinline__ uint32_t from(int first) const { return keys.from(first); }
};

// Of the block in each stage of K, from k_full on until k_empty; nothing without holes.
struct NoKeys {};
template <int Stages>
struct KeysOfStages {
  BlockKeys of[Stages];
};
template <class P, int Stages>
using StageKeys = std::conditional_t<P::kHoles, KeysOfStages<Stages>, NoKeys>;

// Which keys of a block may be seen, found while there is no room for it yet.
template <class P>
__device__ __forceinline__ auto keys_of_block(Problem const& p, Sequence const& s, int first_key) {
  if constexpr (P::kHoles) {
    return LaneKeys<P::kBlockN>(p, s, first_key);
  } else {
    RowRange range;
    s.visible_keys(first_key, P::kBlockN, range.begin, range.end);
    return range;
  }
}

// And when there is: the rows of its tiles, for the consumers too. The whole warp calls this.
__device__ __forceinline__ RowRange rows_of_keys(RowRange range, NoKeys, int) { return range; }
template <int Keys, int Stages>
__device__ __forceinline__ VisibleRows rows_of_keys(LaneKeys<Keys> const& lane,
                                                    KeysOfStages<Stages>& keys, int stage) {
  keys.of[stage].store(lane);
  return {keys.of[stage], lane.all};
}

// Zeroes the rows that are not among `rows`: the whole warp works. The swizzle moves bytes within a
// row only.
template <class Tile, class Rows>
__device__ __forceinline__ void zero_other_rows(Tile const& tile, Rows const& rows) {
  constexpr int kUnits = Tile::kChunkRowBytes / 16;
  int const lane = threadIdx.x % kWarpThreads;
#pragma unroll 1
  for (int first = 0; first < Tile::kRows; first += 32) {
    uint32_t const kept = rows.from(first);
    if (kept == ~0u) continue;
    int const end = min(first + 32, Tile::kRows);
#pragma unroll 1
    for (int row = first + lane / kUnits; row < end; row += kWarpThreads / kUnits) {
      if (kept >> row % 32 & 1) continue;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
        store_shared_zero_16b(tile.chunk_address(chunk) + row * Tile::kChunkRowBytes +
                              lane % kUnits * 16);
    }
  }
  fence_proxy_async();
  __syncwarp();
}

// Fills a tile and completes `full`, with all but `rows` as zeros, whatever is in memory there:
// 0 * NaN must not reach a product. Such tiles are rare (the ends of a sequence, holes), so the
// warp waits for TMA on `staging` and patches the tile before it lets the consumers in.
// The whole warp calls this; `staging_phase` is the parity of its next use.
template <class Tile, class Rows>
__device__ __forceinline__ void load_tile_rows(CUtensorMap const& map, Mbarrier& full,
                                               Mbarrier& staging, uint32_t& staging_phase,
                                               Tile const& tile, int row, int head, int batch,
                                               Rows const& rows) {
  bool const patch = !rows.template holds_all<Tile::kRows>();
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
  zero_other_rows(tile, rows);
  if (leader) full.arrive();
}

}  // namespace hf_flashattn::sm90
