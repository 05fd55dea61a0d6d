"""Longer context, better model: GPT-2 at 1k to 8k tokens of context, on as many tokens each.

    python examples/prepare_corpus.py --output DIR
    python benchmarks/context.py --corpus DIR --json benchmarks/results/context_start.json

A job is a run of examples/train_gpt2.py in a process of its own, one on each visible GPU at a time.
--start-share of the tokens come first, at the shortest context: a job that all contexts of a model
and seed continue, on the rest of the tokens. The start warms up and stays at its learning rate; a
continuation begins with a fresh optimizer, warms up in 2 % of its steps and falls to 0. Positions
that the start lacks begin as copies of its own; with --shift-positions it has and trains those of
the longest context. Starts and continuations share no text until all of it was read. With
--start-share 0 every context is trained from scratch, with a cosine.

All contexts have as many tokens in a step, so as many steps and the same learning rates; long
documents start blocks of their own at every context. All are evaluated on the same windows of 8192
tokens out of held-out documents, which a shorter context goes through in pieces. Seeds change
weights, dropout and the order of documents and blocks.

mini-start-SEED     8 layers of 512, three seeds, at the shortest context
mini-CONTEXT-SEED   from there on
gpt2-CONTEXT-0      GPT-2 small, once, and gpt2-start-0
eager-1024-0        GPT-2 small with eager attention, not compiled, for --eager-steps alone: what
                    its run at 1k would take, for the wall clock

tokens_per_second is without the first ten steps, which compile; wall_seconds is of the whole job,
with what was lost where it was stopped. These and losses are of the continuation; `start` has them
of the start, tokens has both. A start is trained where a continuation needs it and --runs does not
have its model, which is kept until all contexts are done.

What jobs have left in --runs or in the file of --json is not run again, if it was trained with the
same options, and a job that was stopped goes on from its newest checkpoint, so the same command
continues a list that was cut off, by --max-seconds or else. The JSON is written after every job.

    python benchmarks/context.py --merge A.json B.json --json benchmarks/results/context_start.json

joins what other machines or calls have left, each entry once, draws the picture and runs nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from outcome import save
from plot_context import draw

TRAIN = os.path.relpath(Path(__file__).parents[1] / "examples" / "train_gpt2.py")
CONTEXTS = "1024,2048,4096,8192"
SEEDS = {"gpt2": (0,), "mini": (0, 1, 2)}
LR = 1e-3
WARMUP = 0.02  # share of a continuation
KEPT_LOSSES = 100  # points of a loss curve in the JSON
SAVE_EVERY = 400  # steps
# While no job of the model is done: tokens/s, and seconds to compile, evaluate and read text.
GUESSED, GUESSED_REST = {"gpt2": 270e3, "mini": 500e3}, 60
OF_THE_START = ("name", "context", "positions", "steps", "resumed_at", "tokens",
                "tokens_per_second", "training_seconds", "wall_seconds", "perplexity",
                "losses_every", "losses", "command")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run of train_gpt2.py."""

    model: str
    context: int
    seed: int
    attention: str = "hf_flashattn"
    start: Job | None = None  # what it continues
    begins: bool = False  # it is such a start

    @property
    def name(self) -> str:
        what = "eager" if self.attention == "eager" else self.model
        return f"{what}-{'start' if self.begins else self.context}-{self.seed}"

    def part(self, args: argparse.Namespace) -> tuple[int, int]:
        """Tokens before it and its own."""
        if self.attention == "eager":
            return 0, args.eager_steps * args.tokens_per_step
        steps = args.tokens // args.tokens_per_step
        shared = round(steps * args.start_share) * args.tokens_per_step
        if self.begins:
            return 0, shared
        return (shared if self.start else 0), steps * args.tokens_per_step - shared

    def command(self, args: argparse.Namespace) -> list[str]:
        before, tokens = self.part(args)
        # Not at the last step: no run goes on from there, were it stopped in its evaluation.
        at_the_end = tokens // args.tokens_per_step % SAVE_EVERY == 0
        options = {
            "--corpus": args.corpus,
            "--tokenizer": args.tokenizer or args.corpus / "gpt2",
            "--cache-dir": args.cache_dir,
            "--size": self.model,
            "--attention": self.attention,
            "--context": self.context,
            "--packing": "whole",
            "--tokens": tokens,
            "--tokens-per-step": args.tokens_per_step,
            "--lr": LR,
            "--eval-window": args.window,
            "--eval-blocks": args.eval_blocks,
            "--eval-every": args.eval_every,
            "--seed": self.seed,
            "--save-every": SAVE_EVERY + at_the_end,
            "--output": args.runs / self.name,
        }
        if self.begins or self.start:
            options |= {"--first-token": before, "--schedule": "wsd"}
            options["--decay"] = 0 if self.begins else 1
        if self.begins and args.shift_positions:
            options["--positions"] = args.contexts[-1]
        if self.start:
            options |= {"--init-from": args.runs / self.start.name / "model", "--warmup": WARMUP}
        given = [
            str(part) for option in options.items() if option[1] is not None for part in option
        ]
        if self.attention != "eager" and not args.no_compile:
            given.append("--compile")
        if not args.cpu:
            given.append("--strict")  # rather an error than a benchmark of something else
        given.append("--resume" if self.begun(args) else "--overwrite")
        return [sys.executable, TRAIN, *given, *(["--cpu"] if args.cpu else [])]

    def begun(self, args: argparse.Namespace) -> bool:
        found = (args.runs / self.name).glob("checkpoint-*")
        return any(path.suffix != ".incomplete" for path in found)

    def has_model(self, args: argparse.Namespace) -> bool:
        """Of a start: it is done, and can be continued."""
        left = ("results.json", "seconds.json", "model/config.json")
        return all((args.runs / self.name / name).is_file() for name in left)


def all_jobs(args: argparse.Namespace) -> list[Job]:
    """Each start before what continues it, the longest first; all of a seed before the next."""
    jobs = []
    for model in args.models:
        for seed in SEEDS.get(model, (0,)):
            start = Job(model, args.contexts[0], seed, begins=True) if args.start_share else None
            jobs += [start] if start else []
            jobs += [Job(model, context, seed, start=start) for context in args.contexts[::-1]]
    if "gpt2" in args.models:
        jobs.append(Job("gpt2", args.contexts[0], 0, "eager"))
    return jobs


def siblings(job: Job, args: argparse.Namespace) -> list[Job]:
    """All that continue this start, or the one that this job continues."""
    start = job if job.begins else job.start
    return [other for other in all_jobs(args) if other.start and other.start == start]


def jobs_to_run(args: argparse.Namespace, found: dict[str, Any]) -> list[Job]:
    """What --jobs matches and is not there yet, and the starts that this needs.

    A start that is matched by itself is run while anything could continue it.
    """
    patterns = args.jobs.split(",")
    wanted = [j for j in all_jobs(args) if any(fnmatch.fnmatch(j.name, p) for p in patterns)]
    if not wanted:
        names = ", ".join(job.name for job in all_jobs(args))
        raise SystemExit(
            f"error: expected --jobs to match some of {names}; got {args.jobs!r}; "
            "next step: --jobs '*'"
        )
    missing = [job for job in wanted if not job.begins and job.name not in found]
    needed = {job.start for job in missing if job.start and not job.begun(args)}
    for job in wanted:
        alone = job.begins and not any(other.start == job for other in missing)
        if alone and any(other.name not in found for other in siblings(job, args)):
            needed.add(job)
    return [
        job
        for job in all_jobs(args)
        if job in missing or (job in needed and not job.has_model(args))
    ]


# ---- running -------------------------------------------------------------------------------------


class Queue:
    """Jobs over devices: each takes the next one that can begin and can be done in time."""

    def __init__(
        self, jobs: Sequence[Job], args: argparse.Namespace, found: dict[str, Any]
    ) -> None:
        self.args, self.found = args, found
        self.waiting = list(jobs)
        self.running: set[Job] = set()
        self.starts: dict[str, Any] = {}  # entries of starts that were done here
        self.started = time.monotonic()
        self.failed: list[str] = []
        self.left: list[str] = []
        self.changed = threading.Condition()  # what is waiting or running

    def seconds_left(self) -> float:
        return self.args.max_seconds - (time.monotonic() - self.started)

    def expected(self, job: Job) -> float:
        """Seconds: its tokens at the rate of a finished job of its context, else of its model, and
        what that one took besides."""
        tokens = job.part(self.args)[1]
        for like in (("model", "attention", "context"), ("model", "attention")):
            done = [
                entry["wall_seconds"] + (tokens - own_tokens(entry)) / entry["tokens_per_second"]
                for entry in (*self.found.values(), *self.starts.values())
                if all(entry[key] == getattr(job, key) for key in like)
            ]
            if done:
                return max(done)
        return GUESSED_REST + tokens / GUESSED.get(job.model, 1e6)

    def run(self, devices: Sequence[str | None]) -> None:
        threads = [threading.Thread(target=self._work, args=(device,)) for device in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, device: str | None) -> None:
        while job := self._next():
            try:
                self._train(job, device)
            finally:
                with self.changed:
                    self.running.remove(job)
                    self.changed.notify_all()

    def _next(self) -> Job | None:
        """Waits while all that is left continues starts that are running."""
        with self.changed:
            while self.waiting:
                job = next((job for job in self.waiting if self._can_begin(job)), None)
                if job is None and self.running:
                    self.changed.wait()
                elif job is None:  # their starts failed, or there was no time for them
                    self.left += [job.name for job in self.waiting]
                    self.waiting.clear()
                else:
                    self.waiting.remove(job)
                    if self.expected(job) <= self.seconds_left():
                        self.running.add(job)
                        return job
                    self.left.append(job.name)
            self.changed.notify_all()
        return None

    def _can_begin(self, job: Job) -> bool:
        if job.start is None or job.begun(self.args):
            return True
        return job.start not in self.running and job.start.has_model(self.args)

    def _train(self, job: Job, device: str | None) -> None:
        folder = self.args.runs / job.name
        folder.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        if device is not None:
            variables["CUDA_VISIBLE_DEVICES"] = device
        seconds = folder / "seconds.json"  # of all processes that worked on it
        spent = json.loads(seconds.read_text()) if job.begun(self.args) and seconds.exists() else 0
        if job.start and not job.begun(self.args):
            start = compact(job.start, self.args)
            kept = {key: start[key] for key in OF_THE_START} | {"share": self.args.start_share}
            (folder / "start.json").write_text(json.dumps(kept))
        began = time.monotonic()
        with (self.args.runs / f"{job.name}.log").open("w") as log:
            process = subprocess.Popen(
                job.command(self.args), stdout=log, stderr=log, env=variables
            )
            try:
                code: int | str = process.wait(max(self.seconds_left(), 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = f"stopped at --max-seconds {self.args.max_seconds:g}"
        seconds.write_text(json.dumps(spent + time.monotonic() - began))
        with self.changed:
            if code != 0:
                self.failed.append(job.name)
                print(f"{job.name:<14} {code}, see {log.name}", flush=True)
                return
            entry = compact(job, self.args)
            (self.starts if job.begins else self.found)[job.name] = entry
            write(self.args, self.found, " ".join(sys.argv))
            print(line(entry), flush=True)
        self._remove_used_up(job)

    def _remove_used_up(self, job: Job) -> None:
        models = [] if job.begins else [self.args.runs / job.name / "model"]
        if job.start and all(other.name in self.found for other in siblings(job, self.args)):
            models.append(self.args.runs / job.start.name / "model")
        for folder in (*models, *(self.args.runs / job.name).glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)


def own_tokens(entry: dict[str, Any]) -> int:
    """Without those of its start."""
    return entry["steps"] * entry["tokens_per_step"]


def compact(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """One entry of the JSON, from what train_gpt2.py left in the job's folder."""
    folder = args.runs / job.name
    start = json.loads((folder / "start.json").read_text()) if job.start else None
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
        "positions": settings.get("positions") or job.context,
        "seed": job.seed,
        "layers": settings["layers"],
        "hidden": settings["hidden"],
        "steps": run["steps"],
        "resumed_at": run["resumed_at"],
        "tokens": run["steps"] * tokens_per_step + (start["tokens"] if start else 0),
        "tokens_per_step": tokens_per_step,
        "tokens_per_second": run["tokens_per_second"],
        "seconds_per_step": run["seconds_per_step"],
        "training_seconds": run["training_seconds"],
        "compile_seconds": run["training_seconds"] - run["steps"] * run["seconds_per_step"],
        "wall_seconds": json.loads((folder / "seconds.json").read_text()),
        "peak_memory_gib": run["peak_memory_gib"],
        "perplexity": last["perplexity"],
        "held_out_tokens": last["tokens"],
        "perplexities": [{k: p[k] for k in ("step", "perplexity")} for p in run["perplexities"]],
        "by_position": last["by_position"],
        "by_window_position": last.get("by_window_position", last["by_position"]),
        "losses_every": stride,
        "losses": [statistics.fmean(part) for part in losses],
        "start": start,
        "ran_on": None
        if report is None
        else dict(Counter(f"{row['runs']}: {row['why']}" for row in report["rows"])),
        "corpus": result["corpus"],
        "device": result["device"],
        "versions": result["versions"],
        "command": result["command"],
    }


def collected(args: argparse.Namespace) -> dict[str, Any]:
    """Entries by name: of the JSON as far as it got before, and of what is in --runs.

    Exits where one of these was trained with other options.
    """
    found: dict[str, Any] = {}
    if args.json and args.json.is_file():
        found = {entry["name"]: entry for entry in json.loads(args.json.read_text())["jobs"]}
    for job in all_jobs(args):
        if job.name in found:
            require_same_options(job, args, found[job.name], args.json)
        folder = args.runs / job.name
        if (folder / "seconds.json").is_file() and (folder / "results.json").is_file():
            entry = compact(job, args)
            require_same_options(job, args, entry, folder)
            if not job.begins:
                found[job.name] = entry
    return found


def require_same_options(
    job: Job, args: argparse.Namespace, entry: dict[str, Any], where: Path
) -> None:
    before, own = job.part(args)
    start = entry if job.begins else entry.get("start") or {}
    positions = args.contexts[-1 if args.shift_positions else 0]
    expected = {
        "positions at the start": positions if job.begins or job.start else None,
        "tokens of the start": before,
        "own tokens": own,
        "tokens a step": args.tokens_per_step,
        "window": args.window,
    }
    got = {
        "positions at the start": start.get("positions"),
        "tokens of the start": entry["tokens"] - own_tokens(entry),
        "own tokens": own_tokens(entry),
        "tokens a step": entry["tokens_per_step"],
        "window": entry["by_window_position"][-1]["to"],
    }
    different = [name for name in expected if expected[name] != got[name]]
    if different:
        raise SystemExit(
            f"error: expected {job.name} with {_listed(expected, different)}; "
            f"got {_listed(got, different)} in {where}; "
            "next step: the options of that run, or another --json and --runs"
        )


def _listed(values: dict[str, int], names: Sequence[str]) -> str:
    return ", ".join(f"{values[name]} {name}" for name in names)


def merged(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Entries of several JSONs by name, and the command that makes the same ones in one go."""
    found: dict[str, Any] = {}
    for path in args.merge:
        for entry in json.loads(path.read_text())["jobs"]:
            if found.setdefault(entry["name"], entry) != entry:
                raise SystemExit(
                    f"error: expected one entry of {entry['name']}; got another in {path}; "
                    "next step: leave one of the files out"
                )
    trained = [entry for entry in found.values() if entry["attention"] != "eager"]
    starts = [entry.get("start") or {} for entry in trained]
    parts = {
        (entry["tokens"], start.get("tokens", 0), start.get("positions", 0))
        for entry, start in zip(trained, starts, strict=True)
    }
    if len(parts) != 1:
        raise SystemExit(
            "error: expected jobs on as many tokens each, as many of them at the start, with as "
            f"many positions there; got {sorted(parts)}; "
            "next step: merge the files of one --tokens, --start-share and --shift-positions"
        )
    start = trained[0].get("start") or {"share": 0, "context": 0, "positions": 0}
    command = f"benchmarks/context.py --corpus DIR --tokens {trained[0]['tokens']} "
    command += f"--start-share {start['share']:g} "
    if start["positions"] > start["context"]:
        command += "--shift-positions "
    command += f"--jobs {','.join(found)} "
    return found, command + f"--json benchmarks/results/{args.json.name}"


def write(args: argparse.Namespace, found: dict[str, Any], command: str) -> None:
    order = {job.name: number for number, job in enumerate(all_jobs(args))}
    jobs = sorted(found.values(), key=lambda entry: order.get(entry["name"], len(order)))
    if jobs:
        common = {key: jobs[0][key] for key in ("device", "versions")}
        save(args.json, common | {"kind": "context", "command": command, "jobs": jobs})


def line(entry: dict[str, Any]) -> str:
    return (
        f"{entry['name']:<14} perplexity {entry['perplexity']:8.3f}"
        f"{entry['tokens_per_second']:>12,.0f} tokens/s"
        f"{entry['compile_seconds']:>7.0f} s compiling{entry['wall_seconds']:>7.0f} s in all"
    )


# ---- command line --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--corpus", type=Path, metavar="DIR", help="of prepare_corpus.py")
    add("--tokenizer", type=Path, metavar="DIR", help="default: gpt2 in --corpus")
    add("--jobs", default="*", metavar="P,P,...", help="patterns of names, such as 'mini-*-0'")
    add("--list", action="store_true", help="print what would run, and stop")
    add("--models", default="gpt2,mini", metavar="M,M,...", help="sizes of train_gpt2.py")
    add("--contexts", type=integers, default=CONTEXTS, metavar="N,N,...")
    add("--tokens", type=int, default=105_000_000, metavar="N", help="of every context")
    add(
        "--start-share",
        type=float,
        default=0.75,
        metavar="SHARE",
        help="of the tokens: the shortest context's, which all others continue (0: from scratch)",
    )
    add("--shift-positions", action="store_true", help="starts train the longest context's")
    add("--tokens-per-step", type=int, default=2**16, metavar="N")
    add("--eager-steps", type=int, default=40, metavar="N")
    add("--window", type=int, metavar="N", help="held-out, in tokens (default: longest context)")
    add("--eval-blocks", type=int, default=176, metavar="N", help="windows")
    add("--eval-every", type=int, metavar="N", help="steps (default: before and after)")
    add("--no-compile", action="store_true")
    add("--max-seconds", type=float, default=float("inf"), metavar="S", help="of this call")
    add("--runs", type=Path, default=Path("runs/context"), metavar="DIR")
    add("--cache-dir", type=Path, metavar="DIR", help="of tokens, see train_gpt2.py")
    add("--cpu", action="store_true")
    add("--json", type=Path, metavar="FILE", help="beside it a PNG of that name")
    add("--merge", type=Path, nargs="+", metavar="FILE", help="join these into --json, run nothing")
    args = parser.parse_args(argv)
    args.models = args.models.split(",")
    args.contexts.sort()
    args.window = args.window or args.contexts[-1]
    if not 0 <= args.start_share < 1:
        parser.error(
            f"expected 0 <= --start-share < 1; got {args.start_share}; next step: for example 0.75"
        )
    if args.merge and not args.json:
        parser.error("expected --json with --merge; got none; next step: --json FILE")
    if not args.merge and not args.corpus:
        parser.error("expected --corpus; got none; next step: examples/prepare_corpus.py")
    return args


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def save_with_picture(args: argparse.Namespace, found: dict[str, Any], command: str) -> None:
    path = args.json
    write(args, found, command)
    if path and any(entry["attention"] != "eager" for entry in found.values()):
        picture = path.with_suffix(".png")
        try:
            draw(list(found.values()), picture)
        except ImportError as error:
            print(f"no {picture}: {error}; next step: pip install matplotlib", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.merge:
        save_with_picture(args, *merged(args))
        return 0
    found = collected(args)
    missing = jobs_to_run(args, found)
    if args.list:
        for job in missing:
            print(job.name, " ".join(job.command(args)))
        return 0
    gpus = 0 if args.cpu else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = (visible if visible != [""] else [str(i) for i in range(gpus)]) if gpus else [None]
    jobs = Queue(missing, args, found)
    jobs.run(devices)
    save_with_picture(args, found, " ".join(sys.argv))
    if jobs.left:
        print(f"no time or no start for {', '.join(jobs.left)}; the same command runs them")
    contexts = sum(not job.begins for job in all_jobs(args))
    print(f"{time.monotonic() - jobs.started:.0f} s, {len(found)} of {contexts} jobs done")
    return 1 if jobs.failed else 0


if __name__ == "__main__":
    sys.exit(main())
