// The named barriers of the Hopper kernels: who arrives, who waits. Barrier 0 is __syncthreads.
#pragma once

namespace hf_flashattn::sm90 {

enum ForwardBarrier : int {
  // + warpgroup: the warpgroup before it in the ring arrives when it has issued its products; this
  // warpgroup waits before it issues its own (ping-pong).
  kTensorCores = 1,  // 1, 2, 3
};

enum BackwardBarrier : int {
  // Both consumer warpgroups arrive and wait: dS is complete in shared memory.
  kScoreGradients = 1,
  // Wide heads: both consumer warpgroups arrive and wait: nobody reads K and V any more, their
  // memory becomes scratch.
  kEpilogue = 2,
  // + warpgroup, + 2 * stage: the consumers arrive when they have written their part of dQ; the
  // writer of every other row block waits, or the only writer.
  kQueryGradientFull = 3,  // 3, 4, 5, 6
  // + warpgroup: the writer arrives when that part has been read; the consumers wait.
  kQueryGradientEmpty = 7,  // 7, 8
  // Wide heads: consumer 1 arrives when it has issued S^T and dP^T; consumer 0 waits before it
  // issues its own.
  kFirstScores = 3,
};

}  // namespace hf_flashattn::sm90
