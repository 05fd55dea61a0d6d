// What the warps of a backward CTA share: its work, its shared memory, its barriers.
#pragma once

#include "common/blocks.cuh"
#include "common/tile.cuh"
#include "common/workspace.cuh"
#include "sm90/barriers.cuh"
#include "sm90/policy.cuh"
#include "sm90/producer.cuh"

namespace hf_flashattn::sm90 {

struct BackwardMaps {
  CUtensorMap q, k, v, dout;
};

// One block of keys of one key head, and the row blocks of the query heads that share it.
template <class P>
struct KeyWork {
  int head_k, first_head, group;
  int key_block, first_key;
  Sequence sequence;
  RowBlocks<P::kBlockM, P::kBlockN> rows;

  // Grid (key blocks, key heads, sequences). Causal: block 0 sees the most rows and comes first.
  // Deterministic: later blocks come first, since the earlier ones wait for them; this relies on
  // CTAs starting in the order of blockIdx, as they do.
  __device__ __forceinline__ explicit KeyWork(BackwardParams const& p)
      : head_k(blockIdx.y), group(p.problem.heads_q / p.problem.heads_k),
        key_block(p.deterministic ? gridDim.x - 1 - blockIdx.x : blockIdx.x),
        sequence(p.problem, blockIdx.z), rows(sequence, P::kCausal, key_block * P::kBlockN) {
    first_head = head_k * group;
    first_key = key_block * P::kBlockN;
  }

  // How many key blocks have to add to the dQ of a row block before this one.
  __device__ __forceinline__ int earlier_key_blocks(int row_block) const {
    return later_key_blocks<P::kBlockN>(sequence, P::kCausal, (row_block + 1) * P::kBlockM - 1,
                                        key_block);
  }
};

// What the rows of a block bring besides Q and dO; both are bulk copies from the workspace.
template <class P>
struct RowStatistics {
  alignas(128) float lse[P::kBlockM];
  float delta[P::kBlockM];
};

template <class P>
struct BackwardSmem {
  using Element = typename P::Element;
  // Where dQ is split by columns, a chunk of K is what one consumer multiplies.
  using KeyTile = SmemTile<Element, P::kBlockN, P::kHeadDim, P::kPartColumns>;
  using ValueTile = SmemTile<Element, P::kBlockN, P::kHeadDim>;
  using RowTile = SmemTile<Element, P::kBlockM, P::kHeadDim>;
  KeyTile k;
  ValueTile v;  // scratch for dK and dV in the end
  RowTile q[P::kStages];
  RowTile dout[P::kStages];
  SmemTile<Element, P::kBlockN, P::kBlockM> ds[2];             // (key, row): dS^T
  alignas(128) float dq[P::kConsumers][64 * P::kPartColumns];  // (float4, thread) of each consumer
  RowStatistics<P> statistics[P::kStages];
  Mbarrier k_full, v_full;
  Mbarrier q_full[P::kStages], q_empty[P::kStages];                    // empty: every consumer warp
  Mbarrier dout_full[P::kStages], dout_empty[P::kStages];              // the same
  Mbarrier statistics_full[P::kStages], statistics_empty[P::kStages];  // empty: consumer threads
  Mbarrier staging;  // TMA to the producer itself, for tiles it has to patch
};

template <class P>
__device__ void init_barriers(BackwardSmem<P>& s) {
  s.k_full.init(1);
  s.v_full.init(1);
  s.staging.init(1);
  for (int stage = 0; stage < P::kStages; ++stage) {
    s.q_full[stage].init(1);
    s.dout_full[stage].init(1);
    s.statistics_full[stage].init(1);
    s.statistics_empty[stage].init(P::kConsumers * kWarpgroupThreads);
    s.q_empty[stage].init(P::kConsumers * 4);
    s.dout_empty[stage].init(P::kConsumers * 4);
  }
  fence_mbarrier_init();
}

// Waits until `earlier` key blocks have added to a dQ block, and sees what they wrote.
__device__ __forceinline__ void wait_turn(int32_t const* turn, int earlier) {
  int32_t done;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(done) : "l"(turn) : "memory");
  } while (done < earlier);
  asm volatile("fence.proxy.async;\n" ::: "memory");
}

// After bulk_wait<0>, or a barrier with the threads that added: the sums are in global memory for
// whoever sees the turn, the next key block may add to them.
__device__ __forceinline__ void pass_turn(int32_t* turn) {
  asm volatile("fence.proxy.async;\n" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;\n" ::"l"(turn) : "memory");
}

}  // namespace hf_flashattn::sm90
