// Before the backward: delta = rowsum(dO * O), LSE in base 2, and a cleared dQ accumulator.
#pragma once

#include "common/ptx.cuh"
#include "common/workspace.cuh"

namespace hf_flashattn::prep {

constexpr int kPreprocessThreads = 256;

template <class T>
__device__ __forceinline__ float dot_8(uint4 a, uint4 b);

template <>
__device__ __forceinline__ float dot_8<__half>(uint4 a, uint4 b) {
  auto const* x = reinterpret_cast<__half2 const*>(&a);
  auto const* y = reinterpret_cast<__half2 const*>(&b);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 const u = __half22float2(x[i]), v = __half22float2(y[i]);
    sum += u.x * v.x + u.y * v.y;
  }
  return sum;
}

template <>
__device__ __forceinline__ float dot_8<__nv_bfloat16>(uint4 a, uint4 b) {
  auto const* x = reinterpret_cast<__nv_bfloat162 const*>(&a);
  auto const* y = reinterpret_cast<__nv_bfloat162 const*>(&b);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 const u = __bfloat1622float2(x[i]), v = __bfloat1622float2(y[i]);
    sum += u.x * v.x + u.y * v.y;
  }
  return sum;
}

// Grid (row blocks, query heads, sequences).
template <class T, int HeadDim, int BlockM>
__global__ void __launch_bounds__(kPreprocessThreads)
    backward_preprocess_kernel(BackwardParams const __grid_constant__ p,
                               BackwardWorkspace const __grid_constant__ workspace) {
  constexpr int kLanes = HeadDim / 8;  // 16 bytes a lane
  constexpr int kRows = kPreprocessThreads / kLanes;
  Sequence const s(p.problem, blockIdx.z);
  int const first_row = blockIdx.x * BlockM;
  if (first_row >= s.length_q) return;
  int64_t const slot = workspace.first_slot(s, blockIdx.z, blockIdx.y) + first_row;
  int64_t const lse_row =
      workspace.packed ? int64_t(blockIdx.y) * p.problem.total_q + s.first_q
                       : (int64_t(s.batch) * p.problem.heads_q + blockIdx.y) * p.problem.seqlen_q;

  auto* accumulator = reinterpret_cast<float4*>(workspace.dq + slot * HeadDim);
#pragma unroll
  for (int i = threadIdx.x; i < BlockM * HeadDim / 4; i += kPreprocessThreads)
    accumulator[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  if (threadIdx.x == 0) workspace.turn[slot / BlockM] = 0;

  int const lane = threadIdx.x % kLanes;
#pragma unroll
  for (int r = threadIdx.x / kLanes; r < BlockM; r += kRows) {
    int const row = first_row + r;
    bool const exists = row < s.length_q;
    float delta = 0.f, lse = -infinity();
    if (exists) {
      auto const at = [&](TensorView const& view) {
        return *reinterpret_cast<uint4 const*>(
            static_cast<T const*>(view.data) + s.batch * view.stride_batch +
            (s.first_q + row) * view.stride_seq + blockIdx.y * view.stride_head + lane * 8);
      };
      delta = dot_8<T>(at(p.out), at(p.dout));
      lse = p.lse[lse_row + row];
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      delta += __shfl_xor_sync(0xffffffff, delta, distance);
    if (lane != 0) continue;
    bool const sees_keys = lse != -infinity();
    workspace.lse_log2[slot + r] = sees_keys ? lse * kLog2e : infinity();
    workspace.delta[slot + r] = sees_keys ? delta : 0.f;
  }
}

}  // namespace hf_flashattn::prep
