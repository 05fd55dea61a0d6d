// Tile shapes, register budgets and orders per head dim and direction, and why.
#pragma once

#include <type_traits>

#include "common/blocks.cuh"
#include "common/ptx.cuh"
#include "params.h"

namespace hf_flashattn::sm90 {

template <DType D>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat16> {
  using type = __half;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using type = __nv_bfloat16;
};

constexpr int kSharedMemoryBytes = 227 << 10;  // what one CTA may have

// One producer warpgroup, and consumers that hold 64 rows each.
// 2 consumers: 24 + 2 * 240 registers a thread of each warpgroup; 3 consumers: 32 + 3 * 160.
template <int Consumers>
struct RegisterBudget {
  static_assert(Consumers == 2 || Consumers == 3,
                "the register file fits 2 or 3 consumer warpgroups");
  static constexpr int kProducer = Consumers == 2 ? 24 : 32;
  static constexpr int kConsumer = Consumers == 2 ? 240 : 160;
};

struct BackwardRegisterBudget {
  static constexpr int kProducer = 40, kConsumer = 232;
};

// The order in which the CTAs take tiles, one each in a step.
enum class TileOrder {
  // Row blocks of one head follow each other and share its K and V in the L2. For full attention,
  // whose row blocks are alike.
  kHeadByHead,
  // Within chunks of streams, and every other step runs backwards, so that no CTA always gets the
  // longest of a step. For causal attention.
  kLongestFirst,
  // Head by head, but row blocks go in pairs of one length, the longest with the shortest; of an
  // odd number the middle ones, half a pair, come last. For causal attention where K and V are
  // large (d128), if there are many tiles and row blocks (kFoldedFrom); else longest first.
  kFolded,
};

// Row blocks from which a folded order pays, but for two, which are one pair. A third of the tiles
// of three are middle ones, and whoever has a pair more has one of those more too. d128, folded and
// in chunks, TFLOP/s: forward at S = 384 249, 278, at 640 371, 365; backward 235, 239 and 279, 279.
constexpr int kFoldedRowBlocks = 4;

// How a tile's rows get from the accumulators to global memory.
enum class OutputPath {
  kOwnMemory,  // through shared memory of their own, 16 bytes a lane, in the next tile
  kRegisters,  // exchanged between lanes, 8 bytes each: where there is no memory for that
};

// When a consumer draws the random words of a block: in the forward and in the narrow backward; the
// wide backward and dQ have one place for it. Philox is a chain of products, each of which waits
// for the one before: time that is there while the other consumers use the tensor cores.
enum class Draw {
  kBeforeScores,  // before it issues S (or S^T): while it waits for the block, or for its turn
  kUnderScores,   // while its S (S^T) runs
  kWithSoftmax,   // mixed into the forward's softmax: no words are kept across the wait for S
};

// Half a block of keys, in whole steps of O += P V; 0 where that would be too few to gain anything.
template <int BlockN>
constexpr int kHalfBlock = BlockN > 64 ? (BlockN / 2 + 15) / 16 * 16 : 0;

// HeadDim: of the kernel. It serves every smaller multiple of 8 too: TMA fills up with zeros, and
// only the columns that exist are written.
template <int HeadDim, DType Type, bool Causal, bool Dropout, int Consumers, int BlockN>
struct ForwardTile {
  using Element = typename ElementOf<Type>::type;
  using Registers = RegisterBudget<Consumers>;
  static constexpr int kHeadDim = HeadDim;
  static constexpr bool kCausal = Causal;
  static constexpr bool kDropout = Dropout;
  static constexpr int kConsumers = Consumers;
  static constexpr int kBlockM = 64 * Consumers;
  static constexpr int kBlockN = BlockN;
  // A third stage gained 0.7 % at d64 full and cost 0.3 % when causal; d32 by likeness.
  static constexpr int kStages = HeadDim <= 64 ? 3 : 2;
  // A second Q tile, where it fits, lets the next rows arrive while these write their output.
  static constexpr int kQueryStages =
      2 * HeadDim * (2 * kBlockM + 2 * kStages * kBlockN) + 1024 <= kSharedMemoryBytes ? 2 : 1;
  static constexpr OutputPath kOutputPath =
      HeadDim > 128 ? OutputPath::kRegisters : OutputPath::kOwnMemory;
  // Full / causal, over the better peer: d64 under S 1.92 / 1.84, before S 1.88 / 1.81, with the
  // softmax 1.77 / 1.75; d96 1.81 / 1.72, 1.78 / 1.71, 1.71 / 1.71 with three consumers, with two
  // before S 0.96 / 1.00 of the rate under S. At d128 before S 1.94 / 1.90, under S 1.89 / 1.89. At
  // d192 the others were within 1 %, at d256 they lost 1 to 4 %, at d32 they gave between +1 and
  // -4 %.
  static constexpr Draw kDraw = HeadDim == 64 || HeadDim == 96 ? Draw::kUnderScores
                                : HeadDim == 128               ? Draw::kBeforeScores
                                                               : Draw::kWithSoftmax;
  // A tile's first block is the diagonal, of which half of the consumers see half at most: S of
  // this many keys is made where that is all. 0: always of the whole block.
  static constexpr int kShortBlock = Causal ? kHalfBlock<BlockN> : 0;
  // Chunks instead of folding gained 5 % at d64 causal, together with idle consumers handing tiles
  // back, and lost 5 % at d128.
  static constexpr TileOrder kTileOrder = !Causal         ? TileOrder::kHeadByHead
                                          : HeadDim < 128 ? TileOrder::kLongestFirst
                                                          : TileOrder::kFolded;
  // With dropout chunks also gain 5 and 1 to 4 % at S = 512 and 1k of d128, and lose 2 and 3 % at
  // 2k and 4k, at d192 from 512 on.
  static constexpr int kFoldedFrom = HeadDim == 128 && Dropout ? 9 : kFoldedRowBlocks;
  // Tiles in the order of TileScheduler; RaggedPolicy claims them.
  static constexpr bool kRagged = false;
  static constexpr bool kHoles = false;  // HoledPolicy: keys inside their range may be hidden
  static constexpr int kThreads = (Consumers + 1) * kWarpgroupThreads;
  static_assert(BlockN % 16 == 0, "O += P V takes 16 keys at a time");
  static_assert(!Dropout || BlockN % 32 == 0, "dropout masks come for 32 columns at a time");
};

// A consumer thread holds BlockN / 2 registers of S, BlockN / 4 of P and HeadDim / 2 of O.
// d32: as d64, where S and P are most of it.
// d64: three consumers, because a row of O is only 32 registers; 128 keys keep S, P and O in 160.
// d96: three consumers, of which O takes 48 registers: 96 keys make 120 in all (d64: 128), and
// masks come for 32 columns.
// d128: two consumers of 240. 176 keys would fit and amortise a block's softmax over more of them,
// but then a second Q tile does not: 128 keys were 8 % faster at S = 512, level to 3 % slower at
// 16k.
// d192, d256: shared memory decides. At d192 80 keys leave room for a second Q, which 112 do not:
// 1.14 / 1.19 of cuDNN's rate (full / causal) instead of 1.12 / 1.17. d256: 80 keys fit too, and
// are as fast at 16k, but lengths are multiples of 64 rather: 1.12 / 1.19 instead of 1.11 / 1.175.
template <int HeadDim, DType Type, bool Causal, bool Dropout>
struct ForwardPolicy;
template <DType Type, bool Causal, bool Dropout>
struct ForwardPolicy<32, Type, Causal, Dropout> : ForwardTile<32, Type, Causal, Dropout, 3, 128> {};
template <DType Type, bool Causal, bool Dropout>
struct ForwardPolicy<64, Type, Causal, Dropout> : ForwardTile<64, Type, Causal, Dropout, 3, 128> {};
template <DType Type, bool Causal, bool Dropout>
struct ForwardPolicy<96, Type, Causal, Dropout> : ForwardTile<96, Type, Causal, Dropout, 3, 96> {};
template <DType Type, bool Causal, bool Dropout>
struct ForwardPolicy<128, Type, Causal, Dropout> : ForwardTile<128, Type, Causal, Dropout, 2, 128> {
};
template <DType Type, bool Causal, bool Dropout>
struct ForwardPolicy<192, Type, Causal, Dropout>
    : ForwardTile<192, Type, Causal, Dropout, 2, Dropout ? 64 : 80> {};
template <DType Type, bool Causal, bool Dropout>
struct ForwardPolicy<256, Type, Causal, Dropout> : ForwardTile<256, Type, Causal, Dropout, 2, 64> {
};

// Low tiles, of two consumers instead of three: for lengths that leave many rows of the last high
// one empty, where the host knows them. In packed batches of 128..512 they lost, full / causal: d32
// 0.85 / 0.92, d64 0.90 / 1.00, d96 0.94 / 0.97; with dropout 0.95 / 0.98, 0.93 / 0.98, 0.96 /
// 0.91.
template <int HeadDim, DType Type, bool Causal, bool Dropout>
struct LowForwardPolicy : ForwardTile<HeadDim, Type, Causal, Dropout, 2, 128> {};

// Up to what share of the high tiles' rows, in percent, low tiles are taken; 0: there are none. By
// length, low over high, full / causal (the causal ones before high tiles began ahead of the
// sequence, which made them 3 to 4 % faster where they lack rows):
//   S     rows, low : high   d32          d64          d96          d96, dropout
//   128   128 : 192          0.91 / 1.11  1.02 / 1.11  1.02 / 1.06  1.33 / 1.14
//   256   256 : 384          1.16 / 1.05  1.25 / 1.10  1.44 / 1.14  1.62 / 1.16
//   320   384 : 384          0.76 / 0.87  0.83 / 0.90  0.95 / 0.99  1.01 / 1.00
//   512   512 : 576          0.87 / 0.92  0.94 / 0.96  1.14 / 1.06  1.25 / 1.00
//   640   640 : 768          0.94 / 1.14  0.99 / 1.14  1.15 / 1.23  1.25 / 1.25
//   1024  1024 : 1152        not timed    not timed    1.10 / 1.07  1.18 / 1.06
//   4096  4096 : 4224        not timed    0.83 / 0.90  0.96 / 1.00  1.02 / 1.03
//   16384 16384 : 16512      not timed    not timed    0.93 / 0.95  1.01 / 0.99
// With dropout d32 gains 4 to 10 % more than that at 256 and 640, d64 between -3 and +6 %. d96
// takes low tiles unless they have more rows: the words of a call are for 64 columns, and blocks of
// 96 keys use three quarters of them.
template <class P>
constexpr int kLowRowsPercent = P::kConsumers == 2          ? 0
                                : P::kHeadDim == 96         ? (P::kDropout ? 100 : 90)
                                : P::kCausal || P::kDropout ? 85
                                                            : 80;

template <class High, class Low>
inline bool prefers_low_tiles(Problem const& p) {
  int const low_rows = ceil_div(p.seqlen_q, Low::kBlockM) * Low::kBlockM;
  int const rows = ceil_div(p.seqlen_q, High::kBlockM) * High::kBlockM;
  // One tile a sequence either way: d32 gains nothing there.
  if (High::kHeadDim == 32 && !High::kCausal && low_rows == Low::kBlockM) return false;
  return int64_t{low_rows} * 100 <= int64_t{rows} * kLowRowsPercent<High>;
}

// The same kernel for sequences whose lengths only the device knows: see common/ragged_order.cuh.
// Packed lengths end anywhere, so the first block is short at full attention too: lengths 256..4096
// 7 % faster.
template <class P>
struct RaggedPolicy : P {
  static constexpr bool kRagged = true;
  static constexpr int kShortBlock = kHalfBlock<P::kBlockN>;
};

// And for problems with key_bits, where every block looks at its bits: a forward with ragged tiles,
// or the kernel of dQ.
template <class P>
struct HoledPolicy : P {
  static constexpr bool kHoles = true;
};

// Backward: a block of 128 keys stays, 64 for each of two consumers; row blocks stream past.
template <int HeadDim, DType Type, bool Causal, bool Dropout, int BlockM>
struct BackwardTile {
  using Element = typename ElementOf<Type>::type;
  // The rounding warps want more than 24; the masks of dropout leave none to spare.
  using Registers = std::conditional_t<Dropout, RegisterBudget<2>, BackwardRegisterBudget>;
  static constexpr int kHeadDim = HeadDim;
  static constexpr bool kCausal = Causal;
  static constexpr bool kDropout = Dropout;
  static constexpr int kConsumers = 2;
  static constexpr int kBlockM = BlockM;
  static constexpr int kBlockN = 128;
  static constexpr int kStages = 2;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  // Full / causal, over the better peer: d64 before S^T 1.45 / 1.51, under it 1.45 / 1.49;
  // d128 1.36 / 1.26 and 1.37 / 1.27; d32 and d96 by likeness.
  static constexpr Draw kDraw = HeadDim == 64 ? Draw::kBeforeScores : Draw::kUnderScores;
  static_assert(kDraw != Draw::kWithSoftmax, "the backward draws before or under S^T");
  static constexpr bool kMakesDq = true;
  static constexpr int kKeyStages = 1;  // tiles of K and V
  // dQ of a row block is BlockM x HeadDim; each consumer makes half of it, 64 rows high.
  static_assert(BlockM == 64 || BlockM == 128, "a part of dQ has 64 rows");
  static constexpr bool kSplitRows = BlockM == 128;
  // Whether a last row block of no more than 64 rows is worked on as one of 64. d64 has kernels of
  // its own for that (PackedBackwardPolicy).
  static constexpr bool kShortBlocks = HeadDim == 32;
  static constexpr int kPartColumns = kSplitRows ? HeadDim : HeadDim / 2;
};

// A consumer thread holds BlockM / 2 registers each of S^T and dP^T, as many of their 16-bit forms,
// and HeadDim / 2 each of dK and dV; P^T and dS^T reuse what S^T and dP^T leave. d64 and d128: 192
// before dQ, of 232, with dropout 240. d32 takes 160, but no row block between 128 and 256 splits
// into parts of dQ. d96: 128 rows would take 224.
template <int HeadDim, DType Type, bool Causal, bool Dropout>
struct BackwardPolicy;
template <DType Type, bool Causal, bool Dropout>
struct BackwardPolicy<32, Type, Causal, Dropout> : BackwardTile<32, Type, Causal, Dropout, 128> {};
template <DType Type, bool Causal, bool Dropout>
struct BackwardPolicy<64, Type, Causal, Dropout> : BackwardTile<64, Type, Causal, Dropout, 128> {};
template <DType Type, bool Causal, bool Dropout>
struct BackwardPolicy<96, Type, Causal, Dropout> : BackwardTile<96, Type, Causal, Dropout, 64> {};
template <DType Type, bool Causal, bool Dropout>
struct BackwardPolicy<128, Type, Causal, Dropout> : BackwardTile<128, Type, Causal, Dropout, 64> {};

// The same tiles of packed sequences, which end anywhere: lengths 128..512 d64 full 4 % faster.
// Dense ones do without the second copy of the loop's body, causal d64 is 1 % faster so.
template <class P>
struct PackedBackwardPolicy : P {
  static_assert(P::kBlockM == 128 && !P::kShortBlocks, "half a block has 64 rows");
  static constexpr bool kShortBlocks = true;
};

// The same tiles where dQ has a kernel of its own: dS^T stays in registers, nobody needs the other
// consumer, and nothing is summed in global memory. Without rounding warps consumers have 240
// registers. The memory that dQ leaves is for K and V of the next tile, since tiles of short
// sequences are few row blocks each: 208 KB at d128.
template <class P>
struct KeysOnlyPolicy : P {
  using Registers = RegisterBudget<2>;
  static constexpr bool kMakesDq = false;
  static constexpr int kKeyStages = 2;
  static constexpr bool kShortBlocks = P::kBlockM == 128;
};

// Wide heads: dK or dV of 64 keys fills half of a consumer's registers. One consumer accumulates
// dV, the other dK, and each makes S^T and dP^T of every other block of 64 rows.
template <int HeadDim, DType Type, bool Causal, bool Dropout>
struct BackwardWideTile {
  using Element = typename ElementOf<Type>::type;
  using Registers = RegisterBudget<2>;
  static constexpr int kHeadDim = HeadDim;
  static constexpr bool kCausal = Causal;
  static constexpr bool kDropout = Dropout;
  static constexpr int kConsumers = 2;
  static constexpr int kBlockM = 64;
  static constexpr int kBlockN = 64;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static_assert(HeadDim % 64 == 0 && HeadDim <= 256, "dK or dV fits 128 floats");
};
template <DType Type, bool Causal, bool Dropout>
struct BackwardPolicy<192, Type, Causal, Dropout> : BackwardWideTile<192, Type, Causal, Dropout> {};
template <DType Type, bool Causal, bool Dropout>
struct BackwardPolicy<256, Type, Causal, Dropout> : BackwardWideTile<256, Type, Causal, Dropout> {};

// dQ in a kernel of its own: a consumer thread holds HeadDim / 2 registers of dQ and 32 each of S
// and dP. At 256 the rows, two stages of K and one of V take 224 of 227 KB: V is needed for dP
// alone, and the next one comes while dQ += dS K and S of the next block are made. Up to 128 there
// is room for the rows of two tiles, and sequences that are split there have tiles of a few blocks:
// Q and dO of the next one come meanwhile, and K and V fill the rest. 128 keys would do with fewer
// reads of shared memory, but take 224 registers, and of a causal sequence of 512 make a tenth more
// scores.
template <int HeadDim, DType Type, bool Causal, bool Dropout>
struct QueryGradientPolicy {
  using Element = typename ElementOf<Type>::type;
  using Registers = RegisterBudget<2>;
  static constexpr int kHeadDim = HeadDim;
  static constexpr bool kCausal = Causal;
  static constexpr bool kDropout = Dropout;
  static constexpr int kConsumers = 2;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kBlockN = 64;
  static constexpr int kRowStages = HeadDim > 128 ? 1 : 2;
  static constexpr int kKeyStages = HeadDim > 128 ? 2 : 4;
  static constexpr int kValueStages = HeadDim > 192 ? 1 : 2;
  static constexpr TileOrder kTileOrder = Causal ? TileOrder::kFolded : TileOrder::kHeadByHead;
  static constexpr int kFoldedFrom = kFoldedRowBlocks;
  static constexpr bool kRagged = false;
  static constexpr bool kHoles = false;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
};

// The same for packed sequences: in static steps over all row blocks that the longest could have,
// many CTAs find none.
template <class P>
struct RaggedQueryPolicy : P {
  static constexpr bool kRagged = true;
};

// Rows of a block: the workspace is laid out in these.
template <int HeadDim>
constexpr int kBackwardBlockM = BackwardPolicy<HeadDim, DType::kBFloat16, false, false>::kBlockM;

// Up to how many keys a sequence dQ has a kernel of its own although the backward could sum it; 0:
// never, and there are no such kernels. Two more products cost less there than sums do: a short
// sequence has them added, read and zeroed for few scores each. Split over summed, full / causal:
//   S     d64          d96          d128
//   128   1.29 / 1.32  1.37 / 1.38  1.41 / not timed
//   256   1.09 / 1.17  1.19 / 1.38  1.22 / not timed
//   384   0.93 / 1.05  1.05 / 1.24  1.10 / not timed
//   512   0.87 / 1.00  0.94 / 1.16  0.99 / 1.22
// d32 gains 1.08 / 1.05 at 128 and nothing from 192 on.
template <int HeadDim, bool Causal>
constexpr int kSplitUpToKeys = HeadDim == 64                     ? (Causal ? 384 : 256)
                               : HeadDim == 96 || HeadDim == 128 ? (Causal ? 512 : 384)
                                                                 : 0;

// The same for the mean of packed sequences, in eighths of it. Longer ones have more of the work
// than of the number, but splitting costs less where sequences end than summing does. Split over
// summed, the better of two runs each on an H200 whose rate moved: what was split in both differed
// by 0.98 to 1.11, so the first row says little more than that nothing is lost:
//   lengths    mean  d64 full, causal  d96 full, causal  d128 full, causal
//   160..640   432   0.98  1.13        1.09  (split)     1.11  (split)
//   200..800   513   0.93  1.03        0.96  1.15        0.99  1.28
//   256..1024  614   0.93  0.91        0.95  1.08        0.92  1.13
// With dropout d64 full is not expected to gain: 0.91 before packed tiles ended by themselves.
template <int HeadDim, bool Causal>
constexpr int kSplitPackedEighths = HeadDim == 64 && !Causal ? 7 : 10;

// Whether the backward is split in two kernels, one for dK and dV and one for dQ. By sizes that the
// host knows: the workspace depends on it.
template <int HeadDim>
inline bool splits_backward(Problem const& p) {
  if (HeadDim > 128) return true;
  int64_t const most = p.causal ? kSplitUpToKeys<HeadDim, true> : kSplitUpToKeys<HeadDim, false>;
  if (most == 0) return false;
  if (p.cu_seqlens_q == nullptr) return p.seqlen_k <= most;
  int64_t const eighths =
      p.causal ? kSplitPackedEighths<HeadDim, true> : kSplitPackedEighths<HeadDim, false>;
  // A very long sequence beside short ones has most of the work.
  return 8 * int64_t{p.total_k} <= eighths * most * p.batch && p.seqlen_k <= 2 * most;
}

// Keys of a tile whose dQ is summed in the workspace, and its memory recycled (see
// common/workspace.cuh); 0 where the backward is split.
template <int HeadDim>
constexpr int kSummedKeys = BackwardPolicy<HeadDim, DType::kBFloat16, false, false>::kBlockN;
template <int HeadDim>
inline int summed_keys(Problem const& p) {
  return splits_backward<HeadDim>(p) ? 0 : kSummedKeys<HeadDim>;
}

}  // namespace hf_flashattn::sm90
