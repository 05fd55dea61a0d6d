// How much memory the backward needs besides its results.
#include "common/workspace.cuh"
#include "sm90/entries.h"
#include "sm90/policy.cuh"

namespace hf_flashattn::sm90 {

template <int HeadDim>
size_t backward_workspace_bytes(Problem const& problem) {
  return BackwardWorkspace(problem, HeadDim, kBackwardBlockM<HeadDim>, nullptr).bytes();
}

template size_t backward_workspace_bytes<32>(Problem const&);
template size_t backward_workspace_bytes<64>(Problem const&);
template size_t backward_workspace_bytes<96>(Problem const&);
template size_t backward_workspace_bytes<128>(Problem const&);
template size_t backward_workspace_bytes<192>(Problem const&);
template size_t backward_workspace_bytes<256>(Problem const&);

}  // namespace hf_flashattn::sm90
