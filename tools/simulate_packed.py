"""Simulated makespan of the packed forward under several orders of its tiles; no GPU needed.

    python tools/simulate_packed.py [--noise 0.05] [--seeds 5]

A tile costs a fixed part and a part for each key block, which depends on how many of its consumers
have rows. The parts are fitted to rates of an H200 (d64: 410 TFLOP/s at S = 512, 500 at long S,
-14 % with two consumers instead of three; one consumer alone is a guess). A CTA either follows a
list in static steps or claims tiles from it, each when it begins the tile `ahead` places before.
Memory is not modelled.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from dataclasses import dataclass

SMS, KEYS = 132, 128
MISSING_US = 0.15  # a step whose tile does not exist
PREP_US = 4.0  # launch to launch: a kernel before the forward that makes a list


@dataclass(frozen=True)
class Shape:
    """What a head dim's tiles cost, in microseconds."""

    dim: int
    consumers: int  # 64 rows each
    fixed: float
    block: tuple[float, ...]  # by active consumers

    @property
    def rows(self) -> int:
        return 64 * self.consumers


SHAPES = {
    64: Shape(64, 3, 1.1, (0.0, 0.95, 1.27, 1.66)),
    128: Shape(128, 2, 1.4, (0.0, 1.15, 1.72)),
}


@dataclass(frozen=True)
class Tile:
    sequence: int
    head: int
    row_block: int
    cost: float


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def make_tile(shape: Shape, length: int, causal: bool, where: tuple[int, int, int]) -> Tile:
    first = where[-1] * shape.rows
    if causal and shape.consumers == 3:  # the first tile lacks rows, not the last
        first -= -length % shape.rows // 64 * 64
    if first >= length:
        return Tile(*where, MISSING_US)
    # Each consumer does the blocks its own rows see; the tile's blocks are those of the last one.
    ends = [min(first + 64 * (i + 1), length) for i in range(shape.consumers)]
    own = [
        ceil_div(end if causal else length, KEYS) if 0 <= first + 64 * i < length else 0
        for i, end in enumerate(ends)
    ]
    cost = shape.fixed
    for block in range(max(own)):
        cost += shape.block[sum(block < count for count in own)]
    return Tile(*where, cost)


def useful_flops(shape: Shape, lengths: list[int], heads: int, causal: bool) -> float:
    return sum(4.0 * n * n * shape.dim * heads for n in lengths) * (0.5 if causal else 1.0)


def all_tiles(shape: Shape, lengths: list[int], heads: int, causal: bool) -> list[Tile]:
    """Without a list: of every stream the last row block of the longest sequence, and so on."""
    return [
        make_tile(shape, length, causal, (sequence, head, row_block))
        for row_block in reversed(range(ceil_div(max(lengths), shape.rows)))
        for sequence, length in enumerate(lengths)
        for head in range(heads)
    ]


def existing(tiles: list[Tile]) -> list[Tile]:
    return [tile for tile in tiles if tile.cost > MISSING_US]


def by_length(tiles: list[Tile], lengths: list[int], bucket: int) -> list[Tile]:
    """Sequences longest first, in buckets of lengths; within one the last row block first."""
    order = [-(-lengths[tile.sequence] // bucket) for tile in tiles]
    keys = [(-o, t.sequence, -t.row_block, t.head) for o, t in zip(order, tiles, strict=True)]
    return [tile for _, tile in sorted(zip(keys, tiles, strict=True), key=lambda pair: pair[0])]


def by_cost(tiles: list[Tile]) -> list[Tile]:
    return sorted(tiles, key=lambda tile: -tile.cost)


def as_built(shape: Shape, tiles: list[Tile], lengths: list[int], causal: bool) -> list[Tile]:
    """As kernels/common/ragged_order.cuh has them, up to 32 sequences and in one chunk of heads."""
    if not causal:
        return by_length(tiles, lengths, 1)

    def end(tile: Tile) -> int:
        rows = lengths[tile.sequence]
        missing = -rows % shape.rows // 64 * 64 if shape.consumers == 3 else 0
        return ceil_div(min((tile.row_block + 1) * shape.rows - missing, rows), 64)

    return sorted(tiles, key=lambda tile: (-end(tile), tile.sequence, tile.head))


def static(costs: list[float]) -> float:
    """Steps of one tile each; every other step backwards."""
    ends = [0.0] * SMS
    for i, cost in enumerate(costs):
        step, place = divmod(i, SMS)
        ends[place if step % 2 == 0 else SMS - 1 - place] += cost
    return max(ends)


def dynamic(costs: list[float], ahead: int) -> float:
    """Each CTA claims a tile when it begins the one `ahead` places before, or ends the last one."""
    ends = [0.0] * SMS
    starts: list[list[float]] = [[] for _ in range(SMS)]  # of each CTA's tiles
    ready = [(0.0, cta) for cta in range(SMS)]  # when a CTA claims its next tile
    heapq.heapify(ready)
    for cost in costs:
        _, cta = heapq.heappop(ready)
        starts[cta].append(ends[cta])
        ends[cta] += cost
        # The tile after this one is claimed when the one `ahead` places before it starts.
        claimed = starts[cta][-ahead] if 0 < ahead <= len(starts[cta]) else 0.0
        heapq.heappush(ready, (ends[cta] if ahead == 0 else claimed, cta))
    return max(ends)


def simulate(shape: Shape, lengths: list[int], heads: int, causal: bool, noise: float, draw):
    tiles = all_tiles(shape, lengths, heads, causal)
    listed = existing(tiles)
    orders = {
        "max row blocks": tiles,
        "existing": listed,
        "existing by length": by_length(listed, lengths, 1),
        "existing by length / 128": by_length(listed, lengths, 128),
        "existing by cost, from a list": by_cost(listed),
        "as built": as_built(shape, listed, lengths, causal),
    }
    flops = useful_flops(shape, lengths, heads, causal)
    rates = {}
    for name, order in orders.items():
        costs = [tile.cost * draw.uniform(1 - noise, 1 + noise) for tile in order]
        before = PREP_US if "list" in name else 0.0
        rates[f"{name}, static"] = flops / (static(costs) + before)
        for ahead in (0, 1, 2):
            rates[f"{name}, counter, {ahead} ahead"] = flops / (dynamic(costs, ahead) + before)
    total = sum(tile.cost for tile in listed)
    rates["perfect balance"] = flops / (total / SMS)
    whole = sum(ceil_div(n, 64) * 64 * ceil_div(n, KEYS) * KEYS for n in lengths)
    rates["(useful share of 64 x 128 blocks, full)"] = sum(n * n for n in lengths) / whole * 1e6
    return rates


def dense_rate(shape: Shape, length: int, heads: int, sequences: int, causal: bool) -> float:
    lengths = [length] * sequences
    tiles = all_tiles(shape, lengths, heads, causal)
    return useful_flops(shape, lengths, heads, causal) / static([tile.cost for tile in tiles])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--noise", type=float, default=0.05, help="of a tile's cost, uniform")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    for low, high, sequences, heads, dim, causal in (
        (128, 512, 32, 16, 64, False),
        (128, 512, 64, 16, 64, False),
        (128, 512, 32, 8, 128, False),
        (256, 4096, 16, 16, 64, True),
        (256, 4096, 16, 16, 64, False),
        (256, 4096, 16, 8, 128, True),
    ):
        shape, found = SHAPES[dim], []
        for seed in range(args.seeds):
            draw = random.Random(seed)
            lengths = [draw.randint(low, high) for _ in range(sequences)]
            rates = simulate(shape, lengths, heads, causal, args.noise, draw)
            same = round(sum(n * n for n in lengths) / sum(lengths))
            rates["(dense, same work a token)"] = dense_rate(shape, same, heads, sequences, causal)
            rates["(dense, longest)"] = dense_rate(shape, high, heads, sequences, causal)
            found.append(rates)
        kind = "causal" if causal else "full"
        print(f"\n{sequences} x {low}..{high}, {heads} heads of {dim}, {kind}: useful TFLOP/s")
        for name in found[0]:
            print(f"  {name:44}{statistics.mean(rates[name] for rates in found) / 1e6:8.2f}")


if __name__ == "__main__":
    main()
