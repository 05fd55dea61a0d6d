"""What a run leaves behind: one JSON file, and a few lines on the terminal."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "hf_flashattn",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "tokenizers",
    "liger_kernel",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and command: what is needed to run it again."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    described: dict[str, Any] = {"type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    else:
        described |= {
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    return {"command": " ".join(sys.argv), "versions": versions, "device": described}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file in one piece: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(json.dumps(content, indent=1) + "\n")
    work.replace(path)


def training_lines(run: dict[str, Any], attention: str, stopped: str) -> list[str]:
    """Loss, held-out perplexity and speed of a training run."""
    before, after = run["perplexities"][0], run["perplexities"][-1]
    losses = run["losses"]
    tail = losses[-min(10, len(losses)) :]
    return [
        f"attention            {attention}",
        f"steps                {run['steps']} ({stopped})",
        f"loss                 {losses[0]:.3f} -> {sum(tail) / len(tail):.3f}"
        f" (first step -> mean of the last {len(tail)})",
        f"held-out perplexity  {before['perplexity']:,.1f} -> {after['perplexity']:,.1f}"
        f" ({after['tokens']:,} tokens of held-out documents)",
        *(
            [f"held-out accuracy    {before['accuracy']:.1%} -> {after['accuracy']:.1%}"]
            if "accuracy" in after
            else []
        ),
        f"speed                {run['tokens_per_second']:,.0f} tokens/s,"
        f" {run['seconds_per_step'] * 1e3:,.0f} ms a step",
    ]


def comparison_lines(runs: dict[str, dict[str, Any]]) -> list[str]:
    """A table: one attention a row, the speed relative to the others."""
    names = list(runs)
    header = f"{'attention':<14}{'ms/step':>9}{'tokens/s':>11}{'peak GiB':>10}{'last loss':>11}"
    lines = [header + "".join(f"{'x ' + name:>16}" for name in names)]
    for name, run in runs.items():
        peak = run["peak_memory_gib"]
        lines.append(
            f"{name:<14}{run['step_ms']['median']:>9.1f}{run['tokens_per_second']:>11,.0f}"
            f"{'-' if peak is None else f'{peak:.1f}':>10}{run['losses'][-1]:>11.3f}"
            + "".join(f"{ratio:>16.2f}" for ratio in speed_ratios(runs)[name].values())
        )
    return lines


def speed_ratios(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """ratios[a][b] > 1: a step of `a` takes less time than one of `b` (medians of the same run)."""
    time = {name: run["step_ms"]["median"] for name, run in runs.items()}
    return {a: {b: time[b] / time[a] for b in runs} for a in runs}


def report_record(report: Any) -> dict[str, Any] | None:
    """An attention report as JSON: the printed table, and what every module ran on."""
    if report is None:
        return None
    rows = [
        {
            "module": row.module,
            "runs": row.runs,
            "why": row.why,
            "calls": {name: getattr(row.calls, name) for name in ("kernel", "cpu", "fallback")},
        }
        for row in report.rows
    ]
    return {"table": str(report), "rows": rows}


def attention_that_ran(name: str, report: Any) -> str:
    """One line: on what the attention modules of the run have run."""
    if report is None:
        return f"{name} (Transformers' own)"
    kinds = Counter((row.runs, row.why) for row in report.rows)
    parts = [f"{count} x {runs}: {why}" for (runs, why), count in kinds.items()]
    return f"{name} ({'; '.join(parts)})"
