// The consumers of the wide backward. Consumer 0 accumulates dV, consumer 1 dK; each makes the
// scores of every other row block.
#pragma once

#include "sm90/backward_consumer.cuh"
#include "sm90/backward_wide_smem.cuh"

namespace hf_flashattn::sm90 {

// acc += scores (64 keys x rows, in shared memory) x b (rows x head dim).
template <class P, int N, class ScoreTile, class RowTile>
__device__ __forceinline__ void issue_shared_update(float (&acc)[N], ScoreTile const& scores,
                                                    RowTile const& b) {
  static_assert(N == P::kHeadDim / 2, "the accumulator's columns are the head dim");
  pin_registers(acc);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < RowTile::kRows / 16; ++k)
    Wgmma<typename P::Element, P::kHeadDim>::template smem_smem<Major::kK, Major::kMN>(
        acc, k_major(scores, 0, k), mn_major(b, 0, k), 1);
  wgmma_commit();
}

// W: which consumer.
template <class P, int W>
struct WideConsumer {
  static constexpr int kOther = 1 - W;

  BackwardParams const& p;
  BackwardWideSmem<P>& s;
  KeyWork<P> const& work;
  Lane const lane;
  FirstRows const first_rows;
  float const scale_log2;
  ByteRule const rule;
  DropoutLane<Down::kKeys> dropout_lane;

  __device__ __forceinline__ WideConsumer(BackwardParams const& p, BackwardWideSmem<P>& s,
                                          KeyWork<P> const& work)
      : p(p), s(s), work(work), lane(threadIdx.x),
        first_rows(p.problem, work.sequence, P::kCausal,
                   work.first_key + lane.warp * 16 + lane.group),
        scale_log2(p.problem.softmax_scale * kLog2e), rule(p.problem) {
    if constexpr (P::kDropout) dropout_lane = DropoutLane<Down::kKeys>(dropout_origin(p.problem));
  }

  // What this consumer accumulates from: dO for dV, Q for dK.
  __device__ __forceinline__ auto& source(int buffer) const {
    if constexpr (W == 0) return s.dout[buffer];
    else return s.q[buffer];
  }
  __device__ __forceinline__ Mbarrier& source_full(int buffer) const {
    return W == 0 ? s.dout_full[buffer] : s.q_full[buffer];
  }
  __device__ __forceinline__ Mbarrier& source_empty(int buffer) const {
    return W == 0 ? s.dout_empty[buffer] : s.q_empty[buffer];
  }

  // P^T and dS^T of this consumer's row block: to shared memory for the other products, and the one
  // that this consumer multiplies itself to `operand`. In a pair consumer 1 goes first, so that the
  // softmax of one runs under products of the other; its Q was released first, too.
  template <bool Pair>
  __device__ __forceinline__ void make_scores(uint32_t (&operand)[4][4], RowWalk<P> const& walk,
                                              uint32_t parity) const {
    float scores[32], dp[32];
    uint32_t other[4][4];
    RowBlockDropout<P, P::kBlockM> dropout;

    constexpr int kBoth = P::kConsumers * kWarpgroupThreads;
    s.q_full[W].wait(parity);
    if constexpr (Pair && W == 0) barrier_sync(kFirstScores, kBoth);
    issue_product<P>(scores, s.k, 0, s.q[W]);
    s.dout_full[W].wait(parity);
    issue_product<P>(dp, s.v, 0, s.dout[W]);
    if constexpr (Pair && W == 1) barrier_arrive(kFirstScores, kBoth);
    if constexpr (P::kDropout)
      dropout.draw(dropout_lane, work.sequence.index * p.problem.heads_q + walk.head,
                   walk.first_row(), work.first_key + lane.warp * 16);
    s.statistics_full[W].wait(parity);

    wgmma_wait<1>();
    pin_registers(scores);
    if constexpr (W == 0) release(s.q_empty[W]);
    if (work.rows.needs_mask(walk.block)) first_rows.mask(scores, walk.first_row(), lane.quad);
    to_probabilities(scores, s.statistics[W].lse, scale_log2, lane.quad);
    wgmma_wait<0>();
    pin_registers(dp);
    if constexpr (W == 1) release(s.dout_empty[W]);
    to_operands<P>(W == 0 ? operand : other, W == 0 ? other : operand, scores, dp,
                   s.statistics[W].delta, dropout, rule, lane.quad, p.problem.batch);
    s.scores_empty.wait(parity ^ 1);
    store_operand(W == 0 ? s.ds : s.p, other, lane.warp * 16);
  }

  // One pair of row blocks; of an odd number the last pair has only consumer 0's.
  template <bool Own, bool Other>
  __device__ __forceinline__ void step(float (&grad)[P::kHeadDim / 2], RowWalk<P> const& walk,
                                       uint32_t parity) const {
    uint32_t operand[4][4];
    if constexpr (Own) {
      make_scores<Other>(operand, walk, parity);
      issue_update<P>(grad, operand, source(W));
    }
    fence_proxy_async();
    barrier_sync(kScoreGradients, P::kConsumers * kWarpgroupThreads);
    if constexpr (Own) release_statistics(s.statistics_empty[W]);
    if constexpr (Other) {
      source_full(kOther).wait(parity);
      if constexpr (W == 0) issue_shared_update<P>(grad, s.p, source(kOther));
      else issue_shared_update<P>(grad, s.ds, source(kOther));
    }
    if constexpr (Own) {
      wgmma_wait<Other>();
      pin_registers(operand);
      release(source_empty(W));
    }
    wgmma_wait<0>();
    pin_registers(grad);
    if constexpr (Other) release(source_empty(kOther));
    release(s.scores_empty);
  }

  __device__ __forceinline__ void accumulate(float (&grad)[P::kHeadDim / 2]) const {
    RowWalk<P> walk(work, W);
    int const blocks = work.group * work.rows.count;
    s.k_full.wait(0);
    s.v_full.wait(0);
    for (int pair = 0; pair < blocks / 2; ++pair, walk.next())
      step<true, true>(grad, walk, pair % 2);
    if (blocks % 2) step<W == 0, W == 1>(grad, walk, blocks / 2 % 2);
  }

  __device__ __forceinline__ void store(float const (&grad)[P::kHeadDim / 2]) const {
    using Element = typename P::Element;
    TensorView const& view = W == 0 ? p.dv : p.dk;
    float const kept = P::kDropout ? kLiftedScale<Element> : 1.f;
    float const scale = W == 0 ? kept : p.problem.softmax_scale;
    int const tile_row = lane.warp * 16, key = work.first_key + tile_row;
    Sequence const& sequence = work.sequence;
    Element* const global =
        row_pointer<Element>(view, sequence, sequence.first_k, key, work.head_k);
    store_rows(W == 0 ? s.v : s.k, tile_row, grad, scale, scale, global, view.stride_seq,
               sequence.length_k - key, p.problem.head_dim);
  }
};

template <int W, class P>
__device__ __forceinline__ void consume_wide(BackwardParams const& p, BackwardWideSmem<P>& s,
                                             KeyWork<P> const& work) {
  WideConsumer<P, W> const consumer(p, s, work);
  float grad[P::kHeadDim / 2];  // (64 keys, head dim) of dV or dK
  fill_zero(grad);
  if (work.rows.count > 0) consumer.accumulate(grad);
  // Nobody reads K and V any more: their memory becomes scratch.
  barrier_sync(kEpilogue, P::kConsumers * kWarpgroupThreads);
  consumer.store(grad);
}

}  // namespace hf_flashattn::sm90
