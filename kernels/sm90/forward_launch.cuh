// Launches the forward kernel of one policy; included by the instantiation files alone.
#pragma once

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
  // Q alone may hold rows of others: of tiles that begin ahead of the sequence too.
  Status status = make_map<typename Smem::QTile>(maps.q, p.q, problem, rows_q, problem.heads_q,
                                                 TileEnd::kTensor);
  if (status.ok())
    status = make_map<typename Smem::KeyTile>(maps.k, p.k, problem, rows_k, problem.heads_k,
                                              TileEnd::kSequence);
  if (status.ok())
    status = make_map<typename Smem::KeyTile>(maps.v, p.v, problem, rows_k, problem.heads_k,
                                              TileEnd::kSequence);
  if (status.ok())
    status = allow_shared_memory<forward_kernel<P>>(problem.device, kForwardSmemBytes<P>);
  return status;
}

template <class P>
Status launch(ForwardParams const& p, RowScheduler<P> const& scheduler) {
  ForwardMaps maps;
  Status const status = set_up<P>(maps, p);
  if (!status.ok()) return status;
  auto const stream = static_cast<cudaStream_t>(p.problem.stream);
  forward_kernel<P>
      <<<scheduler.grid, P::kThreads, kForwardSmemBytes<P>, stream>>>(p, maps, scheduler);
  return check(cudaGetLastError(), "launching the forward kernel");
}

// Every length is known here: tiles in static steps.
template <class P>
Status launch_static(ForwardParams const& p) {
  return launch<P>(p, RowScheduler<P>(p.problem, P::kBlockM, P::kFoldedFrom));
}

// Lengths are on the device.
template <class P>
Status launch_ragged(ForwardParams const& p, int32_t* counter) {
  return launch<P>(p, RaggedOrder(p.problem, P::kBlockM, counter));
}

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status forward(ForwardParams const& p, int32_t* counter) {
  using Policy = ForwardPolicy<HeadDim, Type, Causal, Dropout>;
  if (p.problem.key_bits != nullptr)
    return launch_ragged<HoledPolicy<RaggedPolicy<Policy>>>(p, counter);
  if (claims_tiles(p.problem)) return launch_ragged<RaggedPolicy<Policy>>(p, counter);
  if constexpr (kLowRowsPercent<Policy> > 0) {
    using Low = LowForwardPolicy<HeadDim, Type, Causal, Dropout>;
    if (prefers_low_tiles<Policy, Low>(p.problem)) return launch_static<Low>(p);
  }
  return launch_static<Policy>(p);
}

}  // namespace hf_flashattn::sm90
