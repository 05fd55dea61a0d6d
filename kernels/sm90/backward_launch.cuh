// Launches the kernels of one backward policy; included by the instantiation files alone.
#pragma once

#include "prep/backward_preprocess.cuh"
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
  constexpr TileEnd kEnd = TileEnd::kSequence;
  int const heads_q = problem.heads_q, heads_k = problem.heads_k;
  Status status = make_map<typename Smem::RowTile>(maps.q, p.q, problem, rows_q, heads_q, kEnd);
  if (status.ok())
    status = make_map<typename Smem::RowTile>(maps.dout, p.dout, problem, rows_q, heads_q, kEnd);
  if (status.ok())
    status = make_map<typename Smem::KeyTile>(maps.k, p.k, problem, rows_k, heads_k, kEnd);
  if (status.ok())
    status = make_map<typename Smem::ValueTile>(maps.v, p.v, problem, rows_k, heads_k, kEnd);
  return status;
}

// Where the tiles of dQ come from.
template <class QueryP>
RowScheduler<QueryP> row_scheduler(Problem const& problem, BackwardWorkspace const& workspace) {
  if constexpr (QueryP::kRagged)
    return RaggedOrder(problem, QueryP::kBlockM, workspace.claimed + 1);
  else return RowScheduler<QueryP>(problem, QueryP::kBlockM, QueryP::kFoldedFrom);
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
  kernel<<<rows, kThreads, 0, stream>>>(p, workspace);
  return check(cudaGetLastError(), "launching the kernel before the backward");
}

template <class Smem, auto Kernel>
Status set_up_backward(BackwardMaps& maps, BackwardParams const& p) {
  static_assert(sizeof(Smem) <= kSharedMemoryBytes, "the tiles of a policy fit one CTA's memory");
  Status const status = make_maps<Smem>(maps, p);
  return status.ok() ? allow_shared_memory<Kernel>(p.problem.device, sizeof(Smem)) : status;
}

// One kernel, and one to round sums of dQ that are not recycled.
template <class P>
Status launch_backward(BackwardParams const& p) {
  using Smem = BackwardSmem<P>;
  static_assert(P::kBlockN == kSummedKeys<P::kHeadDim>,
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

// dK and dV, and dQ by a kernel of its own, which starts while the last CTAs of the first run.
// Nothing is summed in global memory, so this is always deterministic.
template <class P, class QueryP>
Status launch_split_kernels(BackwardParams p) {
  constexpr bool kWide = P::kHeadDim > 128;
  using Smem = std::conditional_t<kWide, BackwardWideSmem<P>, BackwardSmem<P>>;
  using QuerySmem = QueryGradientSmem<QueryP>;
  constexpr auto kKernel = [] {
    if constexpr (kWide) return backward_wide_kernel<P>;
    else return backward_kernel<P>;
  }();
  p.deterministic = false;  // no turns
  BackwardMaps maps, query_maps;
  Status status = set_up_backward<Smem, kKernel>(maps, p);
  if (status.ok())
    status = set_up_backward<QuerySmem, query_gradient_kernel<QueryP>>(query_maps, p);
  if (!status.ok()) return status;
  Problem const& problem = p.problem;
  auto const stream = static_cast<cudaStream_t>(problem.stream);
  char const* const what = "launching the backward kernels";
  BackwardWorkspace const workspace(p, P::kHeadDim, P::kBlockM, 0);
  RowScheduler<QueryP> const scheduler = row_scheduler<QueryP>(problem, workspace);
  status = preprocess<P>(p, workspace);
  if (!status.ok()) return status;
  if constexpr (kWide) {
    dim3 const keys(ceil_div(problem.seqlen_k, P::kBlockN), problem.heads_k, problem.batch);
    kKernel<<<keys, P::kThreads, sizeof(Smem), stream>>>(p, workspace, maps);
    status = check(cudaGetLastError(), what);
  } else {
    KeyTileOrder const order(p, P::kBlockM, P::kBlockN);
    status = check(launch_overlapped(kKernel, min(order.tiles(), problem.num_sms), P::kThreads,
                                     sizeof(Smem), stream, p, workspace, maps, order),
                   what);
  }
  if (!status.ok()) return status;
  return check(launch_overlapped(query_gradient_kernel<QueryP>, scheduler.grid, QueryP::kThreads,
                                 sizeof(QuerySmem), stream, p, workspace, query_maps, scheduler),
               what);
}

template <class P, class QueryP>
Status launch_split_backward(BackwardParams const& p) {
  Problem const& problem = p.problem;
  if (problem.key_bits != nullptr) return launch_split_kernels<P, HoledPolicy<QueryP>>(p);
  return problem.cu_seqlens_q != nullptr ? launch_split_kernels<P, RaggedQueryPolicy<QueryP>>(p)
                                         : launch_split_kernels<P, QueryP>(p);
}

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status backward(BackwardParams const& p) {
  using P = BackwardPolicy<HeadDim, Type, Causal, Dropout>;
  using Query = QueryGradientPolicy<HeadDim, Type, Causal, Dropout>;
  if constexpr (HeadDim > 128) {
    return launch_split_backward<P, Query>(p);
  } else {
    if constexpr (kSplitUpToKeys<HeadDim, Causal> > 0)
      if (splits_backward<HeadDim>(p.problem))
        return launch_split_backward<KeysOnlyPolicy<P>, Query>(p);
    if constexpr (HeadDim == 64)
      if (p.problem.cu_seqlens_q != nullptr) return launch_backward<PackedBackwardPolicy<P>>(p);
    return launch_backward<P>(p);
  }
}

}  // namespace hf_flashattn::sm90
