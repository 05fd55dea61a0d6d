"""The options of `train_gpt2.py`, with defaults that depend on the device."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lm import options
from lm.failures import UsageError
from lm.gpt2 import SIZES
from lm.model import Size
from lm.options import bad
from lm.training import DECAY, SCHEDULES, Recipe

# What a flag is where it was not given: on a CPU something that learns within minutes, on a GPU
# GPT-2 itself. Without dropout on a CPU: a short run never sees a block twice, and the reference
# that draws the kernels' dropout mask bit by bit is slow there.
CPU_DEFAULTS = {"size": "cpu", "context": 256, "batch_size": 4, "vocab_size": 4096, "dropout": 0.0}
GPU_DEFAULTS = {"size": "gpt2", "context": 1024, "vocab_size": 16384, "dropout": 0.1}
CPU_DEMO = {"max_seconds": 110.0, "max_bytes": 6 * 2**20, "eval_blocks": 48}
GPU_DEMO = {"max_seconds": 60.0, "eval_blocks": 64}
GPU_TOKENS = 16 * 1024  # of a microbatch
LR = 6e-4  # GPT-2 small's


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """All options, filled in and checked.

    Raises:
        UsageError: a value that can not work, or flags that contradict each other.
    """
    args = _parser().parse_args(argv)
    args.on_gpu = torch.cuda.is_available() and not args.cpu
    args.attentions = options.attentions_of(args)
    demo = (GPU_DEMO if args.on_gpu else CPU_DEMO) if args.demo else None
    options.fill(args, _on_gpu(args) if args.on_gpu else {}, CPU_DEFAULTS, demo)
    options.check(args, ("tokens", "tokens_per_step", "eval_window"))
    if args.context < 2:
        raise bad("context", "at least 2 tokens", args.context)
    if args.positions is None:
        args.positions = args.context
    if args.positions < args.context:
        raise bad("positions", f"at least --context {args.context}", args.positions)
    if args.vocab_size < 257:
        raise bad("vocab_size", "at least 257 (every byte and the end of text)", args.vocab_size)
    if args.decay is not None and args.schedule != "wsd":
        raise UsageError(
            "--decay with --schedule wsd", f"--schedule {args.schedule}", "give both or neither"
        )
    if args.decay is not None and not 0 <= args.decay <= 1:
        raise bad("decay", "a share from 0 to 1", args.decay)
    _split_step(args)
    _count_steps(args)
    if args.eval_window and args.eval_window % args.context:
        raise bad("eval_window", f"a multiple of --context {args.context}", args.eval_window)
    if args.output is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        args.output = Path(f"runs/demo-{stamp}") if args.demo else options.default_output(args)
    return args


def size_of(args: argparse.Namespace) -> Size:
    return options.size_of(args, SIZES)


def recipe_of(args: argparse.Namespace, steps: int | None = None) -> Recipe:
    recipe = options.recipe_of(args, size_of(args), LR, steps)
    decay = DECAY if args.decay is None else args.decay
    return dataclasses.replace(recipe, schedule=args.schedule, decay=decay)


def _on_gpu(args: argparse.Namespace) -> dict[str, object]:
    context = args.context or GPU_DEFAULTS["context"]
    tokens = GPU_TOKENS // 4 if options.small_gpu() else GPU_TOKENS
    return GPU_DEFAULTS | {"batch_size": max(1, tokens // max(context, 1))}


def _split_step(args: argparse.Namespace) -> None:
    """--tokens-per-step as microbatches of --batch-size blocks, the last of which may be smaller
    than asked but never larger."""
    if args.tokens_per_step is None:
        return
    blocks, rest = divmod(args.tokens_per_step, args.context * options.processes())
    if rest or not blocks:
        raise bad(
            "tokens_per_step",
            f"a multiple of --context {args.context} x {options.processes()} process(es)",
            args.tokens_per_step,
        )
    args.batch_size = next(n for n in range(min(args.batch_size, blocks), 0, -1) if blocks % n == 0)
    args.accumulate = blocks // args.batch_size


def _count_steps(args: argparse.Namespace) -> None:
    if args.first_token is not None and (args.tokens is None or args.first_token < 0):
        raise UsageError(
            "--first-token of 0 or more, with --tokens",
            f"--first-token {args.first_token}" + (" alone" if args.tokens is None else ""),
            "for example --tokens 10000000 --first-token 0",
        )
    if args.tokens is None:
        return
    if args.compare or args.max_seconds:
        raise UsageError(
            "--tokens alone to say how long to train",
            "--compare or --max-seconds beside it",
            "leave one of them out",
        )
    per_step = args.batch_size * args.accumulate * options.processes() * args.context
    args.steps = max(1, args.tokens // per_step)


def _parser() -> argparse.ArgumentParser:
    parser = options.parser(
        "train_gpt2.py",
        "Train GPT-2 of any size on any text, and compare attention implementations.",
    )
    add = options.add_text(parser, "a byte-level BPE")
    add(
        "--packing",
        choices=("auto", "chain", "whole"),
        default="auto",
        help="whole: long documents start their own block (auto: from a context of 2048)",
    )
    add = options.add_model(parser, SIZES, "gpt2")
    add("--context", type=int, metavar="N", help="tokens of a block (default: GPU 1024, CPU 256)")
    add(
        "--positions",
        type=int,
        metavar="N",
        help="position embeddings (default: --context). More: every batch begins at a random one, "
        "so that all are trained for a run with a longer context",
    )
    add(
        "--init-from",
        type=Path,
        metavar="DIR",
        help="weights of a saved GPT-2, such as `model` in an earlier run's --output; positions "
        "beyond its own are copies of these in turn",
    )
    options.add_attention(parser)
    add = options.add_training(parser, "blocks", "6e-4 for gpt2, higher for smaller")
    add(
        "--schedule",
        choices=SCHEDULES,
        default="cosine",
        help="of the learning rate after warm-up: a cosine down to a tenth, or (warm-up, stable, "
        "decay) constant and then down to 0",
    )
    add(
        "--decay",
        type=float,
        metavar="SHARE",
        help=f"of the run, with wsd (default: {DECAY}); 0 for a run that others continue",
    )
    add("--tokens", type=int, metavar="N", help="train on N tokens, whatever the context is")
    add(
        "--first-token",
        type=int,
        metavar="N",
        help="train on the tokens N to N + --tokens of the shuffled documents, read over and over: "
        "from where another run ended, whatever its context (default: on blocks of them all)",
    )
    add(
        "--tokens-per-step",
        type=int,
        metavar="N",
        help="over all processes; --accumulate and, if need be, --batch-size follow from it",
    )
    add = options.add_output(parser, "blocks")
    add("--demo", action="store_true", help="two minutes that show everything")
    add(
        "--eval-window",
        type=int,
        metavar="N",
        help="evaluate on --eval-blocks windows of N tokens, each within one held-out document: "
        "the same tokens for every --context that divides N",
    )
    return parser
