// Forward attention on Hopper: a persistent, warp-specialised kernel.
//
//   producer warp    Q, then K and V blocks from the last to the first, in stages
//   consumers        64 rows each: S = Q K^T, softmax, O += P V
//
// Inside a consumer O += P V of one block runs under the softmax of the next, and the consumers
// take turns at the tensor cores, so that the softmax of one runs under the products of another.
#pragma once

#include <type_traits>

#include "common/clear_uncovered.cuh"
#include "common/mask.cuh"
#include "common/softmax.cuh"
#include "sm90/barriers.cuh"
#include "sm90/forward_tile.cuh"
#include "sm90/producer.cuh"
#include "sm90/warp_scores.cuh"

namespace hf_flashattn::sm90 {

struct ForwardMaps {
  CUtensorMap q, k, v;
};

template <class P>
struct ForwardSmem {
  using Element = typename P::Element;
  using QTile = SmemTile<Element, P::kBlockM, P::kHeadDim>;
  using KeyTile = SmemTile<Element, P::kBlockN, P::kHeadDim>;
  static constexpr bool kOwnOutput = P::kOutputPath == OutputPath::kOwnMemory;
  QTile q[P::kQueryStages];
  KeyTile k[P::kStages];
  KeyTile v[P::kStages];
  [[no_unique_address]] std::conditional_t<kOwnOutput, QTile, NoHandover> out;
  Mbarrier q_full[P::kQueryStages], q_empty[P::kQueryStages];  // full: TMA; empty: consumer warps
  Mbarrier k_full[P::kStages], k_empty[P::kStages];
  Mbarrier v_full[P::kStages], v_empty[P::kStages];
  Mbarrier staging;  // TMA to the producer itself, for tiles it has to patch
  RowHandover<P> tiles;
  [[no_unique_address]] StageKeys<P, P::kStages> keys;
};

template <class P>
__device__ void init_barriers(ForwardSmem<P>& s) {
  constexpr int kConsumerWarps = P::kConsumers * 4;
  s.staging.init(1);
  for (int stage = 0; stage < P::kQueryStages; ++stage) {
    s.q_full[stage].init(1);
    s.q_empty[stage].init(kConsumerWarps);
  }
  for (int stage = 0; stage < P::kStages; ++stage) {
    s.k_full[stage].init(1);
    s.v_full[stage].init(1);
    s.k_empty[stage].init(kKeyReleases<P>);
    s.v_empty[stage].init(kConsumerWarps);
  }
  if constexpr (P::kRagged) s.tiles.init();
  fence_mbarrier_init();
}

template <class P>
__device__ void produce(ForwardParams const& p, ForwardMaps const& maps, ForwardSmem<P>& s,
                        RowScheduler<P> const& scheduler) {
  Problem const& problem = p.problem;
  PipelineState<P::kStages> pipe;
  PipelineState<P::kQueryStages> q_pipe;
  uint32_t staging_phase = 0;
  Work work;
  for (auto tiles = tiles_of_warp<P>(s.tiles, scheduler); tiles.next(work);) {
    auto const sequence = sequence_of<P>(problem, tiles, work);
    int const first_row = first_row_of<P>(sequence, work);
    ForwardKeyBlocks<P> const blocks(sequence, P::kCausal, first_row);
    if (blocks.count <= 0) continue;

    s.q_empty[q_pipe.stage()].wait(q_pipe.parity() ^ 1);
    if (elect_one()) {
      s.q_full[q_pipe.stage()].arrive_expect(ForwardSmem<P>::QTile::kBytes);
      load_tile(maps.q, s.q_full[q_pipe.stage()], s.q[q_pipe.stage()],
                TilePlace::in_tensor(sequence, sequence.first_q + first_row, work.head));
    }
    __syncwarp();
    q_pipe.next();

    int const head_k = work.head / (problem.heads_q / problem.heads_k);
    for (int block = blocks.last(); block >= blocks.first; --block, pipe.next()) {
      int const first_key = block * P::kBlockN;
      auto const place = TilePlace::of_keys(s.k[0], sequence, first_key, head_k);
      auto const block_keys = keys_of_block<P>(problem, sequence, first_key);
      s.k_empty[pipe.stage()].wait(pipe.parity() ^ 1);
      hand_over(block_keys, s.keys, pipe.stage());
      if (elect_one()) {
        s.k_full[pipe.stage()].arrive_expect(ForwardSmem<P>::KeyTile::kBytes);
        load_tile(maps.k, s.k_full[pipe.stage()], s.k[pipe.stage()], place);
      }
      __syncwarp();
      s.v_empty[pipe.stage()].wait(pipe.parity() ^ 1);
      load_tile_rows(maps.v, s.v_full[pipe.stage()], s.staging, staging_phase, s.v[pipe.stage()],
                     place, block_keys);
    }
  }
}

// S = Q K^T of the first 2N keys of a block, one commit group.
template <class P, int N>
__device__ __forceinline__ void issue_scores(float (&scores)[N], ForwardSmem<P> const& s, int stage,
                                             int q_stage, int warpgroup) {
  pin_registers(scores);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < P::kHeadDim / 16; ++k)
    Wgmma<typename P::Element, 2 * N>::template smem_smem<Major::kK, Major::kK>(
        scores, k_major(s.q[q_stage], warpgroup * 64, k), k_major(s.k[stage], 0, k), k > 0);
  wgmma_commit();
}

// O += P V, one commit group.
template <class P, int N, int Steps>
__device__ __forceinline__ void issue_output(float (&out)[N], uint32_t (&probabilities)[Steps][4],
                                             ForwardSmem<P> const& s, int stage) {
  pin_registers(out);
  pin_registers(probabilities);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Steps; ++k)
    Wgmma<typename P::Element, P::kHeadDim>::template register_smem<Major::kMN>(
        out, probabilities[k], mn_major(s.v[stage], 0, k), 1);
  wgmma_commit();
}

// The first M of N values that a lane keeps in registers.
template <int M, class T, int N>
__device__ __forceinline__ auto first_of(T (&values)[N]) -> T (&)[M] {
  static_assert(M <= N);
  return *reinterpret_cast<T(*)[M]>(&values);
}

template <class P>
struct TensorCoreTurns {
  int warpgroup;
  __device__ __forceinline__ void start() const {
    if (warpgroup == P::kConsumers - 1) pass();
  }
  __device__ __forceinline__ void take() const {
    barrier_sync(kTensorCores + warpgroup, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void pass() const {
    int const next = warpgroup == P::kConsumers - 1 ? 0 : warpgroup + 1;
    barrier_arrive(kTensorCores + next, 2 * kWarpgroupThreads);
  }
};

// A block that none of this consumer's rows sees: keeps its place in the pipeline and in the ring.
template <class P>
__device__ __forceinline__ void skip_block(ForwardSmem<P>& s, PipelineState<P::kStages> const& pipe,
                                           TensorCoreTurns<P> const& turns) {
  turns.take();
  turns.pass();
  s.k_full[pipe.stage()].wait(pipe.parity());
  release_keys<P>(s.k_empty[pipe.stage()]);
  s.v_full[pipe.stage()].wait(pipe.parity());
  release(s.v_empty[pipe.stage()]);
}

template <class P>
__device__ void consume(ForwardParams const& p, ForwardSmem<P>& s,
                        RowScheduler<P> const& scheduler) {
  using Element = typename P::Element;
  constexpr int kScores = P::kBlockN / 2, kSteps = P::kBlockN / 16;
  // A tile's rows leave in the next one, after the softmax of its first block.
  constexpr bool kStoreLate = P::kOutputPath == OutputPath::kOwnMemory;
  // What that takes is made there too, under S, and not under the last O += P V: d64 1.26 / 1.24 of
  // cuDNN's rate, not 1.25 / 1.24; d128 1.12 / 1.18, not 1.15 / 1.20. But ragged rows are located
  // while the tile is theirs: its record goes with it.
  constexpr bool kFinishLate = kStoreLate && P::kConsumers == 3 && !P::kRagged;
  Problem const& problem = p.problem;
  int const warpgroup = warp_uniform(threadIdx.x / kWarpgroupThreads) - 1;
  Lane const lane(threadIdx.x);
  TensorCoreTurns<P> const turns{warpgroup};
  turns.start();

  PipelineState<P::kStages> pipe;
  PipelineState<P::kQueryStages> q_pipe;
  auto tiles = tiles_of_warp<P>(s.tiles, scheduler);
  ConsumerTile<P> tile{};
  float out[P::kHeadDim / 2], scores[kScores], rescale[2], normalise[2]{}, lse[2]{};
  uint32_t probabilities[kSteps][4];
  OnlineSoftmax softmax(problem.softmax_scale * kLog2e);
  BlockDropout<P> dropout(problem, tile.work);
  struct {
    Work work;
    int row;
  } done{{}, problem.seqlen_q};  // if kFinishLate: the tile before; at first one without rows
  OutputRows<P> rows{};

  auto const warp_row = [&] { return tile.own_row + lane.warp * 16; };
  auto const next_tile = [&] { return tile.next(problem, tiles, warpgroup); };
  auto const skip_blocks = [&] {
    int const last = tile.last();
    for (; tile.block > last; --tile.block, pipe.next()) skip_block(s, pipe, turns);
  };
  // The next tile with rows for this consumer, handing back those without; nothing is in flight.
  auto const next_busy_tile = [&](bool found) {
    for (; found && tile.idle; found = next_tile()) {
      if (tile.sees_nothing) [[unlikely]] {
        if (!kMayBeAhead<P> || tile.own_row >= 0)
          OutputRows<P>(p, sequence_of<P>(problem, tiles, tile.work), tile.work, warp_row())
              .store_empty(lane, problem.head_dim);
        continue;
      }
      skip_blocks();
      s.q_full[q_pipe.stage()].wait(q_pipe.parity());
      release(s.q_empty[q_pipe.stage()]);
      q_pipe.next();
    }
    return found;
  };
  auto const draw_at = [&](Draw moment) {
    if (P::kDraw == moment) dropout.draw(tile.block);
  };
  auto const draw_first = [&](Draw moment) {
    if (P::kDraw != moment) return;
    dropout.set_tile(warp_row());
    dropout.draw(tile.block);
  };
  auto const mask_scores = [&](auto& some) {
    if constexpr (P::kHoles) mask_keys(some, s.keys.of[pipe.stage()], lane.quad);
    if (tile.needs_mask(problem))
      mask_keys(some, tile.visible_keys(problem, tiles), P::kCausal, warp_row() + lane.group,
                tile.block * P::kBlockN, lane.quad);
  };
  auto const scores_again = [&](float (&values)[kScores], bool const(&rows)[2]) {
    VisibleKeys const visible = tile.visible_keys(problem, tiles);
    int const first_key = tile.block * P::kBlockN, row = warp_row() + lane.group;
    warp_scores<Element>(values, rows, s.q[q_pipe.stage()], warpgroup * 64 + lane.warp * 16,
                         s.k[pipe.stage()], lane, [&](int half, int column) {
                           if constexpr (P::kHoles)
                             if (!s.keys.of[pipe.stage()].has(column)) return false;
                           return visible.sees(P::kCausal, row + 8 * half, first_key + column);
                         });
  };
  auto const to_probabilities = [&](auto& operand, auto const& some) {
    to_operand<Element>(operand, some);
    dropout.apply(operand);
  };
  auto const locate_rows = [&] {
    Work const& work = kFinishLate ? done.work : tile.work;
    rows = OutputRows<P>(p, sequence_of<P>(problem, tiles, work), work,
                         kFinishLate ? done.row : warp_row());
  };
  auto const finish_rows = [&] {
    locate_rows();
    softmax.finish(normalise, lse);
    if constexpr (P::kDropout) {
      float const scale = keep_scale(problem.drop_threshold) / kFlagValue<Element>;
      normalise[0] *= scale;
      normalise[1] *= scale;
    }
  };
  auto const store_output = [&] {
    // A row that sees no key gives 0, though V's NaN may have reached it as 0 * NaN.
    if (__any_sync(0xffffffff, normalise[0] == 0.f || normalise[1] == 0.f))
      clear_rows(out, normalise[0] == 0.f, normalise[1] == 0.f);
    if constexpr (P::kOutputPath == OutputPath::kOwnMemory)
      store_rows(s.out, warpgroup * 64 + lane.warp * 16, out, normalise[0], normalise[1], rows.out,
                 rows.stride, rows.count, problem.head_dim);
    else
      store_rows(lane, out, normalise[0], normalise[1], rows.out, rows.stride, rows.count,
                 problem.head_dim);
    rows.store_lse(lane, lse);
  };

  // The first block of a tile, from S to P: as many of its scores as `some` has room for, which are
  // all that the rows see.
  auto const first_block = [&](auto& some) {
    constexpr int kSomeSteps = std::extent_v<std::remove_reference_t<decltype(some)>> / 8;
    issue_scores(some, s, pipe.stage(), q_pipe.stage(), warpgroup);
    turns.pass();
    draw_first(Draw::kUnderScores);
    if constexpr (kFinishLate) finish_rows();
    wgmma_wait<0>();
    pin_registers(some);
    draw_first(Draw::kWithSoftmax);
    if constexpr (!P::kHoles) release_keys<P>(s.k_empty[pipe.stage()]);
    mask_scores(some);
    if constexpr (P::kHoles) release_keys<P>(s.k_empty[pipe.stage()]);  // and its BlockKeys
    softmax.first(some);
    to_probabilities(first_of<kSomeSteps>(probabilities), some);
#pragma unroll
    for (int k = kSomeSteps; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) probabilities[k][i] = 0;
  };

  fill_zero(out);
  bool found = next_busy_tile(next_tile());
  while (found) {
    skip_blocks();
    draw_first(Draw::kBeforeScores);
    s.q_full[q_pipe.stage()].wait(q_pipe.parity());
    s.k_full[pipe.stage()].wait(pipe.parity());
    turns.take();
    if constexpr (P::kShortBlock == 0) {
      first_block(scores);
    } else if (tile.short_first) {
      float some[P::kShortBlock / 2];
      first_block(some);
    } else {
      first_block(scores);
    }
    if constexpr (kStoreLate) store_output();
    fill_zero(out);

    while (--tile.block >= tile.first) {
      auto const previous = pipe;
      pipe.next();
      draw_at(Draw::kBeforeScores);
      s.k_full[pipe.stage()].wait(pipe.parity());
      turns.take();
      issue_scores(scores, s, pipe.stage(), q_pipe.stage(), warpgroup);
      s.v_full[previous.stage()].wait(previous.parity());
      issue_output(out, probabilities, s, previous.stage());
      turns.pass();
      draw_at(Draw::kUnderScores);
      wgmma_wait<1>();
      pin_registers(scores);
      mask_scores(scores);  // with the softmax, under O += P V
      softmax.next(scores);
      draw_at(Draw::kWithSoftmax);
      wgmma_wait<0>();
      pin_registers(out);
      pin_registers(probabilities);
      release(s.v_empty[previous.stage()]);
      bool const large = softmax.sums_are_large();
      // Before the vote is known: nothing waits for it, and it is rarely true.
      to_probabilities(probabilities, scores);
      if (large) {
        softmax.raise(scores, rescale, scores_again);
        scale_rows(out, rescale);
        dropout.draw(tile.block);  // anew: words kept for this would take registers from the rest
        to_probabilities(probabilities, scores);
      }
      release_keys<P>(s.k_empty[pipe.stage()]);
    }

    // The last output; the next tile is found under it.
    auto const last = pipe;
    int const q_last = q_pipe.stage();
    pipe.next();
    q_pipe.next();
    release(s.q_empty[q_last]);
    s.v_full[last.stage()].wait(last.parity());
    issue_output(out, probabilities, s, last.stage());
    if constexpr (kFinishLate) done = {tile.work, warp_row()};
    else finish_rows();
    found = next_tile();
    wgmma_wait<0>();
    pin_registers(out);
    release(s.v_empty[last.stage()]);
    if constexpr (!kStoreLate) store_output();
    found = next_busy_tile(found);
  }
  if constexpr (kFinishLate) finish_rows();
  if constexpr (kStoreLate) store_output();
  // The last pass of the ring is never taken: take it, so that the barriers end as they began.
  if (warpgroup == 0) turns.take();
}

// For the last two warps of the producer's warpgroup.
__device__ __forceinline__ void clear_tokens_of_nobody(ForwardParams const& p, int warp) {
  Problem const& problem = p.problem;
  if (problem.cu_seqlens_q == nullptr) return;
  clear_uncovered({p.out, p.lse, problem.cu_seqlens_q, problem.total_q, problem.heads_q},
                  problem.batch, problem.head_dim, 2 * blockIdx.x + warp - 2, 2 * gridDim.x);
}

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1)
    forward_kernel(ForwardParams const __grid_constant__ p,
                   ForwardMaps const __grid_constant__ maps,
                   RowScheduler<P> const __grid_constant__ scheduler) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto& s = *reinterpret_cast<ForwardSmem<P>*>(smem_bytes);
  if (threadIdx.x == 0) init_barriers(s);
  __syncthreads();

  if (threadIdx.x < kWarpgroupThreads) {
    shrink_registers<P::Registers::kProducer>();
    int const warp = warp_uniform(threadIdx.x / kWarpThreads);
    if constexpr (P::kRagged) {
      if (warp == 1) claim_ragged_tiles<RaggedGroup<P>>(p.problem, scheduler, s.tiles);
      if (!P::kHoles && warp > 1) clear_tokens_of_nobody(p, warp);
    }
    if (warp == 0) {
      if (elect_one()) {
        prefetch_tensor_map(&maps.q);
        prefetch_tensor_map(&maps.k);
        prefetch_tensor_map(&maps.v);
      }
      __syncwarp();
      produce(p, maps, s, scheduler);
    }
  } else {
    grow_registers<P::Registers::kConsumer>();
    consume(p, s, scheduler);
  }
}

}  // namespace hf_flashattn::sm90
