"""Draws attention_grid.py's JSON: rate against length; a panel a mask, direction and head dim.

python benchmarks/plot_grid.py benchmarks/results/attention_grid.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"ours": "hf_flashattn", "cudnn": "cuDNN", "fa2": "FlashAttention-2"}
COLOURS = {"ours": "#c1272d", "cudnn": "#4d9221", "fa2": "#4575b4"}
STYLES = {0.0: "-", 0.1: "--"}  # by dropout


def draw(facts: dict, target: Path) -> None:
    rows = facts["rows"]
    dims = sorted({r["head_dim"] for r in rows})
    columns = [(d, c) for d in ("forward", "backward") for c in (False, True)]
    figure, axes = plt.subplots(
        len(dims),
        len(columns),
        figsize=(14, 3.4 * len(dims)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for i, dim in enumerate(dims):
        for j, (direction, causal) in enumerate(columns):
            panel = axes[i][j]
            chosen = [
                r
                for r in rows
                if (r["head_dim"], r["direction"], r["causal"]) == (dim, direction, causal)
            ]
            for p in sorted({r["dropout"] for r in chosen}):
                for name, label in NAMES.items():
                    points = [
                        (r["seqlen"], r["tflops"][name])
                        for r in chosen
                        if r["dropout"] == p and name in r["tflops"]
                    ]
                    panel.plot(
                        *zip(*points, strict=True),
                        STYLES.get(p, ":"),
                        color=COLOURS[name],
                        marker="o",
                        markersize=3,
                        label=label + (f", dropout {p:g}" if p else ""),
                    )
            panel.set_title(f"{direction}, {'causal' if causal else 'full'}, head dim {dim}")
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
    axes[0][0].set_ylim(0, 1.05 * max(rate for r in rows for rate in r["tflops"].values()))
    seqlens = sorted({r["seqlen"] for r in rows})
    for panel in axes[-1]:
        panel.set_xticks(seqlens, [f"{s // 1024}k" if s >= 1024 else str(s) for s in seqlens])
        panel.set_xlabel("sequence length")
    for line in axes:
        line[0].set_ylabel("TFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    figure.suptitle(f"{facts['device']}, {facts['dtype']}, 16k tokens, hidden 2048")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(target, dpi=110)


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
