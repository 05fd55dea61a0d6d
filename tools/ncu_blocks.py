"""Where a kernel's warps spend their time, by stretches of code that run equally often.

    ncu --set full --import-source no -k regex:forward_kernel --launch-skip 2 --launch-count 1 \\
        -o report python ...
    ncu -i report.ncu-rep --page source --csv > report.csv
    python tools/ncu_blocks.py report.csv [--least 0.004] [--detail FIRST LAST]

A line of the table is a run of instructions that were executed equally often, which is a basic
block or several: its first instruction's number, how many there are, how often warps ran them, the
share of all samples that fell there, the stall reasons of a fifth of them or more, and what the
stretch is for, by instructions that tell. Shares are of all warps' samples, so those of a producer
count too. --detail: the instructions of these numbers that have samples, one by one.

Stall reasons summed over a kernel hide what happens once a tile: at head dim 256 and 512 tokens a
fifth of all samples was in the way out of the rows, and no sum had shown it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Where a stretch has one of these, its purpose can be told.
TELLING = ("HGMMA", "MUFU.EX2", "STG", "LDG", "SYNCS", "BAR", "SHFL", "ATOMG", "UTMALDG", "STS")
MUCH = 0.2  # of a stretch's samples: a stall reason that is shown


@dataclass(frozen=True)
class Line:
    """An instruction: how often warps executed it, how often they were seen waiting there."""

    source: str
    executed: int
    samples: int
    stalls: Counter[str]


@dataclass
class Stretch:
    """Instructions that follow each other and were executed equally often."""

    first: int
    executed: int
    length: int = 0
    samples: int = 0
    stalls: Counter[str] = field(default_factory=Counter)
    telling: list[str] = field(default_factory=list)

    def add(self, line: Line) -> None:
        self.length += 1
        self.samples += line.samples
        self.stalls += line.stalls
        for word in line.source.split():
            for known in TELLING:
                if word.startswith(known) and known not in self.telling:
                    self.telling.append(known)


def read(rows: Iterable[str]) -> list[Line]:
    """The lines of `ncu --page source --csv`. ValueError if this is something else."""
    table = csv.reader(rows)
    header = next((row for row in table if "Source" in row), None)
    needed = ("Source", "# Samples", "Instructions Executed")
    if header is None or any(name not in header for name in needed):
        raise ValueError(
            f"expected the columns {', '.join(needed)} of ncu --page source --csv, got "
            f"{'no header' if header is None else ', '.join(header[:4])}. Next step: ncu -i "
            "REPORT.ncu-rep --page source --csv"
        )
    at = {name: i for i, name in enumerate(header)}
    stalls = [name for name in header if name.startswith("stall_") and "Not Issued" not in name]
    return [
        Line(
            row[at["Source"]].strip(),
            _number(row[at["Instructions Executed"]]),
            _number(row[at["# Samples"]]),
            Counter({name.removeprefix("stall_"): _number(row[at[name]]) for name in stalls}),
        )
        for row in table
        if len(row) == len(header)
    ]


def _number(text: str) -> int:
    return int(float(text.replace(",", "") or 0))


def stretches(lines: Sequence[Line]) -> Iterator[Stretch]:
    current: Stretch | None = None
    for number, line in enumerate(lines):
        if current is None or line.executed != current.executed:
            if current is not None:
                yield current
            current = Stretch(number, line.executed)
        current.add(line)
    if current is not None:
        yield current


def reasons(stalls: Counter[str], samples: int) -> str:
    return ", ".join(
        f"{name} {count / samples:.0%}"
        for name, count in stalls.most_common()
        if samples and count >= MUCH * samples
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, help="CSV of ncu --page source")
    parser.add_argument("--least", type=float, default=0.004, help="share of a shown stretch")
    parser.add_argument("--detail", type=int, nargs=2, metavar=("FIRST", "LAST"))
    args = parser.parse_args(argv)
    try:
        lines = read(args.report.open(newline=""))
    except (OSError, ValueError) as error:
        print(f"ncu_blocks: {args.report}: {error}", file=sys.stderr)
        return 2
    total = sum(line.samples for line in lines)
    if args.detail:
        first, last = args.detail
        for number, line in enumerate(lines[first : last + 1], first):
            if line.samples:
                share, why = line.samples / total, reasons(line.stalls, line.samples)
                print(f"{number:>6} {line.executed:>9} {share:>7.2%}  {line.source[:60]:60}  {why}")
        return 0
    print(f"{'first':>6} {'instr.':>7} {'executed':>9} {'samples':>8}  {'waits for':32}  has")
    for stretch in stretches(lines):
        if total and stretch.executed and stretch.samples >= args.least * total:
            share, why = stretch.samples / total, reasons(stretch.stalls, stretch.samples)
            place = f"{stretch.first:>6} {stretch.length:>7} {stretch.executed:>9}"
            print(f"{place} {share:>8.2%}  {why:32}  {' '.join(stretch.telling)}".rstrip())
    print(f"{len(lines)} instructions, {total} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
