// What memory the kernels need besides their results.
#include "common/workspace.cuh"
#include "sm90/entries.h"
#include "sm90/policy.cuh"

namespace hf_flashattn::sm90 {

// Claims pay when tiles' lengths differ and CTAs have several: key ranges unless the problem is
// small. Packed sequences and key bits always, as other kernels know nothing of them.
bool claims_tiles(Problem const& p) {
  bool const ranges = p.key_start != nullptr || p.key_len != nullptr;
  bool const several = int64_t(p.batch) * p.heads_q * ceil_div(p.seqlen_q, 128) > p.num_sms;
  bool const bits = p.key_bits != nullptr;
  return p.cu_seqlens_q != nullptr || bits || (ranges && several);
}

template <int HeadDim>
size_t backward_workspace_bytes(BackwardParams const& params) {
  int const block_n = summed_keys<HeadDim>(params.problem);
  return BackwardWorkspace(params, HeadDim, kBackwardBlockM<HeadDim>, block_n).bytes();
}

template size_t backward_workspace_bytes<32>(BackwardParams const&);
template size_t backward_workspace_bytes<64>(BackwardParams const&);
template size_t backward_workspace_bytes<96>(BackwardParams const&);
template size_t backward_workspace_bytes<128>(BackwardParams const&);
template size_t backward_workspace_bytes<192>(BackwardParams const&);
template size_t backward_workspace_bytes<256>(BackwardParams const&);

}  // namespace hf_flashattn::sm90

namespace hf_flashattn {

// Each on a cache line of its own.
struct alignas(128) TileCounter {
  int32_t claimed;
};
__device__ TileCounter tile_counters[kTileCounters];

int32_t* tile_counter(int32_t number) {
  void* first = nullptr;
  if (cudaGetSymbolAddress(&first, tile_counters) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return &static_cast<TileCounter*>(first)[number].claimed;
}

}  // namespace hf_flashattn
