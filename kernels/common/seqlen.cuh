// Where one sequence of the batch lies, dense or packed, and which of its keys may be seen.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace hf_flashattn {

struct Sequence {
  int index;             // in the batch
  int batch;             // index for TMA and for strides: 0 when packed
  int first_q, first_k;  // rows before this sequence: 0 when dense
  int length_q, length_k;
  int key_begin, key_end;  // keys that exist for every row
  bool packed;             // what is beyond the length is another's (TileEnd in sm90/launch.cuh)

  __host__ __device__ __forceinline__ Sequence(Problem const& p, int index)
      : Sequence(p, index, p.cu_seqlens_q != nullptr) {}

  // Where the kernel knows whether it is packed.
  __host__ __device__ __forceinline__ Sequence(Problem const& p, int index, bool packed)
      : index(index), packed(packed) {
    if (packed) {
      // Clamped, so that wrong lengths give wrong results and not wrong accesses.
      batch = 0;
      first_q = min(max(p.cu_seqlens_q[index], 0), p.total_q);
      first_k = min(max(p.cu_seqlens_k[index], 0), p.total_k);
      int const end_q = min(max(p.cu_seqlens_q[index + 1], first_q), p.total_q);
      int const end_k = min(max(p.cu_seqlens_k[index + 1], first_k), p.total_k);
      length_q = min(end_q - first_q, p.seqlen_q);
      length_k = min(end_k - first_k, p.seqlen_k);
      key_begin = 0;
      key_end = length_k;
    } else {
      batch = index;
      first_q = first_k = 0;
      length_q = p.seqlen_q;
      length_k = p.seqlen_k;
      key_begin = 0;
      key_end = length_k;
      if (p.key_start == nullptr && p.key_len == nullptr) return;
      int64_t const length = length_k;  // 64 bits: any start and length may be asked for
      int64_t const start = p.key_start == nullptr ? 0 : p.key_start[index];
      int64_t const end = p.key_len == nullptr ? length : start + p.key_len[index];
      key_begin = int(min(max(start, int64_t{0}), length));
      key_end = int(min(max(end, int64_t{key_begin}), length));
    }
  }

  // From parts that another thread has looked up.
  __device__ __forceinline__ Sequence(Problem const& p, int index, int first_q, int length_q,
                                      int first_k, int key_begin, int key_end)
      : index(index), first_q(first_q), first_k(first_k), length_q(length_q), key_begin(key_begin),
        key_end(key_end), packed(p.cu_seqlens_q != nullptr) {
    batch = packed ? 0 : index;
    length_k = packed ? key_end : p.seqlen_k;
  }

  // Row r sees keys c <= r + diagonal() when causal.
  __host__ __device__ __forceinline__ int diagonal() const { return length_k - length_q; }

  // The first row that sees a key, 0 or less if all do: keys start at key_begin, rows end at the
  // diagonal.
  __host__ __device__ __forceinline__ int first_seeing_row(bool causal) const {
    return causal ? key_begin - diagonal() : 0;
  }

  // Of the keys first .. first + count - 1, the ones TMA brings in but nobody may see: all outside
  // [begin, end) of this pair, relative to `first`. Equal to [0, count) when TMA already zeroes
  // them.
  __host__ __device__ __forceinline__ void visible_keys(int first, int count, int& begin,
                                                        int& end) const {
    begin = max(key_begin - first, 0);
    end = key_end == length_k ? count : min(key_end - first, count);
  }
};

// A row of this sequence in a (B, S, H, D) or packed tensor; `first` is first_q or first_k.
template <class T>
__device__ __forceinline__ T* row_pointer(TensorView const& view, Sequence const& s, int first,
                                          int row, int head) {
  return static_cast<T*>(view.data) + s.batch * view.stride_batch +
         (first + row) * view.stride_seq + head * view.stride_head;
}

// Where a sequence's LSE starts: (B, Hq, Sq), packed (Hq, total).
__device__ __forceinline__ int64_t lse_offset(Problem const& p, Sequence const& s, int head) {
  if (!s.packed) return (int64_t(s.index) * p.heads_q + head) * p.seqlen_q;
  return int64_t(head) * p.total_q + s.first_q;
}

}  // namespace hf_flashattn
