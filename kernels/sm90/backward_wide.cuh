// dK and dV on Hopper for head dims above 128: one CTA a block of 64 keys. dQ has a kernel of its
// own (query_gradient.cuh).
//
//   4 producer warps   each fills one of the four row buffers (Q and dO of even and odd row
//                      blocks); the first two also bring K and V once
//   2 consumers        in pairs of row blocks, consumer w has the scores of the one in buffer w:
//                        S^T = K Q^T, dP^T = V dO^T, P^T and dS^T to registers, and one of them to
//                        shared memory
//                        consumer 0: dV += P^T dO, consumer 1: dK += dS^T Q, over both blocks;
//                        the own block's operand comes from registers
#pragma once

#include "sm90/backward.cuh"
#include "sm90/backward_wide_consumer.cuh"

namespace hf_flashattn::sm90 {

// Producer warp 2w brings Q and the statistics of the row blocks of consumer w, 2w + 1 their dO.
template <class P>
__device__ void produce_wide(BackwardParams const& p, BackwardWorkspace const& workspace,
                             BackwardMaps const& maps, BackwardWideSmem<P>& s,
                             KeyWork<P> const& work, int warp) {
  Sequence const& sequence = work.sequence;
  int const buffer = warp / 2;
  bool const queries = warp % 2 == 0;
  uint32_t staging_phase = 0, parity = 0;
  if (buffer == 0) {
    LaneKeys<P::kBlockN> const keys(p.problem, sequence, work.first_key);
    load_tile_rows(queries ? maps.k : maps.v, queries ? s.k_full : s.v_full, s.staging[warp],
                   staging_phase, queries ? s.k : s.v,
                   TilePlace::of_keys(s.k, sequence, work.first_key, work.head_k), keys);
  }
  for (RowWalk<P> walk(work, buffer); walk.valid(); walk.next(), parity ^= 1) {
    int const row = walk.first_row();
    // Rows of a tile that see no key come as zeros.
    RowRange const rows = {max(sequence.first_seeing_row(P::kCausal) - row, 0), P::kBlockM};
    if (queries) {
      s.statistics_empty[buffer].wait(parity ^ 1);
      if (elect_one())
        load_statistics(workspace, workspace.first_slot(sequence, walk.head) + row,
                        s.statistics_full[buffer], s.statistics[buffer]);
      __syncwarp();
    }
    (queries ? s.q_empty : s.dout_empty)[buffer].wait(parity ^ 1);
    load_tile_rows(queries ? maps.q : maps.dout, (queries ? s.q_full : s.dout_full)[buffer],
                   s.staging[warp], staging_phase, (queries ? s.q : s.dout)[buffer],
                   TilePlace::of_rows(s.q[0], sequence, row, walk.head), rows);
  }
}

// Grid (key blocks, key heads, sequences).
template <class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    backward_wide_kernel(BackwardParams const __grid_constant__ p,
                         BackwardWorkspace const __grid_constant__ workspace,
                         BackwardMaps const __grid_constant__ maps) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto& s = *reinterpret_cast<BackwardWideSmem<P>*>(smem_bytes);
  launch_dependents();  // at once: this kernel is not launched to overlap with those before it
  Work const tile{int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)};
  KeyWork<P> const work(p, tile);
  if (work.first_key >= work.sequence.length_k) return;
  if (threadIdx.x == 0) init_barriers(s);
  __syncthreads();

  int const warp = warp_uniform(threadIdx.x / kWarpThreads);
  if (warp < 4) {
    shrink_registers<P::Registers::kProducer>();
    // Found anew, or d256 with dropout loads five of the consumers' values again in every turn.
    if (work.rows.count > 0) produce_wide(p, workspace, maps, s, KeyWork<P>(p, tile), warp);
  } else {
    grow_registers<P::Registers::kConsumer>();
    if (warp < 8) consume_wide<0>(p, s, work);
    else consume_wide<1>(p, s, work);
  }
}

}  // namespace hf_flashattn::sm90
