// The table of kernels: what was compiled, how to launch it, and why a request finds nothing.
//
// Every failure is reported before anything is launched, as expected / got / nearest / next step.
#include <algorithm>
#include <array>
#include <cmath>

#include "common/status.h"
#include "sm90/entries.h"

namespace hf_flashattn {

namespace {

struct Entry {
  int32_t compute_capability;
  int32_t head_dim;  // of the kernel: every smaller multiple of 8 runs on it too
  DType dtype;
  bool causal;
  bool dropout;
  Status (*forward)(ForwardParams const&, int32_t*);
  Status (*backward)(BackwardParams const&);
  bool (*claims_tiles)(Problem const&);
  size_t (*backward_workspace_bytes)(BackwardParams const&);
};

template <int HeadDim, DType Type, bool Causal, bool Dropout>
constexpr Entry sm90_entry() {
  return {90,
          HeadDim,
          Type,
          Causal,
          Dropout,
          sm90::forward<HeadDim, Type, Causal, Dropout>,
          sm90::backward<HeadDim, Type, Causal, Dropout>,
          sm90::claims_tiles,
          sm90::backward_workspace_bytes<HeadDim>};
}

// What inst/ holds for one head dim.
using HeadDimEntries = std::array<Entry, 8>;

template <int HeadDim>
constexpr HeadDimEntries sm90_entries() {
  constexpr DType kHalf = DType::kFloat16, kBFloat = DType::kBFloat16;
  return {sm90_entry<HeadDim, kHalf, false, false>(),   sm90_entry<HeadDim, kHalf, false, true>(),
          sm90_entry<HeadDim, kHalf, true, false>(),    sm90_entry<HeadDim, kHalf, true, true>(),
          sm90_entry<HeadDim, kBFloat, false, false>(), sm90_entry<HeadDim, kBFloat, false, true>(),
          sm90_entry<HeadDim, kBFloat, true, false>(),  sm90_entry<HeadDim, kBFloat, true, true>()};
}

// Head dims upwards: the first that is large enough is taken.
constexpr HeadDimEntries kEntries[] = {
    sm90_entries<32>(),  sm90_entries<64>(),  sm90_entries<96>(),
    sm90_entries<128>(), sm90_entries<192>(), sm90_entries<256>(),
};

Status check(Problem const& p) {
  if (p.batch < 1 || p.heads_q < 1 || p.heads_k < 1 || p.seqlen_q < 1 || p.seqlen_k < 1)
    return failure(
        "expected at least one sequence, head, row and key; got batch %d, heads %d and %d, seqlens "
        "%d and %d. Next step: answer empty problems without a launch",
        p.batch, p.heads_q, p.heads_k, p.seqlen_q, p.seqlen_k);
  if (p.heads_q % p.heads_k != 0)
    return failure(
        "expected the number of query heads to be a multiple of the number of key heads; got %d "
        "and %d, nearest %d and %d. Next step: repeat or drop heads",
        p.heads_q, p.heads_k, p.heads_q / p.heads_k * p.heads_k, p.heads_k);
  if (!(p.softmax_scale > 0.f) || !std::isfinite(p.softmax_scale))
    return failure(
        "expected a finite softmax_scale above 0, got %g; nearest 1/sqrt(head_dim) = %g. Next "
        "step: "
        "fold the sign of the scale into q",
        p.softmax_scale, 1.0 / std::sqrt(double(p.head_dim)));
  if (p.drop_threshold > 255)
    return failure("expected a drop_threshold of at most 255, got %u", p.drop_threshold);
  if (p.drop_threshold > 0 && p.rng_state == nullptr)
    return failure("expected rng_state (seed, offset) on the device with dropout, got none");
  if ((p.cu_seqlens_q == nullptr) != (p.cu_seqlens_k == nullptr))
    return failure("expected both of cu_seqlens_q and cu_seqlens_k or neither, got one");
  if (p.cu_seqlens_q != nullptr &&
      (p.key_start != nullptr || p.key_len != nullptr || p.key_bits != nullptr))
    return failure(
        "expected no key_start, key_len or key_bits with cu_seqlens_q, which says the same of "
        "packed keys, got some. Next step: leave them out");
  constexpr int kGridLimit = 65535;
  if (p.batch > kGridLimit || p.heads_q > kGridLimit)
    return failure(
        "expected at most %d sequences and heads, got %d and %d. Next step: split the batch",
        kGridLimit, p.batch, p.heads_q);
  constexpr int64_t kTileLimit = int64_t{1} << 30;
  auto const tiles = [&](int seqlen, int heads) {
    return (int64_t(seqlen) + 63) / 64 * heads * p.batch;
  };
  if (tiles(p.seqlen_q, p.heads_q) > kTileLimit)
    return failure(
        "expected at most 2^30 tiles of 64 rows, got %lld from max_seqlen_q %d, %d heads and %d "
        "sequences. Next step: pass the length of the longest sequence as max_seqlen_q, or split "
        "the batch",
        (long long)tiles(p.seqlen_q, p.heads_q), p.seqlen_q, p.heads_q, p.batch);
  if (tiles(p.seqlen_k, p.heads_k) > kTileLimit)
    return failure(
        "expected at most 2^30 tiles of 64 keys, got %lld from max_seqlen_k %d, %d key heads and "
        "%d sequences. Next step: pass the length of the longest sequence as max_seqlen_k, or "
        "split the batch",
        (long long)tiles(p.seqlen_k, p.heads_k), p.seqlen_k, p.heads_k, p.batch);
  return success();
}

Entry const* find(Problem const& p) {
  if (p.head_dim < 1 || p.head_dim % 8 != 0) return nullptr;
  for (HeadDimEntries const& entries : kEntries) {
    if (entries[0].head_dim < p.head_dim) continue;
    for (Entry const& entry : entries)
      if (entry.compute_capability == p.compute_capability && entry.dtype == p.dtype &&
          entry.causal == p.causal && entry.dropout == (p.drop_threshold > 0))
        return &entry;
  }
  return nullptr;
}

Status explain_miss(Problem const& p) {
  int largest = 0;
  bool device_known = false;
  for (HeadDimEntries const& entries : kEntries) {
    device_known |= entries[0].compute_capability == p.compute_capability;
    largest = std::max(largest, entries[0].head_dim);
  }
  if (!device_known)
    return failure(
        "expected a GPU of compute capability 9.0 (Hopper), got %d.%d. Next step: use "
        "scaled_dot_product_attention on this GPU",
        p.compute_capability / 10, p.compute_capability % 10);
  if (p.head_dim > largest)
    return failure(
        "expected head_dim a multiple of 8 up to %d, got %d; nearest %d. Next step: use "
        "scaled_dot_product_attention for this head_dim",
        largest, p.head_dim, largest);
  int const padded = (std::max(p.head_dim, 1) + 7) / 8 * 8;
  return failure(
      "expected head_dim a multiple of 8 up to %d, got %d; nearest %d. Next step: pad q, k and v "
      "with zeros to it and keep softmax_scale",
      largest, p.head_dim, padded);
}

}  // namespace

Status launch_forward(ForwardParams const& params, int32_t* counter) {
  Status const status = check(params.problem);
  if (!status.ok()) return status;
  Entry const* const entry = find(params.problem);
  return entry == nullptr ? explain_miss(params.problem) : entry->forward(params, counter);
}

Status launch_backward(BackwardParams const& params) {
  Status const status = check(params.problem);
  if (!status.ok()) return status;
  Entry const* const entry = find(params.problem);
  return entry == nullptr ? explain_miss(params.problem) : entry->backward(params);
}

Status check_supported(Problem const& problem) {
  return find(problem) == nullptr ? explain_miss(problem) : success();
}

bool forward_claims_tiles(Problem const& problem) {
  Entry const* const entry = find(problem);
  return entry != nullptr && entry->claims_tiles(problem);
}

size_t backward_workspace_bytes(BackwardParams const& params) {
  Entry const* const entry = find(params.problem);
  return entry == nullptr ? 0 : entry->backward_workspace_bytes(params);
}

}  // namespace hf_flashattn
