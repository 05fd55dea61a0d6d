"""Which tiles and blocks the kernels visit, from their own headers compiled for the host."""

from __future__ import annotations

import ast
import itertools
import random
import re
from pathlib import Path

# Rows x keys of the backward's tiles: up to 64, up to 128 and above.
BACKWARD_TILES = {"a": (128, 128), "b": (64, 128), "w": (64, 64)}
FORWARD_TILES = ((128, 128), (192, 96), (128, 80), (64, 128), (64, 80))


def test_every_tile_once(dump):
    cases = list(
        itertools.product(
            (1, 64, 250, 384, 500, 1024, 8000), (1, 12), (1, 3, 32), (1, 7, 132), (128, 192),
            ((0, 0), (1, 0), (1, 4), (1, 9)),
        )
    )  # fmt: skip
    requests = [
        f"tiles {seqlen} {heads} {batch} {sms} {block_m} {causal} {folded_from}"
        for seqlen, heads, batch, sms, block_m, (causal, folded_from) in cases
    ]
    for (seqlen, heads, batch, _, block_m, *_), tiles in zip(cases, dump(requests), strict=True):
        want = itertools.product(range(-(-seqlen // block_m)), range(heads), range(batch))
        assert sorted(tiles) == sorted(",".join(map(str, tile)) for tile in want)


def test_folded_unless_there_are_few_row_blocks(dump):
    def folds(row_blocks: int, folded_from: int) -> bool:
        """Whether the first CTA begins with a pair, the longest and the shortest of a stream."""
        (tiles,) = dump([f"tiles {128 * row_blocks} 200 1 132 128 1 {folded_from}"])
        first, second = (int(tile.split(",")[0]) for tile in tiles[:2])
        return (first, second) == (row_blocks - 1, 0)

    counts = (2, 3, 5, 6, 7, 8, 9, 10)  # of four both orders begin alike
    assert [n for n in counts if not folds(n, folded_from=4)] == [3]
    assert [n for n in counts if not folds(n, folded_from=9)] == [3, 5, 6, 7, 8]


def test_low_tiles_where_high_ones_would_leave_rows_empty(dump):
    lengths = (1, 64, 128, 129, 192, 193, 256, 257, 384, 385, 448, 512, 577, 640, 641, 1024, 4096)
    kernels = list(itertools.product((32, 64, 96, 128), (0, 1), (0, 1)))
    answers = dump([f"low {dim} {c} {p} {n}" for dim, c, p in kernels for n in lengths])
    taken = {
        kernel: {n for n, (low,) in zip(lengths, answers[i * len(lengths) :], strict=False)
                 if low == "1"}
        for i, kernel in enumerate(kernels)
    }  # fmt: skip
    short = {1, 64, 128}
    usual = short | {193, 256}
    more = usual | {577, 640}
    for (dim, causal, dropout), got in taken.items():
        want = {
            32: more if causal else (more if dropout else usual) - short,
            64: more if causal or dropout else usual,
            96: set(lengths) - {129, 192} if dropout else more | {385, 448, 512, 1024},
            128: set(),
        }[dim]
        assert got == want, f"d{dim} causal={causal} dropout={dropout}"


def test_causal_tiles_of_three_groups_begin_ahead_of_the_sequence(dump):
    lengths = (1, 63, 64, 65, 128, 129, 192, 193, 256, 320, 321, 384, 512, 1000, 1024, 4096)
    for length, answer in zip(lengths, dump([f"ahead {n}" for n in lengths]), strict=True):
        causal, full, low = map(int, answer)
        assert (full, low) == (0, 0)
        empty = -length % 192
        assert causal == empty - empty % 64, f"{length} rows"


def ragged(dump, *requests) -> list[tuple[int, list[tuple[int, ...]]]]:
    """Heads a chunk and (place, head, row block) of each tile. A request: causal, rows of a block,
    whether they may begin ahead, heads, heads_k, head_dim, total_q, total_k, SMs, how many walk,
    and the sequences' rows."""
    lines = [[*numbers, len(rows), *rows] for *numbers, rows in requests]
    answers = dump([f"ragged {' '.join(map(str, line))}" for line in lines])
    return [
        (int(chunk), [tuple(map(int, t.split(","))) for t in tiles]) for chunk, *tiles in answers
    ]


ROWS = ([1], [1300], [500, 450, 380, 64, 1, 0, 0], [4000, *range(65, 900, 100)], [300] * 32)
RAGGED_KERNELS = ((0, 192, 0), (1, 192, 1), (1, 192, 0), (1, 128, 0))  # causal, rows, ahead


def test_ragged_tiles_once_and_in_their_order(dump):
    requests = [
        (*kernel, heads, heads_k, 64, total, total, sms, walkers, rows)
        for kernel, (heads, heads_k), total, sms, walkers, rows in itertools.product(
            RAGGED_KERNELS, ((1, 1), (7, 7), (14, 2)), (1, 3000, 45_000, 2 * 10**6), (1, 132),
            (1, 7, 132), ROWS,
        )
    ]  # fmt: skip
    chunks = set()
    for request, (chunk, tiles) in zip(requests, ragged(dump, *requests), strict=True):
        causal, block_m, ahead, heads, heads_k, *_, rows = request
        exist = [
            (place, head, block)
            for place, length in enumerate(rows)
            for head, block in itertools.product(range(heads), range(-(-length // block_m)))
        ]
        assert sorted(tiles) == exist, request
        assert chunk % (heads // heads_k) == 0, f"{request}: query heads of one key head are parted"

        def end(place, block, rows=rows, block_m=block_m, ahead=ahead):
            missing = -rows[place] % block_m // 64 * 64 if ahead else 0
            return -(-min((block + 1) * block_m - missing, rows[place]) // 64)

        if causal:
            chunks.add((heads, chunk))
            order = [
                (head // chunk, -end(place, block), place, head) for place, head, block in tiles
            ]
            assert order == sorted(order), request
        else:
            assert tiles == exist, request
    assert {(7, 7), (7, 1), (7, 4), (14, 14), (14, 7)} <= chunks  # 4: the last has 3


def test_chunks_hold_what_fits_the_cache_and_enough_tiles_to_level_out(dump):
    # 16 heads of 64: 256 bytes of K and V for each token and head.
    few_keys, cache_full, few_rows = ragged(
        dump,
        (1, 192, 1, 16, 16, 64, 10_000, 10_000, 132, 1, [1]),
        (1, 192, 1, 16, 16, 64, 400_000, 400_000, 132, 1, [1]),
        (1, 192, 1, 16, 16, 64, 192 * 66, 400_000, 132, 1, [1]),
    )
    assert few_keys[0] == 16  # 41 MB in all
    assert cache_full[0] == 1  # 102 MB a head
    assert few_rows[0] == 8  # 66 row blocks: 528 tiles a chunk are four for each SM


def random_blocks(count: int) -> list[tuple[int, int, int, int, int]]:
    """(rows, keys, causal, key_start, key_len), edges and nonsense included."""
    draw = random.Random(0)
    sizes = (1, 63, 64, 65, 128, 129, 200, 513)
    starts = (0, 0, 1, 64, 127, 128, 200, 600, -5)
    lengths = (0, 1, 64, 128, 300, 2**31 - 1, -4)
    return [
        (*draw.choices(sizes, k=2), draw.randint(0, 1), draw.choice(starts), draw.choice(lengths))
        for _ in range(count)
    ]


def sees(rows, keys, causal, start, length, row, key) -> bool:
    in_range = start <= key < start + length
    return in_range and (not causal or key <= row + keys - rows)


def visibility(case, row_block: int, key_block: int, first_row: int, first_key: int):
    """Of the pairs of a tile that exist: whether any and whether all are seen."""
    rows, keys = case[:2]
    seen = [
        sees(*case, row, key)
        for row in range(max(first_row, 0), min(first_row + row_block, rows))
        for key in range(first_key, min(first_key + key_block, keys))
    ]
    return any(seen), all(seen) and first_key + key_block <= keys


def test_blocks_cover_what_is_seen_and_mask_what_is_not(dump):
    cases = random_blocks(150)
    answers = dump([f"blocks {' '.join(map(str, case))}" for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        rows, keys = case[:2]
        for tile in FORWARD_TILES:
            name, (block_m, block_n) = "f{}x{}:".format(*tile), tile
            forward = [x.removeprefix(name).split(",") for x in answer if x.startswith(name)]
            assert len(forward) == -(-rows // block_m)
            begin = int(forward[0][-1]) if forward else 0
            assert -block_m < begin <= 0 and begin % 64 == 0
            assert begin == 0 or (block_m == 192 and case[2] and rows <= begin + len(forward) * 192)
            for i, (first, count, masks, end, row) in enumerate(forward):
                assert int(row) == begin + i * block_m
                check_end(case, int(row), block_m, int(count), int(end))
                for block in range(-(-keys // block_n)):
                    seen, whole = visibility(case, *tile, int(row), block * block_n)
                    visited = int(first) <= block < int(first) + int(count)
                    assert visited or not seen, (case, tile, i, block)
                    if visited and masks[block - int(first)] == "0":
                        assert whole, (case, tile, i, block)
        for title, tile in BACKWARD_TILES.items():
            backward = [x[2:].split(",") for x in answer if x.startswith(f"{title}:")]
            check_backward(case, tile, backward)
        check_halves(answer)


def check_end(case, first_row: int, block_m: int, count: int, end: int):
    """No row of the block sees a key from `end` on, and some row sees the one before."""
    seen = [
        key
        for row in range(max(first_row, 0), min(first_row + block_m, case[0]))
        for key in range(case[1])
        if sees(*case, row, key)
    ]
    if count > 0:
        assert max(seen, default=-1) + 1 == end, (case, first_row)
    else:
        assert not seen, (case, first_row)


def check_halves(answer: list[str]):
    """A consumer that makes no dQ starts where its own 64 keys of 128 are first seen, and ends with
    the tile."""
    whole, own = (
        [tuple(map(int, x[2:].split(",")[:2])) for x in answer if x.startswith(f"{title}:")]
        for title in "bw"
    )
    for number, (first, count) in enumerate(own):
        tile_first, tile_count = whole[number // 2]
        if count > 0:
            assert first >= tile_first and first + count == tile_first + tile_count, answer


def check_backward(case, tile: tuple[int, int], backward: list[list[str]]):
    rows, keys = case[:2]
    row_block, key_block = tile
    turns: dict[int, list[int]] = {}
    assert len(backward) == -(-keys // key_block)
    for key, (first, count, masks, later) in enumerate(backward):
        for block in range(-(-rows // row_block)):
            seen, whole = visibility(case, *tile, block * row_block, key * key_block)
            visited = int(first) <= block < int(first) + int(count)
            assert visited or not seen, (case, block, key)
            if visited and masks[block - int(first)] == "0":
                assert whole, (case, block, key)
            if visited:
                turns.setdefault(block, []).append(int(later.split(";")[block - int(first)]))
    # The last key block of a row block goes first and everyone knows how many came before.
    for block, order in turns.items():
        assert order == list(range(len(order)))[::-1], (case, block, order)


def test_sums_of_dq_are_recycled_by_streams_that_are_far_apart(dump):
    cases = list(
        itertools.product(
            (1, 7, 64), ((1, 1), (12, 12), (8, 2)), (1, 130, 1024), (1, 130, 1024), (64, 128),
            (4, 132),
        )
    )  # fmt: skip
    requests = [
        f"sums {batch} {heads} {heads_k} {rows} {keys} {block_m} 128 {sms} 0"
        for batch, (heads, heads_k), rows, keys, block_m, sms in cases
    ]
    some_recycled = False
    for case, (facts, *heads) in zip(cases, dump(requests), strict=True):
        batch, (heads_q, heads_k), rows, keys, block_m, sms = case
        recycled, slots, total = map(int, facts.split(","))
        some_recycled |= recycled > 0
        padded, group = -(-rows // block_m) * block_m, heads_q // heads_k
        streams, key_blocks = batch * heads_k, -(-keys // 128)
        together = recycled or streams
        assert slots == together * group * padded
        # As many tiles of newer streams as four for each SM, before memory is needed again.
        assert recycled == 0 or (recycled - 1) * key_blocks >= 4 * sms, case
        assert total >= 4 * (slots * 64 + 2 * streams * group * padded)
        first, users = {}, {}
        for number, text in enumerate(heads):
            start, is_first, is_last, miscount = map(int, text.split(","))
            assert miscount == 0
            stream = number // group  # heads of a sequence, sequence by sequence
            assert start % padded == 0 and start + padded <= slots
            assert is_first == (stream < together) and is_last == (stream + together >= streams)
            users.setdefault(start, []).append(stream)
            first[number] = start
        assert len(set(first.values())) == together * group
        for of_same_memory in users.values():
            gaps = {b - a for a, b in itertools.pairwise(of_same_memory)}
            assert gaps <= {together}, case
    assert some_recycled


def test_sums_of_packed_sequences_have_room_for_the_longest(dump):
    draw = random.Random(0)
    even = [draw.randrange(128, 513) for _ in range(32)]
    cases = list(
        itertools.product(
            (even, [0, *even, 0, 0], [512] * 40, [1] * 600), ((16, 16), (16, 4)), (64, 128)
        )
    )
    requests = [
        f"packed_sums {len(lengths)} {heads} {heads_k} {block_m} 132 {' '.join(map(str, lengths))}"
        for lengths, (heads, heads_k), block_m in cases
    ]
    for case, (facts, *heads) in zip(cases, dump(requests), strict=True):
        lengths, (heads_q, heads_k), block_m = case
        recycled, slots, _ = map(int, facts.split(","))
        tiles = [-(-length // 128) for length in lengths for _ in range(heads_k)]
        assert recycled > 0 or heads_k == 4, case
        if recycled == 0:
            continue
        rows, group = -(-max(lengths) // block_m) * block_m, heads_q // heads_k
        assert slots == recycled * group * rows
        for first in range(len(tiles) - recycled):  # as many as two for each SM
            assert sum(tiles[first + 1 : first + recycled]) >= 2 * 132, (case, first)
        for number, text in enumerate(heads):
            start, is_first, is_last, miscount = map(int, text.split(","))
            stream = number // group
            place, head = stream % recycled, number % group
            assert start == (place * group + head) * rows
            assert is_first == (stream < recycled)
            assert is_last == (stream + recycled >= len(lengths) * heads_k)
            assert miscount == 0


def test_sums_of_packed_sequences_are_not_recycled_beside_a_far_longer_one(dump):
    lengths = [8192] + [64] * 300
    ((facts, *_),) = dump([f"packed_sums 301 16 16 128 132 {' '.join(map(str, lengths))}"])
    assert facts.startswith("0,")


def test_sums_are_not_recycled_when_they_take_turns(dump):
    (facts, *_), (taking_turns, *_) = dump(
        [f"sums 64 12 12 512 512 128 128 132 {flag}" for flag in (0, 1)]
    )
    assert int(facts.split(",")[0]) == 133
    assert taking_turns.split(",")[:2] == ["0", str(64 * 12 * 512)]


def split(dump, *requests) -> list[tuple[bool, bool]]:
    """Whether the backward is split, and whether its workspace has no sums. A request: head_dim,
    causal, packed, batch, keys, total_k, deterministic."""
    answers = dump([f"split {' '.join(map(str, request))}" for request in requests])
    facts = [tuple(map(int, line.split(","))) for (line,) in answers]
    return [(bool(is_split), total == statistics) for is_split, total, statistics in facts]


def of_judge(name: str) -> dict[int, tuple[int, int]]:
    """A table of the GPU tests, which cannot be imported without one."""
    judge = (Path(__file__).parents[1] / "gpu" / "judge.py").read_text()
    (table,) = re.findall(rf"^{name} = (.*)$", judge, re.MULTILINE)
    return ast.literal_eval(table)


def test_the_backward_is_split_where_sequences_are_short_and_has_no_sums_then(dump):
    cases, table, eighths = {}, of_judge("SPLIT_UP_TO"), of_judge("SPLIT_PACKED_EIGHTHS")
    for deterministic, batch, dim, causal in itertools.product((0, 1), (1, 40), table, (0, 1)):
        most = table[dim][causal]
        for keys in {1, max(most, 2) - 1, max(most, 1), most + 1, 4096}:
            cases[dim, causal, 0, batch, keys, batch * keys, deterministic] = 0 < keys <= most
            cases[256, causal, 0, batch, keys, batch * keys, deterministic] = True
        # Packed: by some eighths on average, rounded to neither side, unless one may be far longer.
        limit = eighths[dim][causal] * most * batch // 8
        for total in (0, 1, limit, limit + 1):
            mean_is_small = most > 0 and total <= limit
            cases[dim, causal, 1, batch, 2 * most, total, deterministic] = mean_is_small
            cases[dim, causal, 1, batch, 2 * most + 1, total, deterministic] = False
    for (case, want), got in zip(cases.items(), split(dump, *cases), strict=True):
        assert got == (want, want), case


def test_words_of_blocks_say_which_keys_are_seen_and_which_come_as_zeros(dump):
    """Ranges that are not tight and words that go on beyond the last key included."""
    draw, cases = random.Random(0), []
    for keys in (1, 31, 32, 33, 64, 80, 96, 128, 200, 333, 448):
        for start, length in (
            (0, keys),
            (5, keys // 2),
            (0, 0),
            (keys - 1, 1),
            (-3, 70),
            (9, 2**31 - 1),
        ):
            dense = draw.choice((0.0, 0.5, 0.97, 1.0))
            words = [
                sum(2**i for i in range(32) if draw.random() < dense) for _ in range(-(-keys // 32))
            ]
            cases.append((keys, start, length, *(x - 2**32 if x >= 2**31 else x for x in words)))
    answers = dump([f"words {' '.join(map(str, case))}" for case in cases])
    for (keys, start, length, *words), answer in zip(cases, answers, strict=True):

        def seen(key, keys=keys, start=start, length=length, words=words):
            return key < keys and start <= key < start + length and words[key // 32] >> key % 32 & 1

        assert len(answer) == sum(-(-keys // block) for block in (64, 80, 96, 128))
        firsts = {}
        for text in answer:
            size, _, rest = text.partition(":")
            *numbers, whole = rest.split(",")
            block = int(size)
            first = firsts.get(block, 0)
            firsts[block] = first + block
            for i in range(128):
                word, zeroed = (int(x) for x in numbers[i // 32 * 2 : i // 32 * 2 + 2])
                assert (word >> i % 32 & 1) == (i >= block or bool(seen(first + i)))
                assert (zeroed >> i % 32 & 1) == (first + i >= keys)
            if whole:
                bits = [
                    words[k // 32] >> k % 32 & 1 for k in range(first, min(first + block, keys))
                ]
                assert int(whole) == (first + block <= keys and all(bits))
