"""Ragged tiles in one CTA (sm90/ragged_tiles.cuh), on the host: the claiming warp and the lanes
that read its records as coroutines, with the two slots, their barriers and parities, in whatever
order they may run."""

import random

import pytest

SLOTS = 2
LAST = -1  # the record that says that there are no more tiles


class Barrier:
    """An mbarrier: a phase is over when as many have arrived as it was made for."""

    def __init__(self, expected):
        self.expected, self.arrived, self.phase = expected, 0, 0

    def arrive(self):
        self.arrived += 1
        if self.arrived == self.expected:
            self.arrived, self.phase = 0, self.phase + 1

    def is_over(self, parity):
        return self.phase % 2 != parity


class Ring:
    """PipelineState."""

    def __init__(self, stage=0, parity=0):
        self.stage, self.parity = stage, parity

    def next(self):
        self.stage += 1
        if self.stage == SLOTS:
            self.stage, self.parity = 0, self.parity ^ 1


class Handover:
    def __init__(self, readers, arrivals):
        self.slot = [None] * SLOTS
        self.full = [Barrier(1) for _ in range(SLOTS)]
        self.empty = [Barrier(arrivals) for _ in range(SLOTS)]
        self.begun = [0] * readers  # tiles
        self.claimed = 0

    def claim(self, tiles):
        ring, freed = Ring(), Ring()
        for tile in [*range(tiles), LAST]:
            self.slot[ring.stage] = tile
            self.claimed += 1
            self.full[ring.stage].arrive()
            if tile == LAST:
                return
            ring.next()
            yield lambda: self.empty[ring.stage].is_over(freed.parity)
            freed.next()

    def read(self, lane, tiles, draw):
        ring = Ring(SLOTS - 1, 1)
        for expected in [*range(tiles), LAST]:
            self.empty[ring.stage].arrive()
            ring.next()
            yield lambda: self.full[ring.stage].is_over(ring.parity)
            self.begun[lane] += 1
            for _ in range(draw.randrange(4)):  # again and again while it works on the tile
                assert self.slot[ring.stage] == expected
                yield lambda: True
            assert self.slot[ring.stage] == expected


def play(readers, tiles, arrivals, seed):
    """Whoever may go on goes on, by chance. How far the claiming warp was ahead at most."""
    draw = random.Random(seed)
    handover, ahead = Handover(readers, arrivals), 0
    actors = [handover.claim(tiles), *(handover.read(i, tiles, draw) for i in range(readers))]
    waiting = [(actor, lambda: True) for actor in actors]
    while waiting:
        able = [i for i, (_, may) in enumerate(waiting) if may()]
        assert able, "they wait in a circle"
        actor, _ = waiting.pop(draw.choice(able))
        if (may := next(actor, None)) is not None:
            waiting.append((actor, may))
        ahead = max(ahead, handover.claimed - max(min(handover.begun), 0))
    assert handover.begun == [tiles + 1] * readers
    return ahead


@pytest.mark.parametrize("readers", [1, 2, 5])
@pytest.mark.parametrize("tiles", [0, 1, 2, 3, 9])
def test_every_lane_reads_every_record_while_it_is_there(readers, tiles):
    ahead = [play(readers, tiles, readers, seed) for seed in range(200)]
    assert max(ahead) <= SLOTS


def test_a_slot_that_one_lane_alone_does_not_give_back_is_overwritten():
    with pytest.raises(AssertionError):
        for seed in range(200):
            play(3, 9, 2, seed)
