// dQ on its way out of the backward: the writer warp adds what the consumers made to sums in global
// memory, the rounding warps turn complete sums into dQ.
#pragma once

#include "sm90/backward_smem.cuh"

namespace hf_flashattn::sm90 {

// Adds the consumers' parts of dQ to the sums. Deterministic: key blocks take turns, the last one
// that a row block sees first, which is also the order in which they are claimed. To pass a turn on
// takes longer than a row block, so two writers have every other row block each.
template <class P>
__device__ void write_dq(BackwardParams const& p, BackwardWorkspace const& workspace,
                         BackwardSmem<P>& s, int writer) {
  constexpr int kPartFloats = 64 * P::kPartColumns;
  static_assert(P::kStages == 2, "the consumers tell row blocks apart by their stage");
  bool const leader = threadIdx.x % kWarpThreads == 0;
  auto const allow_next = [&] {
    if (leader) bulk_wait_read<0>();
    __syncwarp();
#pragma unroll
    for (int part = 0; part < P::kConsumers; ++part)
      barrier_arrive(kQueryGradientEmpty + part, kWarpgroupThreads + kWarpThreads);
  };

  if (writer == 0) allow_next();
  int stage = 0;
  ClaimedTiles<kBackwardTileReaders<P>> tiles{s.tiles};
  for (Work tile; tiles.next(tile);) {
    KeyWork<P> const work(p, tile);
    int const stream = workspace.stream(work.sequence, work.head_k);
    // Streams are claimed in order, so these sums have been 0 for long, and nobody waits for later
    // ones. Tiles without rows wait too: once all tiles are counted the sums are rounded.
    if (leader && !workspace.first_user(stream))
      wait_count(workspace.rounded + stream - workspace.recycled, workspace.row_blocks());
    for (int head = work.first_head; head < work.first_head + work.group; ++head) {
      int64_t const first_sum = workspace.first_sum(work.sequence, head);
      for (int block = work.rows.first; block < work.rows.first + work.rows.count; ++block) {
        int const full = kQueryGradientFull + 2 * stage;
        bool const own = !p.deterministic || stage == writer;
        stage ^= 1;
        if (!own) continue;
        int64_t const sum = first_sum + block * P::kBlockM;
        int32_t* const turn = workspace.turn + sum / P::kBlockM;
        if (p.deterministic && leader) wait_count(turn, work.earlier_key_blocks(block));
        __syncwarp();
        int const parts = work.is_short(block) ? 1 : P::kConsumers;  // the others have no rows
#pragma unroll
        for (int part = 0; part < P::kConsumers; ++part) {
          barrier_sync(full + part, kWarpgroupThreads + kWarpThreads);
          if (leader && part < parts) {
            bulk_reduce_add(workspace.dq + sum * P::kHeadDim + part * kPartFloats,
                            smem_address(s.dq.parts[part]), kPartFloats * sizeof(float));
            bulk_commit();
          }
        }
        allow_next();
        if (p.deterministic && leader) {
          bulk_wait<0>();
          add_count(turn);
        }
      }
    }
    if (leader && workspace.recycled > 0) {
      bulk_wait<0>();
      add_count(workspace.added + stream);
    }
  }
  if (leader) bulk_wait<0>();
}

// Rounds complete sums to rows of dQ, a piece after the other, and leaves zeros for the next stream
// that has their memory. Row blocks are claimed in the order of streams, as many of each: who has
// the first one counts those that are beyond the sequence's length as well.
template <class P>
__device__ void round_dq(BackwardParams const& p, BackwardWorkspace const& workspace,
                         BackwardSmem<P>& s, int warp) {
  using Element = typename P::Element;
  constexpr int kFloats = DqPieces::kFloats, kStages = DqPieces::kStages;
  constexpr int kPieces = P::kBlockM * P::kHeadDim / kFloats;
  constexpr int kPiecesOfPart = P::kPartColumns / 16;
  static_assert(kPiecesOfPart >= kStages, "the first pieces are all of one row block");
  DqPieces& buffers = s.dq.pieces[warp];
  int const lane = threadIdx.x % kWarpThreads;
  float const scale = p.problem.softmax_scale;
  bool const right = lane % 2;
  int const own_column = lane % 2 * 8 + lane % 4 / 2 * 4;
  PipelineState<kStages> pipe;

  while (true) {
    int const claimed = warp_uniform(claim_next(workspace.claimed + 1));
    int const stream = claimed / workspace.row_blocks();
    if (stream >= workspace.streams) return;
    int const rest = claimed % workspace.row_blocks();
    int const blocks = workspace.sum_rows / P::kBlockM;  // of a head
    int const head = stream % workspace.heads_k * workspace.group() + rest / blocks;
    Sequence const sequence(p.problem, stream / workspace.heads_k);
    int const existing = ceil_div(sequence.length_q, P::kBlockM);
    if (!workspace.is_rounded(rest, existing)) continue;
    // In the accumulators of wgmma this lane has rows g and g + 8, two columns of every 8; after an
    // exchange with its neighbour 4 of the left or of the right 8 columns of a piece.
    int const first_row = rest % blocks * P::kBlockM + lane / 4;
    int const rows = sequence.length_q - first_row;
    // A short block has nothing in its second part.
    int const pieces = KeyWork<P>::is_short(sequence, rest % blocks) ? kPiecesOfPart : kPieces;
    Element* const out =
        row_pointer<Element>(p.dq, sequence, sequence.first_q, first_row, head) + own_column;
    int64_t const first_sum = workspace.first_sum(sequence, head) + rest % blocks * P::kBlockM;
    float* sums = workspace.dq + first_sum * P::kHeadDim;
    auto const load_piece = [&](float const* piece, int stage) {
      buffers.full[stage].arrive_expect(kFloats * sizeof(float));
      bulk_load(piece, buffers.full[stage], smem_address(buffers.data[stage]),
                kFloats * sizeof(float));
    };

    if (lane == 0) {
      int const key_blocks = ceil_div(sequence.length_k, P::kBlockN);
      wait_count(workspace.added + stream, key_blocks, 500);
      // Where there is no tile whose writer has waited for this memory.
      if (key_blocks == 0 && !workspace.first_user(stream))
        wait_count(workspace.rounded + stream - workspace.recycled, workspace.row_blocks(), 500);
#pragma unroll 1
      for (int piece = 0; piece < kStages; ++piece)
        load_piece(sums + piece * kFloats, (pipe.stage() + piece) % kStages);
    }
    __syncwarp();
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece, pipe.next(), sums += kFloats) {
      int const row = P::kSplitRows ? piece / kPiecesOfPart * 64 : 0;
      int const column = (P::kSplitRows ? piece % kPiecesOfPart : piece) * 16;
      uint32_t const address = smem_address(buffers.data[pipe.stage()]) + lane * 16;
      buffers.full[pipe.stage()].wait(pipe.parity());
      Element* global = out + row * p.dq.stride_seq + column;
      bool const exists = column + own_column < p.problem.head_dim;
#pragma unroll(P::Registers::kProducer < 40 ? 1 : 2)
      for (int down = row; down < row + 64; down += 16, global += 16 * p.dq.stride_seq) {
        uint32_t low[2], high[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint4 const x = load_shared_16b(address + i * kWarpgroupThreads * 16 +
                                          (down - row) / 16 * kWarpThreads * 16);
          low[i] = pack<Element>(__uint_as_float(x.x) * scale, __uint_as_float(x.y) * scale);
          high[i] = pack<Element>(__uint_as_float(x.z) * scale, __uint_as_float(x.w) * scale);
        }
        swap_with_lane<1>(low[0], low[1], right);
        swap_with_lane<1>(high[0], high[1], right);
        if (exists && down < rows) store_global_8b(global, low[0], low[1]);
        if (exists && down + 8 < rows)
          store_global_8b(global + 8 * p.dq.stride_seq, high[0], high[1]);
      }
      __syncwarp();
      if (lane == 0 && piece + kStages < pieces) load_piece(sums + kStages * kFloats, pipe.stage());
      if (!workspace.last_user(stream))
#pragma unroll
        for (int i = 0; i < kFloats; i += 4 * kWarpThreads)
          *reinterpret_cast<float4*>(sums + i + 4 * lane) = make_float4(0.f, 0.f, 0.f, 0.f);
      __syncwarp();
    }
    if (workspace.last_user(stream)) continue;
    fence_proxy_async_all();  // the next to add does so by bulk copies
    __threadfence();
    __syncwarp();
    if (lane == 0) add_count(workspace.rounded + stream, workspace.counted(rest, existing));
  }
}

}  // namespace hf_flashattn::sm90
