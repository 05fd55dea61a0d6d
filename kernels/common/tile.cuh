// A tile of 16-bit values in shared memory, as TMA writes it and wgmma reads it: 128-byte swizzle.
//
// Columns come in chunks of 64 (128 bytes); a chunk holds its rows one after the other, and within
// each group of 8 rows the 16-byte units of row r stand at unit ^ (r % 8).
#pragma once

#include "common/wgmma.cuh"

namespace hf_flashattn {

constexpr int kChunkColumns = 64;
constexpr int kChunkRowBytes = 128;
constexpr int kSwizzleGroupBytes = 8 * kChunkRowBytes;

template <class T, int Rows, int Columns>
struct SmemTile {
  static_assert(sizeof(T) == 2, "tiles hold 16-bit values");
  static_assert(Rows % 8 == 0, "the swizzle repeats every 8 rows");
  static_assert(Columns % kChunkColumns == 0, "columns come in chunks of 64");
  static constexpr int kRows = Rows;
  static constexpr int kChunks = Columns / kChunkColumns;
  static constexpr int kChunkBytes = Rows * kChunkRowBytes;
  static constexpr int kBytes = kChunks * kChunkBytes;

  alignas(1024) T data[Rows * Columns];

  __device__ __forceinline__ uint32_t address() const { return smem_address(data); }
  __device__ __forceinline__ uint32_t chunk_address(int chunk) const {
    return address() + chunk * kChunkBytes;
  }

  // The 16-byte unit of `row` that starts at column 8 * unit of the whole tile.
  static __device__ __forceinline__ uint32_t unit_offset(int row, int unit) {
    return (unit / 8) * kChunkBytes + row * kChunkRowBytes + (((unit % 8) ^ (row % 8)) * 16);
  }
};

// The shared-memory descriptor of a wgmma operand (PTX ISA, "Matrix descriptor"): 128-byte swizzle,
// byte offsets between the repeating patterns. `address` is the tile's, `bytes` a constant on top
// of it: the steps of a product then differ by one addition in the low word. Shared addresses have
// 18 bits.
__device__ __forceinline__ uint64_t make_descriptor(uint32_t address, uint32_t bytes,
                                                    uint32_t leading_bytes) {
  constexpr uint32_t kSwizzle128B = 1u << 30;
  uint32_t const low = (address >> 4) + ((leading_bytes >> 4 << 16) + (bytes >> 4));
  uint32_t const high = kSwizzle128B | (kSwizzleGroupBytes >> 4);
  return uint64_t(high) << 32 | low;
}

// Operands name the index that the product sums over "k" and the other "mn".
// K-major: rows are mn, columns are k. Step `k16` covers columns 16 * k16 .. + 15.
template <class Tile>
__device__ __forceinline__ uint64_t k_major(Tile const& tile, int first_row, int k16) {
  uint32_t const column_bytes = (k16 / 4) * Tile::kChunkBytes + (k16 % 4) * 32;
  return make_descriptor(tile.address() + first_row * kChunkRowBytes, column_bytes, 16);
}

// MN-major: rows are k, columns are mn. Step `k16` covers rows 16 * k16 .. + 15, from `first_chunk`
// on.
template <class Tile>
__device__ __forceinline__ uint64_t mn_major(Tile const& tile, int first_chunk, int k16) {
  return make_descriptor(tile.chunk_address(first_chunk), k16 * 2 * kSwizzleGroupBytes,
                         Tile::kChunkBytes);
}

}  // namespace hf_flashattn
