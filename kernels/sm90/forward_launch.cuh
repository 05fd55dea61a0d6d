// Launches the forward kernel of one policy; included by the instantiation files alone.
#pragma once

#include "prep/clear_uncovered.cuh"
#include "sm90/forward.cuh"
#include "sm90/launch.cuh"

namespace hf_flashattn::sm90 {

template <class P>
Status launch_forward(ForwardParams const& p) {
  Problem const& problem = p.problem;
  bool const packed = problem.cu_seqlens_q != nullptr;
  int const rows_q = packed ? problem.total_q : problem.seqlen_q;
  int const rows_k = packed ? problem.total_k : problem.seqlen_k;
  using Smem = ForwardSmem<P>;
  static_assert(sizeof(Smem) <= kSharedMemoryBytes, "the tiles of a policy fit one CTA's memory");
  ForwardMaps maps;
  Status status = make_map<typename Smem::QTile>(maps.q, p.q, problem, rows_q, problem.heads_q);
  if (status.ok())
    status = make_map<typename Smem::KeyTile>(maps.k, p.k, problem, rows_k, problem.heads_k);
  if (status.ok())
    status = make_map<typename Smem::KeyTile>(maps.v, p.v, problem, rows_k, problem.heads_k);
  int const smem_bytes = sizeof(Smem);
  if (status.ok()) status = allow_shared_memory<forward_kernel<P>>(smem_bytes);
  if (!status.ok()) return status;

  ForwardScheduler<P> const scheduler(problem, P::kBlockM, P::kCausal);
  int const grid = scheduler.tiles() < problem.num_sms ? scheduler.tiles() : problem.num_sms;
  auto const stream = static_cast<cudaStream_t>(problem.stream);
  if (packed) {
    prep::PackedResults const results = {
        {{p.out, p.lse, problem.cu_seqlens_q, problem.total_q, problem.heads_q}}};
    prep::clear_uncovered_kernel<<<dim3(prep::kClearBlocks, 1), prep::kClearThreads, 0, stream>>>(
        results, problem.batch, problem.head_dim);
  }
  forward_kernel<P><<<grid, P::kThreads, smem_bytes, stream>>>(p, maps, scheduler);
  return check(cudaGetLastError(), "launching the forward kernel");
}

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status forward(ForwardParams const& p) {
  return launch_forward<ForwardPolicy<HeadDim, Type, Causal, Dropout>>(p);
}

}  // namespace hf_flashattn::sm90
