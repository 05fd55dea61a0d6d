// Backward attention on Hopper: a persistent, warp-specialised kernel. A tile is a block of 128
// keys.
//
//   producer warp    claims a tile; K and V, once; then Q, LSE and dO, delta of each row block
//   2 consumers      64 keys each, for every row block:
//                      S^T = K Q^T and dP^T = V dO^T, P^T and dS^T in registers,
//                      dV += P^T dO, dK += dS^T Q from registers, dQ = dS K through shared memory
//                    without dQ (KeysOnlyPolicy) each for itself, whose keys not all rows may see
//   writer warp      adds each dQ of a row block to its fp32 sums in global memory
//   2 more warps     turn sums that are complete into dQ, where their memory is recycled;
//                      deterministic, the first is a second writer
//
// With grouped query heads a tile goes over all heads of the group, so that dK and dV stay in
// registers.
#pragma once

#include "sm90/backward_consumer.cuh"
#include "sm90/backward_dq.cuh"
#include "sm90/sequence_group.cuh"

namespace hf_flashattn::sm90 {

template <class P>
__device__ __forceinline__ void load_statistics(BackwardWorkspace const& workspace, int64_t slot,
                                                Mbarrier& full, RowStatistics<P>& statistics) {
  constexpr uint32_t kBytes = P::kBlockM * sizeof(float);
  full.arrive_expect(2 * kBytes);
  bulk_load(workspace.lse_log2 + slot, full, smem_address(statistics.lse), kBytes);
  bulk_load(workspace.delta + slot, full, smem_address(statistics.delta), kBytes);
}

// Which tile of a packed batch a number is: stream by stream, blocks of keys that exist alone. For
// a warp, whose numbers do not fall: it passes over each 32 sequences once.
template <int BlockN>
class PackedKeyTiles {
  GroupBlocks group_{};
  int first_ = -kWarpThreads;  // sequence of the group
  int before_ = 0;             // tiles before the group

 public:
  __device__ __forceinline__ bool locate(Problem const& p, int tile, Work& work) {
    int place;
    while ((place = group_.place_of(tile - before_)) == kWarpThreads) {
      before_ += group_.tiles_before(kWarpThreads);
      first_ += kWarpThreads;
      if (first_ >= p.batch) return false;
      bool exists;
      Sequence const s = sequence_of_lane(p, first_, exists);
      group_.own = exists ? ceil_div(s.length_k, BlockN) : 0;
      group_.count_tiles(p.heads_k);
    }
    int const rest = tile - before_ - group_.tiles_before(place), blocks = group_.blocks(place);
    work.index = first_ + place;
    work.head = rest / blocks;
    work.block = rest % blocks;
    return true;
  }
};

// Claims tiles and hands them to the writer and the consumers. Every tile comes from the counter,
// so that those before it belong to CTAs that run: some wait for them (deterministic; recycled
// sums).
template <class P>
class TileClaims {
  int const heads_k_;
  KeyTileOrder const& order_;
  int32_t* const claimed_;
  TileHandover<kBackwardTileReaders<P>>& handover_;
  PipelineState<kTileSlots> ring_;
  PackedKeyTiles<P::kBlockN> packed_;

 public:
  __device__ __forceinline__ TileClaims(KeyTileOrder const& order,
                                        BackwardWorkspace const& workspace, BackwardSmem<P>& s)
      : heads_k_(workspace.heads_k), order_(order), claimed_(workspace.claimed),
        handover_(s.tiles) {}

  // For the whole warp, when the loads of the tile before are issued: then the consumers have at
  // most two row blocks to go, which hides the way to the counter. A tile that is claimed earlier
  // would keep others waiting.
  __device__ __forceinline__ bool next(Problem const& problem, Work& work) {
    bool found = false;
    if (problem.cu_seqlens_k != nullptr && order_.together == 0) {
      found = packed_.locate(problem, warp_uniform(claim_next(claimed_)), work);
    } else {
      for (int tile; !found && (tile = warp_uniform(claim_next(claimed_))) < order_.tiles();) {
        int stream;
        order_.locate(tile, stream, work.block);
        work.index = stream / heads_k_;
        work.head = stream % heads_k_;
        found = work.block * P::kBlockN < Sequence(problem, work.index).length_k;
      }
    }
    handover_.empty[ring_.stage()].wait(ring_.parity() ^ 1);
    if (threadIdx.x % kWarpThreads == 0) {
      handover_.slot[ring_.stage()] = make_int4(found ? work.block : -1, work.head, work.index, 0);
      handover_.full[ring_.stage()].arrive();
    }
    __syncwarp();
    ring_.next();
    return found;
  }
};

template <class P>
__device__ void produce(BackwardParams const& p, BackwardWorkspace const& workspace,
                        BackwardMaps const& maps, KeyTileOrder const& order, BackwardSmem<P>& s) {
  PipelineState<P::kStages> pipe;
  PipelineState<P::kKeyStages> keys_pipe;
  uint32_t staging_phase = 0;
  TileClaims<P> tiles(order, workspace, s);
  for (Work tile{}; tiles.next(p.problem, tile);) {
    KeyWork<P> const work(p, tile);
    if (work.rows.count <= 0) continue;
    Sequence const& sequence = work.sequence;
    auto const load_keys = [&] {
      int const stage = keys_pipe.stage();
      LaneKeys<P::kBlockN> const keys(p.problem, sequence, work.first_key);
      s.keys_empty[stage].wait(keys_pipe.parity() ^ 1);
      keys_pipe.next();
      load_tiles_rows(Filling{maps.k, s.k_full[stage], s.k[stage]},
                      Filling{maps.v, s.v_full[stage], s.v[stage]}, s.staging, staging_phase,
                      TilePlace::of_keys(s.k[stage], sequence, work.first_key, work.head_k), keys);
    };
    bool keys_loaded = P::kKeyStages > 1;
    if (keys_loaded) {
      load_keys();
    } else {
      if (elect_one()) {
        auto const place = TilePlace::of_keys(s.k[0], sequence, work.first_key, work.head_k);
        prefetch_tile(maps.k, s.k[0], place);
        prefetch_tile(maps.v, s.v[0], place);
      }
      __syncwarp();
    }
    for (int head = work.first_head; head < work.first_head + work.group; ++head) {
      int64_t const first_slot = workspace.first_slot(sequence, head);
      for (int block = work.rows.first; block < work.rows.first + work.rows.count;
           ++block, pipe.next()) {
        int const row = block * P::kBlockM;
        // Rows of a tile that see no key come as zeros.
        RowRange const rows = {max(sequence.first_seeing_row(P::kCausal) - row, 0), P::kBlockM};
        s.statistics_empty[pipe.stage()].wait(pipe.parity() ^ 1);
        if (elect_one())
          load_statistics(workspace, first_slot + row, s.statistics_full[pipe.stage()],
                          s.statistics[pipe.stage()]);
        __syncwarp();
        s.q_empty[pipe.stage()].wait(pipe.parity() ^ 1);
        s.dout_empty[pipe.stage()].wait(pipe.parity() ^ 1);
        load_tiles_rows(Filling{maps.q, s.q_full[pipe.stage()], s.q[pipe.stage()]},
                        Filling{maps.dout, s.dout_full[pipe.stage()], s.dout[pipe.stage()]},
                        s.staging, staging_phase,
                        TilePlace::of_rows(s.q[pipe.stage()], sequence, row, head), rows);
        if (keys_loaded) continue;
        // The first rows have memory of their own, K and V wait for the last ones of the tile
        // before.
        keys_loaded = true;
        load_keys();
      }
    }
  }
}

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    backward_kernel(BackwardParams const __grid_constant__ p,
                    BackwardWorkspace const __grid_constant__ workspace,
                    BackwardMaps const __grid_constant__ maps,
                    KeyTileOrder const __grid_constant__ order) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto& s = *reinterpret_cast<BackwardSmem<P>*>(smem_bytes);
  if (threadIdx.x == 0) init_barriers(s, p.deterministic);
  __syncthreads();
  wait_for_previous_kernel();
  // Not before: the kernel for dQ needs what comes from the one before this.
  if constexpr (!P::kMakesDq) launch_dependents();

  if (threadIdx.x < kWarpgroupThreads) {
    shrink_registers<P::Registers::kProducer>();
    int const warp = warp_uniform(threadIdx.x / kWarpThreads);
    if (warp == 0) {
      produce(p, workspace, maps, order, s);
    } else if constexpr (P::kMakesDq) {
      if (warp == 1 || (warp == 2 && p.deterministic)) write_dq(p, workspace, s, warp - 1);
      else if (workspace.recycled > 0) round_dq(p, workspace, s, warp - 2);
    }
  } else {
    grow_registers<P::Registers::kConsumer>();
    consume(p, s);
  }
}

}  // namespace hf_flashattn::sm90
