// Launches the forward kernel of one policy; included by the instantiation files alone.
#pragma once

#include "prep/list_tiles.cuh"
#include "sm90/forward.cuh"
#include "sm90/launch.cuh"

namespace hf_flashattn::sm90 {

template <class P>
constexpr int kForwardSmemBytes = sizeof(ForwardSmem<P>);

template <class P>
Status set_up(ForwardMaps& maps, ForwardParams const& p) {
  Problem const& problem = p.problem;
  bool const packed = problem.cu_seqlens_q != nullptr;
  int const rows_q = packed ? problem.total_q : problem.seqlen_q;
  int const rows_k = packed ? problem.total_k : problem.seqlen_k;
  static_assert(kForwardSmemBytes<P> <= kSharedMemoryBytes,
                "a policy's tiles fit one CTA's memory");
  using Smem = ForwardSmem<P>;
  Status status = make_map<typename Smem::QTile>(maps.q, p.q, problem, rows_q, problem.heads_q);
  if (status.ok())
    status = make_map<typename Smem::KeyTile>(maps.k, p.k, problem, rows_k, problem.heads_k);
  if (status.ok())
    status = make_map<typename Smem::KeyTile>(maps.v, p.v, problem, rows_k, problem.heads_k);
  if (status.ok())
    status = allow_shared_memory<forward_kernel<P>>(problem.device, kForwardSmemBytes<P>);
  return status;
}

// Every length is known here: tiles in static steps.
template <class P>
Status launch_static(ForwardParams const& p) {
  ForwardMaps maps;
  Status const status = set_up<P>(maps, p);
  if (!status.ok()) return status;
  Problem const& problem = p.problem;
  RowScheduler<P> const scheduler(problem, P::kBlockM, P::kFoldedFrom);
  auto const stream = static_cast<cudaStream_t>(problem.stream);
  forward_kernel<P>
      <<<scheduler.grid, P::kThreads, kForwardSmemBytes<P>, stream>>>(p, maps, scheduler);
  return check(cudaGetLastError(), "launching the forward kernel");
}

// Lengths are on the device: a list of tiles is made there first.
template <class P>
Status launch_listed(ForwardParams const& p, void* workspace) {
  ForwardMaps maps;
  Status status = set_up<P>(maps, p);
  if (!status.ok()) return status;
  Problem const& problem = p.problem;
  auto const stream = static_cast<cudaStream_t>(problem.stream);
  TileList const list(problem, P::kBlockM, workspace);
  prep::PackedResults const results = {
      {{p.out, p.lse, problem.cu_seqlens_q, problem.total_q, problem.heads_q}}};
  int const clear_blocks = problem.cu_seqlens_q != nullptr ? prep::kListClearBlocks : 0;
  prep::list_tiles_kernel<P::kBlockM, P::kBlockN>
      <<<1 + clear_blocks, prep::kListThreads, 0, stream>>>(problem, list, results);
  status = check(cudaGetLastError(), "launching the kernel that lists tiles");
  if (!status.ok()) return status;
  return check(launch_overlapped(forward_kernel<P>, list.grid, P::kThreads, kForwardSmemBytes<P>,
                                 stream, p, maps, list),
               "launching the forward kernel");
}

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status forward(ForwardParams const& p, void* workspace) {
  using Policy = ForwardPolicy<HeadDim, Type, Causal, Dropout>;
  if (p.problem.key_bits != nullptr)
    return launch_listed<HoledPolicy<ListedPolicy<Policy>>>(p, workspace);
  // Static kernels know nothing of packed batches (sequence_of).
  bool const packed = p.problem.cu_seqlens_q != nullptr;
  if (packed || sm90::forward_workspace_bytes(p.problem) > 0)
    return launch_listed<ListedPolicy<Policy>>(p, workspace);
  if constexpr (kLowRowsPercent<Policy> > 0) {
    using Low = LowForwardPolicy<HeadDim, Type, Causal, Dropout>;
    if (prefers_low_tiles<Policy, Low>(p.problem)) return launch_static<Low>(p);
  }
  return launch_static<Policy>(p);
}

}  // namespace hf_flashattn::sm90
