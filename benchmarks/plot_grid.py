"""Draws attention_grid.py's JSON: rate against length; a panel a mask, direction and head dim.

python benchmarks/plot_grid.py benchmarks/results/attention_grid.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_flashattn.bench import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--output", type=Path, help="default: the JSON's name with .png")
    args = parser.parse_args()
    target = args.output or args.json.with_suffix(".png")
    draw(json.loads(args.json.read_text()), target)
    print(target)


if __name__ == "__main__":
    main()
