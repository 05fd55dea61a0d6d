"""Rates of attention forward and backward against PyTorch's peers, in one run on one GPU.

    python benchmarks/attention_grid.py --json benchmarks/results/grid.json
    python benchmarks/attention_grid.py --head-dims 64 --seqlens 1024 4096 --repeats 5

The protocol is in hf_flashattn/bench.py, which `hf-flashattn bench` runs on a smaller grid.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from outcome import save

from hf_flashattn import bench

SEQLENS = [512, 1024, 2048, 4096, 8192, 16384]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--causal", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    parser.add_argument("--directions", nargs="+", default=list(bench.DIRECTIONS))
    parser.add_argument("--deterministic", action="store_true", help="time that backward too")
    parser.add_argument("--dtype", choices=bench.DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    rows = bench.run_grid(
        args.head_dims,
        [bool(c) for c in args.causal],
        args.dropouts,
        args.seqlens,
        dtype=args.dtype,
        directions=args.directions,
        repeats=args.repeats,
        deterministic=args.deterministic,
    )
    print(bench.table(rows))
    command = " ".join(["python", *sys.argv])
    save(args.json, bench.facts(rows, command=command, dtype=args.dtype, repeats=args.repeats))


if __name__ == "__main__":
    main()
