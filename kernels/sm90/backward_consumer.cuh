// The consumers of the backward: the five products of a row block and what lies between them.
#pragma once

#include "common/dropout.cuh"
#include "common/mask.cuh"
#include "sm90/backward_smem.cuh"

namespace hf_flashattn::sm90 {

// A wgmma product that reads both operands from K-major tiles: (64 rows of a) x (2 N rows of b)^T.
template <class P, int N, class TileA, class TileB>
__device__ __forceinline__ void issue_product(float (&acc)[N], TileA const& a, int first_row,
                                              TileB const& b) {
  static_assert(TileB::kRows >= 2 * N, "the accumulator's columns are the first rows of b");
  pin_registers(acc);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < P::kHeadDim / 16; ++k)
    Wgmma<typename P::Element, 2 * N>::template smem_smem<Major::kK, Major::kK>(
        acc, k_major(a, first_row, k), k_major(b, 0, k), k > 0);
  wgmma_commit();
}

// acc += operand (64 keys x rows, in registers) x b (rows x head dim).
template <class P, int N, int Steps, class Tile>
__device__ __forceinline__ void issue_update(float (&acc)[N], uint32_t (&operand)[Steps][4],
                                             Tile const& b) {
  static_assert(Tile::kRows >= 16 * Steps, "the operand's columns are the first rows of b");
  static_assert(Tile::kChunkStep == Tile::kChunkColumns, "the product reads full chunks of b");
  pin_registers(acc);
  pin_registers(operand);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Steps; ++k)
    Wgmma<typename P::Element, P::kHeadDim>::template register_smem<Major::kMN>(
        acc, operand[k], mn_major(b, 0, k), 1);
  wgmma_commit();
}

// A part of dQ = dS K: rows 64 part .. of the row block, or columns from kPartColumns part on.
template <class P, int N, class Smem>
__device__ __forceinline__ void issue_dq(float (&dq)[N], Smem const& s, int stage, int part) {
  static_assert(2 * N == P::kPartColumns, "the accumulator holds 64 rows of a part");
  pin_registers(dq);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < P::kBlockN / 16; ++k)
    Wgmma<typename P::Element, P::kPartColumns>::template smem_smem<Major::kMN, Major::kMN>(
        dq, mn_major(s.ds[stage], P::kSplitRows ? part : 0, k),
        mn_major(s.k[0], P::kSplitRows ? 0 : part, k), k > 0);
  wgmma_commit();
}

// P^T = exp2(scale_log2 * S^T - LSE) in place; columns are rows of the problem.
template <int N>
__device__ __forceinline__ void to_probabilities(float (&scores)[N], float const* lse,
                                                 float scale_log2, int quad) {
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    float2 const l = load_shared_float2(smem_address(lse + 2 * j + 2 * quad));
    scores[j] = exp2_approx(fmaf(scores[j], scale_log2, -l.x));
    scores[j + 1] = exp2_approx(fmaf(scores[j + 1], scale_log2, -l.y));
    scores[j + 2] = exp2_approx(fmaf(scores[j + 2], scale_log2, -l.x));
    scores[j + 3] = exp2_approx(fmaf(scores[j + 3], scale_log2, -l.y));
  }
}

// By every thread that read LSE and delta, once dS is in shared memory or in a product: an arrival
// does not wait for loads that are still on their way, and behind the additions to dQ they take
// long enough for the producer to overwrite what they read (seen at head dim 256).
__device__ __forceinline__ void release_statistics(Mbarrier& empty) { empty.arrive(); }

// Random words of a row block.
template <class P, int Rows>
using RowBlockDropout = DropoutLine<Down::kKeys, P::kDropout ? Rows / 16 : 2>;

// From P^T and dP^T the 16-bit operands P'^T (after dropout) and dS^T = P^T (mask * dP^T - delta).
// With dropout the statistics are such that P^T is too large and delta too small by the factor
// dropout_lift: flags read as floats are 2^-7, and no product is needed to undo that.
template <class P, int N, int Steps>
__device__ __forceinline__ void to_operands(uint32_t (&p_operand)[Steps][4],
                                            uint32_t (&ds_operand)[Steps][4],
                                            float const (&probabilities)[N], float (&dp)[N],
                                            float const* delta,
                                            RowBlockDropout<P, 16 * Steps> const& dropout,
                                            ByteRule const& rule, int quad, int never) {
  using Element = typename P::Element;
#pragma unroll
  for (int k = 0; k < Steps; ++k) {
    // Dropout leaves no registers for what ptxas would like to load ahead; at 256 it likes less.
    if (P::kDropout && P::kHeadDim < 256 && k == Steps / 2) schedule_fence(never);
    auto const square = dropout.square(P::kDropout ? k : 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 8 rows of the problem
      float2 const d = load_shared_float2(smem_address(delta + 16 * k + 8 * half + 2 * quad));
#pragma unroll
      for (int down = 0; down < 2; ++down) {  // keys g and g + 8
        int const i = half * 2 + down;
        float const* const prob = &probabilities[8 * k + 2 * i];
        float dp_low = dp[8 * k + 2 * i], dp_high = dp[8 * k + 2 * i + 1];
        uint32_t p_pair = pack<Element>(prob[0], prob[1]);
        if constexpr (P::kDropout) {
          uint32_t const flags = square.keep_flags(rule, half, down);
          p_pair = multiply<Element>(p_pair, flags);
          dp_low *= __uint_as_float(flags << 16);
          dp_high *= __uint_as_float(flags & 0xffff0000u);
        }
        p_operand[k][i] = p_pair;
        ds_operand[k][i] = pack<Element>(prob[0] * (dp_low - d.x), prob[1] * (dp_high - d.y));
      }
    }
  }
}

template <class P>
struct KeyGradients {
  float dk[P::kHeadDim / 2], dv[P::kHeadDim / 2];
};

// The row blocks of which a consumer makes scores. Together for dQ; each for itself those that see
// its own 64 keys, up to the same last one.
template <class P>
using OwnRows = RowBlocks<P::kBlockM, P::kMakesDq ? P::kBlockN : 64>;
template <class P>
__device__ __forceinline__ OwnRows<P> own_rows(Problem const& p, KeyWork<P> const& work,
                                               int first_key) {
  if constexpr (P::kMakesDq) {
    return work.rows;
  } else {
    OwnRows<P> own(work.sequence, P::kCausal, first_key);
    if (own.count <= 0) own.first = work.rows.first + work.rows.count;
    if (p.key_bits != nullptr && own.keys_whole)
      own.keys_whole = KeyBits(p, work.sequence.index).template has_all<64>(first_key);
    return own;
  }
}

// Where a consumer stands among the stages of Q and dO.
template <class P>
using RowRing = PipelineState<P::kStages>;

// Hands back a row block that sees no key of this consumer. Only once it is full: two arrivals
// must not come in one phase.
template <class P>
__device__ __forceinline__ void pass_over(BackwardSmem<P>& s, RowRing<P> const& pipe) {
  int const stage = pipe.stage();
  s.statistics_full[stage].wait(pipe.parity());
  s.q_full[stage].wait(pipe.parity());
  s.dout_full[stage].wait(pipe.parity());
  release_statistics(s.statistics_empty[stage]);
  release(s.q_empty[stage]);
  release(s.dout_empty[stage]);
}

// What the row blocks of a tile have in common, as a consumer sees it.
template <class P>
struct ConsumerKeys {
  Problem const& problem;
  OwnRows<P> rows;
  int stage, warpgroup, warp_key;  // where K and V are; the warp's first key
  FirstRows first_rows;
  ByteRule rule;
  float scale_log2;
  uint2 origin_of_dropout;
};

// Adds the first `Rows` rows of a row block, which are all that it has. head: its index among those
// of all batches.
template <class P, int Rows>
__device__ __forceinline__ void add_rows(KeyGradients<P>& grad, BackwardSmem<P>& s,
                                         ConsumerKeys<P> const& keys, RowRing<P> const& pipe,
                                         int head, int block, Lane const& lane) {
  constexpr int kScores = Rows / 2, kSteps = Rows / 16;
  int const warpgroup = keys.warpgroup;
  int const stage = Rows < P::kBlockM ? anew(pipe.stage()) : pipe.stage();
  float scores[kScores], dp[kScores];
  uint32_t p_operand[kSteps][4], ds_operand[kSteps][4];
  RowBlockDropout<P, Rows> dropout;
  auto const draw_at = [&](Draw moment) {
    if constexpr (P::kDropout)
      if (P::kDraw == moment)  // the lane's part anew: no registers for it
        dropout.draw(DropoutLane<Down::kKeys>(keys.origin_of_dropout), head, block * P::kBlockM,
                     keys.warp_key);
  };

  draw_at(Draw::kBeforeScores);
  s.q_full[stage].wait(pipe.parity());
  issue_product<P>(scores, s.k[keys.stage], warpgroup * 64, s.q[stage]);
  s.dout_full[stage].wait(pipe.parity());
  issue_product<P>(dp, s.v[keys.stage], warpgroup * 64, s.dout[stage]);
  draw_at(Draw::kUnderScores);
  s.statistics_full[stage].wait(pipe.parity());

  wgmma_wait<1>();
  pin_registers(scores);
  if (keys.rows.needs_mask(block)) keys.first_rows.mask(scores, block * P::kBlockM, lane.quad);
  to_probabilities(scores, s.statistics[stage].lse, keys.scale_log2, lane.quad);
  wgmma_wait<0>();
  pin_registers(dp);
  to_operands<P>(p_operand, ds_operand, scores, dp, s.statistics[stage].delta, dropout, keys.rule,
                 lane.quad, keys.problem.batch);

  if constexpr (P::kMakesDq) {
    float dq[P::kPartColumns / 2];
    // dS is double buffered: the other consumer may still read the previous one.
    store_operand(s.ds[stage], ds_operand, warpgroup * 64 + lane.warp * 16);
    issue_update<P>(grad.dv, p_operand, s.dout[stage]);
    fence_proxy_async();
    barrier_sync(kScoreGradients, P::kConsumers * kWarpgroupThreads);
    release_statistics(s.statistics_empty[stage]);
    // Of 64 rows the second consumer's part is of what was there before: the writer leaves it out.
    issue_dq<P>(dq, s, stage, warpgroup);
    issue_update<P>(grad.dk, ds_operand, s.q[stage]);

    wgmma_wait<2>();
    pin_registers(grad.dv);
    pin_registers(p_operand);
    release(s.dout_empty[stage]);
    wgmma_wait<1>();
    pin_registers(dq);
    barrier_sync(kQueryGradientEmpty + warpgroup, kWarpgroupThreads + kWarpThreads);
#pragma unroll
    for (int i = 0; i < P::kPartColumns / 8; ++i)
      store_shared_16b(smem_address(s.dq.parts[warpgroup] +
                                    (i * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads) * 4),
                       make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]));
    fence_proxy_async();
    barrier_arrive(kQueryGradientFull + warpgroup + 2 * stage, kWarpgroupThreads + kWarpThreads);
  } else {
    issue_update<P>(grad.dv, p_operand, s.dout[stage]);
    issue_update<P>(grad.dk, ds_operand, s.q[stage]);
    wgmma_wait<1>();
    pin_registers(grad.dv);
    pin_registers(p_operand);
    release_statistics(s.statistics_empty[stage]);
    release(s.dout_empty[stage]);
  }
  wgmma_wait<0>();
  pin_registers(grad.dk);
  pin_registers(ds_operand);
  release(s.q_empty[stage]);
}

// All row blocks of all heads of the group.
template <class P>
__device__ __forceinline__ void accumulate(KeyGradients<P>& grad, BackwardParams const& p,
                                           BackwardSmem<P>& s, KeyWork<P> const& work,
                                           uint2 origin_of_dropout, RowRing<P>& pipe,
                                           PipelineState<P::kKeyStages> const& keys_pipe,
                                           int warpgroup, Lane const& lane) {
  Problem const& problem = p.problem;
  int const warp_key = work.first_key + warpgroup * 64 + lane.warp * 16;
  ConsumerKeys<P> const keys{
      problem,           own_rows(problem, work, work.first_key + warpgroup * 64),
      keys_pipe.stage(), warpgroup,
      warp_key,          FirstRows(problem, work.sequence, P::kCausal, warp_key + lane.group),
      ByteRule(problem), problem.softmax_scale * kLog2e,
      origin_of_dropout};
  s.k_full[keys.stage].wait(keys_pipe.parity());
  s.v_full[keys.stage].wait(keys_pipe.parity());

  // Votes, though the warp agrees anyway: ptxas then keeps uniform registers around the loop (d128
  // 429 instructions, not 485; with dropout 565 and 632).
  auto const more = [](int place, int end) { return __any_sync(0xffffffff, place < end); };
  int const end_head = work.first_head + work.group;
  int const end_block = work.rows.first + work.rows.count;
  int const end_whole = end_block - work.is_short(end_block - 1);
  for (int head = work.first_head; more(head, end_head); ++head) {
    int block = work.rows.first;
    int const dropout_head = work.sequence.index * problem.heads_q + head;
    if constexpr (!P::kMakesDq)
      for (; block < keys.rows.first; ++block, pipe.next()) pass_over(s, pipe);
    for (; more(block, end_whole); ++block, pipe.next())
      add_rows<P, P::kBlockM>(grad, s, keys, pipe, dropout_head, block, lane);
    if constexpr (P::kShortBlocks) {
      if (more(block, end_block)) {
        // To the compiler other addresses than the loop's, which else has no registers for its own.
        Lane again = lane;
        again.quad = lane_anew() % 4;
        add_rows<P, 64>(grad, *kept(&s), keys, pipe, dropout_head, block, again);
        pipe.next();
      }
    }
  }
}

// Rounds 64 keys of dK or dV and writes them, 64 columns (or 32, where 64 do not divide them) at a
// time. `scratch`: the rows of dS that this consumer itself writes and that nobody reads now, 128
// bytes each. A warp keeps to its own 16: the others may be a tile ahead.
template <class P>
__device__ __forceinline__ void store_gradient(TensorView const& view, KeyWork<P> const& work,
                                               float (&acc)[P::kHeadDim / 2], float scale,
                                               typename P::Element const* scratch, int warpgroup,
                                               Lane const& lane, int head_dim) {
  using Element = typename P::Element;
  constexpr int kColumns = P::kHeadDim % 64 == 0 ? 64 : 32;
  constexpr int kTileRows = kColumns == 64 ? 64 : 16;  // rows of 64 bytes start where 128 do
  int const tile_row = kTileRows == 64 ? lane.warp * 16 : 0;
  auto const& tile = *reinterpret_cast<SmemTile<Element, kTileRows, kColumns> const*>(
      scratch + (lane.warp * 16 - tile_row) * 64);
  Sequence const& sequence = work.sequence;
  int const key = work.first_key + warpgroup * 64 + lane.warp * 16;
  Element* const global = row_pointer<Element>(view, sequence, sequence.first_k, key, work.head_k);
#pragma unroll
  for (int column = 0; column < P::kHeadDim; column += kColumns) {
    float part[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) part[i] = acc[column / 2 + i];
    store_rows(tile, tile_row, part, scale, scale, global + column, view.stride_seq,
               sequence.length_k - key, head_dim - column);
  }
}

template <class P>
__device__ __forceinline__ void consume(BackwardParams const& p, BackwardSmem<P>& s) {
  int const warpgroup = warp_uniform(threadIdx.x / kWarpgroupThreads) - 1;
  Lane const lane(threadIdx.x);
  RowRing<P> pipe;
  PipelineState<P::kKeyStages> keys_pipe;
  KeyGradients<P> grad;
  uint2 origin_of_dropout{};
  if constexpr (P::kDropout) origin_of_dropout = dropout_origin(p.problem);
  ClaimedTiles<kBackwardTileReaders<P>> tiles{s.tiles};
  for (Work tile; tiles.next(tile);) {
    KeyWork<P> work(p, tile);
    if constexpr (P::kDropout) work.make_uniform();
    fill_zero(grad.dk);
    fill_zero(grad.dv);
    if (work.rows.count > 0) {
      accumulate(grad, p, s, work, origin_of_dropout, pipe, keys_pipe, warpgroup, lane);
      release(s.keys_empty[keys_pipe.stage()]);
      keys_pipe.next();
    }
    // The other consumer may still read the dS of the last row block, but not the one before it.
    static_assert(!P::kMakesDq || P::kStages == 2, "the next stage is the one before the last");
    auto const* const scratch = s.ds[P::kMakesDq ? pipe.stage() : 0].data + warpgroup * 64 * 64;
    store_gradient(p.dv, work, grad.dv, P::kDropout ? kLiftedScale<typename P::Element> : 1.f,
                   scratch, warpgroup, lane, p.problem.head_dim);
    store_gradient(p.dk, work, grad.dk, p.problem.softmax_scale, scratch, warpgroup, lane,
                   p.problem.head_dim);
  }
  // The writer's last word, so that the barrier ends as it began.
  if constexpr (P::kMakesDq)
    barrier_sync(kQueryGradientEmpty + warpgroup, kWarpgroupThreads + kWarpThreads);
}

}  // namespace hf_flashattn::sm90
