// dQ where the backward is split (wide heads; short sequences): a persistent, warp-specialised
// kernel, whose rows stay while keys stream past, so that no sums of dQ leave the registers.
//
//   producer warp    Q and dO of a tile, then K and V blocks from the last to the first
//   2 consumers      64 rows each: S = Q K^T, dP = dO V^T, dS in registers, dQ += dS K
//
// dQ += dS K of one block runs under S and dP of the next.
#pragma once

#include "common/dropout.cuh"
#include "common/mask.cuh"
#include "sm90/backward_consumer.cuh"
#include "sm90/ragged_tiles.cuh"

namespace hf_flashattn::sm90 {

template <class P>
struct QueryGradientSmem {
  using Element = typename P::Element;
  using RowTile = SmemTile<Element, P::kBlockM, P::kHeadDim>;
  using KeyTile = SmemTile<Element, P::kBlockN, P::kHeadDim>;
  using ValueTile = KeyTile;
  RowTile q[P::kRowStages], dout[P::kRowStages];
  KeyTile k[P::kKeyStages];
  KeyTile v[P::kValueStages];
  Mbarrier q_full[P::kRowStages], q_empty[P::kRowStages];        // empty: every consumer warp
  Mbarrier dout_full[P::kRowStages], dout_empty[P::kRowStages];  // the same
  Mbarrier k_full[P::kKeyStages], k_empty[P::kKeyStages];
  Mbarrier v_full[P::kValueStages], v_empty[P::kValueStages];
  Mbarrier staging;  // TMA to the producer itself, for tiles it has to patch
  [[no_unique_address]] RowHandover<P> tiles;
  [[no_unique_address]] StageKeys<P, P::kKeyStages> keys;
  [[no_unique_address]] SharedDropoutOrigin<P::kDropout> dropout;
};

template <class P>
__device__ void init_barriers(QueryGradientSmem<P>& s) {
  constexpr int kConsumerWarps = P::kConsumers * 4;
  s.staging.init(1);
  if constexpr (P::kRagged) s.tiles.init();
  for (int stage = 0; stage < P::kRowStages; ++stage) {
    s.q_full[stage].init(1);
    s.dout_full[stage].init(1);
    s.q_empty[stage].init(kConsumerWarps);
    s.dout_empty[stage].init(kConsumerWarps);
  }
  for (Mbarrier& full : s.k_full) full.init(1);
  for (Mbarrier& full : s.v_full) full.init(1);
  for (Mbarrier& empty : s.k_empty) empty.init(kKeyReleases<P>);
  for (Mbarrier& empty : s.v_empty) empty.init(kConsumerWarps);
  fence_mbarrier_init();
}

// The next tile, and the key blocks that its rows see, which may be none.
template <class P>
struct RowTiles {
  using Blocks = KeyBlocks<P::kBlockM, P::kBlockN>;
  Problem const& problem;
  TilesOfWarp<P> tiles;
  Work work;
  int first_row;
  Blocks blocks;

  __device__ __forceinline__ RowTiles(Problem const& problem, QueryGradientSmem<P>& s,
                                      RowScheduler<P> const& scheduler)
      : problem(problem), tiles(tiles_of_warp<P>(s.tiles, scheduler)) {}

  // Of this tile.
  __device__ __forceinline__ Sequence sequence() const {
    return sequence_of<P>(problem, tiles, work);
  }

  __device__ __forceinline__ bool next() {
    if (!tiles.next(work)) return false;
    first_row = work.block * P::kBlockM;
    blocks = Blocks(sequence(), P::kCausal, first_row);
    return true;
  }
};

template <class P>
__device__ void produce(BackwardMaps const& maps, QueryGradientSmem<P>& s, RowTiles<P> tiles) {
  using Smem = QueryGradientSmem<P>;
  PipelineState<P::kKeyStages> k_pipe;
  PipelineState<P::kValueStages> v_pipe;
  PipelineState<P::kRowStages> row_pipe;
  uint32_t staging_phase = 0;
  auto const load_rows = [&](CUtensorMap const& map, auto const& stages, auto& full, auto& empty,
                             TilePlace const& place) {
    int const stage = row_pipe.stage();
    empty[stage].wait(row_pipe.parity() ^ 1);
    if (elect_one()) {
      full[stage].arrive_expect(Smem::RowTile::kBytes);
      load_tile(map, full[stage], stages[stage], place);
    }
    __syncwarp();
  };
  while (tiles.next()) {
    if (tiles.blocks.count <= 0) continue;
    Work const& work = tiles.work;
    Sequence const sequence = tiles.sequence();
    int const head_k = work.head / (tiles.problem.heads_q / tiles.problem.heads_k);
    auto const row_place = TilePlace::of_rows(s.q[0], sequence, tiles.first_row, work.head);
    load_rows(maps.q, s.q, s.q_full, s.q_empty, row_place);
    int const last = tiles.blocks.last();
    for (int block = last; block >= tiles.blocks.first; --block, k_pipe.next(), v_pipe.next()) {
      int const first_key = block * P::kBlockN;
      auto const place = TilePlace::of_keys(s.k[0], sequence, first_key, head_k);
      auto const keys = keys_of_block<P>(tiles.problem, sequence, first_key);
      s.k_empty[k_pipe.stage()].wait(k_pipe.parity() ^ 1);
      hand_over(keys, s.keys, k_pipe.stage());
      load_tile_rows(maps.k, s.k_full[k_pipe.stage()], s.staging, staging_phase,
                     s.k[k_pipe.stage()], place, keys);
      if (block == last) load_rows(maps.dout, s.dout, s.dout_full, s.dout_empty, row_place);
      s.v_empty[v_pipe.stage()].wait(v_pipe.parity() ^ 1);
      load_tile_rows(maps.v, s.v_full[v_pipe.stage()], s.staging, staging_phase,
                     s.v[v_pipe.stage()], place, keys);
    }
    row_pipe.next();
  }
}

// Random words of a block's scores.
template <class P>
using ScoreDropout = DropoutLine<Down::kRows, P::kDropout ? P::kBlockN / 16 : 2>;

// From S and dP of a block: dS = P (mask * dP - delta) with P = exp2(scale_log2 * S - LSE), 16
// bits. The statistics of dropout are as common/dropout.cuh (dropout_lift) says.
template <class P, int N>
__device__ __forceinline__ void to_score_gradients(uint32_t (&operand)[N / 8][4],
                                                   float const (&scores)[N], float const (&dp)[N],
                                                   float const (&lse)[2], float const (&delta)[2],
                                                   float scale_log2, ScoreDropout<P> const& dropout,
                                                   ByteRule const& rule) {
#pragma unroll
  for (int k = 0; k < N / 8; ++k) {
    auto const square = dropout.square(P::kDropout ? k : 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows g and g + 8, columns 2q and 2q + 8
      int const j = 8 * k + 2 * i, half = i % 2;
      float low = dp[j], high = dp[j + 1];
      if constexpr (P::kDropout) {
        uint32_t const flags = square.keep_flags(rule, half, i / 2);
        low *= __uint_as_float(flags << 16);
        high *= __uint_as_float(flags & 0xffff0000u);
      }
      low = exp2_approx(fmaf(scores[j], scale_log2, -lse[half])) * (low - delta[half]);
      high = exp2_approx(fmaf(scores[j + 1], scale_log2, -lse[half])) * (high - delta[half]);
      operand[k][i] = pack<typename P::Element>(low, high);
    }
  }
}

template <class P>
__device__ void consume(BackwardParams const& p, BackwardWorkspace const& workspace,
                        QueryGradientSmem<P>& s, RowTiles<P> tiles) {
  using Element = typename P::Element;
  constexpr int kScores = P::kBlockN / 2;
  Problem const& problem = p.problem;
  int const warpgroup = warp_uniform(threadIdx.x / kWarpgroupThreads) - 1;
  Lane const lane(threadIdx.x);
  float const scale_log2 = problem.softmax_scale * kLog2e;
  ByteRule const rule(problem);
  PipelineState<P::kKeyStages> k_pipe;
  PipelineState<P::kValueStages> v_pipe;
  PipelineState<P::kRowStages> row_pipe;
  float dq[P::kHeadDim / 2], scores[kScores], dp[kScores];
  uint32_t operand[kScores / 8][4];
  ScoreDropout<P> dropout;
  DropoutLane<Down::kRows> dropout_lane;
  if constexpr (P::kDropout) dropout_lane = DropoutLane<Down::kRows>(load_origin(s.dropout));

  // In this form ptxas keeps uniform registers around the loop: 367 instructions a block of causal
  // d256, 510 with `while (tiles.next())`.
  bool found = tiles.next();
  while (found) {
    Work const& work = tiles.work;
    Sequence const sequence = tiles.sequence();
    int const own_row = tiles.first_row + warpgroup * 64, warp_row = own_row + lane.warp * 16;
    float lse[2], delta[2];
    int64_t const slot = workspace.first_slot(sequence, work.head) + warp_row + lane.group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bool const exists = warp_row + lane.group + 8 * i < sequence.length_q;
      lse[i] = exists ? workspace.lse_log2[slot + 8 * i] : infinity();
      delta[i] = exists ? workspace.delta[slot + 8 * i] : 0.f;
    }
    fill_zero(dq);
    if (tiles.blocks.count > 0) {
      KeyBlocks<64, P::kBlockN> const own(sequence, P::kCausal, own_row);
      int const first = tiles.blocks.first;
      int block = tiles.blocks.last();
      // The blocks above these are for later rows alone.
      int const last =
          own_row < sequence.length_q ? min(max(own.last(), first - 1), block) : first - 1;
      for (; block > last; --block, k_pipe.next(), v_pipe.next()) {
        s.k_full[k_pipe.stage()].wait(k_pipe.parity());
        release_keys<P>(s.k_empty[k_pipe.stage()]);
        s.v_full[v_pipe.stage()].wait(v_pipe.parity());
        release(s.v_empty[v_pipe.stage()]);
      }
      int const row_stage = row_pipe.stage();
      s.q_full[row_stage].wait(row_pipe.parity());
      s.dout_full[row_stage].wait(row_pipe.parity());
      row_pipe.next();
      for (; block >= first; --block) {
        s.k_full[k_pipe.stage()].wait(k_pipe.parity());
        issue_product<P>(scores, s.q[row_stage], warpgroup * 64, s.k[k_pipe.stage()]);
        s.v_full[v_pipe.stage()].wait(v_pipe.parity());
        issue_product<P>(dp, s.dout[row_stage], warpgroup * 64, s.v[v_pipe.stage()]);
        wgmma_wait<1>();
        pin_registers(scores);
        pin_registers(dq);
        pin_registers(operand);
        if (block < last) release_keys<P>(s.k_empty[k_pipe.previous_stage()]);
        if constexpr (P::kDropout) {
          // Under dP, not before: the operand above leaves no registers for it at head dim 256.
          schedule_fence(problem.batch);
          if constexpr (P::kHeadDim > 192) dropout_lane.find_call();
          dropout.draw(dropout_lane, work.index * problem.heads_q + work.head, warp_row,
                       block * P::kBlockN);
        }
        if constexpr (P::kHoles) {
          mask_keys(scores, s.keys.of[k_pipe.stage()], lane.quad);
          if (crosses_diagonal<P::kBlockN>(problem, P::kCausal, warp_row, block))
            mask_keys(scores, VisibleKeys::up_to_diagonal(problem), P::kCausal,
                      warp_row + lane.group, block * P::kBlockN, lane.quad);
        } else if (own.needs_mask(block)) {
          mask_keys(scores, VisibleKeys(sequence), P::kCausal, warp_row + lane.group,
                    block * P::kBlockN, lane.quad);
        }
        wgmma_wait<0>();
        pin_registers(dp);
        release(s.v_empty[v_pipe.stage()]);
        to_score_gradients<P>(operand, scores, dp, lse, delta, scale_log2, dropout, rule);
        issue_update<P>(dq, operand, s.k[k_pipe.stage()]);
        k_pipe.next();
        v_pipe.next();
      }
      release(s.q_empty[row_stage]);
      release(s.dout_empty[row_stage]);
      wgmma_wait<0>();
      pin_registers(dq);
      pin_registers(operand);
      if (last >= first) release_keys<P>(s.k_empty[k_pipe.previous_stage()]);
      // A row that sees no key gets 0, whatever its Q and dO hold.
      if (__any_sync(0xffffffff, lse[0] == infinity() || lse[1] == infinity()))
        clear_rows(dq, lse[0] == infinity(), lse[1] == infinity());
    }
    Element* const global =
        row_pointer<Element>(p.dq, sequence, sequence.first_q, warp_row, work.head);
    store_rows(lane, dq, problem.softmax_scale, problem.softmax_scale, global, p.dq.stride_seq,
               sequence.length_q - warp_row, problem.head_dim);
    found = tiles.next();
  }
}

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    query_gradient_kernel(BackwardParams const __grid_constant__ p,
                          BackwardWorkspace const __grid_constant__ workspace,
                          BackwardMaps const __grid_constant__ maps,
                          RowScheduler<P> const __grid_constant__ scheduler) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto& s = *reinterpret_cast<QueryGradientSmem<P>*>(smem_bytes);
  if (threadIdx.x == 0) {
    init_barriers(s);
    if constexpr (P::kDropout) s.dropout = dropout_origin(p.problem);
  }
  __syncthreads();

  RowTiles<P> const tiles(p.problem, s, scheduler);
  if (threadIdx.x < kWarpgroupThreads) {
    shrink_registers<P::Registers::kProducer>();
    int const warp = warp_uniform(threadIdx.x / kWarpThreads);
    // The counter is 0: the kernel before lets this one start when it has waited for what cleared
    // it.
    if constexpr (P::kRagged)
      if (warp == 1) claim_ragged_tiles<RaggedGroup<P>>(p.problem, scheduler, s.tiles);
    if (warp == 0) produce(maps, s, tiles);
  } else {
    grow_registers<P::Registers::kConsumer>();
    consume(p, workspace, s, tiles);
  }
  // Nothing here needs the kernel before, but what comes after this one counts on both.
  wait_for_previous_kernel();
}

}  // namespace hf_flashattn::sm90
