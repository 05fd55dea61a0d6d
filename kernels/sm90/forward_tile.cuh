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
  SharedDropoutOrigin<P::kDropout && P::kRagged> const& origin;
  DropoutLane<Down::kRows> lane;
  DropoutLine<Down::kRows, P::kDropout ? P::kBlockN / 16 : 2> line;

  __device__ __forceinline__
  BlockDropout(Problem const& problem, Work const& work,
               SharedDropoutOrigin<P::kDropout && P::kRagged> const& origin)
      : problem(problem), work(work), origin(origin) {
    if constexpr (P::kDropout && !P::kRagged)
      lane = DropoutLane<Down::kRows>(dropout_origin(problem));
  }
  // Before the first draw of a tile.
  __device__ __forceinline__ void set_tile(int warp_row) {
    row = warp_row;
    head = work.index * problem.heads_q + work.head;
    if constexpr (P::kRagged) head = warp_uniform(head);  // or ptxas wants a register for it
  }

  __device__ __forceinline__ void draw(int block) {
    if constexpr (P::kDropout) {
      if constexpr (P::kRagged) lane = DropoutLane<Down::kRows>(load_origin(origin));
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
  bool idle;                      // these rows are before or behind the sequence
  bool short_first;               // its rows see no key beyond kShortBlock in their first block

  // The next tile for which the producer loads Q; rows that see no key are written here.
  __device__ __forceinline__ bool next(ForwardParams const& p, TilesOfWarp<P>& tiles, int warpgroup,
                                       Lane const& lane) {
    while (tiles.next(work)) {
      auto const sequence = sequence_of<P>(p.problem, tiles, work);
      int const first_row = first_row_of<P>(sequence, work);
      if (P::kRagged && first_row >= sequence.length_q) continue;
      ForwardKeyBlocks<P> const blocks(sequence, P::kCausal, first_row);
      own_row = first_row + warpgroup * 64;
      if (blocks.count <= 0) [[unlikely]] {
        if (!kMayBeAhead<P> || own_row >= 0)
          OutputRows<P>(p, sequence, work, own_row + lane.warp * 16)
              .store_empty(lane, p.problem.head_dim);
        continue;
      }
      own = KeyBlocks<64, P::kBlockN>(sequence, P::kCausal, own_row);
      if constexpr (kKeepVisible) visible = VisibleKeys(sequence);
      idle = own_row >= sequence.length_q || (kMayBeAhead<P> && own_row < 0);
      first = blocks.first;
      block = blocks.last();
      short_first = P::kShortBlock > 0 && own.end - last() * P::kBlockN <= P::kShortBlock;
      return true;
    }
    return false;
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

  // For masks. With holes BlockKeys say all but what is causal. Ragged kernels have no registers to
  // keep them in, with dropout none for the way to the record; full attention has few masks.
  __device__ __forceinline__ VisibleKeys visible_keys(Problem const& p,
                                                      TilesOfWarp<P> const& tiles) const {
    if constexpr (P::kHoles) return VisibleKeys::up_to_diagonal(p);
    else if constexpr (P::kRagged && P::kDropout) return VisibleKeys(Sequence(p, work.index));
    else return kKeepVisible ? visible : VisibleKeys(sequence_of<P>(p, tiles, work));
  }

  // Tells ptxas again what it loses track of across tiles. With dropout it then spills less, or not
  // at all; without, more.
  __device__ __forceinline__ void make_uniform() {
    for (int* value : {&work.block, &work.head, &work.index, &own_row, &first, &block})
      *value = warp_uniform(*value);
    if constexpr (!P::kHoles)
      for (int* value : {&own.unmasked_begin, &own.unmasked_end}) *value = warp_uniform(*value);
  }
};

}  // namespace hf_flashattn::sm90
