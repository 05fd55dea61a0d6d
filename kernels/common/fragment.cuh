// What a lane holds of a 64 x N accumulator, and the ways out of it: to a 16-bit A operand of the
// next product, and to rows in global memory. wgmma.cuh describes the layout.
#pragma once

#include "common/tile.cuh"

namespace hf_flashattn {

struct Lane {
  int warp, group, quad;  // warp of the warpgroup; lane / 4 and lane % 4
  __device__ __forceinline__ explicit Lane(int thread)
      : warp(warp_uniform(thread % kWarpgroupThreads / kWarpThreads)),
        group(thread % kWarpThreads / 4), quad(thread % 4) {}
};

template <int N>
__device__ __forceinline__ void fill_zero(float (&acc)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) acc[i] = 0.f;
}

// Rows g (low) and g + 8 (high) of a lane become zero, whatever they hold.
template <int N>
__device__ __forceinline__ void clear_rows(float (&acc)[N], bool low, bool high) {
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (j / 2 % 2 == 0 ? low : high) acc[j] = 0.f;
}

// Columns 16k .. 16k + 15 of the accumulator are step k of an A operand with the same rows.
template <class T, int N>
__device__ __forceinline__ void to_operand(uint32_t (&operand)[N / 8][4], float const (&acc)[N]) {
#pragma unroll
  for (int k = 0; k < N / 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[k][i] = pack<T>(acc[8 * k + 2 * i], acc[8 * k + 2 * i + 1]);
}

// Writes a warp's 16 rows of an operand to the swizzled tile.
template <class Tile, int Steps>
__device__ __forceinline__ void store_operand(Tile const& tile, uint32_t const (&operand)[Steps][4],
                                              int first_row) {
  int const lane = lane_anew();
  // Matrices 0, 1 are rows 0-7, 8-15 of the left 8 columns; 2, 3 the same of the right 8.
  uint32_t const first = tile.address() + Tile::unit_offset(first_row + lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < Steps; ++k) store_matrix_x4(Tile::later_unit(first, 2 * k), operand[k]);
}

// Scales a warp's 16 x 2N-column accumulator, rounds it and writes `rows` rows and `columns`
// columns of it to global memory in 16-byte units. `tile` is scratch whose rows first_row .. + 15
// belong to this warp.
template <class T, class Tile, int N>
__device__ __forceinline__ void store_rows(Tile const& tile, int first_row, float const (&acc)[N],
                                           float scale_low, float scale_high, T* global,
                                           int64_t stride, int rows, int columns) {
  constexpr int kUnits = 2 * N / 8;                   // of a row
  constexpr int kRowsAtOnce = kWarpThreads / kUnits;  // lanes beyond them rest
  static_assert(kRowsAtOnce > 0, "a warp writes whole rows");
  uint32_t operand[N / 8][4];
#pragma unroll
  for (int k = 0; k < N / 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float const scale = i % 2 ? scale_high : scale_low;
      operand[k][i] = pack<T>(acc[8 * k + 2 * i] * scale, acc[8 * k + 2 * i + 1] * scale);
    }
  store_operand(tile, operand, first_row);
  __syncwarp();
  int const lane = threadIdx.x % kWarpThreads;
  bool const rests = lane / kUnits >= kRowsAtOnce;
  int const first = rests ? 0 : lane / kUnits, unit = lane % kUnits;
  int const end = !rests && unit * 8 < columns ? min(rows, 16) : 0;
  global = kept(global + first * stride + unit * 8);
#pragma unroll
  for (int i = 0; i < 16; i += kRowsAtOnce, global += kRowsAtOnce * stride) {
    int const row = first + i;
    // A sixth of a warp takes five rows at once (dq_convert at d96), and may end beyond its memory.
    int const there = 16 % kRowsAtOnce == 0 ? row : min(row, 15);
    uint4 const value =
        load_shared_16b(tile.address() + Tile::unit_offset(first_row + there, unit));
    store_global_16b_if(row < end, global, value);
  }
  __syncwarp();
}

// The same without scratch: lanes l and l ^ 1 exchange a word of two 16-byte units, so that a quad
// writes whole sectors of 32 bytes. All four words of a unit in one lane would take another step.
template <class T, int N>
__device__ __forceinline__ void store_rows(Lane const& lane, float const (&acc)[N], float scale_low,
                                           float scale_high, T* global, int64_t stride, int rows,
                                           int columns) {
  static_assert(N % 8 == 0, "units go in pairs");
  bool const odd = lane.quad % 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // rows g and g + 8
    int const row = lane.group + 8 * i;
    float const scale = i ? scale_high : scale_low;
    int const first = odd * 8 + lane.quad / 2 * 4;
    T* const out = kept(global + row * stride + first);
    int const end = row < rows ? columns - first : 0;
#pragma unroll
    for (int unit = 0; unit < N / 4; unit += 2) {
      uint32_t word[2];  // of this lane in the two units
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float const* const pair = &acc[4 * (unit + j) + 2 * i];
        word[j] = pack<T>(pair[0] * scale, pair[1] * scale);
      }
      swap_with_lane<1>(word[0], word[1], odd);
      store_global_8b_if(unit * 8 < end, out + unit * 8, word[0], word[1]);
    }
  }
}

}  // namespace hf_flashattn
