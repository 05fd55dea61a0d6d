"""Peak memory of GPT-2 small's forward and backward against its context, until it runs out.

    python benchmarks/memory.py --json benchmarks/results/memory.json

One sequence a step, bf16 autocast on fp32 weights, dropout 0.1, no optimizer; contexts double from
512 on. An attention is measured alone: its model is built, two steps are made (one, where it takes
long), the last counts. Peak is that of torch's allocator, weights and gradients included. `body` is
the model without the head over 50257 logits, whose fp32 copies hide all else at long contexts;
`whole` has it and the loss.

Where a step runs out of memory, or --most-seconds pass in it, the longer contexts are left out;
after --max-seconds all are. The JSON is written after every row.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contenders import ATTENTIONS, SHAPES, TINY, contender, timed
from outcome import environment, in_k, length_axis, save

PARTS = {"body": "without the output layer", "whole": "with output layer and loss"}
LONG_MS = 2000  # a first step that long is not slow for being the first
COLORS = {"eager": "#888888", "sdpa": "#2b6cb0", "hf_flashattn": "#c05621"}


def measure(
    attention: str, part: str, context: int, tiny: bool, device: torch.device
) -> dict[str, Any]:
    """One row: peak GiB (None on a CPU) and milliseconds, or that memory ran out."""
    row: dict[str, Any] = {"attention": attention, "part": part, "context": context}
    shape = replace((TINY if tiny else SHAPES)["gpt2"], batch=1, length=context, shortest=context)
    try:
        row |= _two_steps(attention, part, shape, device)
    except torch.cuda.OutOfMemoryError as error:
        row["out_of_memory"] = str(error).splitlines()[0]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _two_steps(attention: str, part: str, shape: Any, device: torch.device) -> dict[str, Any]:
    with device:  # random numbers for 125 M weights take a CPU seconds
        current = contender("gpt2", shape, attention, 0, device, compiled=False)
    ids = torch.randint(5, shape.vocab, (1, shape.length), device=device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            if part == "whole":
                loss = current.model(input_ids=ids, labels=ids).loss
            else:
                loss = current.model.transformer(input_ids=ids).last_hidden_state.float().mean()
        loss.backward()
        return loss.detach()

    for _ in range(2):
        current.model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        loss, milliseconds = timed(step, device)
        if milliseconds > LONG_MS:
            break
    if not bool(loss.isfinite()):
        raise SystemExit(f"error: expected a finite loss with {attention}; got {loss.item()}")
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {"peak_gib": peak, "ms": milliseconds}


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Peak memory (on a CPU, where there is none, time) against context; both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    key, label = ("peak_gib", "peak memory (GiB)")
    if all(row.get("peak_gib") is None for row in rows):
        key, label = ("ms", "ms")
    figure, axes = plt.subplots(1, len(PARTS), figsize=(10, 4.2), sharey=True, layout="constrained")
    attentions = list(dict.fromkeys(row["attention"] for row in rows))
    for axis, (part, title_of_part) in zip(axes, PARTS.items(), strict=True):
        for number, attention in enumerate(attentions):
            mine = [row for row in rows if (row["attention"], row["part"]) == (attention, part)]
            points = [(row["context"], row[key]) for row in mine if row.get(key)]
            if not points:
                continue
            out = mine[-1]["context"] if "out_of_memory" in mine[-1] else None
            name = attention + (f", out of memory at {in_k(out)}" if out else "")
            width = 1.6 + 2 * (len(attentions) - 1 - number)  # equal curves stay visible
            style = {"color": COLORS[attention], "linewidth": width, "markersize": width + 3}
            axis.plot(*zip(*points, strict=True), "o-", label=name, **style)
        axis.set(yscale="log", xlabel="context (tokens)", title=title_of_part)
        length_axis(axis, sorted({row["context"] for row in rows if row.get(key)}))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    axes[0].set_ylabel(label)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--first", type=int, default=512, metavar="N", help="shortest context")
    parser.add_argument("--last", type=int, default=2**18, metavar="N", help="longest context")
    parser.add_argument("--most-seconds", type=float, default=20, metavar="S", help="of a step")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--max-seconds", type=float, default=float("inf"), metavar="S", help="begin nothing after S"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model: for tests")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="beside it a PNG of that name")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    outcome: dict[str, Any] = environment(device) | {"kind": "memory", "rows": []}
    started = time.perf_counter()
    for part in args.parts:
        for attention in args.attention:
            context = args.first
            while context <= args.last:
                if time.perf_counter() - started > args.max_seconds:
                    print(f"no time for {part} {attention} from {context} on")
                    break
                row = measure(attention, part, context, args.tiny, device)
                outcome["rows"].append(row)
                print(_line(row), flush=True)
                save(args.json, outcome)
                if "out_of_memory" in row or row["ms"] > 1e3 * args.most_seconds:
                    break
                context *= 2
    print(f"{time.perf_counter() - started:.0f} s")
    if args.json:
        picture = args.json.with_suffix(".png")
        try:
            device_name = outcome["device"]["name"]
            title = f"GPT-2 small, one sequence, forward and backward, {device_name}"
            draw(outcome["rows"], picture, title)
        except ImportError as error:
            print(f"no {picture}: {error}; next step: pip install matplotlib", file=sys.stderr)
        print(args.json)
    return 0


def _line(row: dict[str, Any]) -> str:
    head = f"{row['part']:<6} {row['attention']:<14}{row['context']:>8}"
    if "out_of_memory" in row:
        return f"{head}   out of memory"
    peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
    return f"{head}{peak:>10} GiB{row['ms']:>10.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
