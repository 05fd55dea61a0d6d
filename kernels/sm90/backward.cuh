// Backward attention on Hopper: one CTA a block of 128 keys, warp-specialised.
//
//   producer warp   K and V once; then Q, LSE and dO, delta of each row block, two stages each
//   writer warp     adds each finished dQ block to the fp32 accumulator in global memory
//   2 consumers     64 keys each, for every row block:
//                     S^T = K Q^T and dP^T = V dO^T, P^T and dS^T in registers,
//                     dV += P^T dO, dK += dS^T Q from registers, dQ = dS K through shared memory
//
// With grouped query heads the loop runs over all heads of the group, so that dK and dV stay in
// registers.
#pragma once

#include "sm90/backward_consumer.cuh"

namespace hf_flashattn::sm90 {

template <class P>
__device__ __forceinline__ void load_statistics(BackwardWorkspace const& workspace, int64_t slot,
                                                Mbarrier& full, RowStatistics<P>& statistics) {
  constexpr uint32_t kBytes = P::kBlockM * sizeof(float);
  full.arrive_expect(2 * kBytes);
  bulk_load(workspace.lse_log2 + slot, full, smem_address(statistics.lse), kBytes);
  bulk_load(workspace.delta + slot, full, smem_address(statistics.delta), kBytes);
}

template <class P>
__device__ void produce(BackwardParams const& p, BackwardWorkspace const& workspace,
                        BackwardMaps const& maps, BackwardSmem<P>& s, KeyWork<P> const& work) {
  Sequence const& sequence = work.sequence;
  PipelineState<P::kStages> pipe;
  uint32_t staging_phase = 0;
  int begin, end;
  sequence.visible_keys(work.first_key, P::kBlockN, begin, end);
  int const key_row = sequence.first_k + work.first_key;
  load_tile_zero_outside(maps.k, s.k_full, s.staging, staging_phase, s.k, key_row, work.head_k,
                         sequence.batch, begin, end);
  load_tile_zero_outside(maps.v, s.v_full, s.staging, staging_phase, s.v, key_row, work.head_k,
                         sequence.batch, begin, end);

  for (int head = work.first_head; head < work.first_head + work.group; ++head) {
    int64_t const first_slot = workspace.first_slot(sequence, head);
    for (int block = work.rows.first; block < work.rows.first + work.rows.count;
         ++block, pipe.next()) {
      int const row = block * P::kBlockM;
      // Rows of a tile that see no key, or that are another sequence's, come as zeros.
      int const rows_begin = max(sequence.first_seeing_row(P::kCausal) - row, 0);
      int const rows_end =
          sequence.zero_tail ? min(sequence.length_q - row, P::kBlockM) : P::kBlockM;
      s.statistics_empty[pipe.stage].wait(pipe.parity() ^ 1);
      if (elect_one())
        load_statistics(workspace, first_slot + row, s.statistics_full[pipe.stage],
                        s.statistics[pipe.stage]);
      __syncwarp();
      s.q_empty[pipe.stage].wait(pipe.parity() ^ 1);
      load_tile_zero_outside(maps.q, s.q_full[pipe.stage], s.staging, staging_phase,
                             s.q[pipe.stage], sequence.first_q + row, head, sequence.batch,
                             rows_begin, rows_end);
      s.dout_empty[pipe.stage].wait(pipe.parity() ^ 1);
      load_tile_zero_outside(maps.dout, s.dout_full[pipe.stage], s.staging, staging_phase,
                             s.dout[pipe.stage], sequence.first_q + row, head, sequence.batch,
                             rows_begin, rows_end);
    }
  }
}

// Adds the consumers' parts of dQ to global memory. Deterministic: key blocks take turns, the last
// one that a row block sees first, which is also the order in which they are launched.
template <class P>
__device__ void write_dq(BackwardParams const& p, BackwardWorkspace const& workspace,
                         BackwardSmem<P>& s, KeyWork<P> const& work) {
  constexpr int kPartFloats = 64 * P::kPartColumns;
  bool const leader = threadIdx.x % kWarpThreads == 0;
  for (int head = work.first_head; head < work.first_head + work.group; ++head) {
    int64_t const first_slot = workspace.first_slot(work.sequence, head);
    for (int block = work.rows.first; block < work.rows.first + work.rows.count; ++block) {
      int64_t const slot = first_slot + block * P::kBlockM;
      int32_t* const turn = workspace.turn + slot / P::kBlockM;
      if (leader) bulk_wait_read<0>();
      __syncwarp();
#pragma unroll
      for (int part = 0; part < P::kConsumers; ++part)
        barrier_arrive(kQueryGradientEmpty + part, kWarpgroupThreads + kWarpThreads);
      if (p.deterministic && leader) wait_turn(turn, work.earlier_key_blocks(block));
#pragma unroll
      for (int part = 0; part < P::kConsumers; ++part) {
        barrier_sync(kQueryGradientFull + part, kWarpgroupThreads + kWarpThreads);
        if (leader) {
          bulk_reduce_add(workspace.dq + slot * P::kHeadDim + part * kPartFloats,
                          smem_address(s.dq[part]), kPartFloats * sizeof(float));
          bulk_commit();
        }
      }
      if (p.deterministic && leader) {
        bulk_wait<0>();
        pass_turn(turn);
      }
    }
  }
  if (leader) bulk_wait<0>();
}

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    backward_kernel(BackwardParams const __grid_constant__ p,
                    BackwardWorkspace const __grid_constant__ workspace,
                    BackwardMaps const __grid_constant__ maps) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto& s = *reinterpret_cast<BackwardSmem<P>*>(smem_bytes);
  KeyWork<P> const work(p);
  if (work.first_key >= work.sequence.length_k) return;
  if (threadIdx.x == 0) init_barriers(s);
  __syncthreads();

  if (threadIdx.x < kWarpgroupThreads) {
    shrink_registers<P::Registers::kProducer>();
    int const warp = warp_uniform(threadIdx.x / kWarpThreads);
    if (work.rows.count > 0 && warp == 0) produce(p, workspace, maps, s, work);
    if (work.rows.count > 0 && warp == 1) write_dq(p, workspace, s, work);
  } else {
    grow_registers<P::Registers::kConsumer>();
    consume(p, s, work);
  }
}

}  // namespace hf_flashattn::sm90
