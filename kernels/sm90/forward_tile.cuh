// A forward tile as a consumer sees it: which blocks of keys its rows visit, their dropout flags,
// and where their output goes.
#pragma once

#include "common/dropout.cuh"
#include "common/fragment.cuh"
#include "sm90/policy.cuh"
#include "sm90/ragged_tiles.cuh"

namespace hf_flashattn::sm90 {

template <class P>
using ForwardKeyBlocks = KeyBlocks<P::kBlockM, P::kBlockN>;

// A warp's dropout flags of one block; nothing at all without dropout.
template <class P>
struct BlockDropout {
  Problem const& problem;
  Work const& work;
  int row = 0, head = 0;
  DropoutLane<Down::kRows> lane;
  DropoutLine<Down::kRows, P::kDropout ? P::kBlockN / 16 : 2> line;

  __device__ __forceinline__ BlockDropout(Problem const& problem, Work const& work)
      : problem(problem), work(work) {
    if constexpr (P::kDropout) lane = DropoutLane<Down::kRows>(dropout_origin(problem));
  }
  // Before the first draw of a tile.
  __device__ __forceinline__ void set_tile(int warp_row) {
    row = warp_row;
    head = work.index * problem.heads_q + work.head;
  }

  __device__ __forceinline__ void draw(int block) {
    if constexpr (P::kDropout) {
      line.draw_words(lane, head, uint32_t(row), uint32_t(block * P::kBlockN));
      if constexpr (P::kDraw == Draw::kWithSoftmax) line.find_multipliers(uint32_t(row));
    }
  }

  template <int Steps>
  __device__ __forceinline__ void apply(uint32_t (&probabilities)[Steps][4]) {
    if constexpr (P::kDropout) {
      ByteRule const rule(problem);
      if constexpr (P::kDraw != Draw::kWithSoftmax) line.find_multipliers(uint32_t(row));
#pragma unroll
      for (int k = 0; k < Steps; ++k) {
        auto const square = line.square(k);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          probabilities[k][i] = multiply<typename P::Element>(
              probabilities[k][i], square.keep_flags(rule, i % 2, i / 2));
      }
    }
  }
};

template <class P>
__device__ __forceinline__ int first_row_of(Sequence const& s, Work const& work) {
  return work.block * P::kBlockM - rows_ahead<P::kBlockM>(s.length_q, kMayBeAhead<P>);
}

// Where the output and LSE of a warp's 16 rows go; rows beyond the sequence are not written. None
// may lie before it: the caller sees to that.
template <class P>
struct OutputRows {
  typename P::Element* out;
  float* lse;
  int64_t stride;
  int count;

  OutputRows() = default;
  __device__ __forceinline__ OutputRows(ForwardParams const& p, Sequence const& s, Work const& work,
                                        int row)
      : stride(p.out.stride_seq), count(s.length_q - row) {
    out = row_pointer<typename P::Element>(p.out, s, s.first_q, row, work.head);
    lse = p.lse + lse_offset(p.problem, s, work.head) + row;
  }

  __device__ __forceinline__ void store_lse(Lane const& lane, float const (&value)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const row = lane.group + 8 * i;
      if (lane.quad == 0 && row < count) lse[row] = value[i];
    }
  }

  // Rows that see no key.
  __device__ __forceinline__ void store_empty(Lane const& lane, int head_dim) const {
    float const none[2] = {-infinity(), -infinity()};
    store_lse(lane, none);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const row = lane.group + 8 * i;
      for (int unit = lane.quad; unit < P::kHeadDim / 8; unit += 4)
        if (row < count && unit * 8 < head_dim)
          *reinterpret_cast<uint4*>(out + row * stride + unit * 8) = make_uint4(0, 0, 0, 0);
    }
  }
};

// A tile as one consumer sees it: its own 64 rows.
template <class P>
struct ConsumerTile {
  static constexpr bool kKeepVisible = P::kCausal && !P::kRagged;
  Work work;
  int own_row;                    // the first of the 64
  KeyBlocks<64, P::kBlockN> own;  // the blocks that they see
  int first, block;               // those that the producer loads, from `block` down
  VisibleKeys visible;            // if kKeepVisible
  bool sees_nothing;              // no row of the tile sees a key: the producer loads nothing
  bool idle;                      // that, or these rows are before or behind the sequence
  bool short_first;               // its rows see no key beyond kShortBlock in their first block

  // The next tile. Not in a loop over those that matter: around the wait for a record that makes
  // ptxas take the warp's lanes for apart, and it gives up uniform registers wherever they might be
  // (ragged d64: 366 instructions a block, not 328; with dropout 539 and 494, and spills).
  __device__ __forceinline__ bool next(Problem const& p, TilesOfWarp<P>& tiles, int warpgroup) {
    if (!tiles.next(work)) return false;
    auto const sequence = sequence_of<P>(p, tiles, work);
    int const first_row = first_row_of<P>(sequence, work);
    ForwardKeyBlocks<P> const blocks(sequence, P::kCausal, first_row);
    own_row = first_row + warpgroup * 64;
    own = KeyBlocks<64, P::kBlockN>(sequence, P::kCausal, own_row);
    if constexpr (kKeepVisible) visible = VisibleKeys(sequence);
    sees_nothing = blocks.count <= 0;
    idle = sees_nothing || own_row >= sequence.length_q || (kMayBeAhead<P> && own_row < 0);
    first = blocks.first;
    block = blocks.last();
    short_first = P::kShortBlock > 0 && own.end - last() * P::kBlockN <= P::kShortBlock;
    return true;
  }

  // The blocks above this one are for later rows alone.
  __device__ __forceinline__ int last() const {
    return idle ? first - 1 : min(max(own.last(), first), block);
  }

  // Whether this consumer's rows see less of the block than BlockKeys say, or, where there are
  // none, less than all of it.
  __device__ __forceinline__ bool needs_mask(Problem const& p) const {
    if constexpr (!P::kHoles) return own.needs_mask(block);
    else return crosses_diagonal<P::kBlockN>(p, P::kCausal, own_row, block);
  }

  // For masks. With holes BlockKeys say all but what is causal. Ragged kernels read the record
  // again, full attention has few masks.
  __device__ __forceinline__ VisibleKeys visible_keys(Problem const& p,
                                                      TilesOfWarp<P> const& tiles) const {
    if constexpr (P::kHoles) return VisibleKeys::up_to_diagonal(p);
    else return kKeepVisible ? visible : VisibleKeys(sequence_of<P>(p, tiles, work));
  }
};

}  // namespace hf_flashattn::sm90
