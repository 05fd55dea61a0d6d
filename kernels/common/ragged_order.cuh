// The order of tiles where only the device knows how long the sequences are (ragged batches):
// packed ones, and in the forward those with key ranges. Tiles are numbered, the most expensive
// first, and CTAs claim one number after the other.
//
// Sequences go in groups of 32, as many as a warp has lanes. Full: the one with the most keys
// first, its heads one after the other, each with all its row blocks. Causal, where later row
// blocks cost more, whatever sequence they are of: by the row that a block ends with, the last
// first. All keys of a group are in use at a time then, so that goes once for every chunk of heads:
// as many as the L2 holds, unless that leaves too few tiles for the short ones at the end to level
// the CTAs out.
#pragma once

#include "common/blocks.cuh"

namespace hf_flashattn {

struct RaggedOrder {
  int32_t* claimed;  // tiles, not counting the first of each CTA; 0 before the kernel and after it
  int heads, chunk;
  int grid;  // CTAs: at most one an SM, and no more than may find a tile

  __host__ RaggedOrder(Problem const& p, int block_m, int32_t* claimed)
      : claimed(claimed), heads(p.heads_q) {
    constexpr int64_t kCacheBytes = 48 << 20, kTilesPerSm = 4;
    int64_t const key_head_bytes = int64_t(p.total_k) * p.head_dim * 4;  // K and V, 16 bits each
    int64_t const group = p.heads_q / p.heads_k;
    int64_t const key_heads = max(kCacheBytes / max(key_head_bytes, int64_t{1}), int64_t{1});
    int64_t const wanted = (heads + key_heads * group - 1) / (key_heads * group);
    int64_t const possible = heads * int64_t(p.total_q / block_m) / (kTilesPerSm * p.num_sms);
    int const chunks = int(max(min(wanted, possible), int64_t{1}));
    chunk = int(ceil_div(ceil_div(heads, chunks), int(group)) * group);
    int64_t const of_longest = int64_t(p.batch) * ceil_div(p.seqlen_q, block_m);
    int64_t const of_total = int64_t(p.total_q) / block_m + p.batch;
    bool const packed = p.cu_seqlens_q != nullptr;
    int64_t const most = packed && of_total < of_longest ? of_total : of_longest;
    grid = int(min(most * p.heads_q, int64_t{p.num_sms}));
  }
};

// Where the row blocks of a sequence end, counted in 64 rows; the first is block 0.
template <int BlockM, bool Ahead>
struct RowBlockEnds {
  static constexpr int kStep = BlockM / 64;
  int last;  // 0: none

  RowBlockEnds() = default;
  __host__ __device__ __forceinline__ explicit RowBlockEnds(int rows) : last(ceil_div(rows, 64)) {}

  // Ahead, the first block lacks rows, else the last.
  __host__ __device__ __forceinline__ int first() const {
    return Ahead ? (last - 1) % kStep + 1 : kStep;
  }
  __host__ __device__ __forceinline__ bool has(int end) const {
    return end == last || (end < last && (end - first()) % kStep == 0);
  }
  __host__ __device__ __forceinline__ int row_block(int end) const {
    return ceil_div(end - first(), kStep);
  }
};

struct RaggedTile {
  int place;  // of the sequence in its group
  int head, row_block;
};

// The tiles of one group, whose numbers, counted from its first, must not fall from call to call.
// Full, where a group's sequences are sorted. place_of(tile): whose tile it is;
// tiles_before(place): of the group; blocks(place): of rows.
struct FullWalk {
  template <class Group>
  __host__ __device__ __forceinline__ RaggedTile locate(Group const& group, RaggedOrder const&,
                                                        int tile) {
    int const place = group.place_of(tile), row_blocks = group.blocks(place);
    int const rest = tile - group.tiles_before(place);
    return {place, rest / row_blocks, rest % row_blocks};
  }
};

// Causal. ending(end): of how many sequences a row block ends there; last_end(): the last such;
// row_block_ending(end, n, place): of the n-th of these sequences, and its place.
struct CausalWalk {
  int end = 0, first_head = 0;
  int passed = 0;  // tiles before the first of these

  template <class Group>
  __host__ __device__ __forceinline__ RaggedTile locate(Group const& group,
                                                        RaggedOrder const& order, int tile) {
    if (end == 0) end = group.last_end();
    while (true) {
      int const heads = min(order.chunk, order.heads - first_head);
      int const here = heads * group.ending(end), rest = tile - passed;
      if (rest < here) {
        RaggedTile found{0, first_head + rest % heads, 0};
        found.row_block = group.row_block_ending(end, rest / heads, found.place);
        return found;
      }
      passed += here;
      if (--end > 0) continue;
      end = group.last_end();
      first_head += heads;
    }
  }
};

}  // namespace hf_flashattn
