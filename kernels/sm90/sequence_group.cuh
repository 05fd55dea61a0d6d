// 32 sequences of a ragged batch, one a lane of a warp that has few registers, and where among
// their tiles a number lies (common/ragged_order.cuh). The whole warp calls all of this.
#pragma once

#include "common/ragged_order.cuh"

namespace hf_flashattn::sm90 {

// Sequence number first + lane; the last one again where there is none.
__device__ __forceinline__ Sequence sequence_of_lane(Problem const& p, int first, bool& exists) {
  int const index = first + threadIdx.x % kWarpThreads;
  exists = index < p.batch;
  return Sequence(p, min(index, p.batch - 1));
}

// Sequences one after the other, `heads` times as many tiles as a sequence has blocks.
struct GroupBlocks {
  int own;  // blocks of this lane's sequence
  int end;  // tiles up to its end

  __device__ __forceinline__ void count_tiles(int heads) {
    end = heads * own;
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      int const before = __shfl_up_sync(0xffffffff, end, distance);
      if (threadIdx.x % kWarpThreads >= distance) end += before;
    }
  }
  __device__ __forceinline__ int blocks(int place) const {
    return __shfl_sync(0xffffffff, own, place);
  }
  __device__ __forceinline__ int place_of(int tile) const {
    return __popc(__ballot_sync(0xffffffff, end <= tile));
  }
  __device__ __forceinline__ int tiles_before(int place) const {
    int const before = __shfl_sync(0xffffffff, end, max(place - 1, 0));
    return place > 0 ? before : 0;
  }
};

template <int BlockM>
struct FullGroup : GroupBlocks {
  using Walk = FullWalk;
  int index, keys;  // of this lane's sequence

  __device__ __forceinline__ void load(Problem const& p, int first) {
    bool exists;
    Sequence const s = sequence_of_lane(p, first, exists);
    index = s.index;
    keys = s.key_end - s.key_begin;
    own = exists ? ceil_div(s.length_q, BlockM) : 0;
  }
  __device__ __forceinline__ int row_blocks() const { return __reduce_add_sync(0xffffffff, own); }

  // The most keys first.
  __device__ __forceinline__ void sort(int heads) {
    int const lane = threadIdx.x % kWarpThreads;
    int place = 0, source = 0;
#pragma unroll 4
    for (int other = 0; other < kWarpThreads; ++other) {
      int const its = __shfl_sync(0xffffffff, keys, other);
      place += its > keys || (its == keys && other < lane);
    }
#pragma unroll 4
    for (int other = 0; other < kWarpThreads; ++other)
      if (__shfl_sync(0xffffffff, place, other) == lane) source = other;
    index = __shfl_sync(0xffffffff, index, source);
    own = __shfl_sync(0xffffffff, own, source);
    count_tiles(heads);
  }
  __device__ __forceinline__ int sequence(int place) const {
    return __shfl_sync(0xffffffff, index, place);
  }
};

template <int BlockM, bool Ahead>
struct CausalGroup {
  using Walk = CausalWalk;
  int first_index;
  RowBlockEnds<BlockM, Ahead> own;

  __device__ __forceinline__ void load(Problem const& p, int first) {
    bool exists;
    Sequence const s = sequence_of_lane(p, first, exists);
    first_index = first;
    own = RowBlockEnds<BlockM, Ahead>(exists ? s.length_q : 0);
  }
  __device__ __forceinline__ int row_blocks() const {
    return __reduce_add_sync(0xffffffff, ceil_div(own.last, own.kStep));
  }
  __device__ __forceinline__ void sort(int) {}  // the walk does not ask for it

  __device__ __forceinline__ int sequence(int place) const { return first_index + place; }
  __device__ __forceinline__ int last_end() const {
    return __reduce_max_sync(0xffffffff, own.last);
  }
  __device__ __forceinline__ int ending(int end) const {
    return __popc(__ballot_sync(0xffffffff, own.has(end)));
  }
  __device__ __forceinline__ int row_block_ending(int end, int n, int& place) const {
    uint32_t const all = __ballot_sync(0xffffffff, own.has(end));
    uint32_t const before = all & ((1u << threadIdx.x % kWarpThreads) - 1);
    place = __ffs(__ballot_sync(0xffffffff, own.has(end) && __popc(before) == n)) - 1;
    return __shfl_sync(0xffffffff, own.row_block(end), place);
  }
};

}  // namespace hf_flashattn::sm90
