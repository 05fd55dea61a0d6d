// Keys that are hidden inside their range, in problems with key_bits: the bits in global memory,
// and those of one block in shared memory.
#pragma once

#include "common/seqlen.cuh"

namespace hf_flashattn {

// The bits from this one on, which may lie outside the word.
__host__ __device__ __forceinline__ uint32_t ones_from(int bit) {
  return bit >= 32 ? 0u : ~0u << max(bit, 0);
}

// Of one sequence.
struct KeyBits {
  int32_t const* words;
  int last;  // word

  __host__ __device__ __forceinline__ KeyBits(Problem const& p, int index)
      : words(p.key_bits + index * p.key_bits_stride), last((p.seqlen_k - 1) / 32) {}

  // A key that exists.
  __device__ __forceinline__ bool has(int key) const { return words[key / 32] >> key % 32 & 1; }

  // Keys first .. first + 31, the first in the lowest bit; those that do not exist come as
  // anything. `first` is a multiple of Step.
  template <int Step>
  __host__ __device__ __forceinline__ uint32_t from(int first) const {
    uint32_t const low = words[min(first / 32, last)];
    if constexpr (Step % 32 == 0) return low;
    uint32_t const high = words[min(first / 32 + 1, last)];
    return uint32_t((uint64_t{high} << 32 | low) >> first % 32);
  }

  // Whether none of the keys first .. first + Count - 1, which exist, is hidden.
  template <int Count>
  __host__ __device__ __forceinline__ bool has_all(int first) const {
    static_assert(Count % 32 == 0, "the last word is all of this block");
    uint32_t all = ~0u;
#pragma unroll
    for (int i = 0; i < Count; i += 32) all &= from<Count>(first + i);
    return all == ~0u;
  }
};

// Keys first_key + before .. + 31 of a block of `Keys`, the first in the lowest bit.
template <int Keys>
struct KeyWord {
  uint32_t seen;    // by the rows that see later ones; 1 beyond the block
  uint32_t zeroed;  // by TMA, as there are no such keys

  __host__ __device__ __forceinline__ KeyWord(Problem const& p, Sequence const& s, int first_key,
                                              int before) {
    int const first = first_key + before;
    seen = ones_from(s.key_begin - first) & ~ones_from(s.key_end - first);
    if (p.key_bits != nullptr) seen &= KeyBits(p, s.index).template from<Keys>(first);
    seen |= ones_from(Keys - before);
    zeroed = ones_from(s.length_k - first);
  }
};

// Of one block, as the warp that loads it finds them: a word in each lane. Its tiles' rows are as
// these bits say.
template <int Keys>
struct LaneKeys {
  uint32_t seen;
  bool all;  // TMA brings what nobody may see as zeros

  __device__ __forceinline__ LaneKeys(Problem const& p, Sequence const& s, int first_key) {
    KeyWord<Keys> const word(p, s, first_key, threadIdx.x % kWarpThreads * 32);
    seen = word.seen;
    all = __all_sync(0xffffffff, (word.seen | word.zeroed) == ~0u);
  }

  // Keys `first` .. first + 31 of the block, `first` a multiple of 32. The whole warp asks.
  __device__ __forceinline__ uint32_t from(int first) const {
    return __shfl_sync(0xffffffff, seen, first / 32);
  }
};

// Of one block, in shared memory.
struct alignas(16) BlockKeys {
  static constexpr int kWords = 4;
  uint32_t words[kWords];

  // The whole warp calls this. The lane that writes is the one that tells the readers, and each
  // reader says itself that it has read (release_keys): racecheck credits an arrival to its own
  // thread alone.
  template <int Keys>
  __device__ __forceinline__ void store(LaneKeys<Keys> const& keys) {
    static_assert(Keys <= 32 * kWords, "there is a bit for each key");
    uint4 const all = make_uint4(keys.from(0), keys.from(32), keys.from(64), keys.from(96));
    if (elect_one()) store_shared_16b(smem_address(words), all);
    __syncwarp();
  }

  // Keys `first` .. first + 31 of the block, `first` a multiple of 32.
  __device__ __forceinline__ uint32_t from(int first) const {
    return load_shared_4b(smem_address(words + first / 32));
  }
  __device__ __forceinline__ bool has(int key) const { return from(key) >> key % 32 & 1; }
  template <int Keys>
  __device__ __forceinline__ bool has_all() const {
    if constexpr (Keys <= 64) return (from(0) & from(32)) == ~0u;
    uint4 const w = load_shared_16b(smem_address(words));
    return (w.x & w.y & w.z & w.w) == ~0u;
  }
};

}  // namespace hf_flashattn
