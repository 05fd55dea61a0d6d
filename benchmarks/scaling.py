"""Throughput of data-parallel training on one GPU and on two: GPT-2 small under DDP.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

Each count of processes is a torchrun of its own, on one node. Every process has the step of
training_step.py (16 x 1024 random tokens of its own, bf16 autocast, fused AdamW, dropout 0.1), its
model inside DistributedDataParallel, NCCL on GPUs and gloo on CPUs. A step's time is that of the
slowest process; the median is over the steps after warm-up. Efficiency: tokens/s of n processes
over n times those of the first count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from training_step import (
    ATTENTIONS,
    SHAPES,
    TINY,
    contender,
    environment,
    ran_on,
    random_batch,
    save,
    timed,
)


def worker(args: argparse.Namespace) -> None:
    """One process of a torchrun; rank 0 writes the results of all to --json."""
    on_gpu = not args.cpu
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    runs = {attention: _run(attention, args, device, rank) for attention in args.attention}
    if rank == 0:
        save(args.json, environment(device) | {"runs": runs})
    # Left to the interpreter's exit, gloo's threads sometimes abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _run(
    attention: str, args: argparse.Namespace, device: torch.device, rank: int
) -> dict[str, Any]:
    shape = (TINY if args.tiny else SHAPES)["gpt2"]
    current = contender("gpt2", shape, attention, 0, device, compiled=False)
    current.model = DistributedDataParallel(current.model, gradient_as_bucket_view=True)
    generator = torch.Generator().manual_seed(rank)
    times = []
    for step in range(args.warmup + args.steps):
        batch = {k: v.to(device) for k, v in random_batch("gpt2", shape, generator).items()}
        torch.distributed.barrier()
        _, milliseconds = timed(lambda b=batch: current.step(b), device)
        slowest = torch.tensor(milliseconds, device=device)
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        if step >= args.warmup:
            times.append(slowest.item())
    median = statistics.median(times)
    tokens = shape.batch * shape.length * torch.distributed.get_world_size()
    return {
        "step_ms": {"median": median, "all": times},
        "tokens_per_second": tokens / median * 1e3,
        "ran_on": ran_on(current.report),
    }


def launch(processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """The results of a torchrun with so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(processes), __file__, "--worker", "--json", str(path)),
            *("--attention", *args.attention),
            *("--steps", str(args.steps), "--warmup", str(args.warmup)),
            *(["--tiny"] if args.tiny else []),
            *(["--cpu"] if args.cpu else []),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=args.timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise SystemExit(
                f"error: expected {processes} process(es) to be done within {args.timeout} s; got "
                "no end; next step: a longer --timeout, or fewer --steps"
            ) from error
        if done.returncode:
            raise SystemExit(f"error: {processes} process(es) failed:\n{done.stderr[-4000:]}")
        return json.loads(path.read_text())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=280, metavar="S", help="of one launch")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: for tests")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.worker:
        worker(args)
        return 0
    if not args.cpu and torch.cuda.device_count() < max(args.processes):
        raise SystemExit(
            f"error: expected {max(args.processes)} GPUs; got {torch.cuda.device_count()}; "
            "next step: --processes 1, or --cpu --tiny to try it out"
        )
    outcome: dict[str, Any] = {}
    for processes in args.processes:
        found = launch(processes, args)
        if not outcome:
            outcome = {k: found[k] for k in ("versions", "device")}
            outcome |= {"kind": "scaling", "command": " ".join(sys.argv), "counts": []}
        outcome["counts"].append({"processes": processes, "runs": found["runs"]})
        save(args.json, outcome)
    _add_efficiency(outcome["counts"])
    save(args.json, outcome)
    print(f"{'attention':<14}{'processes':>10}{'ms/step':>10}{'tokens/s':>12}{'efficiency':>12}")
    for count in outcome["counts"]:
        for attention, run in count["runs"].items():
            print(
                f"{attention:<14}{count['processes']:>10}{run['step_ms']['median']:>10.1f}"
                f"{run['tokens_per_second']:>12,.0f}{run['efficiency']:>12.2f}"
            )
    return 0


def _add_efficiency(counts: list[dict[str, Any]]) -> None:
    first = counts[0]
    for count in counts:
        for attention, run in count["runs"].items():
            alone = first["runs"][attention]["tokens_per_second"] / first["processes"]
            run["efficiency"] = run["tokens_per_second"] / count["processes"] / alone


if __name__ == "__main__":
    sys.exit(main())
