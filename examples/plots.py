"""Loss curves and step times of results of the training scripts and `benchmarks/training_step.py`.

    python examples/plots.py runs/my-run/results.json [OTHER.json ...] [--out losses.png]

Several files are overlaid. Needs matplotlib; where training ran without it, run this elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLORS = {"eager": "#888888", "sdpa": "#2b6cb0", "hf_flashattn": "#c05621"}
SMOOTHING = 0.05  # share of the run in the moving average


def smooth(values: Sequence[float], share: float = SMOOTHING) -> list[float]:
    """Mean over the last `share` of the run at every point (shorter at the beginning)."""
    window = max(1, round(len(values) * share))
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))
    ]


def draw(runs: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Writes the PNG. `runs` maps a label to a run with `losses` and perhaps `step_ms`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = {label: run["step_ms"]["median"] for label, run in runs.items() if run.get("step_ms")}
    figure, axes = plt.subplots(
        1,
        2 if timed else 1,
        figsize=(11 if timed else 7, 4.2),
        squeeze=False,
        width_ratios=[2.2, 1] if timed else [1],
        layout="constrained",
    )
    curve = axes[0][0]
    for number, (label, run) in enumerate(runs.items()):
        color = COLORS.get(label, f"C{number}")
        steps = run.get("loss_steps") or range(1, len(run["losses"]) + 1)
        width = 1.2 + 1.4 * (len(runs) - 1 - number)  # equal curves stay visible on each other
        curve.plot(steps, run["losses"], color=color, alpha=0.25, linewidth=0.8)
        curve.plot(steps, smooth(run["losses"]), color=color, linewidth=width, label=label)
    curve.set(xlabel="step", ylabel="training loss (nats per token)")
    curve.legend(frameon=False)
    if timed:
        bars = axes[0][1]
        colors = [COLORS.get(label, f"C{i}") for i, label in enumerate(timed)]
        bars.bar_label(bars.bar(list(timed), list(timed.values()), color=colors), fmt="%.1f")
        bars.set(ylabel="ms per step (median)")
        bars.tick_params(axis="x", rotation=20)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def title_of(result: dict[str, Any]) -> str:
    """Model, batch and device of a results.json; the command where it says nothing of these."""
    settings = result.get("settings")
    device = result.get("device", {}).get("name", "")
    if not settings:
        return textwrap.fill(result.get("command", ""), 90)
    blocks = settings["batch_size"] * settings["accumulate"] * settings["processes"]
    return (
        f"{settings.get('model', 'GPT-2')}, {settings['layers']} layers x {settings['hidden']}, "
        f"{blocks} x {settings['context']} tokens a step, dropout {settings['dropout']:g}, {device}"
    )


def load_runs(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The runs of all files; a label that occurs twice gets its folder's name."""
    runs: dict[str, dict[str, Any]] = {}
    for path in paths:
        for label, run in json.loads(path.read_text())["runs"].items():
            if run.get("losses"):
                runs[label if label not in runs else f"{label} ({path.parent.name})"] = run
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.json of one or more runs")
    parser.add_argument("--out", type=Path, help="default: the first file's name with .png")
    parser.add_argument("--title", help="default: model, batch and device")
    args = parser.parse_args(argv)
    try:
        runs = load_runs(args.results)
        title = args.title or title_of(json.loads(args.results[0].read_text()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        print(
            f"error: expected results.json files with 'runs'\n  got:       {error!r}\n"
            "  next step: name the JSON that a training script wrote",
            file=sys.stderr,
        )
        return 2
    if not runs:
        print(
            "error: expected at least one run with losses\n  got:       none\n"
            "  next step: name the JSON of a run that has trained",
            file=sys.stderr,
        )
        return 2
    out = args.out or args.results[0].with_suffix(".png")
    try:
        draw(runs, out, title)
    except ImportError as error:
        print(
            f"error: expected matplotlib\n  got:       {error}\n"
            "  next step: pip install matplotlib",
            file=sys.stderr,
        )
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
