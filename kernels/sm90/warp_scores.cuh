// S = Q K^T of one warp alone, for the rare block whose scores are needed once more: a wgmma takes
// all four warps of a consumer, and the others do not know.
#pragma once

#include "common/fragment.cuh"

namespace hf_flashattn::sm90 {

// d += a b^T for 16 rows of a and 8 of b, 16 columns each. The accumulator's layout is that of the
// first 8 columns of a wgmma's.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], uint32_t const (&a)[4],
                                            uint32_t const (&b)[2]);

template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&d)[4], uint32_t const (&a)[4],
                                                    uint32_t const (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&d)[4], uint32_t const (&a)[4],
                                                           uint32_t const (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// scores(row, key) of rows first_row + g (rows[0]) and + 8 (rows[1]) where these are true; -inf
// where sees(row half, key) is not. Loops that stay loops: there are few registers where this is
// called, and `scores` are in local memory.
template <class T, class QueryTile, class KeyTile, int N, class Sees>
__device__ __forceinline__ void warp_scores(float (&scores)[N], bool const (&rows)[2],
                                            QueryTile const& q, int first_row, KeyTile const& k,
                                            Lane const& lane, Sees const& sees) {
  auto const load = [&](auto const& tile, int row, int unit) {
    return load_shared_4b(tile.address() + tile.unit_offset(row, unit) + lane.quad * 4);
  };
#pragma unroll 1
  for (int j = 0; j < N; j += 4) {
    float acc[4] = {};
#pragma unroll 1
    for (int unit = 0; unit < QueryTile::kChunks * QueryTile::kChunkStep / 8; unit += 2) {
      int const row = first_row + lane.group, key = 2 * j + lane.group;
      uint32_t const a[4] = {load(q, row, unit), load(q, row + 8, unit), load(q, row, unit + 1),
                             load(q, row + 8, unit + 1)};
      uint32_t const b[2] = {load(k, key, unit), load(k, key, unit + 1)};
      mma_16x8x16<T>(acc, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (rows[i / 2])
        scores[j + i] = sees(i / 2, 2 * j + 2 * lane.quad + i % 2) ? acc[i] : -infinity();
  }
}

}  // namespace hf_flashattn::sm90
