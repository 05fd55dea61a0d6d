"""The options of `train_gpt2.py`, with defaults that depend on the device."""

from __future__ import annotations

import argparse
import difflib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lm.cache import default_cache
from lm.failures import UsageError
from lm.model import ATTENTIONS, SIZES, Size
from lm.training import UNLIMITED, Recipe

# What a flag is where it was not given: on a CPU something that learns within minutes, on a GPU
# GPT-2 itself. Without dropout on a CPU: a short run never sees a block twice, and the reference
# that draws the kernels' dropout mask bit by bit is slow there.
CPU_DEFAULTS = {"size": "cpu", "context": 256, "batch_size": 4, "vocab_size": 4096, "dropout": 0.0}
GPU_DEFAULTS = {
    "size": "gpt2",
    "context": 1024,
    "batch_size": 16,
    "vocab_size": 16384,
    "dropout": 0.1,
}
CPU_DEMO = {"max_seconds": 110.0, "max_bytes": 6 * 2**20, "eval_blocks": 48}
GPU_DEMO = {"max_seconds": 60.0, "eval_blocks": 64}
SMALL_GPU_GIB = 60  # below it, eager attention at 16 x 1024 does not fit


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """All options, filled in and checked.

    Raises:
        UsageError: a value that can not work, or flags that contradict each other.
    """
    args = _parser().parse_args(argv)
    args.on_gpu = torch.cuda.is_available() and not args.cpu
    args.attentions = _attentions(args)
    for name, value in _defaults(args).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _check(args)
    if args.output is None:
        name = "-vs-".join(args.attentions)
        args.output = Path("runs") / (
            f"demo-{time.strftime('%Y%m%d-%H%M%S')}" if args.demo else f"{args.size}-{name}"
        )
    return args


def size_of(args: argparse.Namespace) -> Size:
    preset = SIZES[args.size]
    return Size(
        args.layers or preset.layers,
        args.hidden or preset.hidden,
        args.heads or preset.heads,
        preset.vocab,
    )


def recipe_of(args: argparse.Namespace, steps: int | None = None) -> Recipe:
    """GPT-2's recipe; the learning rate falls with the width unless it is given."""
    return Recipe(
        steps=steps or args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        lr=args.lr or 6e-4 * 768 / size_of(args).hidden,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        clip=args.clip,
        seed=args.seed,
        max_seconds=None if steps else args.max_seconds,
    )


def _defaults(args: argparse.Namespace) -> dict[str, object]:
    defaults: dict[str, object] = dict(GPU_DEFAULTS if args.on_gpu else CPU_DEFAULTS)
    if args.on_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        if memory < SMALL_GPU_GIB:
            defaults["batch_size"] = 4
    # `accelerate launch` hands its own choice over in the environment.
    defaults["mixed_precision"] = os.environ.get("ACCELERATE_MIXED_PRECISION") or (
        "bf16" if args.on_gpu else "no"
    )
    if args.demo and args.steps is None:
        defaults |= GPU_DEMO if args.on_gpu else CPU_DEMO
    timed = args.max_seconds or defaults.get("max_seconds")
    defaults["steps"] = UNLIMITED if timed and not args.compare else 50 if args.compare else 300
    defaults["eval_blocks"] = defaults.get("eval_blocks", 64)
    return defaults


def _attentions(args: argparse.Namespace) -> list[str]:
    names = args.compare.split(",") if args.compare is not None else [args.attention]
    for name in names:
        if name not in ATTENTIONS:
            near = difflib.get_close_matches(name, ATTENTIONS, 1)
            raise UsageError(
                f"an attention out of {', '.join(ATTENTIONS)}",
                repr(name),
                f"did you mean {near[0]!r}?" if near else "name one of these",
            )
    if args.compare is not None and len(set(names)) < max(2, len(names)):
        raise UsageError(
            "two or more different attentions to compare",
            repr(args.compare),
            "for example --compare eager,sdpa,hf_flashattn",
        )
    return names


def _check(args: argparse.Namespace) -> None:
    positive = (
        "layers",
        "hidden",
        "heads",
        "steps",
        "batch_size",
        "accumulate",
        "eval_blocks",
        "max_seconds",
        "max_bytes",
        "save_every",
        "eval_every",
        "lr",
        "clip",
    )
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise _bad(name, "a number above 0", value)
    if args.context < 2:
        raise _bad("context", "at least 2 tokens", args.context)
    if args.vocab_size < 257:
        raise _bad("vocab_size", "at least 257 (every byte and the end of text)", args.vocab_size)
    for name in ("dropout", "warmup"):
        if not 0 <= getattr(args, name) < 1:
            raise _bad(name, "a share from 0 to below 1", getattr(args, name))
    if not 0 < args.held_out < 1:
        raise _bad("held_out", "a share between 0 and 1", args.held_out)
    if args.mixed_precision == "fp16" and not args.on_gpu:
        raise _bad("mixed_precision", "no or bf16 on a CPU", "fp16")
    if args.compare and (args.resume or args.save_every):
        raise UsageError(
            "--compare without --resume and --save-every",
            "both",
            "compare in one go, or train one --attention with checkpoints",
        )


def _bad(name: str, expected: str, got: object) -> UsageError:
    flag = "--" + name.replace("_", "-")
    return UsageError(f"{expected} for {flag}", str(got), f"choose another {flag}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_gpt2.py",
        description="Train GPT-2 of any size on any text, and compare attention implementations.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("text (default: the standard library of this Python)")
    source = add.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", metavar="PATH", help="text files and folders")
    source.add_argument("--dataset", metavar="NAME", help="any data set of the hub")
    add = add.add_argument
    add("--glob", nargs="+", metavar="PATTERN", help="files of a folder, such as '**/*.c'")
    add("--dataset-config", metavar="NAME")
    add("--dataset-split", default="train", metavar="SPLIT")
    add("--text-column", default="text", metavar="NAME")
    add("--max-bytes", type=int, metavar="N", help="use a sample of about N bytes")
    add("--held-out", type=float, default=0.05, metavar="SHARE", help="of the documents")
    add(
        "--tokenizer",
        default="corpus",
        metavar="NAME",
        help="hub name, folder, or 'corpus': a byte-level BPE trained on the text (default)",
    )
    add("--vocab-size", type=int, metavar="N", help="of a tokenizer trained on the text")
    add(
        "--packing",
        choices=("auto", "chain", "whole"),
        default="auto",
        help="whole: long documents start their own block (auto: from a context of 2048)",
    )
    add("--cache-dir", type=Path, default=default_cache(), metavar="DIR")

    add = parser.add_argument_group("model").add_argument
    add("--size", choices=SIZES, help="default: gpt2 on a GPU, cpu otherwise")
    add("--layers", type=int, metavar="N")
    add("--hidden", type=int, metavar="N")
    add("--heads", type=int, metavar="N")
    add("--context", type=int, metavar="N", help="tokens of a block (default: GPU 1024, CPU 256)")
    add(
        "--dropout", type=float, metavar="P", help="attention, residual, embedding (GPU 0.1, CPU 0)"
    )

    add = parser.add_argument_group("attention").add_argument
    add("--attention", default="hf_flashattn", metavar="NAME", help=", ".join(ATTENTIONS))
    add("--compare", metavar="A,B,...", help="train all of them, interleaved, on the same batches")
    add("--strict", action="store_true", help="hf_flashattn: an error instead of a fallback")
    add("--compile", action="store_true", help="torch.compile the model")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, metavar="N", help="default: 300; --compare: 50")
    add("--max-seconds", type=float, metavar="S", help="end the schedule after S seconds")
    add("--batch-size", type=int, metavar="N", help="blocks per process and microbatch")
    add("--accumulate", type=int, default=1, metavar="N", help="microbatches per step")
    add("--lr", type=float, metavar="X", help="peak (default: 6e-4 for gpt2, higher for smaller)")
    add("--warmup", type=float, default=0.05, metavar="SHARE", help="of the run")
    add("--weight-decay", type=float, default=0.1, metavar="X")
    add("--clip", type=float, default=1.0, metavar="X", help="gradient norm")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="default: bf16 on a GPU")
    add("--cpu", action="store_true", help="leave the GPU alone")
    add("--seed", type=int, default=0)

    add = parser.add_argument_group("evaluation and output").add_argument
    add("--eval-every", type=int, metavar="N", help="steps (default: before and after)")
    add("--eval-blocks", type=int, metavar="N", help="held-out blocks that are evaluated")
    add("--output", type=Path, metavar="DIR", help="default: runs/SIZE-ATTENTION")
    add("--save-every", type=int, metavar="N", help="write a checkpoint every N steps")
    add(
        "--resume",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint in --output, or from this one",
    )
    add("--overwrite", action="store_true", help="replace an earlier run in --output")
    add("--demo", action="store_true", help="two minutes that show everything")
    return parser
