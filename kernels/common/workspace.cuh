// The backward's workspace: per row and query head the log-sum-exp and delta = rowsum(dO * O); sums
// of dQ in fp32, in row blocks of a fixed size so that every block is whole and aligned for bulk
// copies; and the counters by which CTAs agree on who does what.
//
// A stream is one key head of one sequence with the query heads that share it. Streams are worked
// on one after the other, so sums are needed for a few of them at a time. Recycled, stream n has
// the memory of stream n - recycled, as much as the longest sequence takes, and the backward itself
// rounds the sums to dQ. Deterministic sums, which take turns and are late, small problems, and
// packed sequences most of which are far shorter than the longest keep sums for all, and a kernel
// after the backward rounds them. Where the backward is split there are none: dQ never leaves the
// registers of one CTA. Tiles of keys are claimed there all the same, but for wide heads.
#pragma once

#include "common/blocks.cuh"

namespace hf_flashattn {

struct BackwardWorkspace {
  int block_m, head_dim;  // head_dim: of the kernel, which may be more than the problem's
  int heads_q, heads_k;
  int padded_rows;        // rows of a head: of one sequence when dense, of all when packed
  int sum_rows;           // rows of a head of one sequence that have sums, where they are recycled
  int streams, recycled;  // recycled: streams that have sums at a time; 0: all
  bool packed;
  int64_t row_slots;  // over all heads and sequences
  int64_t sum_slots;  // rows that have sums at a time
  // log2(e) * LSE; +inf for rows that do not exist or see no key: exp2(s - inf) = 0
  float* lse_log2;
  float* delta;
  float* dq;         // (row block, part, float4, thread) of the consumers' accumulators
  int32_t* turn;     // per row block of dq: how many key blocks have added to it (deterministic)
  int32_t* added;    // per stream: tiles that have added all they make to its sums
  int32_t* rounded;  // per stream: row blocks whose dQ is written, and whose sums are 0 again
  int32_t* claimed;  // tiles, and row blocks to round or tiles of dQ, that CTAs have claimed

  // block_n: keys of a tile; 0: without sums.
  __host__ BackwardWorkspace(BackwardParams const& params, int head_dim, int block_m, int block_n)
      : block_m(block_m), head_dim(head_dim), heads_q(params.problem.heads_q),
        heads_k(params.problem.heads_k), streams(params.problem.batch * heads_k), recycled(0),
        packed(params.problem.cu_seqlens_q != nullptr) {
    Problem const& p = params.problem;
    int64_t const rows = packed ? int64_t(p.total_q) + int64_t(p.batch) * block_m : p.seqlen_q;
    padded_rows = int((rows + block_m - 1) / block_m * block_m);
    row_slots = int64_t(padded_rows) * p.heads_q * (packed ? 1 : p.batch);
    sum_slots = block_n > 0 ? row_slots : 0;
    sum_rows = ceil_div(p.seqlen_q, block_m) * block_m;
    // Row blocks are claimed for the longest sequence: one claim in four at least finds one.
    bool const even = int64_t(sum_rows) * p.batch <= 4 * rows;
    if (block_n > 0 && (!packed || even) && !params.deterministic) {
      // CTAs are busy with tiles of the newest streams, causal ones of twice the usual length
      // first; those before them are being rounded.
      int const keys = packed ? ceil_div(p.total_k, max(p.batch, 1)) : p.seqlen_k;
      int const key_blocks = max(ceil_div(keys, block_n), 1);
      int const enough = ceil_div(4 * p.num_sms, key_blocks) + 1;
      int64_t const slots = int64_t(enough) * group() * sum_rows;
      if (enough < streams && slots < row_slots) {
        recycled = enough;
        sum_slots = slots;
      }
    }
    // Each part is a multiple of block_m >= 64 floats, so 256-byte aligned.
    lse_log2 = static_cast<float*>(params.workspace);
    delta = lse_log2 + row_slots;
    dq = delta + row_slots;
    turn = reinterpret_cast<int32_t*>(dq + sum_slots * head_dim);
    added = turn + sum_slots / block_m;
    rounded = added + streams;
    claimed = rounded + streams;
  }

  __host__ size_t bytes() const {
    return (row_slots * 2 + sum_slots * head_dim) * sizeof(float) +
           (sum_slots / block_m + 2 * streams + 2) * sizeof(int32_t);
  }

  __host__ __device__ __forceinline__ int group() const { return heads_q / heads_k; }
  // Of a stream that has recycled sums, those beyond its length counted too.
  __host__ __device__ __forceinline__ int row_blocks() const {
    return group() * (sum_rows / block_m);
  }

  // Whether this row block of such a stream, of heads with `existing` row blocks, has to be
  // rounded, and what that counts in `rounded`: the first one is always there, for those that are
  // beyond.
  __host__ __device__ __forceinline__ bool is_rounded(int row_block, int existing) const {
    return row_block == 0 || row_block % (sum_rows / block_m) < existing;
  }
  __host__ __device__ __forceinline__ int counted(int row_block, int existing) const {
    int const beyond = row_block > 0 ? 0 : group() * (sum_rows / block_m - existing);
    return min(existing, 1) + beyond;
  }

  __host__ __device__ __forceinline__ int stream(Sequence const& s, int head_k) const {
    return s.index * heads_k + head_k;
  }

  // The slot of row 0 of a sequence, a multiple of block_m. One spare block for each packed
  // sequence keeps whole blocks of neighbours apart.
  __host__ __device__ __forceinline__ int64_t first_slot(Sequence const& s, int head) const {
    if (!packed) return (int64_t(s.index) * heads_q + head) * padded_rows;
    return int64_t(head) * padded_rows + (s.first_q + s.index * block_m) / block_m * block_m;
  }

  // The same in `dq`, and after division by block_m in `turn`.
  __host__ __device__ __forceinline__ int64_t first_sum(Sequence const& s, int head) const {
    if (recycled == 0) return first_slot(s, head);
    int const place = stream(s, head / group()) % recycled;
    return (int64_t(place) * group() + head % group()) * sum_rows;
  }

  // Whether this stream is the first to have its memory for sums, and whether it is the last.
  __host__ __device__ __forceinline__ bool first_user(int stream) const {
    return sum_slots > 0 && (recycled == 0 || stream < recycled);
  }
  __host__ __device__ __forceinline__ bool last_user(int stream) const {
    return recycled == 0 || stream + recycled >= streams;
  }
};

}  // namespace hf_flashattn
