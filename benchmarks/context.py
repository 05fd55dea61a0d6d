"""Longer context, better model: GPT-2 at 1k to 8k tokens of context, on as many tokens each.

    python examples/prepare_corpus.py --output DIR
    python benchmarks/context.py --corpus DIR --json benchmarks/results/context.json

A job is a run of examples/train_gpt2.py in a process of its own, one on each visible GPU at a time.
All contexts of a model train on as many tokens with as many in a step, so with the same number of
steps and the same learning rates; long documents start blocks of their own at every context. All
are evaluated on the same windows of 8192 tokens out of held-out documents, which a shorter context
goes through in pieces. Seeds change weights, dropout and the order of blocks.

mini-CONTEXT-SEED   8 layers of 512, three seeds
gpt2-CONTEXT-0      GPT-2 small, once
eager-1024-0        GPT-2 small with eager attention, not compiled, for --eager-steps alone: what
                    its run at 1k would take, for the wall clock

tokens_per_second is without the first ten steps, which compile; wall_seconds is of the whole job.
What jobs have left in --runs or in the file of --json is not run again, and a job that was stopped
goes on from its newest checkpoint, so the same command continues a list that was cut off, by
--max-seconds or else. The JSON is written after every job.

    python benchmarks/context.py --merge A.json B.json --json benchmarks/results/context.json

joins what other machines or calls have left, each entry once, draws the picture and runs nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training_step import in_k, length_axis, save

TRAIN = os.path.relpath(Path(__file__).parents[1] / "examples" / "train_gpt2.py")
CONTEXTS = (1024, 2048, 4096, 8192)
SEEDS = (0, 1, 2)
LR = 1e-3
KEPT_LOSSES = 100  # points of a loss curve in the JSON
SAVE_EVERY = 400  # steps
GUESSED = {"gpt2": 350e3, "mini": 900e3}  # tokens/s, while no job of this model is done
COLORS = dict(zip(CONTEXTS, ("#a0aec0", "#63b3ed", "#2b6cb0", "#c05621"), strict=True))


@dataclass(frozen=True)
class Job:
    """One run of train_gpt2.py."""

    model: str
    context: int
    seed: int
    attention: str = "hf_flashattn"

    @property
    def name(self) -> str:
        what = "eager" if self.attention == "eager" else self.model
        return f"{what}-{self.context}-{self.seed}"

    def tokens(self, args: argparse.Namespace) -> int:
        return args.eager_steps * args.tokens_per_step if self.attention == "eager" else args.tokens

    def command(self, args: argparse.Namespace, folder: Path) -> list[str]:
        options = {
            "--corpus": args.corpus,
            "--tokenizer": args.tokenizer or args.corpus / "gpt2",
            "--cache-dir": args.cache_dir,
            "--size": self.model,
            "--attention": self.attention,
            "--context": self.context,
            "--packing": "whole",
            "--tokens": self.tokens(args),
            "--tokens-per-step": args.tokens_per_step,
            "--lr": LR,
            "--eval-window": args.window,
            "--eval-blocks": args.eval_blocks,
            "--seed": self.seed,
            "--save-every": SAVE_EVERY,
            "--output": folder,
        }
        given = [
            str(part) for option in options.items() if option[1] is not None for part in option
        ]
        if self.attention != "eager" and not args.no_compile:
            given.append("--compile")
        if not args.cpu:
            given.append("--strict")  # rather an error than a benchmark of something else
        begun = any(folder.glob("checkpoint-*"))
        given += ["--resume" if begun else "--overwrite", *(["--cpu"] if args.cpu else [])]
        return [sys.executable, TRAIN, *given]


def all_jobs() -> list[Job]:
    """The longest first, and a seed of every context before the next seed."""
    contexts = CONTEXTS[::-1]
    return [
        *(Job("gpt2", context, 0) for context in contexts),
        *(Job("mini", context, seed) for seed in SEEDS for context in contexts),
        Job("gpt2", CONTEXTS[0], 0, "eager"),
    ]


# ---- running -------------------------------------------------------------------------------------


class Queue:
    """Jobs over devices: each device takes the next one that can be done in time."""

    def __init__(
        self, jobs: Sequence[Job], args: argparse.Namespace, found: dict[str, Any]
    ) -> None:
        self.args, self.found = args, found
        self.waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            self.waiting.put(job)
        self.started = time.monotonic()
        self.failed: list[str] = []
        self.left: list[str] = []
        self.lock = threading.Lock()

    def seconds_left(self) -> float:
        return self.args.max_seconds - (time.monotonic() - self.started)

    def expected(self, job: Job) -> float:
        """Seconds of a finished job like this one: of its context, else of its model."""
        for like in (("model", "attention", "context"), ("model", "attention")):
            done = [
                entry["wall_seconds"]
                for entry in self.found.values()
                if all(entry[key] == getattr(job, key) for key in like)
            ]
            if done:
                return max(done)
        return job.tokens(self.args) / GUESSED.get(job.model, 1e6)

    def run(self, devices: Sequence[str | None]) -> None:
        threads = [threading.Thread(target=self._work, args=(device,)) for device in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, device: str | None) -> None:
        while True:
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                return
            if self.expected(job) > self.seconds_left():
                self.left.append(job.name)
                continue
            self._train(job, device)

    def _train(self, job: Job, device: str | None) -> None:
        folder = self.args.runs / job.name
        folder.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        if device is not None:
            variables["CUDA_VISIBLE_DEVICES"] = device
        began = time.monotonic()
        with (self.args.runs / f"{job.name}.log").open("w") as log:
            process = subprocess.Popen(
                job.command(self.args, folder), stdout=log, stderr=log, env=variables
            )
            try:
                code: int | str = process.wait(max(self.seconds_left(), 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = f"stopped at --max-seconds {self.args.max_seconds:g}"
        seconds = time.monotonic() - began
        with self.lock:
            if code != 0:
                self.failed.append(job.name)
                print(f"{job.name:<14} {code}, see {log.name}", flush=True)
                return
            (folder / "seconds.json").write_text(json.dumps(seconds))
            self.found[job.name] = entry = compact(job, folder)
            write(self.args.json, self.found, " ".join(sys.argv))
            print(line(entry), flush=True)
        for used_up in (folder / "model", *folder.glob("checkpoint-*")):
            shutil.rmtree(used_up)


def compact(job: Job, folder: Path) -> dict[str, Any]:
    """One entry of the JSON, from what train_gpt2.py left in the folder."""
    result = json.loads((folder / "results.json").read_text())
    run, settings = result["runs"][job.attention], result["settings"]
    last = run["perplexities"][-1]
    stride = -(-len(run["losses"]) // KEPT_LOSSES)
    losses = [run["losses"][i : i + stride] for i in range(0, len(run["losses"]), stride)]
    report = run["attention_report"]
    tokens_per_step = settings["batch_size"] * settings["accumulate"] * job.context
    return {
        "name": job.name,
        "model": job.model,
        "attention": job.attention,
        "compile": settings["compile"],
        "context": job.context,
        "seed": job.seed,
        "layers": settings["layers"],
        "hidden": settings["hidden"],
        "steps": run["steps"],
        "resumed_at": run["resumed_at"],
        "tokens": run["steps"] * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "tokens_per_second": run["tokens_per_second"],
        "seconds_per_step": run["seconds_per_step"],
        "training_seconds": run["training_seconds"],
        "compile_seconds": run["training_seconds"] - run["steps"] * run["seconds_per_step"],
        "wall_seconds": json.loads((folder / "seconds.json").read_text()),
        "peak_memory_gib": run["peak_memory_gib"],
        "perplexity": last["perplexity"],
        "held_out_tokens": last["tokens"],
        "by_position": last["by_position"],
        "by_window_position": last.get("by_window_position", last["by_position"]),
        "losses_every": stride,
        "losses": [statistics.fmean(part) for part in losses],
        "ran_on": None
        if report is None
        else dict(Counter(f"{row['runs']}: {row['why']}" for row in report["rows"])),
        "corpus": result["corpus"],
        "device": result["device"],
        "versions": result["versions"],
        "command": result["command"],
    }


def collected(args: argparse.Namespace) -> dict[str, Any]:
    """Entries by name: of the JSON as far as it got before, and of what is in --runs."""
    found: dict[str, Any] = {}
    if args.json and args.json.is_file():
        found = {entry["name"]: entry for entry in json.loads(args.json.read_text())["jobs"]}
    for job in all_jobs():
        folder = args.runs / job.name
        if (folder / "seconds.json").is_file() and (folder / "results.json").is_file():
            found[job.name] = compact(job, folder)
    return found


def merged(paths: Sequence[Path]) -> tuple[dict[str, Any], str]:
    """Entries of several JSONs by name, and the command that makes the same ones in one go."""
    found: dict[str, Any] = {}
    for path in paths:
        for entry in json.loads(path.read_text())["jobs"]:
            if found.setdefault(entry["name"], entry) != entry:
                raise SystemExit(
                    f"error: expected one entry of {entry['name']}; got another in {path}; "
                    "next step: leave one of the files out"
                )
    tokens = {entry["tokens"] for entry in found.values() if entry["attention"] != "eager"}
    if len(tokens) != 1:
        raise SystemExit(
            f"error: expected jobs on as many tokens each; got {sorted(tokens)}; "
            "next step: merge the files of one --tokens"
        )
    command = f"benchmarks/context.py --corpus DIR --tokens {tokens.pop()} --jobs "
    return found, command + ",".join(found) + " --json benchmarks/results/context.json"


def write(path: Path | None, found: dict[str, Any], command: str) -> None:
    order = {job.name: number for number, job in enumerate(all_jobs())}
    jobs = sorted(found.values(), key=lambda entry: order.get(entry["name"], len(order)))
    if jobs:
        common = {key: jobs[0][key] for key in ("device", "versions")}
        save(path, common | {"kind": "context", "command": command, "jobs": jobs})


def line(entry: dict[str, Any]) -> str:
    return (
        f"{entry['name']:<14} perplexity {entry['perplexity']:8.3f}"
        f"{entry['tokens_per_second']:>12,.0f} tokens/s"
        f"{entry['compile_seconds']:>7.0f} s compiling{entry['wall_seconds']:>7.0f} s in all"
    )


# ---- picture -------------------------------------------------------------------------------------


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
    figure.suptitle(
        f"GPT-2 after {trained[0]['tokens'] / 1e6:.0f} M tokens at every context,"
        f" {trained[0]['device']['name']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _nll(rows: Sequence[dict[str, float]]) -> list[float]:
    return [row["nll"] for row in rows]


# ---- command line --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--corpus", type=Path, metavar="DIR", help="of prepare_corpus.py")
    add("--tokenizer", type=Path, metavar="DIR", help="default: gpt2 in --corpus")
    add("--jobs", default="*", metavar="P,P,...", help="patterns of names, such as 'mini-*-0'")
    add("--list", action="store_true", help="print what would run, and stop")
    add("--tokens", type=int, default=105_000_000, metavar="N", help="of every job")
    add("--tokens-per-step", type=int, default=2**16, metavar="N")
    add("--eager-steps", type=int, default=40, metavar="N")
    add("--window", type=int, default=max(CONTEXTS), metavar="N", help="held-out, in tokens")
    add("--eval-blocks", type=int, default=176, metavar="N", help="windows")
    add("--no-compile", action="store_true")
    add("--max-seconds", type=float, default=float("inf"), metavar="S", help="of this call")
    add("--runs", type=Path, default=Path("runs/context"), metavar="DIR")
    add("--cache-dir", type=Path, metavar="DIR", help="of tokens, see train_gpt2.py")
    add("--cpu", action="store_true")
    add("--json", type=Path, metavar="FILE", help="beside it a PNG of that name")
    add("--merge", type=Path, nargs="+", metavar="FILE", help="join these into --json, run nothing")
    args = parser.parse_args(argv)
    if args.merge and not args.json:
        parser.error("expected --json with --merge; got none; next step: --json FILE")
    if not args.merge and not args.corpus:
        parser.error("expected --corpus; got none; next step: examples/prepare_corpus.py")
    return args


def save_with_picture(path: Path | None, found: dict[str, Any], command: str) -> None:
    write(path, found, command)
    if path and any(entry["attention"] != "eager" for entry in found.values()):
        picture = path.with_suffix(".png")
        try:
            draw(list(found.values()), picture)
        except ImportError as error:
            print(f"no {picture}: {error}; next step: pip install matplotlib", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.merge:
        save_with_picture(args.json, *merged(args.merge))
        return 0
    patterns = args.jobs.split(",")
    wanted = [j for j in all_jobs() if any(fnmatch.fnmatch(j.name, p) for p in patterns)]
    if not wanted:
        names = ", ".join(job.name for job in all_jobs())
        raise SystemExit(
            f"error: expected --jobs to match some of {names}; got {args.jobs!r}; "
            "next step: --jobs '*'"
        )
    found = collected(args)
    missing = [job for job in wanted if job.name not in found]
    if args.list:
        for job in missing:
            print(job.name, " ".join(job.command(args, args.runs / job.name)))
        return 0
    gpus = 0 if args.cpu else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = (visible if visible != [""] else [str(i) for i in range(gpus)]) if gpus else [None]
    jobs = Queue(missing, args, found)
    jobs.run(devices)
    save_with_picture(args.json, found, " ".join(sys.argv))
    if jobs.left:
        print(f"no time for {', '.join(jobs.left)}; the same command runs them")
    print(f"{time.monotonic() - jobs.started:.0f} s, {len(found)} of {len(all_jobs())} jobs done")
    return 1 if jobs.failed else 0


if __name__ == "__main__":
    sys.exit(main())
