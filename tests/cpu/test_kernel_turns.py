"""The deterministic backward's turns, on the host: every CTA's warps as coroutines that wait for
each other through the kernel's barriers, with its finite buffers, in whatever order they may run.

The order of tiles, the row blocks of each and the numbers of their turns come from the kernels' own
headers (schedule_dump.cu). A warp yields what it waits for. If nobody can go on, they wait in a
circle.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from test_kernel_schedule import BACKWARD_TILES as ALL_TILES

# Wide heads add nothing to dQ in global memory, so they take no turns.
BACKWARD_TILES = {kind: tile for kind, tile in ALL_TILES.items() if kind != "w"}
Actor = Iterator[Callable[[], bool]]


@dataclass(frozen=True)
class Problem:
    """Sequences (rows, keys, key_start, key_len); packed lengths have ranges that hide nothing."""

    sequences: tuple[tuple[int, int, int, int], ...]
    heads_q: int = 1
    heads_k: int = 1
    causal: bool = False
    packed: bool = False

    def request(self, kind: str, sms: int, deterministic: bool) -> str:
        rows, keys = (max(s[i] for s in self.sequences) for i in (0, 1))
        total = sum(s[0] for s in self.sequences) if self.packed else 0
        block_m, block_n = BACKWARD_TILES[kind]
        return (
            f"claims {len(self.sequences)} {self.heads_q} {self.heads_k} {rows} {keys} "
            f"{block_m} {block_n} {sms} {int(deterministic)} {total}"
        )


def dense(batch, rows, keys=None, **options) -> Problem:
    keys = rows if keys is None else keys
    return Problem(((rows, keys, 0, keys),) * batch, **options)


@dataclass(frozen=True)
class Tile:
    stream: int
    key_block: int
    steps: tuple[tuple[tuple[int, int, int], int], ...]  # (sum, turn) of its row blocks in order


class Run:
    """What CTAs share: the counter of tiles and the counts of the turns."""

    def __init__(self, tiles: list[Tile]):
        self.unclaimed = iter(tiles)
        self.turns: dict[tuple[int, int, int], int] = defaultdict(int)
        self.added: dict[tuple[int, int, int], list[int]] = defaultdict(list)

    def claim(self) -> Tile | None:
        return next(self.unclaimed, None)

    def add(self, tile: Tile, step: int):
        row_block, turn = tile.steps[step]
        assert self.turns[row_block] == turn, (tile.stream, tile.key_block, row_block)
        self.added[row_block].append(tile.key_block)


def tiles_of(dump, problem: Problem, kind: str, sms: int) -> list[Tile]:
    """In the order of their claims, without those beyond a sequence's keys."""
    distinct = sorted(set(problem.sequences))
    blocks = dump(
        [f"blocks {q} {k} {int(problem.causal)} {begin} {n}" for q, k, begin, n in distinct]
    )
    key_blocks = {
        sequence: [b[2:].split(",") for b in answer if b.startswith(f"{kind}:")]
        for sequence, answer in zip(distinct, blocks, strict=True)
    }
    group, tiles = problem.heads_q // problem.heads_k, []
    for claim in dump([problem.request(kind, sms, True)])[0]:
        stream, key_block = map(int, claim.split(","))
        index, head_k = divmod(stream, problem.heads_k)
        own = key_blocks[problem.sequences[index]]
        if key_block >= len(own):
            continue
        first, count, _, turns = own[key_block]
        numbers = [int(turn) for turn in turns.split(";") if turn]
        steps = tuple(
            ((index, head_k * group + head, int(first) + i), numbers[i])
            for head in range(group)
            for i in range(int(count))
        )
        tiles.append(Tile(stream, key_block, steps))
    return tiles


class NarrowCta:
    """A persistent CTA up to head dim 128. Its consumers meet in every row block: one here."""

    def __init__(self, run: Run):
        self.run = run
        self.handed: list[Tile | None] = []
        self.read = [0, 0, 0]  # tiles, by the consumer and the writers
        self.loaded = self.freed = self.filled = 0  # row blocks
        self.emptied = 1  # dQ's buffer, once by the writer's first word
        self.actors = [self.produce(), self.consume(), self.write(0), self.write(1)]

    def produce(self) -> Actor:
        while True:
            tile = self.run.claim()
            yield lambda: min(self.read) == len(self.handed)
            self.handed.append(tile)
            if tile is None:
                return
            for _ in tile.steps:
                yield lambda: self.loaded - self.freed < 2
                self.loaded += 1

    def next_tile(self, reader: int):
        yield lambda: len(self.handed) > self.read[reader]
        tile = self.handed[self.read[reader]]
        self.read[reader] += 1
        return tile

    def consume(self) -> Actor:
        while (tile := (yield from self.next_tile(0))) is not None:
            for _ in tile.steps:
                yield lambda: self.loaded > self.freed
                yield lambda: self.emptied > self.filled
                self.filled += 1
                self.freed += 1

    def write(self, writer: int) -> Actor:
        row_blocks = itertools.count()  # of all tiles
        while (tile := (yield from self.next_tile(1 + writer))) is not None:
            for step, (counter, turn) in enumerate(tile.steps):
                number = next(row_blocks)
                if number % 2 != writer:
                    continue
                yield lambda counter=counter, turn=turn: self.run.turns[counter] >= turn
                yield lambda number=number: self.filled > number
                self.run.add(tile, step)
                self.emptied += 1
                yield lambda: True  # until the sums have arrived
                self.run.turns[counter] += 1


class Warp:
    """A coroutine, what it waits for, and whether it has ended."""

    def __init__(self, actor: Actor):
        self.actor, self.waits, self.done = actor, lambda: True, False

    def step(self):
        try:
            self.waits = next(self.actor)
        except StopIteration:
            self.done = True


def play(actors: list[Warp], pick: Callable[[list[Warp]], list[Warp]]):
    """Steps the first that can go on, in the order of preference that `pick` gives."""
    while alive := [actor for actor in actors if not actor.done]:
        actors[:] = alive
        ready = next((actor for actor in pick(actors) if actor.waits()), None)
        assert ready is not None, f"{len(alive)} warps wait for each other"
        ready.step()


def preferences(seed: int) -> dict[str, Callable]:
    draw = random.Random(seed)
    return {
        "random": lambda actors: draw.sample(actors, len(actors)),
        "first CTAs first": lambda actors: actors,
        "last CTAs first": lambda actors: actors[::-1],
        "one stands still": lambda actors: actors[1:] + actors[:1],
    }


def check(dump, problem: Problem, kind: str, sms: int, grid: int, preference: str):
    tiles = tiles_of(dump, problem, kind, sms)
    run = Run(tiles)
    actors: list[Warp] = []
    actors += [Warp(actor) for _ in range(grid) for actor in NarrowCta(run).actors]
    play(actors, preferences(grid)[preference])
    visits = defaultdict(list)
    for tile in tiles:
        for row_block, _ in tile.steps:
            visits[row_block].append(tile.key_block)
    assert run.added == {row_block: sorted(keys)[::-1] for row_block, keys in visits.items()}
    assert all(run.turns[row_block] == len(keys) for row_block, keys in visits.items())


PACKED = ((300, 400), (0, 0), (1, 1), (0, 130), (5, 0), (260, 140), (64, 700))
PROBLEMS = {
    "full": dense(2, 520, heads_q=2, heads_k=2),
    "causal": dense(2, 520, causal=True),
    "odd": dense(3, 129, 515, heads_q=1),
    "grouped": dense(2, 330, heads_q=6, heads_k=2),
    "grouped causal": dense(1, 330, 500, heads_q=3, causal=True),
    "more keys than rows": dense(1, 130, 1900, causal=True),
    "more rows than keys": dense(2, 900, 200, causal=True),
    "packed": Problem(tuple((q, k, 0, k) for q, k in PACKED), 4, 2, packed=True),
    "packed causal": Problem(tuple((q, k, 0, k) for q, k in PACKED), 2, 2, True, packed=True),
    "ranges": Problem(((400, 400, 130, 140), (400, 400, 0, 0), (400, 400, 0, 400))),
    "ranges causal": Problem(((400, 400, 130, 140), (400, 400, 390, 10)), 2, 1, causal=True),
    "nothing": Problem(((0, 10, 0, 10), (10, 0, 0, 0))),
}


@pytest.mark.parametrize("preference", preferences(0))
@pytest.mark.parametrize("kind", BACKWARD_TILES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_turns_come_in_order_however_warps_are_scheduled(dump, name, kind, preference):
    for sms, grid in ((1, 1), (2, 2), (7, 7), (132, 3), (4, 40)):
        check(dump, PROBLEMS[name], kind, sms, grid, preference)


def test_more_key_blocks_than_ctas(dump):
    for problem in (dense(1, 2700), dense(1, 2700, causal=True)):
        for preference in preferences(0):
            check(dump, problem, "b", 5, 5, preference)


def claims(dump, requests) -> list[list[tuple[int, int]]]:
    return [[tuple(map(int, c.split(","))) for c in answer] for answer in dump(requests)]


SHAPES = list(
    itertools.product(
        (1, 3, 32), ((1, 1), (12, 12), (32, 8)), (1, 500, 4096), (1, 128, 1000, 4096), (1, 7, 132)
    )
)


@pytest.mark.parametrize("kind", BACKWARD_TILES)
def test_every_tile_is_claimed_once_and_those_of_a_stream_far_enough_apart(dump, kind):
    block_m, block_n = BACKWARD_TILES[kind]
    requests, late = [], 0
    for batch, (heads_q, heads_k), rows, keys, sms in SHAPES:
        problem = dense(batch, rows, keys, heads_q=heads_q, heads_k=heads_k)
        requests += [problem.request(kind, sms, flag) for flag in (False, True)]
    answers = claims(dump, requests)
    for shape, normal, deterministic in zip(SHAPES, answers[::2], answers[1::2], strict=True):
        batch, (heads_q, heads_k), rows, keys, sms = shape
        streams, key_blocks = batch * heads_k, -(-keys // block_n)
        assert normal == list(itertools.product(range(streams), range(key_blocks)))
        assert sorted(deterministic) == normal, shape
        at = {tile: place for place, tile in enumerate(deterministic)}
        steps = heads_q // heads_k * -(-rows // block_m)
        for stream, key_block in deterministic:
            if key_block + 1 == key_blocks:
                continue
            apart = at[stream, key_block] - at[stream, key_block + 1]
            assert 0 < apart < 2 * max(1.5 * sms / steps, 1) + 1, shape
            assert apart >= min(1.5 * sms / steps, streams), shape
            late += apart < streams
    assert late, "in some shape there are several chunks"


def test_packed_streams_are_counted_by_their_mean_length(dump):
    short = Problem(((128, 4096, 0, 4096),) * 64, packed=True)
    long = Problem(((4096, 4096, 0, 4096),) * 64, packed=True)
    (near, far) = claims(dump, [p.request("a", 32, True) for p in (long, short)])
    assert [near.index((0, 30)), far.index((0, 30))] == [2, 64]
