// The block iterator: which key blocks a block of rows visits, and which of them need a mask.
//
// Every pattern (dense, causal, key range; later window, block-sparse, split) is a range of blocks
// walked from the last to the first, so that the diagonal and the tail come first.
#pragma once

#include "common/seqlen.cuh"

namespace hf_flashattn {

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Rows by which tiles of BlockM rows begin before the sequence, so that it is the first one that
// lacks rows, not the last: of a causal sequence the first sees the fewest keys. In whole groups of
// 64, a consumer's: no group has rows on both sides of row 0. For tiles of three groups, 192 rows,
// alone: of two one lacks at most, and lengths are multiples of 128 rather.
template <int BlockM>
constexpr bool kCanBeAhead = BlockM == 192;
template <int BlockM>
__host__ __device__ __forceinline__ int rows_ahead(int length, bool causal) {
  if (!kCanBeAhead<BlockM> || !causal) return 0;
  return (BlockM - 1 - (length + BlockM - 1) % BlockM) / 64 * 64;
}

// The key blocks of rows first_row .. first_row + BlockM - 1.
template <int BlockM, int BlockN>
struct KeyBlocks {
  int first, count;                  // blocks first .. first + count - 1
  int end;                           // behind the last key that some row sees, if count > 0
  int unmasked_begin, unmasked_end;  // blocks in between are seen whole by every row

  KeyBlocks() = default;
  __host__ __device__ __forceinline__ KeyBlocks(Sequence const& s, bool causal, int first_row) {
    int const last_row = min(first_row + BlockM, s.length_q) - 1;
    end = causal ? min(s.key_end, last_row + s.diagonal() + 1) : s.key_end;
    int const whole = causal ? min(s.key_end, first_row + s.diagonal() + 1) : s.key_end;
    first = s.key_begin / BlockN;
    count = end > s.key_begin ? ceil_div(end, BlockN) - first : 0;
    unmasked_begin = ceil_div(s.key_begin, BlockN);
    unmasked_end = max(whole, 0) / BlockN;
  }

  __host__ __device__ __forceinline__ int last() const { return first + count - 1; }
  __host__ __device__ __forceinline__ bool needs_mask(int block) const {
    return block < unmasked_begin || block >= unmasked_end;
  }
};

// Whether rows from first_row on see less of a block than BlockKeys say; dense.
template <int BlockN>
__device__ __forceinline__ bool crosses_diagonal(Problem const& p, bool causal, int first_row,
                                                 int block) {
  return causal && (block + 1) * BlockN - 1 > first_row + p.seqlen_k - p.seqlen_q;
}

// The row blocks that see keys first_key .. first_key + BlockN - 1: what the backward walks,
// upwards.
template <int BlockM, int BlockN>
struct RowBlocks {
  int first, count;
  int unmasked_begin;  // from here on every row sees all the keys of the block, if the range does
  bool keys_whole;     // the key block lies inside the key range

  __host__ __device__ __forceinline__ RowBlocks(Sequence const& s, bool causal, int first_key) {
    // Rows that see no key at all are left out too: their Q and dO are never multiplied.
    int const begin = causal ? max(max(first_key, s.key_begin) - s.diagonal(), 0) : 0;
    bool const empty = first_key >= s.key_end || first_key + BlockN <= s.key_begin;
    first = begin / BlockM;
    count = empty ? 0 : max(ceil_div(s.length_q, BlockM) - first, 0);
    int const whole = causal ? max(first_key + BlockN - 1 - s.diagonal(), 0) : 0;
    unmasked_begin = ceil_div(whole, BlockM);
    keys_whole = first_key >= s.key_begin && first_key + BlockN <= s.key_end;
  }

  __host__ __device__ __forceinline__ bool needs_mask(int block) const {
    return !keys_whole || block < unmasked_begin;
  }
};

// How many key blocks after this one see rows up to last_row too: the deterministic backward lets
// them add to dQ first.
template <int BlockN>
__host__ __device__ __forceinline__ int later_key_blocks(Sequence const& s, bool causal,
                                                         int last_row, int key_block) {
  int const last_key = causal ? min(s.key_end - 1, last_row + s.diagonal()) : s.key_end - 1;
  return last_key / BlockN - key_block;
}

}  // namespace hf_flashattn
