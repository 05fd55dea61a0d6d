// What the producer warps of forward and backward share: filling a stage of a pipeline.
#pragma once

#include <type_traits>

#include "common/blocks.cuh"
#include "common/key_bits.cuh"
#include "common/tile.cuh"
#include "common/tma.cuh"

namespace hf_flashattn::sm90 {

// Where a tile is in its tensor map: the coordinates behind the column.
struct TilePlace {
  int x, y, z;

  // By row, head and sequence, in a map of TileEnd::kTensor.
  static __host__ __device__ __forceinline__ TilePlace in_tensor(Sequence const& s, int row,
                                                                 int head) {
    return {row, head, s.batch};
  }

  // The same where the map is of TileEnd::kSequence. row: of the sequence, whose first one in the
  // tensor is `first`, and which has `length`, more than `row`.
  template <class Tile>
  static __host__ __device__ __forceinline__ TilePlace in_sequence(Tile const&, Sequence const& s,
                                                                   int first, int length, int row,
                                                                   int head) {
    if (!s.packed) return in_tensor(s, row, head);
    int const rows = min(length - row, Tile::kRows);
    return {Tile::kRows - rows, first + row + rows, head};
  }
  template <class Tile>
  static __host__ __device__ __forceinline__ TilePlace of_rows(Tile const& tile, Sequence const& s,
                                                               int row, int head) {
    return in_sequence(tile, s, s.first_q, s.length_q, row, head);
  }
  template <class Tile>
  static __host__ __device__ __forceinline__ TilePlace of_keys(Tile const& tile, Sequence const& s,
                                                               int key, int head) {
    return in_sequence(tile, s, s.first_k, s.length_k, key, head);
  }
};

// All chunks of a tile; one lane issues.
template <class Tile>
__device__ __forceinline__ void load_tile(CUtensorMap const& map, Mbarrier& full, Tile const& tile,
                                          TilePlace const& place) {
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
    tma_load(&map, full, tile.chunk_address(chunk), chunk * Tile::kChunkStep, place.x, place.y,
             place.z);
}

// The same tile on its way into the L2, before there is room for it.
template <class Tile>
__device__ __forceinline__ void prefetch_tile(CUtensorMap const& map, Tile const&,
                                              TilePlace const& place) {
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
    tma_prefetch(&map, chunk * Tile::kChunkStep, place.x, place.y, place.z);
}

// The rows of a tile that come as they are in memory: those of [begin, end). Where keys may be
// hidden anywhere, LaneKeys say it.
struct RowRange {
  int begin, end;
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

// And when there is: handed to the consumers. The whole warp calls this.
__device__ __forceinline__ void hand_over(RowRange, NoKeys, int) {}
template <int Keys, int Stages>
__device__ __forceinline__ void hand_over(LaneKeys<Keys> const& lane, KeysOfStages<Stages>& keys,
                                          int stage) {
  keys.of[stage].store(lane);
}

// How many arrivals hand a stage of K back, and what a consumer warp does for it.
template <class P>
constexpr int kKeyReleases = P::kConsumers * (P::kHoles ? kWarpgroupThreads : 4);
template <class P>
__device__ __forceinline__ void release_keys(Mbarrier& empty) {
  if constexpr (P::kHoles) empty.arrive();
  else release(empty);
}

template <class Tile>
__device__ __forceinline__ bool holds_all(Tile const&, RowRange rows) {
  return rows.begin <= 0 && rows.end >= Tile::kRows;
}
template <class Tile, int Keys>
__device__ __forceinline__ bool holds_all(Tile const&, LaneKeys<Keys> const& keys) {
  return keys.all;
}

// Zeroes rows [begin, end) but those with a bit in `kept`: the whole warp works. The swizzle moves
// bytes within a row only.
template <class Tile>
__device__ __forceinline__ void zero_rows(Tile const& tile, int begin, int end, uint32_t kept = 0) {
  constexpr int kUnits = Tile::kChunkRowBytes / 16;
  int const lane = threadIdx.x % kWarpThreads;
#pragma unroll 1
  for (int row = begin + lane / kUnits; row < end; row += kWarpThreads / kUnits) {
    if (kept >> row % 32 & 1) continue;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
      store_shared_zero_16b(tile.chunk_address(chunk) + row * Tile::kChunkRowBytes +
                            lane % kUnits * 16);
  }
}

// Zeroes the rows that are not among `rows`.
template <class Tile>
__device__ __forceinline__ void zero_other_rows(Tile const& tile, RowRange rows) {
  zero_rows(tile, 0, min(rows.begin, Tile::kRows));
  zero_rows(tile, max(rows.end, 0), Tile::kRows);
}
template <class Tile, int Keys>
__device__ __forceinline__ void zero_other_rows(Tile const& tile, LaneKeys<Keys> const& keys) {
#pragma unroll 1
  for (int first = 0; first < Tile::kRows; first += 32) {
    uint32_t const kept = keys.from(first);
    if (kept != ~0u) zero_rows(tile, first, min(first + 32, Tile::kRows), kept);
  }
}

// The last steps of a tile that TMA has filled and that has other rows than these.
template <class Tile, class Rows>
__device__ __forceinline__ void complete_patched(Tile const& tile, Mbarrier& full, Rows const& rows,
                                                 bool leader) {
  zero_other_rows(tile, rows);
  fence_proxy_async();
  __syncwarp();
  if (leader) full.arrive();
}

// Fills a tile and completes `full`, with all but `rows` as zeros, whatever is in memory there:
// 0 * NaN must not reach a product. Such tiles are rare (the ends of a key range, holes), so the
// warp waits for TMA on `staging` and patches the tile before it lets the consumers in. The whole
// warp calls this; `staging_phase` is the parity of its next use.
template <class Tile, class Rows>
__device__ __forceinline__ void load_tile_rows(CUtensorMap const& map, Mbarrier& full,
                                               Mbarrier& staging, uint32_t& staging_phase,
                                               Tile const& tile, TilePlace const& place,
                                               Rows const& rows) {
  bool const patch = !holds_all(tile, rows);
  bool const leader = elect_one();
  if (leader) {
    Mbarrier& target = patch ? staging : full;
    target.arrive_expect(Tile::kBytes);
    load_tile(map, target, tile, place);
  }
  __syncwarp();
  if (!patch) return;
  staging.wait(staging_phase);
  staging_phase ^= 1;
  complete_patched(tile, full, rows, leader);
}

// One of two tiles that are filled together.
template <class Tile>
struct Filling {
  CUtensorMap const& map;
  Mbarrier& full;
  Tile const& tile;
};

// load_tile_rows for two tiles of the same rows and head: where they have to be patched, both are
// on their way at once.
template <class TileA, class TileB, class Rows>
__device__ __forceinline__ void load_tiles_rows(Filling<TileA> const& a, Filling<TileB> const& b,
                                                Mbarrier& staging, uint32_t& staging_phase,
                                                TilePlace const& place, Rows const& rows) {
  static_assert(TileA::kRows == TileB::kRows);
  bool const patch = !holds_all(a.tile, rows);
  bool const leader = elect_one();
  if (leader) {
    if (patch) {
      staging.arrive_expect(TileA::kBytes + TileB::kBytes);
    } else {
      a.full.arrive_expect(TileA::kBytes);
      b.full.arrive_expect(TileB::kBytes);
    }
    load_tile(a.map, patch ? staging : a.full, a.tile, place);
    load_tile(b.map, patch ? staging : b.full, b.tile, place);
  }
  __syncwarp();
  if (!patch) return;
  staging.wait(staging_phase);
  staging_phase ^= 1;
  complete_patched(a.tile, a.full, rows, leader);
  complete_patched(b.tile, b.full, rows, leader);
}

}  // namespace hf_flashattn::sm90
