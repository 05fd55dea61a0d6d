"""Writes benchmarks/RESULTS.md: what the FlashAttention paper claims, and what was measured here.

    python docs/results.py

A row is a claim, a command and the JSON files that it leaves in benchmarks/results. Rows whose
files are not there say so. The numbers come from the files alone; this script has none of its own
but the paper's (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Files of the kernels before these, by the first digits of their SHA-256: a newer file has others.
OLDER = {
    "ablation": "473045a7",
    "bert_accuracy_eager_padded": "9647c594",
    "bert_accuracy_hf_flashattn_unpadded": "d96b4b12",
    "bert_accuracy_sdpa_padded": "479893f3",
    "bert_large": "d071eee6",
    "bert_large_compiled_half": "7a9fe058",
    "bert_large_full_plain": "3902a0b7",
    "bert_large_half": "8a11885f",
    "context": "daa7d05f",
    "context_start": "843a2e28",
    "dropout_draws": "6c942cd2",
    "gpt2_grid_medium": "e6854e14",
    "gpt2_grid_medium_2k": "819ec348",
    "gpt2_grid_medium_4k": "164dd104",
    "gpt2_grid_medium_512": "b38a3dfd",
    "gpt2_grid_small": "b03978db",
    "gpt2_grid_small_1k_4k": "c507e4a5",
    "gpt2_grid_small_1k_h100": "29abf517",
    "gpt2_grid_small_4k": "8b9df88a",
    "gpt2_grid_small_ends": "56dd61a4",
    "limits": "6ad4887f",
    "memory": "7e55fa1d",
    "scaling": "0d99a3d6",
    "scaling_again": "0144a029",
    "step_parts": "0f1c853c",
    "training_step": "8016142e",
}
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
NOT_RUN = "not run"
OURS = "hf_flashattn"

Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """`measured` makes a cell of the files that exist; None where they lack what it needs."""

    claim: str
    patterns: str  # of the JSON files, with spaces between
    command: str
    measured: Callable[[list[Json]], str | None]


# ---- cells ---------------------------------------------------------------------------------------


def speed(model: str, lengths: Sequence[int] = ()) -> Callable[[list[Json]], str | None]:
    """Speed of a step that is not compiled over the others, a line for every shape.

    With `lengths` of these shapes alone, in that order; what was not run says so.
    """

    def cell(files: list[Json]) -> str | None:
        found: dict[int, list[str]] = defaultdict(list)
        for card, entry in ((_card(file, files), e) for file in files for e in file["models"]):
            runs, length = entry["runs"], entry["shape"]["length"]
            if entry["name"] != model or entry["compile"] or OURS not in runs:
                continue
            shape = f"{entry['shape']['batch']} x {length}"
            if "step_ms" not in runs[OURS]:
                found[length].append(f"{shape}: out of memory")
                continue
            for own in (name for name in runs if name.startswith(OURS)):
                ms = runs[own]["step_ms"]["median"]
                parts = []
                for other in (name for name in runs if not name.startswith(OURS)):
                    theirs = runs[other].get("step_ms")
                    ratio = f"{theirs['median'] / ms:.2f}" if theirs else "out of memory"
                    parts.append(f"x {other} {ratio}")
                label = "" if own == OURS else f" ({own.removeprefix(OURS + '_')})"
                found[length].append(f"{shape}{label}{card}: {ms:.1f} ms, {', '.join(parts)}")
        return _by_length(found, lengths)

    return cell


def compiled_speed(model: str, lengths: Sequence[int] = ()) -> Callable[[list[Json]], str | None]:
    """Speed of compiled steps over the others compiled, and over eager that is not."""

    def eager_steps(entries: list[Json]) -> dict[tuple, float]:
        return {
            tuple(e["shape"].values()): e["runs"]["eager"]["step_ms"]["median"]
            for e in entries
            if not e["compile"] and "step_ms" in e["runs"].get("eager", {})
        }

    def cell(files: list[Json]) -> str | None:
        of_files = [[e for e in file["models"] if e["name"] == model] for file in files]
        of_any = eager_steps([e for entries in of_files for e in entries])
        found: dict[int, list[str]] = defaultdict(list)
        for entry, plain, card in (
            # The file's own run, where it has one.
            (e, of_any | eager_steps(entries), _card(file, files))
            for file, entries in zip(files, of_files, strict=True)
            for e in entries
            if e["compile"]
        ):
            shape, runs = entry["shape"], entry["runs"]
            times = {
                name: run["step_ms"]["median"] for name, run in runs.items() if "step_ms" in run
            }
            for own in (name for name in times if name.startswith(OURS)):
                line = f"{shape['batch']} x {shape['length']}"
                line += "" if own == OURS else f" ({own.removeprefix(OURS + '_')})"
                line += f"{card}: {times[own]:.1f} ms"
                for other in (name for name in runs if not name.startswith(OURS)):
                    got = f"{times[other] / times[own]:.2f}" if other in times else "out of memory"
                    line += f", x {other} {got}"
                eager = plain.get(tuple(shape.values()))
                line += "" if eager is None else f", x eager not compiled {eager / times[own]:.2f}"
                found[shape["length"]].append(line)
        return _by_length(found, lengths)

    return cell


def _card(file: Json, files: list[Json]) -> str:
    """Which GPU, where the files of a row are not of the same."""
    names = {each["device"]["name"] for each in files}
    return "" if len(names) == 1 else f" on {file['device']['name'].split()[1]}"


def _by_length(found: dict[int, list[str]], lengths: Sequence[int]) -> str | None:
    lines = [line for length in lengths or sorted(found) for line in found.get(length, [])]
    missing = [str(length) for length in lengths if length not in found]
    if lines and missing:
        lines.append(f"{NOT_RUN}: {', '.join(missing)}")
    return _lines(lines)


def overlay(files: list[Json]) -> str | None:
    lines = []
    for file in files:
        runs = file.get("runs") or {}
        if OURS in runs:
            noise = runs.get("eager (other seed)", {}).get("mean_gap_to_eager")
            beside = "" if noise is None else f" (eager with another seed: {noise:.3f})"
            lines.append(
                f"{len(runs[OURS]['losses'])} steps, mean gap to eager"
                f" {runs[OURS]['mean_gap_to_eager']:.3f} nats{beside}"
            )
    return _lines(lines)


def perplexity_by_context(files: list[Json]) -> str | None:
    """Mean and standard deviation over the seeds; the time beside that of eager at 1k."""
    found: dict[tuple, list[Json]] = defaultdict(list)
    eager: dict[str, float] = {}  # seconds a token
    for job in (job for file in files for job in file["jobs"]):
        if job["attention"] == "eager":
            eager[job["model"]] = _training_seconds(job) / job["tokens"]
        else:
            found[job["model"], job["context"]].append(job)
    lines = []
    for (model, context), jobs in sorted(found.items()):
        scores = [job["perplexity"] for job in jobs]
        spread = f" +- {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        line = f"{model}, context {context}: {statistics.fmean(scores):.3f}{spread}"
        line += f" after {jobs[0]['tokens'] / 1e6:.1f} M tokens"
        if start := jobs[0].get("start"):
            line += f" ({start['tokens'] / 1e6:.1f} M of them at {start['context']})"
        seconds = statistics.fmean(_training_seconds(job) for job in jobs)
        line += f", {len(scores)} seed(s), {seconds:.0f} s"
        if model in eager:
            line += f" (eager at 1k: {jobs[0]['tokens'] * eager[model]:.0f} s)"
        lines.append(line)
    if any(_rises(found, model) for model, _ in found):
        lines.insert(0, "**not reproduced**: perplexity rises with the context")
    return _lines(lines)


def _training_seconds(job: Json) -> float:
    """Without compilation; with those of the job that it continued."""
    start = job.get("start")
    if not start:
        return job["tokens"] / job["tokens_per_second"]
    own = (job["tokens"] - start["tokens"]) / job["tokens_per_second"]
    return own + start["tokens"] / start["tokens_per_second"]


def _rises(found: dict[tuple, list[Json]], model: str) -> bool:
    """Whether the shortest of several contexts has the best perplexity."""
    means = {
        context: statistics.fmean(job["perplexity"] for job in jobs)
        for (name, context), jobs in found.items()
        if name == model
    }
    return len(means) > 1 and min(means, key=means.__getitem__) == min(means)


def time_to_accuracy(files: list[Json]) -> str | None:
    lines = []
    for file in files:
        for name, run in file["runs"].items():
            target = run["target"]
            if target["accuracy"] is None:
                continue
            label = f"{name}, {file['settings']['batching']}, to {target['accuracy']:.1%}"
            reached = target["reached"]
            lines.append(
                f"{label}: {reached['training_seconds']:.0f} s"
                if reached
                else f"{label}: not reached in {run['training_seconds']:.0f} s"
            )
    return _lines(lines)


def memory(files: list[Json]) -> str | None:
    """How peak memory grows with the context, and where each attention ran out."""
    lines = []
    for file in files:
        by_name: dict[str, list[Json]] = defaultdict(list)
        for row in file["rows"]:
            if row["part"] == "body":
                by_name[row["attention"]].append(row)
        for name, rows in by_name.items():
            fitting = [row for row in rows if row.get("peak_gib")]
            if not fitting:
                continue
            longest = fitting[-1]
            line = f"{name}: {longest['context']} tokens in {longest['peak_gib']:.1f} GiB"
            if len(fitting) > 1:
                growth = longest["peak_gib"] / fitting[-2]["peak_gib"]
                line += f", last doubling x {growth:.2f}"
            out = [row["context"] for row in rows if "out_of_memory" in row]
            lines.append(line + (f", out of memory at {out[0]}" if out else ""))
    return _lines(lines)


def attention_alone(files: list[Json]) -> str | None:
    lines = []
    groups: dict[tuple, list[float]] = defaultdict(list)
    for row in (row for file in files for row in file["rows"]):
        if row["head_dim"] == 64 and "cudnn" in row["tflops"]:
            ratio = row["tflops"]["ours"] / row["tflops"]["cudnn"]
            groups[row["direction"], bool(row["dropout"])].append(ratio)
    for (direction, dropout), ratios in sorted(groups.items(), reverse=True):
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        with_or_without = "with" if dropout else "without"
        lines.append(f"{direction} {with_or_without} dropout: x cuDNN {mean:.2f}")
    return _lines(lines)


def longest_sequence(files: list[Json]) -> str | None:
    return _lines(
        [
            f"{file['long']['seqlen']} tokens forward and backward in {file['long']['ms']:.0f} ms,"
            f" {file['long']['tflops']:.0f} TFLOP/s"
            for file in files
            if "long" in file
        ]
    )


def scaling(files: list[Json]) -> str | None:
    lines = []
    for run in (run for file in files for run in file["runs"]):
        if "gap" not in run or run["layout"] == "one":
            continue
        where = f"{run['layout']}, {run['processes']} GPUs"
        if run["kind"] == "speed":
            lines.append(f"{where}: x {run['speedup']:.2f}")
        else:
            gap = run["gap"]
            lines.append(
                f"{where}: {len(run['losses'])} steps, gap to one GPU {gap['mean']:.1e} nats,"
                f" at most {gap['largest']:.1e}"
            )
    return _lines(lines)


def step_parts(files: list[Json]) -> str | None:
    lines = []
    for model in (model for file in files for model in file["models"]):
        for name, run in model["runs"].items():
            share = run["parts_ms"]["attention"] / run["sum_ms"]
            lines.append(
                f"{model['name']}, {name}: attention {run['parts_ms']['attention']:.1f}"
                f" of {run['sum_ms']:.1f} ms ({share:.0%})"
            )
    return _lines(lines)


def _lines(lines: Sequence[str]) -> str | None:
    return "<br>".join(lines) or None


# ---- rows ----------------------------------------------------------------------------------------

STEP = "python benchmarks/training_step.py"
CONTEXTS = (512, 1024, 2048, 4096, 8192)


def grid(size: str) -> str:
    model = {"small": "gpt2", "medium": "gpt2-medium"}[size]
    return (
        f"{STEP} --models {model} --contexts {','.join(map(str, CONTEXTS))} --compile both "
        f"--tokens 16384 --json benchmarks/results/gpt2_grid_{size}.json"
    )


CONTEXT = "python benchmarks/context.py --corpus DIR"
BERT_LARGE_HALF = (
    f"{STEP} --models bert-large-half --attention "
    "eager,sdpa,hf_flashattn,hf_flashattn_unpad,hf_flashattn_flat "
    "--json benchmarks/results/bert_large_half.json"
)
BERT_LARGE_HALF_COMPILED = (
    f"{STEP} --models bert-large-half --compile both --warmup 25 --attention "
    "eager,sdpa,hf_flashattn_flat,hf_flashattn_flat_graphs "
    "--json benchmarks/results/bert_large_compiled_half.json"
)
BERT_LARGE_FULL = (
    f"{STEP} --models bert-large-full --compile both --attention eager,sdpa,hf_flashattn "
    "--json benchmarks/results/bert_large_compiled_full.json"
)
BERT = (
    "python examples/train_bert.py --corpus DIR --size mini --attention {A} --batching {B} "
    "--steps 5000 --eval-every 100 --eval-blocks 512 --target-accuracy 0.5 --max-seconds 500 "
    "--json benchmarks/results/bert_accuracy_{A}_{B}.json"
)
ROWS = (
    Row(
        "GPT-2 small trains 3.5x as fast as Hugging Face's, 1.7x as Megatron's (table 2)",
        "gpt2_grid*.json",
        grid("small"),
        speed("gpt2", [1024]),
    ),
    Row(
        "the same at contexts of 512 to 8k",
        "gpt2_grid*.json",
        grid("small"),
        speed("gpt2", [length for length in CONTEXTS if length != 1024]),
    ),
    Row(
        "GPT-2 medium trains 3.0x as fast as Hugging Face's, 1.7x as Megatron's (table 2)",
        "gpt2_grid*.json",
        grid("medium"),
        speed("gpt2-medium", CONTEXTS),
    ),
    Row(
        "(GPT-2 small under torch.compile, which the paper did not have)",
        "gpt2_grid*.json",
        grid("small"),
        compiled_speed("gpt2", CONTEXTS),
    ),
    Row(
        "(GPT-2 medium under torch.compile)",
        "gpt2_grid*.json",
        grid("medium"),
        compiled_speed("gpt2-medium", CONTEXTS),
    ),
    Row(
        "BERT-large trains 15 % faster than MLPerf 1.1's record (table 1)",
        "training_step.json bert_large.json",
        f"{STEP} --models bert-large --attention eager,sdpa,hf_flashattn,hf_flashattn_unpad "
        "--json benchmarks/results/bert_large.json",
        speed("bert-large"),
    ),
    Row(
        "(BERT-large without padding)",
        "bert_large_full_plain.json",
        f"{STEP} --models bert-large-full --compile both --max-seconds 205 "
        "--json benchmarks/results/bert_large_full_plain.json",
        speed("bert-large-full"),
    ),
    Row(
        "(BERT-large with half of its places padding)",
        "bert_large_half.json bert_large_compiled_half.json",
        BERT_LARGE_HALF,
        speed("bert-large-half"),
    ),
    Row(
        "(BERT-large with half of its places padding, under torch.compile)",
        "bert_large_compiled*.json",
        BERT_LARGE_HALF_COMPILED,
        compiled_speed("bert-large-half"),
    ),
    Row(
        "(BERT-large without padding, under torch.compile)",
        "bert_large_compiled*.json",
        BERT_LARGE_FULL,
        compiled_speed("bert-large-full"),
    ),
    Row(
        "BERT-large reaches 72.0 % of masked tokens in 17.4 instead of 20.0 minutes (table 1)",
        "bert_accuracy_*.json",
        BERT,
        time_to_accuracy,
    ),
    Row(
        "the same perplexity and loss curve as the baseline (table 2, appendix E)",
        "training_step.json",
        f"{STEP} --overlay-steps 300 --json benchmarks/results/training_step.json",
        overlay,
    ),
    Row(
        "GPT-2 small with 4 times the context: perplexity 17.5 instead of 18.2 (table 4)",
        "context_start.json",
        f"{CONTEXT} --tokens 90000000 --tokens-per-step 32768 "
        "--json benchmarks/results/context_start.json",
        perplexity_by_context,
    ),
    Row(
        "(the same from scratch at every context, in 610 steps)",
        "context.json",
        f"{CONTEXT} --start-share 0 --tokens 40000000 --jobs 'mini-*-0,gpt2-8192-0' "
        "--json benchmarks/results/context.json",
        perplexity_by_context,
    ),
    Row(
        "attention up to 3x as fast as PyTorch's at lengths 128 to 2k (section 4.3)",
        "attention_grid.json",
        "python benchmarks/attention_grid.py --head-dims 64 128 256 --deterministic "
        "--json benchmarks/results/attention_grid.json",
        attention_alone,
    ),
    Row(
        "memory linear in the length, up to 20x less than exact baselines (section 4.3)",
        "memory.json",
        "python benchmarks/memory.py --json benchmarks/results/memory.json",
        memory,
    ),
    Row(
        "sequences of 64k tokens (section 4.3)",
        "limits.json",
        "python benchmarks/limits.py --json benchmarks/results/limits.json",
        longest_sequence,
    ),
    Row(
        "(data-parallel training on two GPUs; the paper used eight)",
        "scaling.json scaling_again.json",
        "python benchmarks/scaling.py --json benchmarks/results/scaling.json",
        scaling,
    ),
    Row(
        "(what a training step spends its time on)",
        "step_parts.json",
        "python benchmarks/step_parts.py --json benchmarks/results/step_parts.json",
        step_parts,
    ),
)
HEAD = """# The paper's results, and ours

Made by `python docs/results.py` from the files in [results](results); do not edit. The paper's
numbers are of A100s (Dao et al. 2022, arXiv:2205.14135), ours of the card in the row: ratios within
a row compare, milliseconds across rows do not. Not reproduced, as neither can be had here:
OpenWebText's perplexity of 18.2, and MLPerf's checkpoint and data. A claim in brackets is not the
paper's. `DIR` is what `examples/prepare_corpus.py --output DIR` leaves; a command ran from the root
of the source tree, with `PYTHONPATH=.`. What fell short of its target and why:
[NOTES.md](NOTES.md#training-steps-benchmarkstraining_steppy). Files marked "older" are of the
[kernels before these](NOTES.md#what-the-committed-numbers-stand-for).
"""
PICTURES = {
    "gpt2_grid.png": "Tokens a second of GPT-2's training steps, by context and attention",
    "memory.png": "Peak memory against context, to where each attention runs out",
    "context_start.png": "Held-out perplexity against context, and loss by place in the window",
    "step_parts.png": "A training step's time by part",
    "loss_overlay.png": "300 steps with eager, with hf_flashattn and with eager from another seed",
}


def page(folder: Path) -> str:
    """RESULTS.md. Raises ValueError for a file that is no such result."""
    pictures = [
        f"\n![{text}](results/{name})"
        for name, text in PICTURES.items()
        if (folder / name).exists()
    ]
    lines = [
        HEAD,
        "| the paper | ours | card, versions | command | JSON |",
        "|---|---|---|---|---|",
        *(_table_row(row, folder) for row in ROWS),
        *pictures,
    ]
    return "\n".join(lines) + "\n"


def _table_row(row: Row, folder: Path) -> str:
    paths = sorted(path for pattern in row.patterns.split() for path in folder.glob(pattern))
    used: dict[Path, Json] = {}  # the files that have something to say
    cell = None
    for path in paths:
        try:
            file = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"expected JSON in {path}, got {error}; run: {row.command}") from error
        try:
            if row.measured([file]) is not None:
                used[path] = file
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"expected in {path} what {row.command} writes, got "
                f"{type(error).__name__}: {error}; run it again"
            ) from error
    cell = row.measured(list(used.values()))
    if cell is None:
        return f"| {row.claim} | {NOT_RUN} | | `{row.command}` | |"
    where = "<br>".join(dict.fromkeys(map(_where, used.values())))
    commands = "<br>".join(
        f"`python {file['command'].removeprefix('python ')}`" for file in used.values()
    )
    links = "<br>".join(_link(path) for path in used)
    return f"| {row.claim} | {cell} | {where} | {commands} | {links} |"


def _link(path: Path) -> str:
    older = OLDER.get(path.stem)
    is_older = older and hashlib.sha256(path.read_bytes()).hexdigest().startswith(older)
    return f"[{path.stem}](results/{path.name})" + (" (older)" if is_older else "")


def _where(file: Json) -> str:
    device, versions = file["device"], file.get("versions", {})
    name = device if isinstance(device, str) else device["name"]
    versions = {"torch": file.get("torch"), **versions}
    shown = [
        f"{package} {versions[package]}"
        for package in ("torch", "transformers", "hf_flashattn")
        if versions.get(package) not in (None, "not installed")  # then it is the source tree
    ]
    return ", ".join([name, *shown])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        text = page(args.results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.write_text(text)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
