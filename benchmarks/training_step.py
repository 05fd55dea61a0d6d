"""Whole training steps of GPT-2 and BERT with eager, sdpa and hf_flashattn, interleaved in one run.

    python benchmarks/training_step.py --json training_step.json
    python benchmarks/training_step.py --models gpt2 --compile both --overlay-steps 300
    python benchmarks/training_step.py --models bert-large-full,bert-large-half --compile both \
        --attention eager,sdpa,hf_flashattn,hf_flashattn_unpad,hf_flashattn_flat

Protocol: bf16 autocast on fp32 weights, fused AdamW, gradient clipping, dropout 0.1 (attention
included), random weights from one seed. All attentions are built first; then every step runs once
with each of them, in rotating order, on the same batch. A time is the median over the steps after
warm-up, by CUDA events around the whole step (forward, loss, backward, clip, optimizer). Peak
memory is that of one attention alone: its weights and optimizer state plus what its step allocates.

gpt2         GPT-2 small, 16 x 1024 random tokens, next-token loss
gpt2-medium  the same, 24 layers of 1024
bert-large   BERT-large, 32 x 512 with lengths uniform in 128..512, right-padded, masked-token loss
             on 15 % of the real tokens; tokens/s counts real tokens
bert-large-half, bert-large-full
             the same with lengths uniform in 1..512, of which half is padding; and with no
             padding at all, so with no padding mask either

Three more attentions, for padded rows alone:

hf_flashattn_unpad  patch_model(model, unpad=True): all layers run without padding. Not compiled,
                    as a graph can not read the number of tokens and would run padded
hf_flashattn_flat   the batch without padding from the start, as DataCollatorWithFlattening hands it
                    over: tokens (1, total), where rows end in cu_seq_lens. Compiled once, for any
                    total
hf_flashattn_flat_graphs  the same, filled up to a multiple of 512 tokens, and compiled in the mode
                    "reduce-overhead": a CUDA graph for each total. Compiled only

--contexts 512,1024,2048,4096,8192 measures the GPT-2 models at each of these lengths, at --tokens a
step; an attention that runs out of memory is left out there, and the JSON says so. Parts of a grid
may run apart, each with a --json of its own. After --max-seconds nothing more is begun.

--overlay-steps N trains GPT-2 small for N steps with eager and hf_flashattn, same weights, same
batches: the bytes of the standard library's .py files as tokens, so that nothing but Python is
needed. Their loss curves go into the JSON; `examples/plots.py` draws them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from contenders import (
    ATTENTIONS,
    DROPOUT,
    FLAT,
    GRAPHS,
    SHAPES,
    TINY,
    UNPADDED,
    Batch,
    Contender,
    Shape,
    contender,
    measure,
    random_batch,
    to_device,
)
from loss_overlay import overlay
from outcome import environment, save


def benchmark(
    name: str,
    shape: Shape,
    attentions: Sequence[str],
    compiled: bool,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """All attentions on one model; a run per attention, keyed by its name."""
    contenders = [
        contender(name, shape, attention, args.seed, device, compiled) for attention in attentions
    ]
    generator = torch.Generator().manual_seed(args.seed)
    missing: dict[str, dict[str, Any]] = {}
    if args.contexts and name.startswith("gpt2"):
        contenders, missing = leave_out_what_does_not_fit(
            contenders, random_batch(name, shape, generator), device
        )
    if not contenders:
        return missing
    tokens = measure(
        contenders,
        lambda: random_batch(name, shape, generator),
        args.warmup,
        args.steps,
        device,
        args.seed,
    )
    baseline = statistics.median(contenders[0].milliseconds)
    return {c.name: _summary(c, tokens, shape.batch, baseline) for c in contenders} | missing


def leave_out_what_does_not_fit(
    contenders: list[Contender], batch: Batch, device: torch.device
) -> tuple[list[Contender], dict[str, dict[str, Any]]]:
    """Those that can make a step beside the others, and a record of those that can not.

    Everybody makes two: in the first the others may have no optimizer state yet.
    """
    missing: dict[str, dict[str, Any]] = {}
    for _ in range(2):
        fitting = []
        while contenders:
            current = contenders.pop(0)
            try:
                current.step(to_device(current.form(batch), device))
                fitting.append(current)
            except torch.cuda.OutOfMemoryError as error:
                missing[current.name] = {"out_of_memory": str(error).splitlines()[0]}
            if current.name in missing:  # outside of except: the traceback holds the activations
                del current
                _free(device)
        contenders = fitting
    return contenders, missing


def attentions_for(shape: Shape, compiled: bool, asked: Sequence[str]) -> list[str]:
    """Of those asked for, the ones that make sense: none without padding where there is none."""
    left_out = {UNPADDED} if compiled else {GRAPHS}
    if shape.shortest == shape.length:
        left_out = {UNPADDED, FLAT, GRAPHS}
    return [name for name in asked if name not in left_out]


def shapes_of(name: str, args: argparse.Namespace) -> list[Shape]:
    """One, or for GPT-2 one for each of --contexts."""
    shape = (TINY if args.tiny else SHAPES)[name]
    if not args.contexts or not name.startswith("gpt2"):
        return [shape]
    return [
        replace(shape, batch=max(1, args.tokens // context), length=context, shortest=context)
        for context in args.contexts
    ]


def table(name: str, shape: Shape, compiled: bool, runs: dict[str, dict[str, Any]]) -> str:
    first = next(iter(runs))
    rows = [
        f"{name}, {shape.batch} x {shape.length}{', torch.compile' if compiled else ''}",
        f"  {'attention':<20}{'ms/step':>9}{'p10':>9}{'p90':>9}{'tokens/s':>12}{'peak GiB':>10}"
        f"{'x ' + first:>10}",
    ]
    for label, run in runs.items():
        if "out_of_memory" in run:
            rows.append(f"  {label:<14}out of memory")
            continue
        times = run["step_ms"]
        rows.append(
            f"  {label:<20}{times['median']:>9.1f}{times['p10']:>9.1f}{times['p90']:>9.1f}"
            f"{run['tokens_per_second']:>12,.0f}{run['peak_memory_gib'] or 0:>10.1f}"
            f"{run['speedup']:>10.2f}"
        )
    rows += [
        f"  {label} ran on {run['ran_on']}" for label, run in runs.items() if run.get("ran_on")
    ]
    return "\n".join(rows)


def ran_on(report: Any) -> str | None:
    """What the attention modules of hf_flashattn ran on; None without a report."""
    if report is None:
        return None
    kinds = Counter(f"{row.runs}, {row.why}" for row in report.rows)
    parts = [f"{count} x {kind}" for kind, count in kinds.items()]
    return "; ".join([*parts, *map(str, report.unpadding)])


def _summary(current: Contender, tokens: float, sequences: int, baseline: float) -> dict[str, Any]:
    times = current.milliseconds
    median = statistics.median(times)
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else [median] * 9
    return {
        "step_ms": {"median": median, "p10": deciles[0], "p90": deciles[-1], "all": times},
        "tokens_per_second": tokens / median * 1e3,
        "sequences_per_second": sequences / median * 1e3,
        "peak_memory_gib": current.peak_bytes / 2**30 or None,
        "speedup": baseline / median,
        "losses": current.losses,
        "ran_on": ran_on(current.report),
        "attention_report": None if current.report is None else str(current.report),
    }


def _names(given: str, known: Sequence[str], flag: str) -> list[str]:
    names = given.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(
            f"error: expected {flag} out of {', '.join(known)}; got {unknown[0]!r}; "
            f"next step: {flag} {','.join(known)}"
        )
    return names


def _integers(given: str) -> list[int]:
    return [int(part) for part in given.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="gpt2,bert-large")
    parser.add_argument("--attention", default=",".join(ATTENTIONS))
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="no")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument(
        "--contexts", type=_integers, default=[], metavar="N,N,...", help="lengths of GPT-2"
    )
    parser.add_argument("--tokens", type=int, default=2**15, help="of a step, with --contexts")
    parser.add_argument("--overlay-steps", type=int, default=0, metavar="N")
    parser.add_argument(
        "--max-seconds", type=float, default=float("inf"), metavar="S", help="begin nothing after S"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: for tests")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    args.models = _names(args.models, tuple(SHAPES), "--models") if args.models else []
    args.attention = _names(args.attention, (*ATTENTIONS, UNPADDED, FLAT, GRAPHS), "--attention")
    unpadded = [name for name in args.attention if name in (UNPADDED, FLAT, GRAPHS)]
    padded = [name for name, s in SHAPES.items() if s.shortest < s.length]
    if unpadded and not set(args.models) & set(padded):
        raise SystemExit(
            f"error: expected --models {' or '.join(padded)} with {unpadded[0]}, as nothing else "
            f"is padded; got --models {','.join(args.models)}; next step: --models {padded[0]}"
        )
    if args.compile == "yes" and args.attention == [UNPADDED]:
        raise SystemExit(
            f"error: expected {FLAT} to compile, as {UNPADDED} would run padded; got --compile yes "
            f"--attention {UNPADDED}; next step: --attention {FLAT}"
        )
    if args.compile == "no" and args.attention == [GRAPHS]:
        raise SystemExit(
            f"error: expected --compile yes or both with {GRAPHS}, which is made of compiled "
            f"graphs; got --compile no; next step: --compile yes"
        )
    if args.steps < 1:
        raise SystemExit(
            f"error: expected --steps of at least 1; got {args.steps}; next step: --steps 30"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    on_gpu = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    outcome: dict[str, Any] = environment(device) | {
        "kind": "training_step",
        "seed": args.seed,
        "dropout": DROPOUT,
        "warmup": args.warmup,
        "timed_steps": args.steps,
        "models": [],
        "runs": {},
    }
    started = time.perf_counter()
    cells = [
        (name, shape, compiled)
        for name in args.models
        for shape in shapes_of(name, args)
        for compiled in {"no": [False], "yes": [True], "both": [False, True]}[args.compile]
    ]
    for name, shape, compiled in cells:
        began = time.perf_counter()
        if began - started > args.max_seconds:
            print(f"no time for {name}, {shape.batch} x {shape.length}, compile {compiled}")
            continue
        attentions = attentions_for(shape, compiled, args.attention)
        runs = benchmark(name, shape, attentions, compiled, args, device)
        print(table(name, shape, compiled, runs), flush=True)
        entry = {"name": name, "shape": asdict(shape), "compile": compiled, "runs": runs}
        outcome["models"].append(entry | {"seconds": time.perf_counter() - began})
        save(args.json, outcome)  # the overlay takes minutes; what is measured is kept
        _free(device)
    if args.overlay_steps and time.perf_counter() - started <= args.max_seconds:
        shape = (TINY if args.tiny else SHAPES)["gpt2"]
        outcome["runs"] = overlay(shape, args.overlay_steps, args.seed, device)
        for label, run in outcome["runs"].items():
            print(
                f"  {label:<20} loss {run['losses'][0]:.3f} -> {run['mean_of_last_tenth']:.4f}"
                f"   gap to eager: mean {run['mean_gap_to_eager']:.4f},"
                f" largest {run['largest_gap_to_eager']:.4f}"
            )
    save(args.json, outcome)
    if args.json:
        print(args.json)
    return 0


def _free(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
