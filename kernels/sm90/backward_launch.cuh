// Launches the kernels of one backward policy; included by the instantiation files alone.
#pragma once

#include "prep/backward_preprocess.cuh"
#include "prep/clear_uncovered.cuh"
#include "prep/dq_convert.cuh"
#include "sm90/backward.cuh"
#include "sm90/backward_wide.cuh"
#include "sm90/launch.cuh"

namespace hf_flashattn::sm90 {

template <class P>
constexpr bool kWide = P::kHeadDim > 128;

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

template <class P, class Smem, auto Kernel>
Status launch_backward(BackwardParams const& p) {
  using Element = typename P::Element;
  Problem const& problem = p.problem;
  static_assert(sizeof(Smem) <= kSharedMemoryBytes, "the tiles of a policy fit one CTA's memory");
  static_assert(P::kBlockM == kBackwardBlockM<P::kHeadDim> &&
                    (kWide<P> || P::kBlockN == kRecyclingKeys<P::kHeadDim>),
                "the workspace is laid out for all policies of a head dim");
  int const smem_bytes = sizeof(Smem);
  BackwardMaps maps;
  Status status = make_maps<Smem>(maps, p);
  if (status.ok()) status = allow_shared_memory<Kernel>(problem.device, smem_bytes);
  if (!status.ok()) return status;

  auto const stream = static_cast<cudaStream_t>(problem.stream);
  BackwardWorkspace const workspace(p, P::kHeadDim, P::kBlockM, kRecyclingKeys<P::kHeadDim>);
  KeyTileOrder const order(p, P::kBlockM, P::kBlockN);
  dim3 const rows(ceil_div(problem.seqlen_q, P::kBlockM), problem.heads_q, problem.batch);
  dim3 const keys(order.key_blocks, problem.heads_k, problem.batch);
  if (problem.cu_seqlens_q != nullptr) clear_uncovered(p, stream);
  prep::backward_preprocess_kernel<Element, P::kHeadDim, P::kBlockM>
      <<<rows, prep::kPreprocessThreads, 0, stream>>>(p, workspace);
  if constexpr (kWide<P>) {
    Kernel<<<keys, P::kThreads, smem_bytes, stream>>>(p, workspace, maps, order);
    status = check(cudaGetLastError(), "launching the backward kernels");
  } else {
    int const grid = min(order.tiles(), problem.num_sms);
    status = check(
        launch_overlapped(Kernel, grid, P::kThreads, smem_bytes, stream, p, workspace, maps, order),
        "launching the backward kernels");
  }
  if (!status.ok()) return status;
  if (workspace.recycled == 0) {
    using DqParts = prep::DqParts<P::kHeadDim, P::kBlockM, P::kPartColumns>;
    prep::dq_convert_kernel<Element, DqParts><<<rows, DqParts::kThreads, 0, stream>>>(p, workspace);
  }
  return check(cudaGetLastError(), "launching the backward kernels");
}

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status backward(BackwardParams const& p) {
  using P = BackwardPolicy<HeadDim, Type, Causal, Dropout>;
  if constexpr (kWide<P>)
    return launch_backward<P, BackwardWideSmem<P>, backward_wide_kernel<P>>(p);
  else return launch_backward<P, BackwardSmem<P>, backward_kernel<P>>(p);
}

}  // namespace hf_flashattn::sm90
