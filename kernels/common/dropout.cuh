// Dropout masks that depend on (seed, offset, batch, head, row, column) alone.
//
// Philox4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") runs
// once a kernel with the key (seed) and the counter (offset, 0, 0): its words, combined with
// (call, row / 64, head, column / 64) by exclusive or, are counters of Philox with the key 0, whose
// round keys are constants of the program. 16 calls serve a 64 x 64 tile of scores. With g = row %
// 8 and c = column % 8:
//   call             = g / 2 * 4 + c / 2
//   word of the call = g % 2 * 2 + c % 2
// A word serves the 4 elements (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8) of each of the tile's
// 16 squares of 16 x 16, by bits 16 .. 47 of its product with the square's multiplier: a half word
// for each row, of which
//   byte, the half rotated left by 1 = 1 - column % 16 / 8 (the high one for the left 8 columns)
// Products of one word with different multipliers are points of a lattice of 2^32: bytes of two, or
// of three, are as good as independent (tests/cpu/test_dropout.py), all 64 of a word are not.
//
// An accumulator lane (group, quad) of S needs, of the call (group / 2, quad), the two words with
// g % 2 = group % 2; one of S^T needs, of the call (quad, group / 2), those with c % 2 = group % 2.
// Either way lanes l and l ^ 4 share a call, so for a pair of tiles each makes the call of one tile
// and they swap two words: 128 elements a lane for one call.
//
// What costs time is instructions, and where the chain of Philox stands: words are drawn by a call
// of their own, at a moment that the loop chooses (Draw in sm90/policy.cuh). Halves of two
// elements that a lane packs into one register are put side by side, and one HSET2 compares both:
// |half| as an fp16 number against threshold << 7 is the byte in bits 7 .. 14 against the
// threshold. (fp16 numbers are ordered as their bits are; NaN, 249 .. 255, counts as larger.) With
// the bytes of each half swapped the other byte, bits 0 .. 6 and 15, stands there. The flags
// are 1.0 and 0.0 in fp16, and multiply the packed probabilities: 0x3c00 is 2^-7 in bf16, which the
// caller undoes.
#pragma once

#include <type_traits>

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

  __device__ __forceinline__ explicit ByteRule(Problem const& p)
      : limit(p.drop_limit), below(p.drop_threshold > 128) {}
};

// One instruction. What nvcc makes of a product of uint64_t adds an upper half that is zero.
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;\n" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

__device__ __forceinline__ uint4 philox_7(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    uint64_t const a = multiply_wide(0xD2511F53u, counter.x);
    uint64_t const b = multiply_wide(0xCD9E8D57u, counter.z);
    counter = make_uint4(uint32_t(b >> 32) ^ counter.y ^ key.x, uint32_t(b),
                         uint32_t(a >> 32) ^ counter.w ^ key.y, uint32_t(a));
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// What a word is multiplied by in the square (row / 16 % 4, column / 16 % 4) of its tile: the first
// round constants of SHA-256, made odd.
static __constant__ uint32_t kMultipliers[4][4] = {
    {0x428a2f99, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5},
    {0x3956c25b, 0x59f111f1, 0x923f82a5, 0xab1c5ed5},
    {0xd807aa99, 0x12835b01, 0x243185bf, 0x550c7dc3},
    {0x72be5d75, 0x80deb1ff, 0x9bdc06a7, 0xc19bf175}};

enum class Down { kRows, kKeys };  // which index of the accumulator runs down its 64 rows

// The random bytes of a lane's 8 elements in a 16 x 16 square, and what is made of them.
struct DropoutSquare {
  uint64_t products[2];  // of the words of neighbouring elements

  __device__ __forceinline__ DropoutSquare(uint32_t const (&words)[2], uint32_t multiplier)
      : products{multiply_wide(words[0], multiplier), multiply_wide(words[1], multiplier)} {}

  // 1.0 or 0.0, as fp16 numbers, for the two elements of a register at (row half, column half).
  __device__ __forceinline__ uint32_t keep_flags(ByteRule const& rule, int row_half,
                                                 int column_half) const {
    uint32_t const halves =
        row_half ? __byte_perm(uint32_t(products[0] >> 32), uint32_t(products[1] >> 32),
                               column_half ? 0x4501 : 0x5410)
                 : __byte_perm(uint32_t(products[0]), uint32_t(products[1]),
                               column_half ? 0x6723 : 0x7632);
    return compare(halves, rule);
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

// What the rows and columns of tiles are combined with: random words of the call's own.
__device__ __forceinline__ uint2 dropout_origin(Problem const& p) {
  uint64_t const seed = p.rng_state[0], offset = p.rng_state[1];
  uint4 const r = philox_7(make_uint4(uint32_t(offset), uint32_t(offset >> 32), 0, 0),
                           make_uint2(uint32_t(seed), uint32_t(seed >> 32)));
  return make_uint2(r.x, r.y);
}

// In shared memory, for loops that leave no registers for it: an origin, or nothing.
struct NoOrigin {};
template <bool Needed>
using SharedDropoutOrigin = std::conditional_t<Needed, uint2, NoOrigin>;

__device__ __forceinline__ uint2 load_origin(uint2 const& shared) {
  return load_shared_8b(smem_address(&shared));
}

// What a lane's counters have in common.
template <Down D>
struct DropoutLane {
  uint2 origin;
  uint32_t call;
  bool odd;  // of lanes l and l ^ 4, this one

  DropoutLane() = default;
  __device__ __forceinline__ explicit DropoutLane(uint2 origin) : origin(origin) { find_call(); }

  // Again where there are no registers for it.
  __device__ __forceinline__ void find_call() {
    int const lane = lane_anew(), group = lane / 4, quad = lane % 4;
    odd = group % 2;
    call = D == Down::kRows ? group / 2 * 4 + quad : quad * 4 + group / 2;
  }
};

// This lane's elements in a line of squares, 16 rows by 16 * Squares columns (kRows), or the same
// transposed (kKeys). The line begins with a tile, but for one of 6 squares, which may begin in the
// middle of one.
template <Down D, int Squares>
struct DropoutLine {
  static constexpr bool kWholeTiles = Squares % 4 == 0;
  static constexpr int kTiles = (Squares + 3) / 4;
  static_assert(kTiles <= 2 && Squares % 2 == 0, "two lanes make the calls of two tiles");
  uint32_t words[kTiles][2];  // of neighbouring elements
  int first;                  // square of its tile
  uint32_t multipliers[4];

  // head: its index among those of all batches; row, column: of the first element of the line.
  template <class Index>
  __device__ __forceinline__ void draw(DropoutLane<D> const& lane, uint32_t head, Index row,
                                       Index column) {
    draw_words(lane, head, row, column);
    find_multipliers(D == Down::kRows ? row : column);
  }

  // draw in two parts, for loops in which words wait for S: four registers less meanwhile.
  template <class Index>
  __device__ __forceinline__ void draw_words(DropoutLane<D> const& lane, uint32_t head, Index row,
                                             Index column) {
    constexpr bool kRows = D == Down::kRows;
    first = kWholeTiles ? 0 : (kRows ? column : row) / 16 % 4;
    uint32_t const next = kTiles > 1 && lane.odd;
    uint4 const counter{lane.call, lane.origin.x ^ (row / kTile + (kRows ? 0 : next)), head,
                        lane.origin.y ^ (column / kTile + (kRows ? next : 0))};
    uint4 const r = philox_7(counter, make_uint2(0, 0));
    uint32_t const even[2] = {r.x, kRows ? r.y : r.z}, odd[2] = {kRows ? r.z : r.y, r.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kTiles == 1) {
        words[0][i] = lane.odd ? odd[i] : even[i];
      } else {
        uint32_t const received = __shfl_xor_sync(0xffffffff, lane.odd ? even[i] : odd[i], 4);
        words[0][i] = lane.odd ? received : even[i];
        words[1][i] = lane.odd ? odd[i] : received;
      }
    }
  }

  // across: the row of a line of kRows, the column of one of kKeys.
  template <class Index>
  __device__ __forceinline__ void find_multipliers(Index across) {
    int const other = across / 16 % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      multipliers[i] = D == Down::kRows ? kMultipliers[other][(first + i) % 4]
                                        : kMultipliers[(first + i) % 4][other];
  }

  __device__ __forceinline__ DropoutSquare square(int i) const {
    if (kWholeTiles || i / 2 != 1) return {words[i / 4], multipliers[i % 4]};
    uint32_t const of_second[2] = {first ? words[kTiles - 1][0] : words[0][0],
                                   first ? words[kTiles - 1][1] : words[0][1]};
    return {of_second, multipliers[i % 4]};
  }

 private:
  static constexpr int kTile = 64;
};

}  // namespace hf_flashattn
