"""Fills the tables of README.md: what was measured, and what runs where.

    python docs/tables.py                                      # the support matrix alone
    python docs/tables.py --steps gpt2_grid_small.json bert_large_compiled_half.json \\
        --grid attention_grid.json

The measured tables come from the JSON of benchmarks/training_step.py, of it the rows that STEPS
names, and of benchmarks/attention_grid.py; the support matrix from hf_flashattn.support.explain.
Each stands between a pair of markers, <!-- NAME:begin --> and <!-- NAME:end -->; nothing else is
touched.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_flashattn.support import Request, explain

README = Path(__file__).parents[1] / "README.md"
USUAL: dict[str, Any] = {
    "device_type": "cuda",
    "compute_capability": (9, 0),
    "dtype": torch.bfloat16,
    "head_dim": 64,
    "heads_q": 12,
    "heads_k": 12,
}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("fp16, bf16; head dim 64", {}),
    ("head dims 8, 16, ... 256", {"head_dim": 256}),
    ("causal, training, dropout", {"causal": True, "dropout_p": 0.1, "needs_grad": True}),
    ("grouped and multi-query heads", {"heads_k": 1}),
    ("deterministic gradients", {"deterministic": True, "needs_grad": True}),
    ("CPU", {"device_type": "cpu"}),
    ("CPU with dropout", {"device_type": "cpu", "dropout_p": 0.1}),
    ("fp32 on a GPU", {"dtype": torch.float32}),
    ("other head dims", {"head_dim": 90}),
    ("Ampere, Ada", {"compute_capability": (8, 0)}),
    ("Blackwell", {"compute_capability": (10, 0)}),
    ("sliding window", {"causal": True, "window": (127, 0)}),
    ("softcap", {"softcap": 30.0}),
    ("ALiBi", {"alibi": True}),
    ("additive bias, arbitrary mask", {"bias": True}),
    ("attention sinks", {"sinks": True}),
    ("paged KV cache", {"paged": True}),
]

# Rows of the README's training table: model, length, compiled, which of ours, label.
STEPS = (
    ("gpt2", 1024, False, "hf_flashattn", "GPT-2 small"),
    ("gpt2", 1024, True, "hf_flashattn", "GPT-2 small"),
    ("gpt2", 4096, False, "hf_flashattn", "GPT-2 small"),
    ("gpt2", 4096, True, "hf_flashattn", "GPT-2 small"),
    ("gpt2-medium", 1024, True, "hf_flashattn", "GPT-2 medium"),
    ("bert-large-half", 512, False, "hf_flashattn_unpad", "BERT-large, ours unpadded"),
    ("bert-large-half", 512, True, "hf_flashattn_flat", "BERT-large, ours unpadded"),
    ("bert-large-half", 512, True, "hf_flashattn_flat_graphs", "the same, ours in CUDA graphs"),
)


def support_matrix() -> str:
    """One row per case: the kernel, or the reason and what to do, in the words of support.py."""
    lines = ["| | runs on | |", "|---|---|---|"]
    for label, changed in ROWS:
        answer = explain(Request(**{**USUAL, **changed}))
        if answer.ok:
            lines.append(f"| {label} | {answer.kernel} | |")
        else:
            lines.append(f"| {label} | fallback | nearest: {answer.nearest}; {answer.next_step} |")
    return "\n".join(lines)


def training_table(outcomes: dict[str, dict[str, Any]]) -> str:
    """Milliseconds, peak memory and speed of whole training steps; `outcomes` by file name.

    A row is of the first file that has it.
    """
    lines = [
        "| training step, ms (peak GiB) | eager | sdpa | hf_flashattn | x eager | x sdpa "
        "| x eager not compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    used: list[str] = []
    for model, length, compiled, own, label in STEPS:
        cases = [
            (file, case)
            for file, outcome in outcomes.items()
            for case in outcome["models"]
            if (case["name"], case["shape"]["length"]) == (model, length)
        ]
        for file, case in cases:
            if case["compile"] == compiled and "step_ms" in case["runs"].get(own, {}):
                plain = [c for f, c in cases if f == file and not c["compile"]] if compiled else []
                lines.append(_training_row(label, case, own, plain))
                used += [file] if file not in used else []
                break
    first = outcomes[used[0]]
    links = ", ".join(f"[{Path(file).stem}](benchmarks/results/{file})" for file in used)
    protocol = f"dropout {first['dropout']}, bf16 autocast, fused AdamW"
    return "\n".join([*lines, "", f"{_machine(first)}; {protocol}; {links}."])


def _training_row(label: str, case: dict[str, Any], own: str, plain: list[dict[str, Any]]) -> str:
    runs = case["runs"]
    shown = {name: runs.get(name, {}) for name in ("eager", "sdpa", own)}
    times = [run["step_ms"]["median"] if "step_ms" in run else None for run in shown.values()]
    cells = [
        "out of memory"
        if time is None
        else f"{time:.1f} ({run['peak_memory_gib'] or math.nan:.1f})"
        for time, run in zip(times, shown.values(), strict=True)
    ]
    cells[-1] = f"**{cells[-1]}**"
    times += [case["runs"].get("eager", {}).get("step_ms", {}).get("median") for case in plain[:1]]
    ratios = [times[0], times[1], times[3] if plain else None]
    cells += ["" if time is None else f"{time / times[2]:.2f}" for time in ratios]
    shape = case["shape"]
    lengths = f", lengths {shape['shortest']}..{shape['length']}"
    head = f"{label}, {shape['batch']} x {shape['length']}"
    head += lengths if shape["shortest"] < shape["length"] else ""
    head += ", compiled" if case["compile"] else ""
    return "| " + " | ".join([head, *cells]) + " |"


def grid_table(outcome: dict[str, Any]) -> str:
    """TFLOP/s at the longest sequence, and the geometric mean of the ratio to cuDNN over all."""
    lines = [
        "| attention alone | forward TFLOP/s | / cuDNN | backward TFLOP/s | / cuDNN |",
        "|---|---|---|---|---|",
    ]
    key = ("head_dim", "causal", "dropout")
    rows = sorted(outcome["rows"], key=lambda row: tuple(row[k] for k in key))
    for (dim, causal, dropout), members in itertools.groupby(
        rows, key=lambda row: tuple(row[k] for k in key)
    ):
        group = list(members)
        cells = [f"head dim {dim}, {'causal' if causal else 'full'}"]
        cells[0] += f", dropout {dropout:g}" if dropout else ""
        for direction in ("forward", "backward"):
            rates = {r["seqlen"]: r["tflops"] for r in group if r["direction"] == direction}
            ratios = [rate["ours"] / rate["cudnn"] for rate in rates.values() if "cudnn" in rate]
            cells.append(f"{rates[max(rates)]['ours']:.0f}" if rates else "")
            cells.append(f"{_geometric_mean(ratios):.2f}" if ratios else "")
        lines.append("| " + " | ".join(cells) + " |")
    lengths = sorted({row["seqlen"] for row in rows})
    protocol = (
        f"TFLOP/s at S {lengths[-1]}, ratio: geometric mean over S {lengths[0]}..{lengths[-1]}"
    )
    command = outcome["command"].removeprefix("python ")
    return "\n".join([*lines, "", f"{_machine(outcome)}; {protocol}. `python {command}`"])


def replace_between_markers(text: str, name: str, content: str) -> str:
    """Raises ValueError where the pair of markers is not there exactly once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} before one {end}; put them back into the file")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def _machine(outcome: dict[str, Any]) -> str:
    device = outcome["device"]
    name = device if isinstance(device, str) else device["name"]
    return f"{name}, torch {outcome.get('torch') or outcome['versions']['torch']}"


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=Path, nargs="+", metavar="JSON", help="of benchmarks/training_step.py"
    )
    parser.add_argument("--grid", type=Path, metavar="JSON", help="of benchmarks/attention_grid.py")
    parser.add_argument("--readme", type=Path, default=README)
    args = parser.parse_args(argv)
    text = replace_between_markers(args.readme.read_text(), "support", support_matrix())
    measured = []
    if args.steps:
        files = {path.name: json.loads(path.read_text()) for path in args.steps}
        measured.append(training_table(files))
    if args.grid:
        measured.append(grid_table(json.loads(args.grid.read_text())))
    if measured:
        text = replace_between_markers(text, "measured", "\n\n".join(measured))
    args.readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
