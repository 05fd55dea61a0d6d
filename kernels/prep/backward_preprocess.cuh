// Before the backward: delta = rowsum(dO * O), LSE in base 2, cleared sums of dQ and counters, and
// zeros for gradients of packed tokens that belong to no sequence. With dropout the first two are
// as common/dropout.cuh (dropout_lift) says.
#pragma once

#include <bit>

#include "common/clear_uncovered.cuh"
#include "common/dropout.cuh"
#include "common/workspace.cuh"

namespace hf_flashattn::prep {

constexpr int kPreprocessThreads = 256;

__device__ __forceinline__ float2 to_float2(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }

// The dot product of eight 16-bit values each; Pair is T's vector of two.
template <class Pair>
__device__ __forceinline__ float dot_8(uint4 a, uint4 b) {
  auto const* x = reinterpret_cast<Pair const*>(&a);
  auto const* y = reinterpret_cast<Pair const*>(&b);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 const u = to_float2(x[i]), v = to_float2(y[i]);
    sum += u.x * v.x + u.y * v.y;
  }
  return sum;
}

template <class T>
struct PairOf;
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

// By all blocks of the first sequence.
__device__ __forceinline__ void clear_uncovered_gradients(BackwardParams const& p) {
  Problem const& problem = p.problem;
  constexpr int kWarps = kPreprocessThreads / kWarpThreads;
  int const warp =
      (blockIdx.y * gridDim.x + blockIdx.x) * kWarps + warp_uniform(threadIdx.x / kWarpThreads);
  int const warps = gridDim.y * gridDim.x * kWarps;
  auto const clear = [&](TensorView const& view, int32_t const* cu_seqlens, int total, int heads) {
    clear_uncovered({view, nullptr, cu_seqlens, total, heads}, problem.batch, problem.head_dim,
                    warp, warps);
  };
  clear(p.dq, problem.cu_seqlens_q, problem.total_q, problem.heads_q);
  clear(p.dk, problem.cu_seqlens_k, problem.total_k, problem.heads_k);
  clear(p.dv, problem.cu_seqlens_k, problem.total_k, problem.heads_k);
}

// Grid (row blocks, query heads, sequences). HeadDim: of the kernel, at least the problem's.
template <class T, int HeadDim, int BlockM>
__global__ void __launch_bounds__(kPreprocessThreads)
    backward_preprocess_kernel(BackwardParams const __grid_constant__ p,
                               BackwardWorkspace const __grid_constant__ workspace) {
  constexpr int kLanes = std::bit_ceil(HeadDim / 8u);  // 16 bytes a lane
  constexpr int kRows = kPreprocessThreads / kLanes;
  launch_dependents();
  Sequence const s(p.problem, blockIdx.z);
  int const first_row = blockIdx.x * BlockM;
  int const stream = workspace.stream(s, blockIdx.y / workspace.group());
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    if (blockIdx.y % workspace.group() == 0)
      workspace.added[stream] = workspace.rounded[stream] = 0;
    if (blockIdx.y == 0 && blockIdx.z == 0) workspace.claimed[0] = workspace.claimed[1] = 0;
  }
  // All loads are on their way before anything waits for one: a block has few rows, and lives about
  // as long as they take.
  constexpr int kPasses = BlockM / kRows;
  static_assert(BlockM % kRows == 0);
  int const lane = threadIdx.x % kLanes, thread_row = threadIdx.x / kLanes;
  int const rows = s.length_q - first_row;
  bool const in_head = lane * 8 < p.problem.head_dim;
  uint4 out[kPasses], dout[kPasses];
  float lse[kPasses];
  auto const load_rows = [&](TensorView const& view, uint4(&values)[kPasses]) {
    T const* const data =
        row_pointer<T>(view, s, s.first_q, first_row + thread_row, blockIdx.y) + lane * 8;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      values[pass] = in_head && thread_row + pass * kRows < rows
                         ? *reinterpret_cast<uint4 const*>(data + pass * kRows * view.stride_seq)
                         : make_uint4(0, 0, 0, 0);
  };
  load_rows(p.out, out);
  load_rows(p.dout, dout);
  float const* const lse_rows = p.lse + lse_offset(p.problem, s, blockIdx.y) + first_row;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    int const row = thread_row + pass * kRows;
    lse[pass] = lane == 0 && row < rows ? lse_rows[row] : -infinity();
  }

  // Recycled sums are for later streams too, which may have more rows.
  if (workspace.first_user(stream) && (rows > 0 || workspace.recycled > 0)) {
    int64_t const sum = workspace.first_sum(s, blockIdx.y) + first_row;
    auto* accumulator = reinterpret_cast<float4*>(workspace.dq + sum * HeadDim);
#pragma unroll
    for (int i = threadIdx.x; i < BlockM * HeadDim / 4; i += kPreprocessThreads)
      accumulator[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (threadIdx.x == 0) workspace.turn[sum / BlockM] = 0;
  }
  if (workspace.packed && blockIdx.z == 0) clear_uncovered_gradients(p);
  if (rows <= 0) return;

  int64_t const slot = workspace.first_slot(s, blockIdx.y) + first_row;
  uint32_t const threshold = p.problem.drop_threshold;
  float const lift = threshold > 0 ? dropout_lift(threshold) : 1.f;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float delta = dot_8<typename PairOf<T>::type>(out[pass], dout[pass]);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      delta += __shfl_xor_sync(0xffffffff, delta, distance);
    if (lane != 0) continue;
    int const row = thread_row + pass * kRows;
    bool const sees_keys = lse[pass] != -infinity();
    workspace.lse_log2[slot + row] = sees_keys ? lse[pass] * kLog2e - log2f(lift) : infinity();
    workspace.delta[slot + row] = sees_keys ? delta / lift : 0.f;
  }
}

}  // namespace hf_flashattn::prep
