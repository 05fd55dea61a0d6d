// Where one sequence of the batch lies, dense or packed, and which of its keys may be seen.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace hf_flashattn {

struct Sequence {
  int batch;             // index for TMA and for strides: 0 when packed
  int first_q, first_k;  // rows before this sequence: 0 when dense
  int length_q, length_k;
  int key_begin, key_end;  // keys that exist for every row
  bool zero_tail;          // rows beyond the length are other data: TMA does not zero them

  __device__ __forceinline__ Sequence(Problem const& p, int index) {
    if (p.cu_seqlens_q != nullptr) {
      // Clamped, so that wrong lengths give wrong results and not wrong accesses.
      batch = 0;
      first_q = min(max(p.cu_seqlens_q[index], 0), p.total_q);
      first_k = min(max(p.cu_seqlens_k[index], 0), p.total_k);
      length_q = min(min(p.cu_seqlens_q[index + 1], p.total_q) - first_q, p.seqlen_q);
      length_k = min(min(p.cu_seqlens_k[index + 1], p.total_k) - first_k, p.seqlen_k);
      length_q = max(length_q, 0);
      length_k = max(length_k, 0);
      key_begin = 0;
      key_end = length_k;
      zero_tail = true;
    } else {
      batch = index;
      first_q = first_k = 0;
      length_q = p.seqlen_q;
      length_k = p.seqlen_k;
      key_begin = p.key_start == nullptr ? 0 : max(p.key_start[index], 0);
      key_end = p.key_len == nullptr ? length_k : min(key_begin + p.key_len[index], length_k);
      zero_tail = false;
    }
  }

  // Row r sees keys c <= r + diagonal() when causal.
  __device__ __forceinline__ int diagonal() const { return length_k - length_q; }

  // Of the keys first .. first + count - 1, the ones TMA brings in but nobody may see: all outside
  // [begin, end) of this pair, relative to `first`. Equal to [0, count) when TMA already zeroes
  // them.
  __device__ __forceinline__ void visible_keys(int first, int count, int& begin, int& end) const {
    begin = max(key_begin - first, 0);
    bool const hardware_zero = key_end == length_k && !zero_tail;
    end = hardware_zero ? count : min(key_end - first, count);
  }
};

}  // namespace hf_flashattn
