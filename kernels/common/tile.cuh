// A tile of 16-bit values in shared memory, as TMA writes it and wgmma reads it: swizzled.
//
// Columns come in chunks, which hold their rows one after the other: of 64 columns (128 bytes), or
// of 32 (64 bytes) where 64 do not divide the tile. Within each group of 8 rows the 16-byte units
// of row r stand at unit ^ (r % 8), or at unit ^ (r / 2 % 4) in chunks of 32. Either way 8 rows of
// one unit lie in different banks.
#pragma once

#include "common/wgmma.cuh"

namespace hf_flashattn {

// Chunk c starts at column c * ChunkStep. With a step of 48 a chunk has room for 64 columns, and
// what stands in the last 16 is not part of the tile.
template <class T, int Rows, int Columns, int ChunkStep = Columns % 64 == 0 ? 64 : 32>
struct SmemTile {
  static_assert(sizeof(T) == 2, "tiles hold 16-bit values");
  static_assert(Rows % 8 == 0, "the swizzle repeats every 8 rows");
  static_assert(ChunkStep == 32 || ChunkStep == 48 || ChunkStep == 64,
                "chunks have rows of 64 or 128 bytes");
  static_assert(Columns % ChunkStep == 0, "columns come in whole chunks");
  static constexpr int kRows = Rows;
  static constexpr int kChunkStep = ChunkStep;
  static constexpr int kChunks = Columns / ChunkStep;
  static constexpr int kChunkColumns = ChunkStep == 32 ? 32 : 64;  // what TMA brings at a time
  static constexpr int kChunkRowBytes = 2 * kChunkColumns;         // the width of the swizzle
  static constexpr int kChunkBytes = Rows * kChunkRowBytes;
  static constexpr int kSwizzleGroupBytes = 8 * kChunkRowBytes;
  static constexpr int kBytes = kChunks * kChunkBytes;

  alignas(1024) T data[kBytes / 2];

  __device__ __forceinline__ uint32_t address() const { return smem_address(data); }
  __device__ __forceinline__ uint32_t chunk_address(int chunk) const {
    return address() + chunk * kChunkBytes;
  }

  // The 16-byte unit of `row` that starts at column 8 * unit of the whole tile.
  static __device__ __forceinline__ uint32_t unit_offset(int row, int unit) {
    constexpr int kUnits = kChunkStep / 8;
    int const swizzle = kChunkRowBytes == 128 ? row % 8 : row / 2 % 4;
    return (unit / kUnits) * kChunkBytes + row * kChunkRowBytes +
           (((unit % kUnits) ^ swizzle) * 16);
  }

  // From the address of unit 0 or 1 of a row to that of the unit `units` further, an even number.
  static __device__ __forceinline__ uint32_t later_unit(uint32_t address, int units) {
    constexpr int kUnits = kChunkStep / 8;
    return (address + units / kUnits * kChunkBytes) ^ (units % kUnits * 16);
  }
};

// The shared-memory descriptor of a wgmma operand (PTX ISA, "Matrix descriptor"): the swizzle, and
// byte offsets between its repeating patterns. `address` is the tile's, `bytes` a constant on top
// of it: the steps of a product then differ by one addition in the low word. Shared addresses have
// 18 bits.
template <class Tile>
__device__ __forceinline__ uint64_t make_descriptor(uint32_t address, uint32_t bytes,
                                                    uint32_t leading_bytes) {
  constexpr uint32_t kSwizzle = (Tile::kChunkRowBytes == 128 ? 1u : 2u) << 30;
  uint32_t const low = (address >> 4) + ((leading_bytes >> 4 << 16) + (bytes >> 4));
  uint32_t const high = kSwizzle | (Tile::kSwizzleGroupBytes >> 4);
  return uint64_t(high) << 32 | low;
}

// Operands name the index that the product sums over "k" and the other "mn".
// K-major: rows are mn, columns are k. Step `k16` covers columns 16 * k16 .. + 15.
template <class Tile>
__device__ __forceinline__ uint64_t k_major(Tile const& tile, int first_row, int k16) {
  constexpr int kSteps = Tile::kChunkStep / 16;
  uint32_t const column_bytes = (k16 / kSteps) * Tile::kChunkBytes + (k16 % kSteps) * 32;
  return make_descriptor<Tile>(tile.address() + first_row * Tile::kChunkRowBytes, column_bytes, 16);
}

// MN-major: rows are k, columns are mn. Step `k16` covers rows 16 * k16 .. + 15, from `first_chunk`
// on. A product that reads more than one chunk needs them full: the hardware knows no step of 48.
template <class Tile>
__device__ __forceinline__ uint64_t mn_major(Tile const& tile, int first_chunk, int k16) {
  return make_descriptor<Tile>(tile.chunk_address(first_chunk), k16 * 2 * Tile::kSwizzleGroupBytes,
                               Tile::kChunkBytes);
}

}  // namespace hf_flashattn
