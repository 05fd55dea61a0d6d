// Scores that a row may not see become -inf. Both layouts: rows down (forward) and keys down
// (backward).
#pragma once

#include "common/fragment.cuh"
#include "common/key_bits.cuh"

namespace hf_flashattn {

// Which keys the rows of a sequence see: those of [begin, end), when causal up to row + diagonal.
struct VisibleKeys {
  int begin, end, diagonal;

  VisibleKeys() = default;
  // What is left where BlockKeys have hidden all keys that no row sees; dense.
  static __device__ __forceinline__ VisibleKeys up_to_diagonal(Problem const& p) {
    VisibleKeys visible;
    visible.begin = 0;
    visible.end = 0x7fffffff;
    visible.diagonal = p.seqlen_k - p.seqlen_q;
    return visible;
  }
  __device__ __forceinline__ explicit VisibleKeys(Sequence const& s)
      : begin(s.key_begin), end(s.key_end), diagonal(s.diagonal()) {}

  __device__ __forceinline__ bool sees(bool causal, int row, int key) const {
    return key >= begin && key < end && !(causal && key > row + diagonal);
  }
};

// scores(row, key): this lane's rows first_row and first_row + 8, keys from first_key on.
template <int N>
__device__ __forceinline__ void mask_keys(float (&scores)[N], VisibleKeys const& visible,
                                          bool causal, int first_row, int first_key, int quad) {
  // Elements whose column, relative to this lane's first, is hidden: comparisons with constants.
  auto const hide = [&](int i, auto const& hidden) {
#pragma unroll
    for (int j = 0; j < N; j += 4)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (hidden(2 * j + e)) scores[j + 2 * i + e] = -infinity();
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int const row_end = first_row + 8 * i + visible.diagonal + 1;
    int const end = (causal ? min(visible.end, row_end) : visible.end) - first_key - 2 * quad;
    hide(i, [=](int column) { return column >= end; });
  }
  if (visible.begin <= first_key) return;  // nearly always
  int const begin = visible.begin - first_key - 2 * quad;
#pragma unroll
  for (int i = 0; i < 2; ++i) hide(i, [=](int column) { return column < begin; });
}

// The same of the keys of a block that nobody may see.
template <int N>
__device__ __forceinline__ void mask_keys(float (&scores)[N], BlockKeys const& keys, int quad) {
  if (keys.has_all<2 * N>()) return;  // nearly always
#pragma unroll
  for (int column = 0; column < 2 * N; column += 32) {
    // Loaded again: there are no registers to keep the words in.
    uint32_t const own = keys.from(column) >> 2 * quad;
#pragma unroll
    for (int c = column; c < min(column + 32, 2 * N); c += 8)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (!(own >> (c - column + e) & 1)) scores[c / 2 + e] = scores[c / 2 + 2 + e] = -infinity();
  }
}

// scores(key, row): the first row that sees each of this lane's keys first_key and first_key + 8.
struct FirstRows {
  static constexpr int kNone = 0x7fffffff;
  int row[2];

  __device__ __forceinline__ FirstRows(Problem const& p, Sequence const& s, bool causal,
                                       int first_key) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const key = first_key + 8 * i;
      bool seen = key >= s.key_begin && key < s.key_end;
      if (seen && p.key_bits != nullptr) seen = KeyBits(p, s.index).has(key);
      row[i] = !seen ? kNone : causal ? key - s.diagonal() : 0;
    }
  }

  // Rows from first_row on; lane `quad` holds columns 8j + 2 quad, + 1.
  template <int N>
  __device__ __forceinline__ void mask(float (&scores)[N], int first_row, int quad) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const begin = row[i] == kNone ? kNone : row[i] - first_row - 2 * quad;
#pragma unroll
      for (int j = 0; j < N; j += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (2 * j + e < begin) scores[j + 2 * i + e] = -infinity();
    }
  }
};

}  // namespace hf_flashattn
