// Prints whether tiles of packed sequences hold the rows of their sequence and nothing else: what
// TMA would read by the maps of launch.cuh and the coordinates of producer.cuh.
#include <cuda_bf16.h>

#include <cstdio>

#include "sm90/launch.cuh"
#include "sm90/producer.cuh"

using namespace hf_flashattn;
using namespace hf_flashattn::sm90;

namespace {

constexpr int kDim = 64;
int failures = 0;

void expect(bool right, char const* what, int sequence, int row) {
  if (right) return;
  std::printf("%s: sequence %d, row %d\n", what, sequence, row);
  ++failures;
}

template <class Tile>
void check(Problem const& p, TensorView const& view, Sequence const& s, int first, int length) {
  MapKey const key = map_key<Tile>(view, p, p.total_q, p.heads_q, TileEnd::kSequence);
  static Tile const tile{};  // for its type
  for (int head = 0; head < p.heads_q; ++head)
    for (int row = 0; row < length; row += Tile::kRows) {
      TilePlace const place = TilePlace::in_sequence(tile, s, first, length, row, head);
      expect(place.x >= 0 && place.y >= 0 && place.y < int(key.sizes[2]), "place", s.index, row);
      expect(place.z < int(key.sizes[3]), "head", s.index, row);
      for (int i = 0; i < Tile::kRows; ++i) {
        bool const inside = place.x + i < int(key.sizes[1]);
        expect(inside == (row + i < length), "rows", s.index, row + i);
        auto const* const read = static_cast<char*>(key.data) + (place.x + i) * key.strides[0] +
                                 place.y * key.strides[1] + place.z * key.strides[2];
        auto const* const wanted =
            static_cast<char*>(view.data) +
            2 * ((first + row + i) * view.stride_seq + head * view.stride_head);
        if (inside) expect(read == wanted, "address", s.index, row + i);
      }
    }
}

// A packed tensor of `heads` heads, whose rows are `stride` elements apart.
void check(int const* offsets, int batch, int longest, int heads, int64_t stride) {
  static char memory[1];
  Problem p{};
  p.batch = batch;
  p.heads_q = p.heads_k = heads;
  p.head_dim = kDim;
  p.total_q = p.total_k = offsets[batch];
  p.seqlen_q = p.seqlen_k = longest;
  p.cu_seqlens_q = p.cu_seqlens_k = offsets;
  TensorView view{};
  view.data = memory;
  view.stride_seq = stride;
  view.stride_head = kDim;
  for (int index = 0; index < batch; ++index) {
    Sequence const s(p, index, true);
    expect(s.length_q <= longest, "length", index, 0);
    check<SmemTile<__nv_bfloat16, 128, kDim>>(p, view, s, s.first_q, s.length_q);
    check<SmemTile<__nv_bfloat16, 80, kDim>>(p, view, s, s.first_k, s.length_k);
    check<SmemTile<__nv_bfloat16, 64, kDim>>(p, view, s, s.first_k, s.length_k);
  }
}

}  // namespace

int main() {
  static int const many[] = {0, 1, 65, 193, 321, 321, 701}, one[] = {0, 1};
  check(many, 6, 400, 3, 3 * kDim);
  check(many, 6, 400, 3, 9 * kDim);  // of q, k and v side by side
  check(many, 6, 400, 1, kDim);
  check(many, 6, 300, 3, 3 * kDim);  // the last one is cut off
  check(one, 1, 1, 3, 3 * kDim);     // one token: its stride is never used
  if (failures == 0) std::printf("right\n");
  return failures != 0;
}
