"""Simulated rate of the deterministic backward over the normal one, by the order of its tiles.

    python tools/simulate_turns.py [--handover 3.0] [--jitter 0.2]

Events of the backward up to head dim 128: CTAs claim tiles in order; a tile costs a fixed part and
a part for each row block; what a row block adds to dQ waits for its turn, which comes `handover`
microseconds after the key block before it began to add. Two writers have every other row block, and
the consumers one buffer. Problems are those of the benchmark: 16k tokens, hidden 2048, 132 SMs.
Memory is not modelled. Stream by stream is the order that `MEASURED` was timed with, on an H200;
together, as sm90/scheduler.cuh has it, streams take turns in chunks.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

SMS, TOKENS, HIDDEN, KEYS = 132, 16384, 2048, 128
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
MEASURED = {  # deterministic over normal
    (64, False): (0.80, 0.72, 0.70, 0.70, 0.76, 0.89),
    (64, True): (0.90, 0.84, 0.83, 0.85, 0.91, 0.96),
    (128, False): (0.88, 0.82, 0.81, 0.81, 0.87, 0.98),
}
READ_US = 0.7  # from adding to the buffer being empty
POLL_US = 0.4  # of a hand-over, after the writer has passed the turn on


@dataclass(frozen=True)
class Shape:
    """What a head dim's tiles cost, in microseconds; fitted to the normal rates at 512 and 16k."""

    dim: int
    rows: int
    fixed: float
    row_block: float


SHAPES = (Shape(64, 128, 4.5, 2.45), Shape(128, 64, 4.5, 2.2))


def stream_by_stream(streams: int, key_blocks: int) -> Iterator[tuple[int, int]]:
    for stream in range(streams):
        for key_block in reversed(range(key_blocks)):
            yield stream, key_block


def in_chunks(streams: int, key_blocks: int, steps: int) -> Iterator[tuple[int, int]]:
    """KeyTileOrder of sm90/scheduler.cuh."""
    chunks = max(streams // -(-3 * SMS // (2 * steps)), 1)
    first = 0
    for chunk in range(chunks):
        size = streams // chunks + (chunk < streams % chunks)
        for key_block in reversed(range(key_blocks)):
            yield from ((stream, key_block) for stream in range(first, first + size))
        first += size


def makespan(shape: Shape, seqlen: int, causal: bool, handover: float | None, jitter: float, tiles):
    """handover None: nobody waits for a turn."""
    draw = random.Random(0)

    def about(cost: float) -> float:
        return cost * (1 + jitter * (draw.random() - 0.5))

    row_blocks = -(-seqlen // shape.rows)
    turn: dict[int, list[float]] = defaultdict(lambda: [0.0] * row_blocks)
    ctas = [(0.0, 0.0)] * SMS  # when each claims its next tile, and begins it
    end = 0.0
    for stream, key_block in tiles:
        _, now = heapq.heappop(ctas)
        now += about(shape.fixed)
        came, made = turn[stream], []
        empty, writers = 0.0, [0.0, 0.0]
        for block in range(key_block * KEYS // shape.rows if causal else 0, row_blocks):
            now = max(now + about(shape.row_block), empty)
            made.append(now)
            if handover is None:
                continue
            add = max(now, came[block], writers[0])
            came[block] = add + handover
            writers = [writers[1], add + handover - POLL_US]
            empty = add + READ_US
        now = max(now, empty)
        end = max(end, now)
        heapq.heappush(ctas, (made[max(len(made) - 2, 0)], now))
    return end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--handover", type=float, default=3.0, help="microseconds")
    parser.add_argument("--jitter", type=float, default=0.2, help="of every cost, as a part of it")
    options = parser.parse_args()
    print("             S  measured  stream by stream  in chunks")
    for (dim, causal), measured in MEASURED.items():
        shape = next(s for s in SHAPES if s.dim == dim)
        for seqlen, before in zip(SEQLENS, measured, strict=True):
            streams, key_blocks = TOKENS // seqlen * (HIDDEN // dim), -(-seqlen // KEYS)
            sequential = list(stream_by_stream(streams, key_blocks))
            chunks = list(in_chunks(streams, key_blocks, -(-seqlen // shape.rows)))
            normal = [(stream, key_blocks - 1 - block) for stream, block in sequential]
            free = makespan(shape, seqlen, causal, None, options.jitter, normal)
            old, new = (
                free / makespan(shape, seqlen, causal, options.handover, options.jitter, tiles)
                for tiles in (sequential, chunks)
            )
            mask = "causal" if causal else "full"
            print(
                f"d{dim:<3} {mask:6}{seqlen:>6}{before:>8.2f}{old:>15.2f}{new:>14.2f}", flush=True
            )


if __name__ == "__main__":
    main()
