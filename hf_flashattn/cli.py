"""The command `hf-flashattn`.

    hf-flashattn build            compile the CUDA library ahead of time and print where it is
    hf-flashattn build --force    recompile every unit
    hf-flashattn doctor           versions, GPU, library, Transformers' hooks, two models tried out
    hf-flashattn report gpt2      what would run where, without weights: a folder, a config, a name
    hf-flashattn bench            this GPU's rates against PyTorch's

doctor, report and bench print JSON with --json. The answer alone goes to stdout.

Exit status: 0 fine, 1 something is wrong or cannot run (stdout or stderr says what), 2 wrong usage.
report is fine with a model that falls back, unless --strict. 141, as of any program that a signal
stops, if nobody reads stdout to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_flashattn import build as library_build

# doctor, preview and bench import models: only the commands that need them do so.


def build_command(args: argparse.Namespace) -> int:
    try:
        path = library_build.find_or_build(rebuild=args.force, verbose=not args.quiet)
    except library_build.BuildError as error:
        return _failed(error)
    print(path)
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    from hf_flashattn.doctor import diagnose

    diagnosis = diagnose()
    _print(diagnosis, diagnosis.as_json(), args.json)
    return 0 if diagnosis.ok else 1


def report_command(args: argparse.Namespace) -> int:
    from hf_flashattn.preview import PreviewError, preview

    try:
        forecast = preview(args.model, device=args.device, dtype=args.dtype)
    except (PreviewError, ValueError) as error:
        return _failed(error)
    _print(forecast, forecast.as_json(), args.json)
    return 1 if args.strict and not forecast.all_on_kernel else 0


def bench_command(args: argparse.Namespace) -> int:
    from hf_flashattn import bench

    try:
        bench.refuse_without_kernels(args.head_dims, args.dtype)
    except bench.BenchError as error:
        return _failed(error)
    rows = bench.run_grid(
        args.head_dims,
        (False, True),
        args.dropouts,
        args.seqlens,
        dtype=args.dtype,
        directions=bench.DIRECTIONS,
        repeats=args.repeats,
    )
    command = " ".join(["hf-flashattn", *args.argv])
    facts = bench.facts(rows, command=command, dtype=args.dtype, repeats=args.repeats)
    title = f"{facts['device']}, torch {facts['torch']}, {args.dtype}\n"
    _print(title + bench.table(rows), facts, args.json)
    try:
        bench.draw(facts, args.png)
    except ImportError as error:
        return _failed(f"no plot: {error}. Next step: pip install matplotlib")
    except OSError as error:
        return _failed(f"no plot: {error}. Next step: --png with a folder that can be written")
    print(f"hf-flashattn: the plot is {args.png}", file=sys.stderr)
    return 0


def _print(text: object, data: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(data, indent=1) if as_json else text)


def _failed(error: object) -> int:
    print(f"hf-flashattn: {str(error).removeprefix('hf_flashattn: ')}", file=sys.stderr)
    return 1


# ---- usage ---------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hf-flashattn",
        description="IO-aware attention for Hugging Face models.",
        epilog="Exit status: 0 fine, 1 something is wrong or cannot run, 2 wrong usage.",
    )
    commands = top.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )

    build = commands.add_parser(
        "build",
        help="compile the CUDA library ahead of time",
        description="Compiles the CUDA library of this version into the cache, unless it is there, "
        "and prints its path. Needs nvcc, a C++ compiler and torch, but no GPU. "
        "The environment variables are in hf_flashattn/build.py.",
    )
    build.add_argument("--force", action="store_true", help="recompile every unit")
    build.add_argument("--quiet", action="store_true", help="no progress on stderr")
    build.set_defaults(run=build_command)

    doctor = commands.add_parser(
        "doctor",
        help="what works here, what doesn't, and what to do",
        description="Checks versions, environment variables, GPU, CUDA library, compiler, and what "
        "the package relies on in Transformers; compares a tiny BERT and GPT-2 with eager "
        "attention. Builds and downloads nothing. Without a GPU the models run on the CPU, which "
        "is no fault; for scripts, the JSON says whether the kernels have run (kernels_run).",
    )
    doctor.set_defaults(run=doctor_command)

    report = commands.add_parser(
        "report",
        help="what would run where in a model, without its weights",
        description="Builds the model from its config, without weights and without the network, "
        "and says for each attention module whether the kernel would run it, and why not.",
    )
    report.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="a folder, a config.json, or the name of a model in the hub's cache",
    )
    report.add_argument(
        "--device",
        choices=("auto", "hopper", "cpu"),
        default="auto",
        help="where it would run; auto: this machine's GPU, or a Hopper GPU if there is none",
    )
    report.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights; default: the config's"
    )
    report.add_argument(
        "--strict", action="store_true", help="exit status 1 unless all would run on the kernel"
    )
    report.set_defaults(run=report_command)

    bench = commands.add_parser(
        "bench",
        help="this GPU's rates against PyTorch's",
        description="Times attention forward and backward, full and causal, against the cuDNN and "
        "FlashAttention-2 backends of torch's scaled_dot_product_attention, and draws the rates. "
        "The protocol is in hf_flashattn/bench.py. Needs a Hopper GPU and matplotlib.",
    )
    bench.add_argument("--head-dims", type=_head_dim, nargs="+", default=[64, 128])
    bench.add_argument("--seqlens", type=_seqlen, nargs="+", default=[512, 2048, 8192])
    bench.add_argument("--dropouts", type=_probability, nargs="+", default=[0.0])
    bench.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    bench.add_argument("--repeats", type=_positive, default=5)
    bench.add_argument("--png", type=Path, default=Path("hf_flashattn_bench.png"), metavar="FILE")
    bench.set_defaults(run=bench_command)

    for command in (doctor, report, bench):
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    return top


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _head_dim(text: str) -> int:
    if (number := _positive(text)) > 2048:
        raise argparse.ArgumentTypeError(f"expected 2048 or less, got {number}")
    return number


def _seqlen(text: str) -> int:
    if (number := _positive(text)) > 16384:
        raise argparse.ArgumentTypeError(f"expected 16384 or less, got {number}")
    return number


def _probability(text: str) -> float:
    if not 0.0 <= (number := float(text)) < 1.0:
        raise argparse.ArgumentTypeError(f"expected 0 <= p < 1, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    args.argv = argv
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has read what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    return status


if __name__ == "__main__":
    sys.exit(main())
