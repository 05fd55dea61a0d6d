// The wide backward's shared memory, its barriers, and the order of its row blocks.
#pragma once

#include "sm90/backward_smem.cuh"

namespace hf_flashattn::sm90 {

// The row blocks that one consumer makes the scores of. All row blocks of the group's heads, head
// after head, are numbered 0, 1, 2, ...; consumer w takes 2i + w of pair i, from buffer w.
template <class P>
struct RowWalk {
  int head, last_head;
  int block, first_block, count;

  __device__ __forceinline__ RowWalk(KeyWork<P> const& work, int parity)
      : head(work.first_head), last_head(work.first_head + work.group - 1), block(work.rows.first),
        first_block(work.rows.first), count(work.rows.count) {
    advance(parity);
  }

  __device__ __forceinline__ bool valid() const { return head <= last_head; }
  __device__ __forceinline__ void next() { advance(2); }
  __device__ __forceinline__ int first_row() const { return block * P::kBlockM; }

 private:
  __device__ __forceinline__ void advance(int steps) {
    for (block += steps; block >= first_block + count; block -= count) ++head;
  }
};

// d256 takes 210 of 227 KB. Buffer w of Q, dO and the statistics belongs to the row blocks of
// consumer w, and each of the four big ones to one producer warp.
template <class P>
struct BackwardWideSmem {
  using Element = typename P::Element;
  using KeyTile = SmemTile<Element, P::kBlockN, P::kHeadDim>;
  using ValueTile = KeyTile;
  using RowTile = SmemTile<Element, P::kBlockM, P::kHeadDim>;
  using ScoreTile = SmemTile<Element, P::kBlockN, P::kBlockM>;  // (key, row)
  KeyTile k;                                                    // scratch for dK in the end
  ValueTile v;                                                  // scratch for dV
  RowTile q[2];
  RowTile dout[2];
  ScoreTile ds;  // dS^T of consumer 0's rows; consumer 1 multiplies its own from registers
  ScoreTile p;   // P^T of consumer 1's
  RowStatistics<P> statistics[2];
  Mbarrier k_full, v_full;
  Mbarrier q_full[2], q_empty[2];
  Mbarrier dout_full[2], dout_empty[2];
  Mbarrier statistics_full[2], statistics_empty[2];  // empty: threads of consumer w
  Mbarrier scores_empty;  // all consumer warps: nobody reads dS and P of this pair any more
  Mbarrier staging[4];    // TMA to each producer warp itself, for tiles it has to patch
};

template <class P>
__device__ void init_barriers(BackwardWideSmem<P>& s) {
  constexpr int kWarps = 4;  // of a consumer
  s.k_full.init(1);
  s.v_full.init(1);
  // Consumer 1 reads both Q (S^T of its own block, dK of both), consumer 0 its own; dO reversed.
  s.q_empty[0].init(2 * kWarps);
  s.q_empty[1].init(kWarps);
  s.dout_empty[0].init(kWarps);
  s.dout_empty[1].init(2 * kWarps);
  s.scores_empty.init(2 * kWarps);
  for (int buffer = 0; buffer < 2; ++buffer) {
    s.q_full[buffer].init(1);
    s.dout_full[buffer].init(1);
    s.statistics_full[buffer].init(1);
    s.statistics_empty[buffer].init(kWarpgroupThreads);
  }
  for (Mbarrier& staging : s.staging) staging.init(1);
  fence_mbarrier_init();
}

}  // namespace hf_flashattn::sm90
