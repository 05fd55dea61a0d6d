// Online softmax (Milakov and Gimelshein 2018; FlashAttention, algorithm 1) over the two rows of
// scores that a lane shares with the three others of its quad: row g in index 0, row g + 8 in 1.
#pragma once

#include "common/ptx.cuh"

namespace hf_flashattn {

struct OnlineSoftmax {
  float scale_log2;  // softmax scale * log2(e)
  float maximum[2];  // of the raw scores so far, the same in the whole quad
  float sum[2];      // of the probabilities so far, this lane's columns only

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maximum[i] = -infinity();
      sum[i] = 0.f;
    }
  }

  // Scores become exp(scale * (score - maximum)) in place; `rescale` is what earlier results have
  // to be multiplied by.
  template <int N>
  __device__ __forceinline__ void update(float (&scores)[N], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const old_maximum = maximum[i];
      float block = scores[2 * i];
#pragma unroll
      for (int j = 0; j < N; j += 4)
        block = fmaxf(block, fmaxf(scores[j + 2 * i], scores[j + 2 * i + 1]));
      block = fmaxf(block, __shfl_xor_sync(0xffffffff, block, 1));
      block = fmaxf(block, __shfl_xor_sync(0xffffffff, block, 2));
      maximum[i] = fmaxf(old_maximum, block);
      // A row that has seen no key yet: any finite offset gives zeros instead of NaN.
      float const offset = maximum[i] == -infinity() ? 0.f : maximum[i] * scale_log2;
      rescale[i] = exp2_approx(old_maximum * scale_log2 - offset);
      float block_sum = 0.f;
#pragma unroll
      for (int j = 0; j < N; j += 4)
#pragma unroll
        for (int k = 2 * i; k < 2 * i + 2; ++k) {
          scores[j + k] = exp2_approx(fmaf(scores[j + k], scale_log2, -offset));
          block_sum += scores[j + k];
        }
      sum[i] = sum[i] * rescale[i] + block_sum;
    }
  }

  // After the last block: the factors that normalise the output, and the natural log of the sums.
  __device__ __forceinline__ void finish(float (&normalise)[2], float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = sum[i];
      total += __shfl_xor_sync(0xffffffff, total, 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      bool const empty = total == 0.f;
      normalise[i] = empty ? 0.f : 1.f / total;
      lse[i] = empty ? -infinity() : maximum[i] * scale_log2 * kLn2 + __logf(total);
    }
  }
};

// Rows become rows * factor; N / 4 groups of (row g, row g, row g + 8, row g + 8).
template <int N>
__device__ __forceinline__ void scale_rows(float (&acc)[N], float const (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < N; ++j) acc[j] *= factor[j / 2 % 2];
}

}  // namespace hf_flashattn
