"""Draws training_step.py's JSON: tokens a second of each model, context and attention.

    python benchmarks/plot_steps.py benchmarks/results/gpt2_grid_*.json \\
        --output benchmarks/results/gpt2_grid.png

The left panel is of plain steps, the right one of compiled steps, with one scale for both. What ran
out of memory has no bar.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contenders import ATTENTIONS
from outcome import in_k

COLORS = {"eager": "#888888", "sdpa": "#2b6cb0", "hf_flashattn": "#c05621"}
TITLES = {False: "not compiled", True: "torch.compile"}
WIDTH = 0.28  # of a bar; three stand at a place


def draw(outcomes: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = [model for outcome in outcomes for model in outcome["models"]]
    names = list(dict.fromkeys(model["name"] for model in models))
    places = sorted(
        {(model["name"], model["shape"]["length"]) for model in models},
        key=lambda place: (names.index(place[0]), place[1]),
    )
    size = (max(6.0, 1.2 * len(places)), 7.5)
    figure, axes = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    for axis, compiled in zip(axes, TITLES, strict=True):
        chosen = [model for model in models if model["compile"] == compiled]
        runs = {(model["name"], model["shape"]["length"]): model["runs"] for model in chosen}
        for number, attention in enumerate(ATTENTIONS):
            bars = [
                (x + (number - 1) * WIDTH, runs[place][attention]["tokens_per_second"] / 1e3)
                for x, place in enumerate(places)
                if "tokens_per_second" in runs.get(place, {}).get(attention, {})
            ]
            if bars:
                drawn = axis.bar(
                    *zip(*bars, strict=True), WIDTH, color=COLORS[attention], label=attention
                )
                axis.bar_label(drawn, fmt="%.0f", fontsize=8)
        labels = [f"{name}\n{in_k(length)}" for name, length in places]
        axis.set_xticks(range(len(places)), labels)
        axis.set(title=TITLES[compiled], ylabel="thousand tokens a second")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    tokens = {model["shape"]["batch"] * model["shape"]["length"] for model in models}
    device = outcomes[0]["device"]["name"]
    figure.suptitle(f"Training steps of {min(tokens) // 1024}k tokens, {device}", fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="default: the first JSON's name with .png")
    args = parser.parse_args(argv)
    target = args.output or args.json[0].with_suffix(".png")
    draw([json.loads(path.read_text()) for path in args.json], target)
    print(target)


if __name__ == "__main__":
    main()
