// Launches the kernels of one backward policy; included by the instantiation files alone.
#pragma once

#include "prep/backward_preprocess.cuh"
#include "prep/clear_uncovered.cuh"
#include "prep/dq_convert.cuh"
#include "sm90/backward.cuh"
#include "sm90/backward_wide.cuh"
#include "sm90/launch.cuh"
#include "sm90/query_gradient.cuh"

namespace hf_flashattn::sm90 {

template <class Smem>
Status make_maps(BackwardMaps& maps, BackwardParams const& p) {
  Problem const& problem = p.problem;
  bool const packed = problem.cu_seqlens_q != nullptr;
  int const rows_q = packed ? problem.total_q : problem.seqlen_q;
  int const rows_k = packed ? problem.total_k : problem.seqlen_k;
  Status status = make_map<typename Smem::RowTile>(maps.q, p.q, problem, rows_q, problem.heads_q);
  if (status.ok())
    status = make_map<typename Smem::RowTile>(maps.dout, p.dout, problem, rows_q, problem.heads_q);
  if (status.ok())
    status = make_map<typename Smem::KeyTile>(maps.k, p.k, problem, rows_k, problem.heads_k);
  if (status.ok())
    status = make_map<typename Smem::ValueTile>(maps.v, p.v, problem, rows_k, problem.heads_k);
  return status;
}

// Gradients of packed tokens that belong to no sequence.
inline void clear_uncovered(BackwardParams const& p, cudaStream_t stream) {
  Problem const& problem = p.problem;
  int32_t const *const cu_q = problem.cu_seqlens_q, *const cu_k = problem.cu_seqlens_k;
  prep::PackedResults const results = {{{p.dq, nullptr, cu_q, problem.total_q, problem.heads_q},
                                        {p.dk, nullptr, cu_k, problem.total_k, problem.heads_k},
                                        {p.dv, nullptr, cu_k, problem.total_k, problem.heads_k}}};
  prep::clear_uncovered_kernel<<<dim3(prep::kClearBlocks, 3), prep::kClearThreads, 0, stream>>>(
      results, problem.batch, problem.head_dim);
}

// Before the backward proper.
template <class P>
Status preprocess(BackwardParams const& p, BackwardWorkspace const& workspace) {
  static_assert(P::kBlockM == kBackwardBlockM<P::kHeadDim>,
                "the workspace is laid out for all policies of a head dim");
  Problem const& problem = p.problem;
  auto const stream = static_cast<cudaStream_t>(problem.stream);
  auto* const kernel =
      prep::backward_preprocess_kernel<typename P::Element, P::kHeadDim, P::kBlockM>;
  constexpr int kThreads = prep::kPreprocessThreads;
  dim3 const rows(ceil_div(problem.seqlen_q, P::kBlockM), problem.heads_q, problem.batch);
  char const* const what = "launching the kernels before the backward";
  if (problem.cu_seqlens_q != nullptr) {
    clear_uncovered(p, stream);
    return check(launch_overlapped(kernel, rows, kThreads, 0, stream, p, workspace), what);
  }
  kernel<<<rows, kThreads, 0, stream>>>(p, workspace);
  return check(cudaGetLastError(), what);
}

template <class Smem, auto Kernel>
Status set_up_backward(BackwardMaps& maps, BackwardParams const& p) {
  static_assert(sizeof(Smem) <= kSharedMemoryBytes, "the tiles of a policy fit one CTA's memory");
  Status const status = make_maps<Smem>(maps, p);
  return status.ok() ? allow_shared_memory<Kernel>(p.problem.device, sizeof(Smem)) : status;
}

// Up to head dim 128: one kernel, and one to round sums of dQ that are not recycled.
template <class P>
Status launch_backward(BackwardParams const& p) {
  using Smem = BackwardSmem<P>;
  static_assert(P::kBlockN == kRecyclingKeys<P::kHeadDim>,
                "the workspace is laid out for all policies of a head dim");
  BackwardMaps maps;
  Status status = set_up_backward<Smem, backward_kernel<P>>(maps, p);
  if (!status.ok()) return status;
  Problem const& problem = p.problem;
  auto const stream = static_cast<cudaStream_t>(problem.stream);
  BackwardWorkspace const workspace(p, P::kHeadDim, P::kBlockM, P::kBlockN);
  KeyTileOrder const order(p, P::kBlockM, P::kBlockN);
  status = preprocess<P>(p, workspace);
  if (!status.ok()) return status;
  status = check(launch_overlapped(backward_kernel<P>, min(order.tiles(), problem.num_sms),
                                   P::kThreads, sizeof(Smem), stream, p, workspace, maps, order),
                 "launching the backward kernels");
  if (!status.ok() || workspace.recycled > 0) return status;
  using DqParts = prep::DqParts<P::kHeadDim, P::kBlockM, P::kPartColumns>;
  dim3 const rows(ceil_div(problem.seqlen_q, P::kBlockM), problem.heads_q, problem.batch);
  prep::dq_convert_kernel<typename P::Element, DqParts>
      <<<rows, DqParts::kThreads, 0, stream>>>(p, workspace);
  return check(cudaGetLastError(), "launching the backward kernels");
}

// Above: a kernel for dK and dV, and one for dQ, which starts while the last CTAs of the first run.
template <class P, class QueryP>
Status launch_wide_backward(BackwardParams const& p) {
  using Smem = BackwardWideSmem<P>;
  using QuerySmem = QueryGradientSmem<QueryP>;
  BackwardMaps maps, query_maps;
  Status status = set_up_backward<Smem, backward_wide_kernel<P>>(maps, p);
  if (status.ok())
    status = set_up_backward<QuerySmem, query_gradient_kernel<QueryP>>(query_maps, p);
  if (!status.ok()) return status;
  Problem const& problem = p.problem;
  auto const stream = static_cast<cudaStream_t>(problem.stream);
  BackwardWorkspace const workspace(p, P::kHeadDim, P::kBlockM, 0);
  TileScheduler<QueryP::kTileOrder> const scheduler(problem, QueryP::kBlockM);
  status = preprocess<P>(p, workspace);
  if (!status.ok()) return status;
  dim3 const keys(ceil_div(problem.seqlen_k, P::kBlockN), problem.heads_k, problem.batch);
  backward_wide_kernel<P><<<keys, P::kThreads, sizeof(Smem), stream>>>(p, workspace, maps);
  status = check(cudaGetLastError(), "launching the backward kernels");
  if (!status.ok()) return status;
  return check(launch_overlapped(query_gradient_kernel<QueryP>, scheduler.grid, QueryP::kThreads,
                                 sizeof(QuerySmem), stream, p, workspace, query_maps, scheduler),
               "launching the backward kernels");
}

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status backward(BackwardParams const& p) {
  using P = BackwardPolicy<HeadDim, Type, Causal, Dropout>;
  if constexpr (HeadDim > 128) {
    using Query = QueryGradientPolicy<HeadDim, Type, Causal, Dropout>;
    return p.problem.key_bits != nullptr ? launch_wide_backward<P, HoledPolicy<Query>>(p)
                                         : launch_wide_backward<P, Query>(p);
  } else {
    return launch_backward<P>(p);
  }
}

}  // namespace hf_flashattn::sm90
