"""Draws context.py's JSON: perplexity against context, and loss by place in the window.

python benchmarks/plot_context.py benchmarks/results/context.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outcome import in_k, length_axis

COLORS = dict(
    zip((1024, 2048, 4096, 8192), ("#a0aec0", "#63b3ed", "#2b6cb0", "#c05621"), strict=True)
)


def draw(jobs: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity against context, a line for a model; and loss by place in the window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trained = [entry for entry in jobs if entry["attention"] != "eager"]
    models = list(dict.fromkeys(entry["model"] for entry in trained))
    figure, axes = plt.subplots(
        1, 1 + len(models), figsize=(5 + 4 * len(models), 4.2), layout="constrained"
    )
    for number, model in enumerate(models):
        by_context: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in trained:
            if entry["model"] == model:
                by_context[entry["context"]].append(entry)
        contexts = sorted(by_context)
        scores = [[entry["perplexity"] for entry in by_context[n]] for n in contexts]
        color = ("#c05621", "#2b6cb0")[number % 2]
        means = [statistics.fmean(s) for s in scores]
        axes[0].plot(contexts, means, "o-", color=color, label=model, markersize=4)
        for context, found in zip(contexts, scores, strict=True):
            axes[0].plot([context] * len(found), found, "o", color=color, markersize=4)
        axis = axes[1 + number]
        axis.sharey(axes[1])
        for context in contexts:
            rows = [entry["by_window_position"] for entry in by_context[context]]
            middles = [(row["from"] + row["to"]) / 2 for row in rows[0]]
            means = [statistics.fmean(nll) for nll in zip(*map(_nll, rows), strict=True)]
            color, label = COLORS.get(context), in_k(context)
            axis.plot(middles, means, "o-", color=color, label=label, markersize=3)
        axis.set(xlabel="place in the window (tokens)", ylabel="loss (nats)", title=model)
        length_axis(axis, [row["to"] for row in rows[0]])
        axis.legend(frameon=False, title="context", ncols=4, loc="lower right")
    axes[0].set(xlabel="context (tokens)", ylabel="held-out perplexity", title="held out")
    length_axis(axes[0], sorted({entry["context"] for entry in trained}))
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{_title(trained[0])}, {trained[0]['device']['name']}", fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _nll(rows: Sequence[dict[str, float]]) -> list[float]:
    return [row["nll"] for row in rows]


def _title(entry: dict[str, Any]) -> str:
    title = f"GPT-2 after {entry['tokens'] / 1e6:.0f} M tokens at every context"
    if start := entry.get("start"):
        title += f", of which the first {start['tokens'] / 1e6:.0f} M at {in_k(start['context'])}"
    return title


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--output", type=Path, help="default: the JSON's name with .png")
    args = parser.parse_args()
    target = args.output or args.json.with_suffix(".png")
    draw(json.loads(args.json.read_text())["jobs"], target)
    print(target)


if __name__ == "__main__":
    main()
