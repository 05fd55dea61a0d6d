// Which tile a persistent CTA works on next: TileScheduler, rows in static steps, where the host
// knows all lengths (else ragged_tiles.cuh); KeyTileOrder, the backward's blocks of keys, which are
// claimed.
#pragma once

#include "common/blocks.cuh"
#include "common/divide.cuh"
#include "common/mbarrier.cuh"
#include "sm90/policy.cuh"

namespace hf_flashattn::sm90 {

struct Work {
  int block, head, index;  // block: of rows, in the backward of keys; index: of the sequence
};

// Tiles in static steps. See TileOrder.
template <TileOrder Order>
struct TileScheduler {
  static constexpr bool kCanFold = Order == TileOrder::kFolded;
  Divisor row_blocks, heads;
  int streams;  // (head, sequence); each has row_blocks tiles
  int grid;     // CTAs: at most one an SM, and none without a tile
  // In chunks: streams a chunk (0: none), tiles a chunk, streams of the last.
  Divisor chunk, chunk_tiles, last_chunk;
  // Folded: pairs a stream; how many pairs every CTA has at least, and how many CTAs have one more.
  Divisor half;
  int pairs, more_pairs;

  // folded_from: fewer row blocks than this go in chunks though the order is kFolded.
  __host__ TileScheduler(Problem const& p, int block_m, int folded_from)
      : TileScheduler(p, ceil_div(p.seqlen_q, block_m), p.heads_q * p.batch, folded_from) {}

  __host__ __device__ int tiles() const { return streams * row_blocks.value; }

  // The next tile of CTA `cta`, and on to the step after it; false if it has no more.
  __host__ __device__ __forceinline__ bool next(int& step, Work& work, int cta) const {
    // The two tiles of a folded pair count as two steps, so a CTA may end two steps later. A loop,
    // though only the last steps can be empty: without it ptxas spills in the kernel's main loop.
    // Unlikely: so that the usual way through needs no jump, each of which waits for instructions.
    for (; step * grid < tiles() + (kCanFold ? 2 * grid : 0); ++step) {
      int stream, block;
      if (in_chunks()) {
        int const tile = step * grid + (step % 2 == 0 ? cta : grid - 1 - cta);
        if (tile >= tiles()) [[unlikely]]
          continue;
        int number, rest, place;
        chunk_tiles.divide(tile, number, rest);
        int const first = number * chunk.value;
        (first + chunk.value <= streams ? chunk : last_chunk).divide(rest, block, place);
        stream = first + place;
        block = row_blocks.value - 1 - block;
      } else if constexpr (kCanFold) {
        int const own = pairs + (cta < more_pairs ? 1 : 0);
        bool const pair = step < 2 * own;
        int const unit = (pair ? step / 2 : step - own) * grid + cta;
        int const folded = streams * half.value;
        if (unit >= folded + streams * (row_blocks.value % 2)) [[unlikely]]
          continue;
        if (pair) half.divide(unit, stream, block);
        else stream = unit - folded, block = half.value;
        if (pair && step % 2 == 0) block = row_blocks.value - 1 - block;
      } else {
        int const tile = step * grid + cta;
        if (tile >= tiles()) [[unlikely]]
          continue;
        row_blocks.divide(tile, stream, block);
      }
      work.block = block;
      heads.divide(stream, work.index, work.head);
      ++step;
      return true;
    }
    return false;
  }

 private:
  __host__ __device__ __forceinline__ bool in_chunks() const {
    if constexpr (kCanFold) {
      if (chunk.value > 0) [[unlikely]]
        return true;
      return false;
    } else {
      return Order == TileOrder::kLongestFirst;
    }
  }

  __host__ TileScheduler(Problem const& p, int row_blocks, int streams, int folded_from)
      : TileScheduler(row_blocks, streams, chunk_of(p, row_blocks, streams, folded_from), p.heads_q,
                      min(streams * row_blocks, p.num_sms)) {}

  __host__ TileScheduler(int row_blocks, int streams, int chunk, int heads, int grid)
      : row_blocks(row_blocks), heads(heads), streams(streams), grid(grid), chunk(chunk),
        chunk_tiles(chunk * row_blocks), last_chunk(chunk > 0 ? streams % chunk : 0),
        half(row_blocks / 2), pairs(streams * (row_blocks / 2) / max(grid, 1)),
        more_pairs(streams * (row_blocks / 2) % max(grid, 1)) {}

  static __host__ int chunk_of(Problem const& p, int row_blocks, int streams, int folded_from) {
    if (Order == TileOrder::kHeadByHead) return 0;
    bool const many = int64_t(streams) * row_blocks >= 3 * int64_t(p.num_sms);
    // Two row blocks are one pair a stream: nothing is left over, in whatever order.
    bool const folds = kCanFold && (row_blocks <= 2 || row_blocks >= folded_from);
    if (many) return folds ? 0 : min(streams, max(p.num_sms / 2, 1));
    return streams;
  }
};

// The order in which the backward's tiles are claimed: blocks of keys, each of one stream (a key
// head of a sequence).
//
// Stream by stream, from the first block of keys on; causal, that is the longest tile first.
// Deterministic: the key blocks of a stream add to a row block of dQ in turns, the last one first,
// and are claimed in that order: whoever waits for a turn waits for a tile that was claimed before
// its own. To pass a turn on takes longer than a row block, so two key blocks of a stream that
// start together stay apart only by waiting. Hence streams are claimed from in turns as well, in
// chunks of as many as it takes for the key blocks of one to start a row block and a half apart: a
// CTA claims a tile every `steps` row blocks, num_sms of them do every steps / num_sms. More
// streams at a time than that only push each other out of the L2.
struct KeyTileOrder {
  int key_blocks, streams;
  int together;  // streams of a chunk; 0: not deterministic
  int larger;    // the first chunks have one more, as many as this

  __host__ KeyTileOrder(BackwardParams const& params, int block_m, int block_n)
      : key_blocks(ceil_div(params.problem.seqlen_k, block_n)),
        streams(params.problem.heads_k * params.problem.batch), together(0), larger(0) {
    Problem const& p = params.problem;
    if (!params.deterministic) return;
    int const rows = p.cu_seqlens_q != nullptr ? p.total_q / max(p.batch, 1) : p.seqlen_q;
    int const steps = max(p.heads_q / p.heads_k * ceil_div(rows, block_m), 1);
    int const chunks = max(streams / ceil_div(3 * p.num_sms, 2 * steps), 1);
    together = streams / chunks;
    larger = streams % chunks;
  }

  __host__ __device__ __forceinline__ int tiles() const { return streams * key_blocks; }

  __host__ __device__ __forceinline__ void locate(int tile, int& stream, int& key_block) const {
    if (together == 0) {
      stream = tile / key_blocks;
      key_block = tile % key_blocks;
      return;
    }
    int const in_larger = larger * (together + 1), rest = tile - in_larger * key_blocks;
    int const size = rest < 0 ? together + 1 : together;
    int const from = rest < 0 ? tile : rest;
    int const chunk = from / (size * key_blocks), place = from % (size * key_blocks);
    stream = (rest < 0 ? 0 : in_larger) + chunk * size + place % size;
    key_block = key_blocks - 1 - place / size;
  }
};

// How a warp walks over its CTA's tiles. Here each computes the static steps by itself.
template <class Scheduler>
struct StaticTiles {
  Scheduler const& scheduler;
  int step = 0;

  __device__ __forceinline__ bool next(Work& work) {
    return scheduler.next(step, work, blockIdx.x);
  }
};

// Tiles of the backward: the producer claims them and hands each over to all warps that work on it.
// The slot is free again when they have read it, which they do at the start of the tile.
constexpr int kTileSlots = 1;

template <int Readers>
struct TileHandover {
  alignas(16) int4 slot[kTileSlots];             // block (-1: no more tiles), head, index
  Mbarrier full[kTileSlots], empty[kTileSlots];  // full: the producer; empty: readers

  __device__ __forceinline__ void init(int readers = Readers) {
    for (int i = 0; i < kTileSlots; ++i) {
      full[i].init(1);
      empty[i].init(readers);
    }
  }
};

// A warp's view of them.
template <int Readers>
struct ClaimedTiles {
  TileHandover<Readers>& handover;
  PipelineState<kTileSlots> ring;

  __device__ __forceinline__ bool next(Work& work) {
    handover.full[ring.stage()].wait(ring.parity());
    // Lane 0 reads, as it alone arrives at `empty`.
    int4 message = make_int4(-1, 0, 0, 0);
    if (threadIdx.x % kWarpThreads == 0) message = handover.slot[ring.stage()];
    // Shuffles and a vote, so that ptxas sees that the whole warp agrees and keeps uniform
    // registers around the loop: without the vote the kernel spills into its main loop at d64.
    work.block = warp_uniform(message.x);
    work.head = warp_uniform(message.y);
    work.index = warp_uniform(message.z);
    release(handover.empty[ring.stage()]);
    ring.next();
    return __any_sync(0xffffffff, message.x >= 0);
  }
};

}  // namespace hf_flashattn::sm90
