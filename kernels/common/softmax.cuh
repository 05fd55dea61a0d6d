// Online softmax (Milakov and Gimelshein 2018; FlashAttention, algorithm 1) over the two rows of
// scores that a lane shares with the three others of its quad: row g in index 0, row g + 8 in 1.
#pragma once

#include "common/ptx.cuh"

namespace hf_flashattn {

// Rows become rows * factor; N / 4 groups of (row g, row g, row g + 8, row g + 8).
template <int N>
__device__ __forceinline__ void scale_rows(float (&acc)[N], float const (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < N; ++j) acc[j] *= factor[j / 2 % 2];
}

// The offset is lazy: a row takes its maximum of the first block in which it sees a key, and no
// maxima are looked for afterwards. Probabilities may then exceed 1, and their sums, which are made
// anyway, tell when the offset has to follow: after the exponentials, so that nothing waits for a
// maximum. Then all is scaled by a power of two, which loses nothing; only where the sum has left
// the range of that, scores more than 87 octaves above the earlier ones are needed again. A row's
// result depends on its own scores alone.
struct OnlineSoftmax {
  static constexpr float kLargeSum = 1 << 13;  // of a lane's columns; fp16 ends at 2^16
  static constexpr float kLostSum = 1.3e30f;   // 2^100: what was there before is nothing beside it
  float scale_log2;                            // softmax scale * log2(e)
  float offset[2];  // what is subtracted from score * scale_log2; 0 before the first key
  float sum[2];     // of the probabilities so far, this lane's columns only

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2)
      : scale_log2(scale_log2), offset{0.f, 0.f}, sum{0.f, 0.f} {}

  // Scores of a tile's first block become exp2(score * scale_log2 - offset) in place.
  template <int N>
  __device__ __forceinline__ void first(float (&scores)[N]) {
    sum[0] = sum[1] = 0.f;
    settle(scores, true, true);
    exponentiate(scores);
  }

  // The same for the next block.
  template <int N>
  __device__ __forceinline__ void next(float (&scores)[N]) {
    // Rows that have seen no key, and a few others.
    if (__any_sync(0xffffffff, sum[0] == 0.f || sum[1] == 0.f))
      settle(scores, quad_sum(sum[0]) == 0.f, quad_sum(sum[1]) == 0.f);
    exponentiate(scores);
  }

  // Afterwards, in the whole warp: whether some offset has to follow.
  __device__ __forceinline__ bool sums_are_large() const {
    return __any_sync(0xffffffff, sum[0] > kLargeSum || sum[1] > kLargeSum);
  }

  // If so: the probabilities by the new offsets, and `rescale` for all earlier results.
  // scores_again(scores, rows) makes the scores of these rows of a lane once more.
  template <int N, class ScoresAgain>
  __device__ __forceinline__ void raise(float (&scores)[N], float (&rescale)[2],
                                        ScoresAgain const& scores_again) {
    bool lost[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const highest = quad_max(sum[i]);
      lost[i] = highest > kLostSum;
      bool const large = highest > kLargeSum && !lost[i];
      int const octaves = large ? (__float_as_int(highest) >> 23) - 127 : 0;
      offset[i] += octaves;
      rescale[i] = __int_as_float((127 - octaves) << 23);
      sum[i] *= rescale[i];
    }
    scale_rows(scores, rescale);
    if (__any_sync(0xffffffff, lost[0] || lost[1])) replace(scores, lost, rescale, scores_again);
  }

  // After the last block: the factors that normalise the output, and the natural log of the sums.
  __device__ __forceinline__ void finish(float (&normalise)[2], float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const total = quad_sum(sum[i]);
      bool const empty = total == 0.f;
      normalise[i] = empty ? 0.f : __fdividef(1.f, total);
      lse[i] = empty ? -infinity() : offset[i] * kLn2 + __logf(total);
    }
  }

 private:
  static __device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(0xffffffff, value, 1);
    return value + __shfl_xor_sync(0xffffffff, value, 2);
  }
  static __device__ __forceinline__ float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffff, value, 2));
  }

  // Of row I, over all its columns of the block.
  template <int I, int N>
  static __device__ __forceinline__ float row_max(float const (&values)[N]) {
    // Two chains, or the latency of each maximum would show.
    float even = fmaxf(values[2 * I], values[2 * I + 1]);
    float odd = fmaxf(values[2 * I + 4], values[2 * I + 5]);
#pragma unroll
    for (int j = 8; j < N; j += 8) {
      even = fmaxf(even, fmaxf(values[j + 2 * I], values[j + 2 * I + 1]));
      odd = fmaxf(odd, fmaxf(values[j + 2 * I + 4], values[j + 2 * I + 5]));
    }
    return quad_max(fmaxf(even, odd));
  }

  template <int N>
  __device__ __forceinline__ void exponentiate(float (&scores)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      scores[j] = exp2_approx(fmaf(scores[j], scale_log2, -offset[j / 2 % 2]));
      sum[j / 2 % 2] += scores[j];
    }
  }

  // Offsets for the rows that have none.
  template <int N>
  __device__ __forceinline__ void settle(float const (&scores)[N], bool low, bool high) {
    float const highest[2] = {row_max<0>(scores), row_max<1>(scores)};
    bool const unset[2] = {low, high};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (unset[i]) offset[i] = highest[i] == -infinity() ? 0.f : highest[i] * scale_log2;
  }

  // Makes the probabilities of lost rows anew. Through local memory and in loops that stay loops,
  // or the registers of this rare case would be missing in every block.
  template <int N, class ScoresAgain>
  __device__ __forceinline__ void replace(float (&scores)[N], bool const (&lost)[2],
                                          float (&rescale)[2], ScoresAgain const& scores_again) {
    float local[N];
#pragma unroll
    for (int j = 0; j < N; ++j) local[j] = scores[j];
    scores_again(local, lost);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = -infinity(), total = 0.f;
#pragma unroll 1
      for (int j = 2 * i; j < N; j += 4) highest = fmaxf(highest, fmaxf(local[j], local[j + 1]));
      float const next = quad_max(highest) * scale_log2;
      if (!lost[i]) continue;
#pragma unroll 1
      for (int j = 2 * i; j < N; j += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          local[j + e] = exp2_approx(fmaf(local[j + e], scale_log2, -next));
          total += local[j + e];
        }
      offset[i] = next;
      sum[i] = total;
      rescale[i] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) scores[j] = local[j];
  }
};

}  // namespace hf_flashattn
