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
// Of the call (group / 2, quad) an accumulator lane (group, quad) of S needs the two words with
// g % 2 = group % 2; one of S^T needs, of the call (quad, group / 2), the halves with c % 2 = group
// % 2. So lanes l and l ^ 4 share each call, and no layout would let one lane of both use up a call
// alone. Warps of the producer that would idle make the words, in the order in which lanes read
// them from shared memory (DropoutWords); the wide backward has none and swaps by shuffles.
//
// What costs a consumer time is instructions, above all those of the half-rate integer pipe. So the
// halves of a word are two elements that a lane packs into one register, and one HSET2 compares
// both: |half| as an fp16 number against threshold << 7 is the byte in bits 7 .. 14 against the
// threshold. (fp16 numbers are ordered as their bits are; NaN, 249 .. 255, counts as larger.) With
// the bytes of each half swapped, the other byte, of bits 0 .. 6 and 15, stands there. The flags
// are 1.0 and 0.0 in fp16, and multiply the packed probabilities: 0x3c00 is 2^-7 in bf16, which the
// caller undoes. For 64 x 128 scores of bf16 a warp executes 103 instructions more than without
// dropout, and the warp that makes the words 150.
#pragma once

#include "common/mbarrier.cuh"
#include "params.h"

namespace hf_flashattn {

// round(256 p), but neither "never" nor "always": the kernels and the reference agree on this rule.
__host__ __device__ inline uint32_t drop_threshold(float p) {
  int const threshold = static_cast<int>(p * 256.f + 0.5f);
  return threshold < 1 ? 1 : threshold > 255 ? 255 : threshold;
}

// The inverse of the kept fraction.
__host__ __device__ inline float keep_scale(float p) { return 256.f / (256 - drop_threshold(p)); }

// The fp16 number 1.0 as a number of type T: what keep_flags multiplies kept elements by.
template <class T>
constexpr float kFlagValue = 1.f;
template <>
constexpr float kFlagValue<__nv_bfloat16> = 1.f / 128;

// The backward's P is multiplied by this (by way of the LSE) and its delta divided: a kept flag,
// read as a float, is the other factor of 2^-7, so that P^T (flag * dP^T - delta) needs no further
// product. P' has the flag's value in T instead, and what accumulates it is scaled by the last.
__host__ __device__ inline float dropout_lift(float p) { return 128.f * keep_scale(p); }
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

// Several calls side by side, so that they share the 14 round keys. Counters of one lane differ in
// w alone: then four products of the first three rounds are the same in all of them.
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

// The random words of one head.
struct DropoutCounters {
  uint2 key;
  uint32_t batch_head, offset;

  __device__ __forceinline__ DropoutCounters(Problem const& p, int batch, int head)
      : DropoutCounters(p) {
    begin_head(p, batch, head);
  }
  __device__ __forceinline__ explicit DropoutCounters(Problem const& p) {
    int64_t const seed = p.rng_state[0], position = p.rng_state[1];
    key = make_uint2(warp_uniform(uint32_t(seed)), warp_uniform(uint32_t(uint64_t(seed) >> 32)));
    offset = uint32_t(position) ^ uint32_t(uint64_t(position) >> 32);
  }
  __device__ __forceinline__ void begin_head(Problem const& p, int batch, int head) {
    batch_head = batch * p.heads_q + head;
  }

  // The same call of tiles first + step * i along the accumulator's columns, from (row16, column16)
  // on. Beyond 2^20 rows or columns their upper bits go where the call is; there is room.
  template <Down D, int Calls>
  __device__ __forceinline__ void draw(uint4 (&random)[Calls], uint32_t call, uint32_t row16,
                                       uint32_t column16, uint32_t first, uint32_t step) const {
    uint32_t const x = call | (row16 >> 16) << 4 | column16 & 0xffff0000u;
    uint32_t const w = row16 << 16 | column16 & 0xffff;
#pragma unroll
    for (int i = 0; i < Calls; ++i)
      random[i] = make_uint4(x, offset, batch_head,
                             w + (first + step * i) * (D == Down::kRows ? 1 : 1 << 16));
    philox_7(random, key);
  }
};

// Of a call of S^T: the words of the elements with c % 2 = 0 and 1. They are halves of the words
// with g % 2 = 0 and 1, which stand the other way round in odd tiles.
struct TransposedWords {
  uint32_t low;  // PRMT selector
  __device__ __forceinline__ explicit TransposedWords(int column16)
      : low(column16 % 2 ? 0x1054 : 0x5410) {}
  __device__ __forceinline__ uint32_t selector(bool odd) const { return odd ? low + 0x2222 : low; }
};

// For a warp that makes its own words of S^T: this lane's elements in pairs of neighbouring tiles,
// (row16 + 2 pair, column16) and the next. Lanes l and l ^ 4 need halves of the same calls: each
// makes that of one tile of a pair, and they swap two words: 16 elements a lane for one call.
template <int Pairs>
__device__ __forceinline__ void draw_transposed(DropoutTile (&tiles)[Pairs][2],
                                                DropoutCounters const& counters, int row16,
                                                int column16) {
  int const group = threadIdx.x % kWarpThreads / 4, quad = threadIdx.x % 4;
  bool const odd = group % 2;
  uint4 random[Pairs];
  counters.draw<Down::kKeys>(random, quad * 4 + group / 2, row16, column16, odd, 2);
  TransposedWords const words(column16);
#pragma unroll
  for (int pair = 0; pair < Pairs; ++pair) {
    uint4 const r = random[pair];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t const even_g = i == 0 ? r.x : r.y, odd_g = i == 0 ? r.z : r.w;
      uint32_t const own = __byte_perm(even_g, odd_g, words.selector(odd));
      uint32_t const received =
          __shfl_xor_sync(0xffffffff, __byte_perm(even_g, odd_g, words.selector(!odd)), 4);
      tiles[pair][0].words[i] = odd ? received : own;
      tiles[pair][1].words[i] = odd ? own : received;
    }
  }
}

// For a warp that another warp makes the words for: 16 x 16 tiles along the accumulator's columns,
// of each 16 calls, of each the two words of lanes l and the two of l ^ 4.
template <int Tiles>
struct DropoutWords {
  static_assert(Tiles % 2 == 0, "a warp makes two tiles at once");
  static constexpr int kCalls = 2;  // side by side in a lane; four would need more registers
  alignas(16) uint4 calls[Tiles][16];
  Mbarrier full, empty;  // the warp that makes them; the warp that uses them

  __device__ __forceinline__ void init() {
    full.init(1);
    empty.init(1);
  }

  // Tiles from (row16, column16) on, along the columns (kRows) or the rows (kKeys).
  template <Down D>
  __device__ __forceinline__ void fill(DropoutCounters const& counters, int row16, int column16) {
    int const slot = threadIdx.x % 16, odd = threadIdx.x / 16 % 2;
    uint32_t const call = D == Down::kRows ? slot : slot % 4 * 4 + slot / 4;
    constexpr int kStep = Tiles % (2 * kCalls) == 0 ? kCalls : 1;
#pragma unroll
    for (int tile = 0; tile < Tiles; tile += 2 * kStep) {
      uint4 random[kStep];
      counters.draw<D>(random, call, row16, column16, tile + odd, 2);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        uint4 r = random[i];
        if constexpr (D == Down::kKeys) {
          uint32_t const low = TransposedWords(column16).selector(0), high = low + 0x2222;
          r = make_uint4(__byte_perm(r.x, r.z, low), __byte_perm(r.y, r.w, low),
                         __byte_perm(r.x, r.z, high), __byte_perm(r.y, r.w, high));
        }
        calls[tile + 2 * i + odd][slot] = r;
      }
    }
  }

  // What lane (group, quad) needs of a tile. kRows: an odd tile has the words of odd g first.
  template <Down D>
  __device__ __forceinline__ DropoutTile read(int tile) const {
    int const group = threadIdx.x % kWarpThreads / 4, quad = threadIdx.x % 4;
    int const half = group % 2 ^ (D == Down::kRows ? tile % 2 : 0);
    auto const* words = reinterpret_cast<uint2 const*>(&calls[tile][group / 2 * 4 + quad]) + half;
    uint2 const value = *words;
    return {{value.x, value.y}};
  }
};

// In its place without dropout.
struct NoDropout {};

}  // namespace hf_flashattn
