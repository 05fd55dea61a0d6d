// What the warps of a backward CTA share: its work, its shared memory, its barriers.
#pragma once

#include "common/blocks.cuh"
#include "common/tile.cuh"
#include "common/workspace.cuh"
#include "sm90/barriers.cuh"
#include "sm90/policy.cuh"
#include "sm90/producer.cuh"
#include "sm90/scheduler.cuh"

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

  __device__ __forceinline__ KeyWork(BackwardParams const& p, Work const& work)
      : head_k(work.head), group(p.problem.heads_q / p.problem.heads_k), key_block(work.block),
        sequence(p.problem, work.index), rows(sequence, P::kCausal, key_block * P::kBlockN) {
    first_head = head_k * group;
    first_key = key_block * P::kBlockN;
    if (p.problem.key_bits != nullptr && rows.keys_whole)
      rows.keys_whole = KeyBits(p.problem, work.index).template has_all<P::kBlockN>(first_key);
  }

  // Tells ptxas what it loses track of across tiles: with dropout it then spills less.
  __device__ __forceinline__ void make_uniform() {
    for (int* value : {&head_k, &first_head, &group, &first_key, &sequence.index,
                       &sequence.length_q, &sequence.length_k, &sequence.key_begin,
                       &sequence.key_end, &rows.first, &rows.count, &rows.unmasked_begin})
      *value = warp_uniform(*value);
    rows.keys_whole = __any_sync(0xffffffff, rows.keys_whole);
  }

  // Whether a row block is worked on as one of 64 rows: of a sequence the last may be.
  static __device__ __forceinline__ bool is_short(Sequence const& s, int row_block) {
    return P::kShortBlocks && s.length_q - row_block * P::kBlockM <= 64;
  }
  __device__ __forceinline__ bool is_short(int row_block) const {
    return is_short(sequence, row_block);
  }

  // How many key blocks have to add to the dQ of a row block before this one.
  __device__ __forceinline__ int earlier_key_blocks(int row_block) const {
    return later_key_blocks<P::kBlockN>(sequence, P::kCausal, (row_block + 1) * P::kBlockM - 1,
                                        key_block);
  }
};

// The next number from a counter in global memory, in lane 0 of the warp.
__device__ __forceinline__ int claim_next(int32_t* counter) {
  int number = 0;
  if (threadIdx.x % kWarpThreads == 0) number = atomicAdd(counter, 1);
  return number;
}

// What the rows of a block bring besides Q and dO; both are bulk copies from the workspace.
template <class P>
struct RowStatistics {
  alignas(128) float lse[P::kBlockM];
  float delta[P::kBlockM];
};

// Sums of dQ on their way to a rounding warp: pieces of 64 rows x 16 columns, in the consumers'
// order.
struct DqPieces {
  static constexpr int kFloats = 64 * 16, kStages = 2;
  alignas(128) float data[kStages][kFloats];
  Mbarrier full[kStages];  // TMA; the rounding warp waits
};
constexpr int kRoundingWarps = 2;

// What leaves the consumers for the writer, and comes back to be rounded.
template <class P>
struct DqBuffers {
  alignas(128) float parts[P::kConsumers][64 * P::kPartColumns];  // (float4, thread) of each
  DqPieces pieces[kRoundingWarps];
};
struct NoDq {};

// The tiles are read by the consumer warps, the writer and, deterministic, a second writer.
template <class P>
constexpr int kBackwardTileReaders = P::kConsumers * 4 + (P::kMakesDq ? 2 : 0);

template <class P>
struct BackwardSmem {
  using Element = typename P::Element;
  // Where dQ is split by columns, a chunk of K is what one consumer multiplies.
  using KeyTile = SmemTile<Element, P::kBlockN, P::kHeadDim, P::kPartColumns>;
  using ValueTile = SmemTile<Element, P::kBlockN, P::kHeadDim>;
  using RowTile = SmemTile<Element, P::kBlockM, P::kHeadDim>;
  KeyTile k[P::kKeyStages];
  ValueTile v[P::kKeyStages];
  RowTile q[P::kStages];
  RowTile dout[P::kStages];
  // (key, row): dS^T. Between two tiles the one that nobody reads is scratch for dK and dV; without
  // dQ there is no other use for it.
  SmemTile<Element, P::kBlockN, P::kBlockM> ds[P::kMakesDq ? P::kStages : 1];
  [[no_unique_address]] std::conditional_t<P::kMakesDq, DqBuffers<P>, NoDq> dq;
  RowStatistics<P> statistics[P::kStages];
  TileHandover<kBackwardTileReaders<P>> tiles;
  Mbarrier k_full[P::kKeyStages], v_full[P::kKeyStages];
  Mbarrier keys_empty[P::kKeyStages];                      // every consumer warp, done with K and V
  Mbarrier q_full[P::kStages], q_empty[P::kStages];        // empty: every consumer warp
  Mbarrier dout_full[P::kStages], dout_empty[P::kStages];  // the same
  Mbarrier statistics_full[P::kStages], statistics_empty[P::kStages];  // empty: consumer threads
  Mbarrier staging;  // TMA to the producer itself, for tiles it has to patch
};

template <class P>
__device__ void init_barriers(BackwardSmem<P>& s, bool deterministic) {
  s.tiles.init(kBackwardTileReaders<P> - (P::kMakesDq && !deterministic));
  if constexpr (P::kMakesDq)
    for (DqPieces& pieces : s.dq.pieces)
      for (Mbarrier& full : pieces.full) full.init(1);
  for (int stage = 0; stage < P::kKeyStages; ++stage) {
    s.k_full[stage].init(1);
    s.v_full[stage].init(1);
    s.keys_empty[stage].init(P::kConsumers * 4);
  }
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

// Waits until a counter in global memory has come to `count`, and sees what those wrote who
// counted, by bulk copies too.
// `nanoseconds`: between two looks, where nobody is in a hurry.
__device__ __forceinline__ void wait_count(int32_t const* counter, int count,
                                           uint32_t nanoseconds = 0) {
  while (true) {
    int32_t now;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(now) : "l"(counter) : "memory");
    if (now >= count) break;
    if (nanoseconds > 0) __nanosleep(nanoseconds);
  }
  fence_proxy_async_global();
}

// After bulk_wait<0>, or a barrier with the threads that wrote: whoever sees the count sees that.
// A bulk copy that has completed needs no fence (PTX ISA, "Async proxy": completion implies it).
__device__ __forceinline__ void add_count(int32_t* counter, int count = 1) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;\n" ::"l"(counter), "r"(count) : "memory");
}

}  // namespace hf_flashattn::sm90
