// Which tile a persistent CTA works on next: (row block, query head, sequence).
#pragma once

#include "common/blocks.cuh"

namespace hf_flashattn::sm90 {

struct Work {
  int row_block, head, batch;
};

// Tiles in an order that the CTAs walk with a stride of the grid, back and forth, so that the tiles of
// one round are alike and no CTA always gets the longest of them.
//
// Full: a head's row blocks follow each other and share its K and V in the L2. Causal: longest rows
// first, within sections of as many heads as the L2 holds.
struct TileScheduler {
  int row_blocks, heads, tiles;
  int section_heads;  // (head, sequence) pairs a section; 0: no sections

  __host__ __device__ TileScheduler(Problem const& p, int block_m, bool longest_first)
      : row_blocks(ceil_div(p.seqlen_q, block_m)),
        heads(p.heads_q),
        tiles(row_blocks * p.heads_q * p.batch),
        section_heads(0) {
    if (!longest_first) return;
    constexpr int64_t kL2Bytes = 32 << 20;  // of the 50 MB, what K and V may claim
    int64_t const pair_bytes = 4 * int64_t(p.seqlen_k) * p.head_dim;
    int64_t const sharing = p.heads_q / p.heads_k;
    int64_t const fits = kL2Bytes / (pair_bytes > 0 ? pair_bytes : 1) * sharing;
    int64_t const all = int64_t(p.heads_q) * p.batch;
    section_heads = int(fits < 1 ? 1 : fits > all ? all : fits);
  }

  __device__ __forceinline__ int tile(int round) const {
    int const position = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + position;
  }

  // The last round is incomplete: a CTA may be idle in it, and none has a tile after it.
  __device__ __forceinline__ bool done(int round) const { return round * int(gridDim.x) >= tiles; }

  __device__ __forceinline__ Work work(int tile) const {
    int row_block, pair;
    if (section_heads == 0) {
      row_block = tile % row_blocks;
      pair = tile / row_blocks;
    } else {
      int const section_tiles = section_heads * row_blocks;
      int const section = tile / section_tiles;
      int const first_pair = section * section_heads;
      int const pairs = min(section_heads, tiles / row_blocks - first_pair);
      int const rest = tile - section * section_tiles;
      row_block = row_blocks - 1 - rest / pairs;
      pair = first_pair + rest % pairs;
    }
    return {row_block, pair % heads, pair / heads};
  }
};

}  // namespace hf_flashattn::sm90
