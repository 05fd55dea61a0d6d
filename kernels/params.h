// The C ABI between the launchers and whoever binds them: plain structs and six functions.
//
// No CUDA or torch header is needed to read this file, so the binding can be compiled without nvcc.
// Shapes are written (B, S, H, D); a packed batch is B = 1 with S = the total number of tokens.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hf_flashattn {

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1 };

// A 4-D view (B, S, H, D) with a contiguous last dimension; strides in elements.
// For a packed (total, H, D) tensor the batch stride is ignored.
struct TensorView {
  void* data;
  int64_t stride_batch;
  int64_t stride_seq;
  int64_t stride_head;
};

// What forward and backward share: the shape of the problem and which keys a row sees.
struct Problem {
  DType dtype;
  int32_t device;              // the current device's index
  int32_t compute_capability;  // 10 * major + minor of it
  int32_t num_sms;
  int32_t batch;               // number of sequences
  int32_t heads_q, heads_k;    // heads_q is a multiple of heads_k
  int32_t head_dim;            // a multiple of 8; the kernel's own may be larger
  int32_t seqlen_q, seqlen_k;  // dense: the sizes; packed: upper bounds (max_seqlen)
  int32_t total_q, total_k;    // packed: number of tokens; dense: batch * seqlen
  float softmax_scale;
  bool causal;  // bottom-right aligned: row r sees key c if c <= r + seqlen_k - seqlen_q

  int32_t const* cu_seqlens_q;  // (batch + 1,) device, or null: dense. Both or neither are set.
  int32_t const* cu_seqlens_k;
  // Sequence b has the keys key_start[b] <= c < key_start[b] + key_len[b]; dense only.
  int32_t const* key_start;  // (batch,) device, or null: 0
  int32_t const* key_len;    // (batch,) device, or null: up to seqlen_k
  // And of these only the ones whose bit is set, bit c % 32 of word c / 32. With bits, key_start is
  // the first such key, and the last one ends the range; a wider range costs time alone.
  int32_t const* key_bits;  // (batch, ceil(seqlen_k / 32)) device, or null: all
  int64_t key_bits_stride;  // words from one row to the next

  uint32_t drop_threshold;   // of 256, below it drops; 0: no dropout; see common/dropout.cuh
  uint32_t drop_limit;       // what random bytes are compared with, made of it
  int64_t const* rng_state;  // (2,) device: Philox seed and offset; null without dropout

  void* stream;  // cudaStream_t
};

struct ForwardParams {
  Problem problem;
  TensorView q, k, v, out;
  float* lse;  // natural log, (B, Hq, Sq), packed (Hq, total_q); -inf for rows that see no key
};

struct BackwardParams {
  Problem problem;
  TensorView dout, q, k, v, out;
  TensorView dq, dk, dv;
  float const* lse;
  void* workspace;  // backward_workspace_bytes(params) bytes, 256-byte aligned, contents undefined
  bool deterministic;
};

// `message` is empty on success; otherwise it says what was expected, what was got and what is
// nearest.
struct Status {
  char message[512];
  bool ok() const { return message[0] == '\0'; }
};

// All launches are asynchronous on problem.stream; device pointers must stay valid until they
// finish. `counter`: where forward_claims_tiles(problem), a 0 in device memory, which the kernel
// leaves as 0; whatever else has it must run before or after, as all on one stream does.
Status launch_forward(ForwardParams const& params, int32_t* counter);
Status launch_backward(BackwardParams const& params);
bool forward_claims_tiles(Problem const& problem);
// One of the current device's counters, which are 0 from the start; null: it cannot be had.
constexpr int32_t kTileCounters = 256;
int32_t* tile_counter(int32_t number);
size_t backward_workspace_bytes(BackwardParams const& params);  // params.workspace is not read
// Whether there is a kernel of this head dim and dtype for this device; asked where nothing is
// launched.
Status check_supported(Problem const& problem);

}  // namespace hf_flashattn
