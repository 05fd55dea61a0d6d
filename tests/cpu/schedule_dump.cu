// The schedules of the kernels, run on the host: what test_kernel_schedule.py checks.
//
// stdin, a request a line, answered by a line:
//   tiles SEQLEN_Q HEADS BATCH SMS BLOCK_M CAUSAL FOLDED_FROM    "row_block,head,index" of each
//                                                          tile; FOLDED_FROM 0: never folded
//   ahead LENGTH                                           rows_ahead: causal, full, low tiles
//   low HEAD_DIM CAUSAL DROPOUT ROWS                       1 where the forward takes low tiles
//   blocks ROWS KEYS CAUSAL KEY_START KEY_LEN              see print_blocks
//   ragged CAUSAL BLOCK_M AHEAD HEADS HEADS_K HEAD_DIM TOTAL_Q TOTAL_K SMS WALKERS SEQUENCES
//          and the rows of each sequence                   see print_ragged
//   sums BATCH HEADS HEADS_K ROWS KEYS BLOCK_M BLOCK_N SMS DETERMINISTIC    see print_sums
//   claims BATCH HEADS HEADS_K ROWS KEYS BLOCK_M BLOCK_N SMS DETERMINISTIC TOTAL_Q
//                                                          "stream,key block" of each tile in order
//   split HEAD_DIM CAUSAL PACKED BATCH KEYS TOTAL_K DETERMINISTIC           see print_split
//   words KEYS KEY_START KEY_LEN WORD ...                  see print_words; words of key_bits
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/key_bits.cuh"
#include "common/ragged_order.cuh"
#include "common/workspace.cuh"
#include "sm90/scheduler.cuh"

namespace hf_flashattn {

template <sm90::TileOrder Order>
void print_tiles(Problem const& p, int block_m, int folded_from) {
  sm90::TileScheduler<Order> const scheduler(p, block_m, folded_from);
  for (int cta = 0; cta < scheduler.grid; ++cta) {
    sm90::Work work;
    for (int step = 0; scheduler.next(step, work, cta);)
      std::printf("%d,%d,%d ", work.block, work.head, work.index);
  }
  std::printf("\n");
}

template <int BlockM, int BlockN>
void print_key_blocks(Problem const& p, Sequence const& s) {
  for (int row = -rows_ahead<BlockM>(s.length_q, p.causal); row < s.length_q; row += BlockM) {
    KeyBlocks<BlockM, BlockN> const blocks(s, p.causal, row);
    std::printf("f%dx%d:%d,%d,", BlockM, BlockN, blocks.first, blocks.count);
    for (int i = 0; i < blocks.count; ++i) std::printf("%d", blocks.needs_mask(blocks.first + i));
    std::printf(",%d,%d ", blocks.end, row);
  }
}

// Backward: "first,count,mask bits,later blocks of each row block" of each block of keys. Bits as 0
// and 1.
template <int BlockM, int BlockN>
void print_row_blocks(Problem const& p, Sequence const& s, char const* title) {
  for (int key = 0; key < s.length_k; key += BlockN) {
    RowBlocks<BlockM, BlockN> const blocks(s, p.causal, key);
    std::printf("%s:%d,%d,", title, blocks.first, blocks.count);
    for (int i = 0; i < blocks.count; ++i) std::printf("%d", blocks.needs_mask(blocks.first + i));
    std::printf(",");
    for (int i = 0; i < blocks.count; ++i) {
      int const last_row = (blocks.first + i + 1) * BlockM - 1;
      std::printf("%d;", later_key_blocks<BlockN>(s, p.causal, last_row, key / BlockN));
    }
    std::printf(" ");
  }
}

// Forward: "first,count,mask bits,end" of each block of rows, for several tiles. Backward: tiles of
// 128 rows x 128 keys as "a", of 64 x 128 as "b", those of wide heads and of a consumer that makes
// no dQ, of 64 x 64, as "w".
void print_blocks(Problem const& p) {
  Sequence const s(p, 0);
  print_key_blocks<128, 128>(p, s);
  print_key_blocks<192, 96>(p, s);
  print_key_blocks<128, 80>(p, s);
  print_key_blocks<64, 128>(p, s);
  print_key_blocks<64, 80>(p, s);
  print_row_blocks<128, 128>(p, s, "a");
  print_row_blocks<64, 128>(p, s, "b");
  print_row_blocks<64, 64>(p, s, "w");
  std::printf("\n");
}

// "seen,zeroed" of four words of each block of `Keys`; backward blocks end with whether they are
// seen whole.
template <int Keys>
void print_words(Problem const& p, Sequence const& s) {
  for (int first = 0; first < s.length_k; first += Keys) {
    std::printf("%d:", Keys);
    for (int before = 0; before < 128; before += 32) {
      KeyWord<Keys> const word(p, s, first, before);
      std::printf("%u,%u,", word.seen, word.zeroed);
    }
    if constexpr (Keys % 64 == 0)
      std::printf("%d", first + Keys <= s.length_k && KeyBits(p, 0).has_all<Keys>(first));
    std::printf(" ");
  }
}

// A group of ragged sequences, as a warp holds it.
template <int BlockM, bool Ahead>
struct Group {
  std::vector<int> rows;
  int heads;

  using Ends = RowBlockEnds<BlockM, Ahead>;
  int blocks(int place) const { return ceil_div(rows[place], BlockM); }
  int tiles_before(int place) const {
    int tiles = 0;
    while (place-- > 0) tiles += heads * blocks(place);
    return tiles;
  }
  int place_of(int tile) const {
    int place = 0;
    while (tiles_before(place + 1) <= tile) ++place;
    return place;
  }
  int last_end() const { return Ends(*std::max_element(rows.begin(), rows.end())).last; }
  int ending(int end) const {
    return int(std::count_if(rows.begin(), rows.end(), [&](int n) { return Ends(n).has(end); }));
  }
  int row_block_ending(int end, int n, int& place) const {
    for (place = 0; !Ends(rows[place]).has(end) || n-- > 0;) ++place;
    return Ends(rows[place]).row_block(end);
  }
};

// Heads a chunk, then "place,head,row block" of every tile, as found by `walkers` that have each a
// number out of so many.
template <class Walk, class Group>
void print_ragged(Problem const& p, Group const& group, int block_m, int walkers) {
  RaggedOrder const order(p, block_m, nullptr);
  int const tiles = group.tiles_before(int(group.rows.size()));
  std::vector<RaggedTile> found(tiles);
  for (int first = 0; first < walkers; ++first) {
    Walk walk;
    for (int tile = first; tile < tiles; tile += walkers)
      found[tile] = walk.locate(group, order, tile);
  }
  std::printf("%d ", order.chunk);
  for (RaggedTile const& tile : found)
    std::printf("%d,%d,%d ", tile.place, tile.head, tile.row_block);
  std::printf("\n");
}

// "recycled,slots,bytes", then "first sum,first user,last user,miscount" of each head of each
// sequence: how many more of its stream's row blocks are counted than there are.
void print_sums(BackwardParams const& params, int block_m, int block_n) {
  Problem const& p = params.problem;
  BackwardWorkspace const workspace(params, 64, block_m, block_n);
  std::printf("%d,%lld,%zu ", workspace.recycled, (long long)workspace.sum_slots,
              workspace.bytes());
  for (int index = 0; index < p.batch; ++index)
    for (int head = 0; head < p.heads_q; ++head) {
      Sequence const s(p, index);
      int const stream = workspace.stream(s, head / workspace.group());
      int const existing = ceil_div(s.length_q, block_m);
      int counted = 0;
      for (int block = 0; block < workspace.row_blocks(); ++block)
        if (workspace.is_rounded(block, existing)) counted += workspace.counted(block, existing);
      std::printf("%lld,%d,%d,%d ", (long long)workspace.first_sum(s, head),
                  workspace.first_user(stream), workspace.last_user(stream),
                  counted - workspace.row_blocks());
    }
  std::printf("\n");
}

// "split,bytes,bytes of the statistics": whether dQ has a kernel of its own, and the backward's
// workspace for as many rows as keys and one head.
template <int HeadDim>
void print_split(BackwardParams const& params) {
  constexpr int kBlockM = sm90::kBackwardBlockM<HeadDim>;
  int const block_n = sm90::summed_keys<HeadDim>(params.problem);
  std::printf("%d,%zu,%zu\n", sm90::splits_backward<HeadDim>(params.problem),
              BackwardWorkspace(params, HeadDim, kBlockM, block_n).bytes(),
              BackwardWorkspace(params, HeadDim, kBlockM, 0).bytes());
}

template <int HeadDim, bool Causal, bool Dropout>
bool takes_low_tiles(Problem const& p) {
  using High = sm90::ForwardPolicy<HeadDim, DType::kFloat16, Causal, Dropout>;
  using Low = sm90::LowForwardPolicy<HeadDim, DType::kFloat16, Causal, Dropout>;
  return sm90::kLowRowsPercent<High> > 0 && sm90::prefers_low_tiles<High, Low>(p);
}

template <int HeadDim>
void print_low(Problem const& p, bool dropout) {
  bool const low = p.causal  ? dropout ? takes_low_tiles<HeadDim, true, true>(p)
                                       : takes_low_tiles<HeadDim, true, false>(p)
                   : dropout ? takes_low_tiles<HeadDim, false, true>(p)
                             : takes_low_tiles<HeadDim, false, false>(p);
  std::printf("%d\n", low);
}

void print_claims(BackwardParams const& params, int block_m, int block_n) {
  sm90::KeyTileOrder const order(params, block_m, block_n);
  for (int tile = 0; tile < order.tiles(); ++tile) {
    int stream, key_block;
    order.locate(tile, stream, key_block);
    std::printf("%d,%d ", stream, key_block);
  }
  std::printf("\n");
}

void serve() {
  char kind[16];
  while (std::scanf("%15s", kind) == 1) {
    Problem p{};
    p.batch = p.heads_q = p.heads_k = 1;
    int causal = 0, read = 0;
    if (std::strcmp(kind, "tiles") == 0) {
      int block_m = 0, folded_from = 0;
      read = std::scanf("%d %d %d %d %d %d %d", &p.seqlen_q, &p.heads_q, &p.batch, &p.num_sms,
                        &block_m, &causal, &folded_from);
      p.causal = causal;
      if (read != 7) continue;
      if (!p.causal) print_tiles<sm90::TileOrder::kHeadByHead>(p, block_m, folded_from);
      else if (folded_from > 0) print_tiles<sm90::TileOrder::kFolded>(p, block_m, folded_from);
      else print_tiles<sm90::TileOrder::kLongestFirst>(p, block_m, folded_from);
    } else if (std::strcmp(kind, "ragged") == 0) {
      int block_m = 0, ahead = 0, walkers = 0, sequences = 0;
      int32_t const offsets[1] = {0};
      p.cu_seqlens_q = offsets;
      read = std::scanf("%d %d %d %d %d %d %d %d %d %d %d", &causal, &block_m, &ahead, &p.heads_q,
                        &p.heads_k, &p.head_dim, &p.total_q, &p.total_k, &p.num_sms, &walkers,
                        &sequences);
      p.seqlen_q = p.total_q;
      std::vector<int> rows(sequences);
      for (int& length : rows) read += std::scanf("%d", &length);
      if (read != 11 + sequences) continue;
      Group<192, true> const high_ahead{rows, p.heads_q};
      Group<192, false> const high{rows, p.heads_q};
      Group<128, false> const low{rows, p.heads_q};
      if (!causal) print_ragged<FullWalk>(p, high, 192, walkers);
      else if (ahead) print_ragged<CausalWalk>(p, high_ahead, 192, walkers);
      else if (block_m == 192) print_ragged<CausalWalk>(p, high, 192, walkers);
      else print_ragged<CausalWalk>(p, low, 128, walkers);
    } else if (std::strcmp(kind, "sums") == 0) {
      int block_m = 0, block_n = 0, deterministic = 0;
      read = std::scanf("%d %d %d %d %d %d %d %d %d", &p.batch, &p.heads_q, &p.heads_k, &p.seqlen_q,
                        &p.seqlen_k, &block_m, &block_n, &p.num_sms, &deterministic);
      if (read == 9)
        print_sums({.problem = p, .deterministic = deterministic != 0}, block_m, block_n);
    } else if (std::strcmp(kind, "packed_sums") == 0) {
      int block_m = 0;
      read = std::scanf("%d %d %d %d %d", &p.batch, &p.heads_q, &p.heads_k, &block_m, &p.num_sms);
      std::vector<int32_t> offsets(p.batch + 1, 0);
      for (int i = 1; i <= p.batch; ++i) {
        int length = 0;
        read += std::scanf("%d", &length);
        offsets[i] = offsets[i - 1] + length;
        p.seqlen_q = p.seqlen_k = max(p.seqlen_q, length);
      }
      p.cu_seqlens_q = p.cu_seqlens_k = offsets.data();
      p.total_q = p.total_k = offsets[p.batch];
      if (read == 5 + p.batch) print_sums({.problem = p, .deterministic = false}, block_m, 128);
    } else if (std::strcmp(kind, "claims") == 0) {
      int block_m = 0, block_n = 0, deterministic = 0;
      int32_t const offsets[1] = {0};
      read =
          std::scanf("%d %d %d %d %d %d %d %d %d %d", &p.batch, &p.heads_q, &p.heads_k, &p.seqlen_q,
                     &p.seqlen_k, &block_m, &block_n, &p.num_sms, &deterministic, &p.total_q);
      if (p.total_q > 0) p.cu_seqlens_q = offsets;
      if (read == 10)
        print_claims({.problem = p, .deterministic = deterministic != 0}, block_m, block_n);
    } else if (std::strcmp(kind, "split") == 0) {
      int packed = 0, deterministic = 0;
      int32_t const offsets[1] = {0};
      read = std::scanf("%d %d %d %d %d %d %d", &p.head_dim, &causal, &packed, &p.batch,
                        &p.seqlen_k, &p.total_k, &deterministic);
      p.causal = causal;
      p.seqlen_q = p.seqlen_k;
      p.total_q = p.total_k;
      p.num_sms = 132;
      if (packed) p.cu_seqlens_q = p.cu_seqlens_k = offsets;
      BackwardParams const params = {.problem = p, .deterministic = deterministic != 0};
      if (read != 7) continue;
      if (p.head_dim == 32) print_split<32>(params);
      else if (p.head_dim == 64) print_split<64>(params);
      else if (p.head_dim == 96) print_split<96>(params);
      else if (p.head_dim == 128) print_split<128>(params);
      else if (p.head_dim == 256) print_split<256>(params);
    } else if (std::strcmp(kind, "ahead") == 0) {
      int length = 0;
      if (std::scanf("%d", &length) != 1) continue;
      std::printf("%d %d %d\n", rows_ahead<192>(length, true), rows_ahead<192>(length, false),
                  rows_ahead<128>(length, true));
    } else if (std::strcmp(kind, "low") == 0) {
      int dropout = 0;
      read = std::scanf("%d %d %d %d", &p.head_dim, &causal, &dropout, &p.seqlen_q);
      p.causal = causal;
      if (read != 4) continue;
      if (p.head_dim == 32) print_low<32>(p, dropout);
      else if (p.head_dim == 64) print_low<64>(p, dropout);
      else if (p.head_dim == 96) print_low<96>(p, dropout);
      else if (p.head_dim == 128) print_low<128>(p, dropout);
    } else if (std::strcmp(kind, "words") == 0) {
      int32_t start = 0, length = 0;
      read = std::scanf("%d %d %d", &p.seqlen_k, &start, &length);
      std::vector<int32_t> words(ceil_div(p.seqlen_k, 32));
      for (int32_t& word : words) read += std::scanf("%d", &word);
      p.seqlen_q = 1;
      p.key_start = &start;
      p.key_len = &length;
      p.key_bits = words.data();
      p.key_bits_stride = int64_t(words.size());
      Sequence const s(p, 0);
      print_words<64>(p, s);
      print_words<80>(p, s);
      print_words<96>(p, s);
      print_words<128>(p, s);
      std::printf("\n");
    } else {
      int32_t start = 0, length = 0;
      read = std::scanf("%d %d %d %d %d", &p.seqlen_q, &p.seqlen_k, &causal, &start, &length);
      p.causal = causal;
      p.key_start = &start;
      p.key_len = &length;
      if (read == 5) print_blocks(p);
    }
  }
}

}  // namespace hf_flashattn

int main() { hf_flashattn::serve(); }
