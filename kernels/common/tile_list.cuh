// The tiles of the forward, and of dQ where it has a kernel of its own, where only the device knows
// how long the sequences are: packed batches, and in the forward batches with key ranges.
// prep/list_tiles writes the list before the kernel, on every call.
#pragma once

#include "common/blocks.cuh"

namespace hf_flashattn {

// A block of rows of one sequence: a tile for each query head.
struct TileUnit {
  int32_t index, row_block;
};

// The units that exist, the most expensive first; CTAs claim their tiles one after the other.
//
// Tiles go through the list once for every chunk of heads. Units of one cost belong to different
// sequences, so all keys and values of a chunk are in use at a time: as many heads as the L2 holds,
// unless that leaves too few tiles for the short ones at the end to level the CTAs out.
struct TileList {
  static constexpr int kHeaderBytes = 256;
  int32_t* units_listed;
  int32_t* claimed;  // tiles claimed, not counting the first of each CTA
  TileUnit* units;
  int capacity;  // of the list; offsets that let sequences overlap can ask for more
  int heads, chunk;
  int grid;  // CTAs: at most one an SM, and no more than may find a tile

  // No policy has a smaller block than 64 rows, so that all of them share this bound.
  static __host__ int64_t max_units(Problem const& p, int block_m = 64) {
    int64_t const of_longest = int64_t(p.batch) * ceil_div(p.seqlen_q, block_m);
    int64_t const of_total = int64_t(p.total_q) / block_m + p.batch;
    return p.cu_seqlens_q != nullptr && of_total < of_longest ? of_total : of_longest;
  }

  static __host__ size_t bytes(Problem const& p) {
    return kHeaderBytes + size_t(max_units(p)) * sizeof(TileUnit);
  }

  __host__ TileList(Problem const& p, int block_m, void* memory)
      : units_listed(static_cast<int32_t*>(memory)), claimed(units_listed + 1),
        units(reinterpret_cast<TileUnit*>(static_cast<char*>(memory) + kHeaderBytes)),
        capacity(int(max_units(p))), heads(p.heads_q) {
    constexpr int64_t kCacheBytes = 48 << 20, kTilesPerSm = 4;
    int64_t const key_head_bytes = int64_t(p.total_k) * p.head_dim * 4;  // K and V, 16 bits each
    int64_t const group = p.heads_q / p.heads_k;
    int64_t const key_heads = max(kCacheBytes / max(key_head_bytes, int64_t{1}), int64_t{1});
    int64_t const wanted = (heads + key_heads * group - 1) / (key_heads * group);
    int64_t const possible = heads * int64_t(p.total_q / block_m) / (kTilesPerSm * p.num_sms);
    int const chunks = int(max(min(wanted, possible), int64_t{1}));
    chunk = int(ceil_div(ceil_div(heads, chunks), int(group)) * group);
    grid = int(min(max_units(p, block_m) * p.heads_q, int64_t{p.num_sms}));
  }

  // Which unit and head tile number `tile` of `count` units times `heads` is.
  __host__ __device__ __forceinline__ void locate(int tile, int count, int& unit, int& head) const {
    int const first = tile / (chunk * count) * chunk;
    int const size = min(chunk, heads - first), rest = tile - first * count;
    unit = rest / size;
    head = first + rest % size;
  }
};

// What a unit costs, in sixths of a tile's fixed part: a key block costs less when some of the
// tile's consumers have no rows, but not in proportion. Only the order matters, so that nobody
// minds that causal tiles of kernels with holes never begin ahead of the sequence.
template <int BlockM, int BlockN>
__host__ __device__ __forceinline__ int unit_cost(Sequence const& s, bool causal, int row_block) {
  int const first_row = row_block * BlockM - rows_ahead<BlockM>(s.length_q, causal);
  KeyBlocks<BlockM, BlockN> const blocks(s, causal, first_row);
  int const rows = min(s.length_q, first_row + BlockM) - max(first_row, 0);
  int const consumers = ceil_div(rows, 64);
  return 6 + max(blocks.count, 0) * (2 * consumers + 3);
}

// Buckets that grow with the cost, at most 3 % of it wide: the list is sorted by them.
constexpr int kCostBuckets = 1024;
__host__ __device__ __forceinline__ int cost_bucket(int cost) {
  int shift = 0;
  while (cost >> shift >= 64) ++shift;
  return 32 * shift + (cost >> shift);
}

}  // namespace hf_flashattn
