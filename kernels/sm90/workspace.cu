// How much memory the backward needs besides its results.
#include "common/workspace.cuh"
#include "sm90/entries.h"
#include "sm90/policy.cuh"

namespace hf_flashattn::sm90 {

size_t backward_workspace_bytes(Problem const& problem) {
  return BackwardWorkspace(problem, backward_block_m(problem.head_dim), nullptr).bytes();
}

}  // namespace hf_flashattn::sm90
