// Online softmax (Milakov and Gimelshein 2018; FlashAttention, algorithm 1) over the two rows of
// scores that a lane shares with the three others of its quad: row g in index 0, row g + 8 in 1.
#pragma once

#include "common/ptx.cuh"

namespace hf_flashattn {

// The maximum is lazy: as long as no score exceeds it by more than 8 octaves the probabilities are
// only larger by up to 2^8, which floats and 16-bit operands hold as well, and nothing has to be
// exchanged between lanes or rescaled. A row's result depends on its own scores alone.
struct OnlineSoftmax {
  static constexpr float kOctaves = 8.f;
  float scale_log2;  // softmax scale * log2(e)
  float limit[2];    // raw scores above this raise the offset; -inf before the first key
  float offset[2];   // what is subtracted from score * scale_log2
  float sum[2];      // of the probabilities so far, this lane's columns only

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
    reset();
  }

  // Before the first block of other rows.
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      limit[i] = -infinity();
      offset[i] = 0.f;
      sum[i] = 0.f;
    }
  }

  // Scores become exp2(score * scale_log2 - offset) in place. True (in the whole warp) if earlier
  // results have to be multiplied by `rescale`.
  template <int N>
  __device__ __forceinline__ bool update(float (&scores)[N], float (&rescale)[2]) {
    float highest[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Two chains, or the latency of each maximum would show.
      float even = fmaxf(scores[2 * i], scores[2 * i + 1]);
      float odd = fmaxf(scores[2 * i + 4], scores[2 * i + 5]);
#pragma unroll
      for (int j = 8; j < N; j += 8) {
        even = fmaxf(even, fmaxf(scores[j + 2 * i], scores[j + 2 * i + 1]));
        odd = fmaxf(odd, fmaxf(scores[j + 2 * i + 4], scores[j + 2 * i + 5]));
      }
      highest[i] = fmaxf(even, odd);
    }
    bool const raised = __any_sync(0xffffffff, highest[0] > limit[0] || highest[1] > limit[1]);
    if (raised) raise(highest, rescale);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      scores[j] = exp2_approx(fmaf(scores[j], scale_log2, -offset[j / 2 % 2]));
      sum[j / 2 % 2] += scores[j];
    }
    return raised;
  }

  // After the last block: the factors that normalise the output, and the natural log of the sums.
  __device__ __forceinline__ void finish(float (&normalise)[2], float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = sum[i];
      total += __shfl_xor_sync(0xffffffff, total, 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      bool const empty = total == 0.f;
      normalise[i] = empty ? 0.f : __fdividef(1.f, total);
      lse[i] = empty ? -infinity() : offset[i] * kLn2 + __logf(total);
    }
  }

 private:
  __device__ __forceinline__ void raise(float (&highest)[2], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xffffffff, highest[i], 1));
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xffffffff, highest[i], 2));
      bool const raised = highest[i] > limit[i];
      float const next = raised ? highest[i] * scale_log2 : offset[i];
      // Before the first key there is nothing to rescale, and the difference could overflow.
      rescale[i] = limit[i] == -infinity() ? 0.f : exp2_approx(offset[i] - next);
      limit[i] = raised ? highest[i] + __fdividef(kOctaves, scale_log2) : limit[i];
      offset[i] = next;
      sum[i] *= rescale[i];
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
