// Which tile a persistent CTA works on next: (row block, query head, sequence).
#pragma once

#include "common/blocks.cuh"

namespace hf_flashattn::sm90 {

struct Work {
  int row_block, head, batch;
};

// Tiles in the order in which the CTAs take them, with a stride of the grid.
//
// Full: row blocks of one head follow each other and share its K and V in the L2. Causal row blocks
// differ in length. Where there are many, they go in units of one length, the longest with the
// shortest, and a CTA takes both; of an odd number of row blocks the middle ones, half a unit, come
// last. Where there are few, all the longest come first.
struct TileScheduler {
  enum class Order { kByHead, kFolded, kLongestFirst };

  int row_blocks, heads, pairs;  // pairs of (head, sequence)
  Order order;

  __host__ TileScheduler(Problem const& p, int block_m, bool causal)
      : row_blocks(ceil_div(p.seqlen_q, block_m)), heads(p.heads_q), pairs(p.heads_q * p.batch) {
    bool const many = int64_t(pairs) * row_blocks >= 3 * int64_t(p.num_sms);
    order = !causal ? Order::kByHead : many ? Order::kFolded : Order::kLongestFirst;
  }

  __host__ __device__ int folded_units() const { return pairs * (row_blocks / 2); }
  __host__ __device__ int units() const {
    return order == Order::kFolded ? folded_units() + pairs * (row_blocks % 2) : pairs * row_blocks;
  }

  // The `step`-th tile of this CTA; false if it has no more.
  __device__ __forceinline__ bool get(int step, Work& work) const {
    int pair;
    if (order == Order::kFolded) {
      int const grid = gridDim.x, cta = blockIdx.x;
      int const own = folded_units() > cta ? (folded_units() - cta - 1) / grid + 1 : 0;
      if (step < 2 * own) {
        int const half = row_blocks / 2, unit = step / 2 * grid + cta;
        pair = unit / half;
        work.row_block = step % 2 ? unit % half : row_blocks - 1 - unit % half;
      } else {
        int const unit = (step - own) * grid + cta;
        if (unit >= units()) return false;
        pair = unit - folded_units();
        work.row_block = row_blocks / 2;
      }
    } else {
      int const unit = step * gridDim.x + blockIdx.x;
      if (unit >= units()) return false;
      bool const by_head = order == Order::kByHead;
      pair = by_head ? unit / row_blocks : unit % pairs;
      work.row_block = by_head ? unit % row_blocks : row_blocks - 1 - unit / pairs;
    }
    work.head = pair % heads;
    work.batch = pair / heads;
    return true;
  }
};

}  // namespace hf_flashattn::sm90
