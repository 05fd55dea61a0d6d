// Dropout masks that depend on (seed, offset, batch, head, row, column) alone.
//
// Philox4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
// gives one byte an element: 16 calls serve a 16 x 16 tile of scores. With g = row % 8, c = column
// % 8 inside it:
//   call (counter.x % 16)  = g / 2 * 4 + c / 2
//   word of the call       = g % 2 * 2 + c % 2
//   byte of the word       = row % 16 / 8 * 2 + column % 16 / 8
// An accumulator lane (group, quad) of S needs, of the call (group / 2, quad), the two words with
// g % 2 = group % 2; one of S^T needs, of the call (quad, group / 2), the two with c % 2 = group
// % 2. Either way lanes l and l ^ 4 share a call, so for a pair of tiles each makes the call of one
// tile and they swap two words: 16 elements a lane for one call.
//
// An element is kept if its byte >= threshold. The flags that say so are packed into the top two
// bits of each byte before the swap (one shuffle instead of two), and one PRMT with sign
// replication spreads two of them over a register of two 16-bit values.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace hf_flashattn {

// round(256 p), but neither "never" nor "always": the kernels and the reference agree on this rule.
__host__ __device__ inline uint32_t drop_threshold(float p) {
  int const threshold = static_cast<int>(p * 256.f + 0.5f);
  return threshold < 1 ? 1 : threshold > 255 ? 255 : threshold;
}

// The inverse of the kept fraction.
__host__ __device__ inline float keep_scale(float p) { return 256.f / (256 - drop_threshold(p)); }

// Several calls side by side, so that they share the 14 round keys: made once for each they cost
// more than the shuffles, and kept they would cost 14 registers.
template <int Calls>
__device__ __forceinline__ void philox_7(uint4 (&counters)[Calls], uint2 key) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    asm volatile("" : "+r"(key.x), "+r"(key.y));  // or ptxas makes the keys anew for every call
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

template <Down D>
struct DropoutMask {
  uint2 key;
  uint32_t batch_head, offset;
  uint32_t call;        // this lane's call within a tile
  bool odd;             // of lanes l and l ^ 4, this one
  uint32_t low_bits;    // 128 - threshold % 128 in every byte
  uint32_t below_half;  // all ones if threshold < 128

  __device__ __forceinline__ DropoutMask(Problem const& p, int batch, int head) {
    int64_t const seed = p.rng_state[0], position = p.rng_state[1];
    key = make_uint2(uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
    offset = uint32_t(position) ^ uint32_t(uint64_t(position) >> 32);
    batch_head = batch * p.heads_q + head;
    int const group = threadIdx.x % kWarpThreads / 4, quad = threadIdx.x % 4;
    call = D == Down::kRows ? group / 2 * 4 + quad : quad * 4 + group / 2;
    odd = group % 2;
    uint32_t const threshold = drop_threshold(p.dropout_p);
    low_bits = (128 - threshold % 128) * 0x01010101u;
    below_half = threshold < 128 ? 0xffffffffu : 0;
  }

  // The flags of this lane's elements in pairs of neighbouring tiles along the accumulator's
  // columns: kRows: (row16, column16 + 2 pair) and the next; kKeys: (row16 + 2 pair, column16) and
  // the next. Bit 7 of each byte is element e = 0, bit 6 element e = 1, where e is column % 2
  // (kRows) or row % 2.
  template <int Pairs>
  __device__ __forceinline__ void draw(uint32_t (&tiles)[Pairs][2], int row16, int column16) const {
    constexpr bool kRowsDown = D == Down::kRows;
    uint4 random[Pairs];
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) {
      uint32_t const across = 2 * pair + odd;
      uint32_t const row = row16 + (kRowsDown ? 0 : across);
      uint32_t const column = column16 + (kRowsDown ? across : 0);
      random[pair] = make_uint4(column * 16 + call, row, batch_head, offset);
    }
    philox_7(random, key);
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) {
      // Words with (g % 2, c % 2) = (0,0), (0,1), (1,0), (1,1) are x, y, z, w.
      uint4 const r = random[pair];
      uint32_t const of_even = both_flags(r.x, kRowsDown ? r.y : r.z);
      uint32_t const of_odd = both_flags(kRowsDown ? r.z : r.y, r.w);
      uint32_t const own = odd ? of_odd : of_even;
      uint32_t const received = __shfl_xor_sync(0xffffffff, odd ? of_even : of_odd, 4);
      tiles[pair][0] = odd ? received : own;
      tiles[pair][1] = odd ? own : received;
    }
  }

  // All ones or zeros for each of the two 16-bit values at (row half, column half) of a tile.
  static __device__ __forceinline__ uint32_t pair_mask(uint32_t tile, int row_half,
                                                       int column_half) {
    uint32_t const byte = row_half * 2 + column_half;
    uint32_t const low = 8 | byte, high = 8 | (4 + byte);
    return permute_signed(tile, tile << 1, low | low << 4 | high << 8 | high << 12);
  }

  // All ones or zeros for one float: element e at (row half, column half) of a tile.
  static __device__ __forceinline__ uint32_t single_mask(uint32_t tile, int row_half,
                                                         int column_half, int e) {
    uint32_t const byte = 8 | (row_half * 2 + column_half);
    return permute_signed(tile << e, 0, byte | byte << 4 | byte << 8 | byte << 12);
  }

 private:
  // Bit 7 of each byte: random byte >= threshold. The other bits are noise.
  __device__ __forceinline__ uint32_t flags(uint32_t random) const {
    uint32_t const low = (random & 0x7f7f7f7fu) + low_bits;
    return (random & low) | ((random | low) & below_half);
  }

  __device__ __forceinline__ uint32_t both_flags(uint32_t first, uint32_t second) const {
    return (flags(first) & 0x80808080u) | (flags(second) >> 1 & ~0x80808080u);
  }

  // PRMT with sign replication (selector bit 3), which __byte_perm masks off.
  static __device__ __forceinline__ uint32_t permute_signed(uint32_t a, uint32_t b,
                                                            uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
  }
};

}  // namespace hf_flashattn
