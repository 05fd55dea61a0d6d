// Where the tiles of a kernel with rows come from (the forward, dQ), by its policy: static steps,
// or a list (common/tile_list.cuh).
//
// Of a list one thread of the CTA claims tiles, looks up where their sequence lies, and hands both
// over in shared memory to all warps that work on them. Its ways through global memory, one after
// the other, pass under the tile before. Nobody else has any, but for masks with dropout, and with
// holes, for want of registers.
#pragma once

#include <type_traits>

#include "common/tile_list.cuh"
#include "sm90/scheduler.cuh"

namespace hf_flashattn::sm90 {

// The tile that a CTA works on, and the next. A third, claimed earlier, leaves less to level the
// CTAs out at the end: packed lengths 128..512 lost 1 to 4 %.
constexpr int kListedSlots = 2;

// A tile, and of its sequence what differs between sequences.
struct TileRecord {
  int4 work;  // row block (-1: no more tiles), head, index, length_q
  int4 keys;  // first_q, first_k, key_begin, key_end
};

// A warp gives a slot back when it asks for the next tile, so it may read the record again as long
// as it works on the tile.
template <int Readers>
struct ListHandover {
  alignas(16) TileRecord slot[kListedSlots];
  // full: the claiming thread; empty: every lane of the readers, as all of them read the record
  Mbarrier full[kListedSlots], empty[kListedSlots];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kListedSlots; ++i) {
      full[i].init(1);
      empty[i].init(Readers * kWarpThreads);
    }
  }
};

// For one thread of the CTA, when the list is there.
template <int Readers>
__device__ void claim_listed_tiles(Problem const& problem, TileList const& list,
                                   ListHandover<Readers>& handover) {
  int const units = load_from_l2(list.units_listed), tiles = units * list.heads;
  PipelineState<kListedSlots> ring, freed;
  int tile = blockIdx.x;
  while (true) {
    TileRecord record{make_int4(-1, 0, 0, 0), make_int4(0, 0, 0, 0)};
    if (tile < tiles) {
      int unit, head;
      list.locate(tile, units, unit, head);
      Sequence const s(problem, load_from_l2(&list.units[unit].index));
      int const row_block = load_from_l2(&list.units[unit].row_block);
      record = {make_int4(row_block, head, s.index, s.length_q),
                make_int4(s.first_q, s.first_k, s.key_begin, s.key_end)};
    }
    handover.slot[ring.stage()] = record;
    handover.full[ring.stage()].arrive();
    if (tile >= tiles) return;
    ring.next();
    // Given back when the readers ask for the tile just handed over; the first time it held none.
    handover.empty[ring.stage()].wait(freed.parity());
    freed.next();
    tile = list.grid + atomicAdd(list.claimed, 1);
  }
}

// A warp's view of them.
template <int Readers>
struct ListedTiles {
  ListHandover<Readers>& handover;
  PipelineState<kListedSlots> ring{2 * kListedSlots - 1};  // of the tile that it works on

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

// Listed tiles are read by the producer warp and the consumer warps.
template <class P>
constexpr int kTileReaders = 1 + P::kConsumers * 4;

template <class P>
using RowScheduler = std::conditional_t<P::kListed, TileList, TileScheduler<P::kTileOrder>>;
struct NoHandover {};
template <class P>
using RowHandover = std::conditional_t<P::kListed, ListHandover<kTileReaders<P>>, NoHandover>;
template <class P>
using TilesOfWarp = std::conditional_t<P::kListed, ListedTiles<kTileReaders<P>>,
                                       StaticTiles<TileScheduler<P::kTileOrder>>>;

template <class P>
__device__ __forceinline__ TilesOfWarp<P> tiles_of_warp(RowHandover<P>& handover,
                                                        RowScheduler<P> const& scheduler) {
  if constexpr (P::kListed) return {handover};
  else return {scheduler};
}

// Packed batches take listed kernels without holes, and no other.
template <class P>
__device__ __forceinline__ Sequence sequence_of(Problem const& p, TilesOfWarp<P> const& tiles,
                                                Work const& work) {
  if constexpr (P::kListed && !P::kHoles) return tiles.sequence(p, work);
  else return Sequence(p, work.index, false);
}

}  // namespace hf_flashattn::sm90
