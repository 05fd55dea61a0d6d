"""GPT-2 small on one GPU and on two, by DDP and by FSDP, through `accelerate launch`.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

Every run is examples/train_gpt2.py with the configuration of examples/accelerate that its name
says; `one` has neither. --tokens-per-step tokens make a step of all of them, so that one GPU goes
through as many microbatches as both, and sees the same blocks in the same order. Text: the standard
library, or --corpus.

speed   dropout 0.1, --steps steps. Efficiency: tokens/s over those of as many runs on one GPU,
        without the first ten steps
curve   no dropout, whose masks depend on how a batch is cut, --curve-steps steps: the losses are
        those of one GPU but for the order of sums. gap: mean and largest distance of the losses

The JSON is written after every run; a run that is in it already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import ATTENTIONS
from outcome import save

EXAMPLES = Path(os.path.relpath(Path(__file__).parents[1] / "examples"))
LAYOUTS = ("one", "ddp", "fsdp")
KINDS = ("speed", "curve")


def command(layout: str, kind: str, args: argparse.Namespace, output: Path) -> list[str]:
    if layout == "one":
        launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "bf16"]
        launch += ["--dynamo_backend", "no"]
    else:
        launch = ["--config_file", str(EXAMPLES / "accelerate" / f"{layout}.yaml")]
        launch += ["--main_process_port", str(free_port())]
    if args.cpu:
        launch += ["--mixed_precision", "no"]
    steps, dropout = (args.steps, 0.1) if kind == "speed" else (args.curve_steps, 0.0)
    options: dict[str, Any] = {
        "--size": args.size,
        "--context": args.context,
        "--tokens-per-step": args.tokens_per_step,
        "--attention": args.attention,
        "--steps": steps,
        "--dropout": dropout,
        "--eval-blocks": 32,
        "--output": output,
    }
    if args.corpus:
        options |= {"--corpus": args.corpus, "--tokenizer": args.corpus / "gpt2"}
    if args.cache_dir:
        options["--cache-dir"] = args.cache_dir
    given = [str(part) for option in options.items() for part in option]
    flags = [*(["--compile"] if args.compile else []), "--cpu" if args.cpu else "--strict"]
    script = str(EXAMPLES / "train_gpt2.py")
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, script, *given, *flags]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Failed(RuntimeError):
    """A run that did not end well, with what it said last."""


def run(layout: str, kind: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """An entry of the JSON. Raises Failed where the run fails, or takes longer than `limit` s."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        given = command(layout, kind, args, output)
        process = subprocess.Popen(
            given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and what it has launched
            said, _ = process.communicate()
            raise Failed(f"not done within {limit:.0f} s:\n{said[-2000:]}") from error
        if process.returncode:
            raise Failed(f"exit code {process.returncode}:\n{said[-4000:]}")
        result = json.loads((output / "results.json").read_text())
    trained, settings = result["runs"][args.attention], result["settings"]
    report = trained["attention_report"]
    return {
        "layout": layout,
        "kind": kind,
        "attention": args.attention,
        "processes": settings["processes"],
        "settings": settings,
        "tokens_per_second": trained["tokens_per_second"],
        "seconds_per_step": trained["seconds_per_step"],
        "peak_memory_gib": trained["peak_memory_gib"],
        "losses": trained["losses"],
        "perplexity": trained["perplexities"][-1]["perplexity"],
        "ran_on": report
        and dict(Counter(f"{row['runs']}: {row['why']}" for row in report["rows"])),
        "device": result["device"],
        "versions": result["versions"],
        "command": " ".join(given[1:]),
    }


def compare_with_one(runs: Sequence[dict[str, Any]]) -> None:
    """Adds `efficiency` and `gap` to what there is a run on one GPU for."""
    alone = {entry["kind"]: entry for entry in runs if entry["layout"] == "one"}
    for entry in runs:
        one = alone.get(entry["kind"])
        if one is None:
            continue
        speedup = entry["tokens_per_second"] / one["tokens_per_second"]
        entry |= {"speedup": speedup, "efficiency": speedup / entry["processes"]}
        gaps = [abs(a - b) for a, b in zip(entry["losses"], one["losses"], strict=True)]
        entry["gap"] = {"mean": statistics.fmean(gaps), "largest": max(gaps)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--attention", choices=ATTENTIONS, default="hf_flashattn")
    add("--size", default="gpt2")
    add("--context", type=int, default=1024, metavar="N")
    add("--tokens-per-step", type=int, default=2**15, metavar="N", help="of all GPUs together")
    add("--steps", type=int, default=60, metavar="N", help="of a speed run")
    add("--curve-steps", type=int, default=200, metavar="N")
    add("--compile", action="store_true")
    add("--corpus", type=Path, metavar="DIR", help="of prepare_corpus.py")
    add("--cache-dir", type=Path, metavar="DIR", help="of tokens, see train_gpt2.py")
    add("--max-seconds", type=float, default=float("inf"), metavar="S", help="of this call")
    add("--cpu", action="store_true")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not args.cpu and torch.cuda.device_count() < 2 and args.layouts != ["one"]:
        raise SystemExit(
            f"error: expected 2 GPUs; got {torch.cuda.device_count()}; next step: --layouts one, "
            "or --cpu --size tiny --layouts one ddp to try it out"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn in every worker
    outcome: dict[str, Any] = {"kind": "scaling", "command": " ".join(sys.argv), "runs": []}
    if args.json and args.json.is_file():
        outcome["runs"] = json.loads(args.json.read_text())["runs"]
    known = {(entry["layout"], entry["kind"]) for entry in outcome["runs"]}
    started, failed = time.monotonic(), False
    for kind in args.kinds:
        for layout in args.layouts:
            left = args.max_seconds - (time.monotonic() - started)
            if (layout, kind) in known:
                continue
            if left <= 0:
                print(f"no time for {layout} {kind}")
                continue
            try:
                entry = run(layout, kind, args, min(left, 1e6))
            except Failed as error:
                failed = True
                print(f"error: expected {layout} {kind} to train; got {error}", file=sys.stderr)
                continue
            outcome["runs"].append(entry)
            compare_with_one(outcome["runs"])
            save(args.json, {k: entry[k] for k in ("device", "versions")} | outcome)
            print(line(entry), flush=True)
    return int(failed)


def line(entry: dict[str, Any]) -> str:
    text = (
        f"{entry['kind']:<6}{entry['layout']:<5}{entry['processes']} GPU(s)"
        f"{entry['tokens_per_second']:>12,.0f} tokens/s   last loss {entry['losses'][-1]:.4f}"
    )
    if "gap" in entry and entry["layout"] != "one":
        gap = entry["gap"]
        text += (
            f"   x one {entry['speedup']:.2f}   gap {gap['mean']:.1e}, at most {gap['largest']:.1e}"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
