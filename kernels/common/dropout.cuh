// Dropout masks that depend on (seed, offset, batch, head, row, column) alone.
//
// Philox4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
// gives one byte an element: 16 calls serve a 16 x 16 tile of scores. With g = row % 8, c = column
// % 8 inside it:
//   call                  = g / 2 * 4 + c / 2
//   word of the call      = (g + column / 16) % 2 * 2 + row % 16 / 8
//   16-bit half of it     = c % 2
//   byte, the half rotated left by 1 = 1 - column % 16 / 8 (the high one for the left 8 columns)
//
// An accumulator lane (group, quad) of S needs, of the call (group / 2, quad), the two words with
// g % 2 = group % 2; one of S^T needs, of the call (quad, group / 2), the halves with c % 2 = group
// % 2. Either way lanes l and l ^ 4 share a call, so for a pair of tiles each makes the call of one
// tile and they swap two words: 16 elements a lane for one call.
//
// What costs time is instructions, above all those of the half-rate integer pipe. So a word's
// halves are two elements that a lane packs into one register, and one HSET2 compares both: |half|
// as an fp16 number against threshold << 7 is the byte in bits 7 .. 14 against the threshold.
// (fp16 numbers are ordered as their bits are; NaN, 249 .. 255, counts as larger.) With the bytes
// of each half swapped the other byte, bits 0 .. 6 and 15, stands there. The flags are 1.0 and 0.0
// in fp16, and multiply the packed probabilities: 0x3c00 is 2^-7 in bf16, which the caller undoes.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace hf_flashattn {

// The inverse of the kept fraction, 1 without dropout.
__host__ __device__ inline float keep_scale(uint32_t threshold) {
  return 256.f / (256 - threshold);
}

// The fp16 number 1.0 as a number of type T: what keep_flags multiplies kept elements by.
template <class T>
constexpr float kFlagValue = 1.f;
template <>
constexpr float kFlagValue<__nv_bfloat16> = 1.f / 128;

// The backward's P is multiplied by this (by way of the LSE) and its delta divided: a kept flag,
// read as a float, is the other factor of 2^-7, so that P^T (flag * dP^T - delta) needs no further
// product. P' has the flag's value in T instead, and what accumulates it is scaled by the last.
__host__ __device__ inline float dropout_lift(uint32_t threshold) {
  return 128.f * keep_scale(threshold);
}
template <class T>
constexpr float kLiftedScale = 1.f / (128.f * kFlagValue<T>);

// Which bytes are kept. A threshold t up to 128 keeps byte >= t; above, byte < 256 - t, since bytes
// above 248 cannot be told apart.
struct ByteRule {
  uint32_t limit;  // in bits 7 .. 14 of both halves
  bool below;      // keep bytes below the limit, not the others

  __host__ __device__ explicit ByteRule(uint32_t threshold)
      : limit((threshold > 128 ? 256 - threshold : threshold) * 0x00800080u),
        below(threshold > 128) {}
};

// Several calls side by side, so that they share the 14 round keys: made once for each they cost
// more than the shuffles, and kept they would cost 14 registers. Counters of one lane differ in w
// alone: then four products of the first three rounds are the same in all of them.
template <int Calls>
__host__ __device__ __forceinline__ void philox_7(uint4 (&counters)[Calls], uint2 key) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(key.x), "+r"(key.y));  // or ptxas makes the keys anew for every call
#endif
#pragma unroll
    for (int i = 0; i < Calls; ++i) {
      uint4& counter = counters[i];
      uint64_t const a = uint64_t{0xD2511F53u} * counter.x;
      uint64_t const b = uint64_t{0xCD9E8D57u} * counter.z;
      counter = make_uint4(uint32_t(b >> 32) ^ counter.y ^ key.x, uint32_t(b),
                           uint32_t(a >> 32) ^ counter.w ^ key.y, uint32_t(a));
    }
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
}

enum class Down { kRows, kKeys };  // which index of the accumulator runs down its 64 rows

// The random words of a lane's elements in a 16 x 16 tile, and what is made of them.
struct DropoutTile {
  uint32_t words[2];  // by row % 16 / 8

  // 1.0 or 0.0, as fp16 numbers, for the two elements of a register at (row half, column half).
  __device__ __forceinline__ uint32_t keep_flags(ByteRule const& rule, int row_half,
                                                 int column_half) const {
    uint32_t const word = words[row_half];
    return compare(column_half ? __byte_perm(word, 0, 0x2301) : word, rule);
  }

 private:
  static __device__ __forceinline__ uint32_t compare(uint32_t halves, ByteRule const& rule) {
    uint32_t flags;
    asm("{\n"
        ".reg .pred below;\n"
        ".reg .b32 magnitude;\n"
        "setp.ne.u32 below, %3, 0;\n"
        "abs.f16x2 magnitude, %1;\n"
        "set.geu.xor.f16x2.f16x2 %0, magnitude, %2, below;\n"
        "}\n"
        : "=r"(flags)
        : "r"(halves), "r"(rule.limit), "r"(uint32_t(rule.below)));
    return flags;
  }
};

template <Down D>
struct DropoutMask {
  uint2 key;
  uint32_t batch_head, offset;
  uint32_t call;  // this lane's call within a tile
  bool odd;       // of lanes l and l ^ 4, this one

  __device__ __forceinline__ DropoutMask(Problem const& p, int batch, int head) {
    int64_t const seed = p.rng_state[0], position = p.rng_state[1];
    key = make_uint2(uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
    offset = uint32_t(position) ^ uint32_t(uint64_t(position) >> 32);
    batch_head = batch * p.heads_q + head;
    int const lane = D == Down::kKeys ? lane_anew() : threadIdx.x % kWarpThreads;
    int const group = lane / 4, quad = lane % 4;
    call = D == Down::kRows ? group / 2 * 4 + quad : quad * 4 + group / 2;
    odd = group % 2;
  }

  // This lane's elements in pairs of neighbouring tiles along the accumulator's columns. kRows:
  // (row16, column16 + 2 pair) and the next; kKeys: (row16 + 2 pair, column16) and the next.
  template <int Pairs>
  __device__ __forceinline__ void draw(DropoutTile (&tiles)[Pairs][2], int row16,
                                       int column16) const {
    uint4 random[Pairs];
    uint4 const first = counter(row16, column16);
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair)
      random[pair] = make_uint4(first.x, first.y, first.z,
                                first.w + (2 * pair + odd) * (D == Down::kRows ? 1 : kRowStep));
    philox_7(random, key);
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) {
      uint32_t own[2], other[2];
      split(random[pair], column16, own, other);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t const received = __shfl_xor_sync(0xffffffff, other[i], 4);
        tiles[pair][0].words[i] = odd ? received : own[i];
        tiles[pair][1].words[i] = odd ? own[i] : received;
      }
    }
  }

 private:
  static constexpr uint32_t kRowStep = 1 << 16;

  // Beyond 2^20 rows or columns their upper bits go where the call is; there is room.
  __device__ __forceinline__ uint4 counter(uint32_t row16, uint32_t column16) const {
    return make_uint4(call | (row16 >> 16) << 4 | column16 & 0xffff0000u, offset, batch_head,
                      row16 << 16 | column16 & 0xffff);
  }

  // The words of this lane's elements and of those of lane l ^ 4. kRows: the tile's column16 is as
  // odd as the lane, so that its own words are the first two. kKeys: half (c % 2) of the two words
  // of g % 2 = 0 and 1, which stand the other way round in odd tiles.
  __device__ __forceinline__ void split(uint4 const& r, int column16, uint32_t (&own)[2],
                                        uint32_t (&other)[2]) const {
    if constexpr (D == Down::kRows) {
      own[0] = r.x, own[1] = r.y, other[0] = r.z, other[1] = r.w;
    } else {
      uint32_t const low = column16 % 2 ? 0x1054 : 0x5410, high = low + 0x2222;
      uint32_t const selector_own = odd ? high : low, selector_other = odd ? low : high;
      own[0] = __byte_perm(r.x, r.z, selector_own);
      own[1] = __byte_perm(r.y, r.w, selector_own);
      other[0] = __byte_perm(r.x, r.z, selector_other);
      other[1] = __byte_perm(r.y, r.w, selector_other);
    }
  }
};

}  // namespace hf_flashattn
