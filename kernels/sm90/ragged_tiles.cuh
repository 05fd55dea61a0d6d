// Where the tiles of a kernel with rows come from (the forward, dQ), by its policy: static steps,
// or numbers claimed from a counter (common/ragged_order.cuh).
//
// One warp of the CTA claims numbers, finds which tile each is, and hands it over in shared memory,
// with where its sequence lies, to all warps that work on it. That passes under the tiles before.
// Nobody else reads lengths.
#pragma once

#include <type_traits>

#include "sm90/scheduler.cuh"
#include "sm90/sequence_group.cuh"

namespace hf_flashattn::sm90 {

// The tile that a CTA works on, and the next. A third, claimed earlier, leaves less to level the
// CTAs out at the end: packed lengths 128..512 lost 1 to 4 %.
constexpr int kRaggedSlots = 2;

// A tile, and of its sequence what differs between sequences.
struct TileRecord {
  int4 work;  // row block (-1: no more tiles), head, index, length_q
  int4 keys;  // first_q, first_k, key_begin, key_end
};

// A warp gives a slot back when it asks for the next tile, so it may read the record again as long
// as it works on the tile.
template <int Readers>
struct RaggedHandover {
  alignas(16) TileRecord slot[kRaggedSlots];
  // full: the claiming warp; empty: every lane of the readers, as all of them read the record
  Mbarrier full[kRaggedSlots], empty[kRaggedSlots];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kRaggedSlots; ++i) {
      full[i].init(1);
      empty[i].init(Readers * kWarpThreads);
    }
  }
};

// For one warp of the CTA.
template <class Group, int Readers>
__device__ void claim_ragged_tiles(Problem const& problem, RaggedOrder const& order,
                                   RaggedHandover<Readers>& handover) {
  PipelineState<kRaggedSlots> ring, freed;
  Group group;
  typename Group::Walk walk;
  int first = -kWarpThreads;  // sequence of the group
  int before = 0, tiles = 0;  // before the group, and in it
  bool sorted = false;
  bool const leader = elect_one();
  int tile = blockIdx.x, claimed = -1;
  while (true) {
    while (tile >= before + tiles && first + kWarpThreads < problem.batch) {
      before += tiles;
      first += kWarpThreads;
      group.load(problem, first);
      tiles = order.heads * group.row_blocks();
      sorted = false;
    }
    bool const found = tile < before + tiles;
    TileRecord record{make_int4(-1, 0, 0, 0), make_int4(0, 0, 0, 0)};
    if (found) {
      if (!sorted) {
        group.sort(order.heads);
        walk = {};
        sorted = true;
      }
      RaggedTile const at = walk.locate(group, order, tile - before);
      Sequence const sequence(problem, group.sequence(at.place));  // as read by its lane: near
      record = {
          make_int4(at.row_block, at.head, sequence.index, sequence.length_q),
          make_int4(sequence.first_q, sequence.first_k, sequence.key_begin, sequence.key_end)};
    }
    if (leader) {
      handover.slot[ring.stage()] = record;
      handover.full[ring.stage()].arrive();
      // As many claims as tiles, the last of which leaves the counter as it was.
      if (!found && claimed == before + tiles - 1) *order.claimed = 0;
    }
    __syncwarp();
    if (!found) return;
    ring.next();
    // Given back when the readers ask for the tile just handed over; the first time it held none.
    handover.empty[ring.stage()].wait(freed.parity());
    freed.next();
    if (leader) claimed = atomicAdd(order.claimed, 1);
    claimed = __reduce_max_sync(0xffffffff, claimed);
    tile = order.grid + claimed;
  }
}

// Whether tiles begin ahead of the sequence.
template <class P>
constexpr bool kMayBeAhead = kCanBeAhead<P::kBlockM> && P::kCausal;

template <class P>
using RaggedGroup =
    std::conditional_t<P::kCausal, CausalGroup<P::kBlockM, kMayBeAhead<P>>, FullGroup<P::kBlockM>>;

// A warp's view of them.
template <int Readers>
struct RaggedTiles {
  RaggedHandover<Readers>& handover;
  PipelineState<kRaggedSlots> ring{kRaggedSlots - 1, 1};  // of the tile that it works on

  __device__ __forceinline__ bool next(Work& work) {
    handover.empty[ring.stage()].arrive();
    ring.next();
    handover.full[ring.stage()].wait(ring.parity());
    int4 const message = handover.slot[ring.stage()].work;
    work.block = warp_uniform(message.x);  // see ClaimedTiles
    work.head = warp_uniform(message.y);
    work.index = warp_uniform(message.z);
    return __any_sync(0xffffffff, message.x >= 0);
  }

  // Of this tile.
  __device__ __forceinline__ Sequence sequence(Problem const& p, Work const& work) const {
    TileRecord const& record = handover.slot[ring.stage()];
    int4 const keys = record.keys;
    return Sequence(p, work.index, keys.x, record.work.w, keys.y, keys.z, keys.w);
  }
};

// They are read by the producer warp and the consumer warps.
template <class P>
constexpr int kTileReaders = 1 + P::kConsumers * 4;

template <class P>
using RowScheduler = std::conditional_t<P::kRagged, RaggedOrder, TileScheduler<P::kTileOrder>>;
struct NoHandover {};
template <class P>
using RowHandover = std::conditional_t<P::kRagged, RaggedHandover<kTileReaders<P>>, NoHandover>;
template <class P>
using TilesOfWarp = std::conditional_t<P::kRagged, RaggedTiles<kTileReaders<P>>,
                                       StaticTiles<TileScheduler<P::kTileOrder>>>;

template <class P>
__device__ __forceinline__ TilesOfWarp<P> tiles_of_warp(RowHandover<P>& handover,
                                                        RowScheduler<P> const& scheduler) {
  if constexpr (P::kRagged) return {handover};
  else return {scheduler};
}

// Packed batches take ragged kernels, and no other.
template <class P>
__device__ __forceinline__ Sequence sequence_of(Problem const& p, TilesOfWarp<P> const& tiles,
                                                Work const& work) {
  if constexpr (P::kRagged) return tiles.sequence(p, work);
  else return Sequence(p, work.index, false);
}

}  // namespace hf_flashattn::sm90
