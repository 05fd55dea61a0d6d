// The backward's workspace: per row and query head the log-sum-exp, delta = rowsum(dO * O), and dQ
// in fp32, in row blocks of a fixed size so that every block is whole and aligned for bulk copies.
#pragma once

#include "common/blocks.cuh"

namespace hf_flashattn {

struct BackwardWorkspace {
  int block_m, head_dim;  // head_dim: of the kernel, which may be more than the problem's
  int heads_q;
  int padded_rows;  // rows of a head: of one sequence when dense, of all when packed
  bool packed;
  int64_t row_slots;  // over all heads and sequences
  float*
      lse_log2;  // log2(e) * LSE; +inf for rows that do not exist or see no key: exp2(s - inf) = 0
  float* delta;
  float* dq;      // (row block, part, float4, thread) of the consumers' accumulators
  int32_t* turn;  // per row block: how many key blocks have added to its dQ (deterministic)

  __host__ BackwardWorkspace(Problem const& p, int head_dim, int block_m, void* memory)
      : block_m(block_m), head_dim(head_dim), heads_q(p.heads_q),
        packed(p.cu_seqlens_q != nullptr) {
    int64_t const rows = packed ? int64_t(p.total_q) + int64_t(p.batch) * block_m : p.seqlen_q;
    padded_rows = int((rows + block_m - 1) / block_m * block_m);
    row_slots = int64_t(padded_rows) * p.heads_q * (packed ? 1 : p.batch);
    // Each part is a multiple of block_m >= 64 floats, so 256-byte aligned.
    lse_log2 = static_cast<float*>(memory);
    delta = lse_log2 + row_slots;
    dq = delta + row_slots;
    turn = reinterpret_cast<int32_t*>(dq + row_slots * head_dim);
  }

  __host__ size_t bytes() const {
    return row_slots * (2 + head_dim) * sizeof(float) + row_slots / block_m * sizeof(int32_t);
  }

  // The slot of row 0 of a sequence, a multiple of block_m. One spare block for each packed
  // sequence keeps whole blocks of neighbours apart.
  __device__ __forceinline__ int64_t first_slot(Sequence const& s, int head) const {
    if (!packed) return (int64_t(s.index) * heads_q + head) * padded_rows;
    return int64_t(head) * padded_rows + (s.first_q + s.index * block_m) / block_m * block_m;
  }
};

}  // namespace hf_flashattn
