"""The options that both training scripts have, and how they are checked."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lm.cache import default_cache
from lm.failures import UsageError
from lm.model import ATTENTIONS, Size
from lm.training import UNLIMITED, Recipe

SMALL_GPU_GIB = 60  # below it, eager attention at 16 x 1024 does not fit
POSITIVE = (
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


def parser(script: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=script, description=description, allow_abbrev=False)


def add_text(parser: argparse.ArgumentParser, kind: str) -> Any:
    """Where documents come from; `kind` is the tokenizer that is trained on them."""
    group = parser.add_argument_group("text (default: the standard library of this Python)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", metavar="PATH", help="text files and folders")
    source.add_argument("--dataset", metavar="NAME", help="any data set of the hub")
    source.add_argument(
        "--corpus", type=Path, metavar="DIR", help="what prepare_corpus.py wrote, with its split"
    )
    add = group.add_argument
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
        help=f"hub name, folder, or 'corpus': {kind} trained on the text (default)",
    )
    add("--vocab-size", type=int, metavar="N", help="of a tokenizer trained on the text")
    add("--cache-dir", type=Path, default=default_cache(), metavar="DIR")
    return add


def add_model(parser: argparse.ArgumentParser, sizes: Mapping[str, Size], on_gpu: str) -> Any:
    add = parser.add_argument_group("model").add_argument
    add("--size", choices=sizes, help=f"default: {on_gpu} on a GPU, cpu otherwise")
    add("--layers", type=int, metavar="N")
    add("--hidden", type=int, metavar="N")
    add("--heads", type=int, metavar="N")
    add(
        "--dropout", type=float, metavar="P", help="attention, residual, embedding (GPU 0.1, CPU 0)"
    )
    return add


def add_attention(parser: argparse.ArgumentParser) -> Any:
    add = parser.add_argument_group("attention").add_argument
    add("--attention", default="hf_flashattn", metavar="NAME", help=", ".join(ATTENTIONS))
    add("--compare", metavar="A,B,...", help="train all of them, interleaved, on the same batches")
    add("--strict", action="store_true", help="hf_flashattn: an error instead of a fallback")
    add("--compile", action="store_true", help="torch.compile the model")
    add(
        "--liger",
        action="store_true",
        help="head and loss in one, by liger-kernel: no logits in memory (GPU only)",
    )
    return add


def add_training(parser: argparse.ArgumentParser, rows: str, lr: str) -> Any:
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, metavar="N", help="default: 300; --compare: 50")
    add("--max-seconds", type=float, metavar="S", help="end training after S seconds")
    add("--batch-size", type=int, metavar="N", help=f"{rows} per process and microbatch")
    add("--accumulate", type=int, default=1, metavar="N", help="microbatches per step")
    add("--lr", type=float, metavar="X", help=f"peak (default: {lr})")
    add("--warmup", type=float, default=0.05, metavar="SHARE", help="of the run")
    add("--weight-decay", type=float, default=0.1, metavar="X")
    add("--clip", type=float, default=1.0, metavar="X", help="gradient norm")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="default: bf16 on a GPU")
    add("--cpu", action="store_true", help="leave the GPU alone")
    add("--seed", type=int, default=0)
    return add


def add_output(parser: argparse.ArgumentParser, rows: str) -> Any:
    add = parser.add_argument_group("evaluation and output").add_argument
    add("--eval-every", type=int, metavar="N", help="steps (default: before and after)")
    add("--eval-blocks", type=int, metavar="N", help=f"held-out {rows} that are evaluated")
    add("--output", type=Path, metavar="DIR", help="default: runs/SIZE-ATTENTION")
    add("--json", type=Path, metavar="FILE", help="write the results there too")
    add("--save-every", type=int, metavar="N", help="write a checkpoint every N steps")
    add(
        "--resume",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint in --output, or from this one",
    )
    add("--overwrite", action="store_true", help="replace an earlier run in --output")
    return add


def fill(
    args: argparse.Namespace,
    on_gpu: Mapping[str, Any],
    on_cpu: Mapping[str, Any],
    demo: Mapping[str, Any] | None = None,
) -> None:
    """Gives every option that was not given its default, which may depend on the device."""
    defaults = dict(on_gpu if args.on_gpu else on_cpu)
    # `accelerate launch` hands its own choice over in the environment.
    defaults["mixed_precision"] = os.environ.get("ACCELERATE_MIXED_PRECISION") or (
        "bf16" if args.on_gpu else "no"
    )
    if demo and args.steps is None:
        defaults |= demo
    timed = args.max_seconds or defaults.get("max_seconds")
    defaults["steps"] = UNLIMITED if timed and not args.compare else 50 if args.compare else 300
    defaults.setdefault("eval_blocks", 64)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def small_gpu() -> bool:
    return torch.cuda.get_device_properties(0).total_memory / 2**30 < SMALL_GPU_GIB


def processes() -> int:
    """Of this run, as torchrun and `accelerate launch` say it before anything is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def attentions_of(args: argparse.Namespace) -> list[str]:
    """Of --compare, or the one of --attention. Raises UsageError for what is none."""
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


def default_output(args: argparse.Namespace) -> Path:
    name = "-vs-".join(args.attentions)
    return Path("runs") / f"{args.size}-{name}"


def size_of(args: argparse.Namespace, sizes: Mapping[str, Size]) -> Size:
    preset = sizes[args.size]
    size = preset._replace(
        layers=args.layers or preset.layers,
        hidden=args.hidden or preset.hidden,
        heads=args.heads or preset.heads,
    )
    if size.hidden % size.heads:
        raise UsageError(
            "a hidden size that is a multiple of the number of heads",
            f"--hidden {size.hidden} --heads {size.heads}",
            f"--hidden {size.hidden // size.heads * size.heads or size.heads} or other --heads",
        )
    return size


def recipe_of(args: argparse.Namespace, size: Size, lr: float, steps: int | None = None) -> Recipe:
    """`lr` is that of a hidden size of 768; it falls with the width unless --lr is given."""
    return Recipe(
        steps=steps or args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        lr=args.lr or lr * 768 / size.hidden,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        clip=args.clip,
        seed=args.seed,
        max_seconds=None if steps else args.max_seconds,
    )


def check(args: argparse.Namespace, more_positive: Iterable[str] = ()) -> None:
    """Raises UsageError for a value that can not work, or flags that contradict each other."""
    for name in (*POSITIVE, *more_positive):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise bad(name, "a number above 0", value)
    for name in ("dropout", "warmup"):
        if not 0 <= getattr(args, name) < 1:
            raise bad(name, "a share from 0 to below 1", getattr(args, name))
    if not 0 < args.held_out < 1:
        raise bad("held_out", "a share between 0 and 1", args.held_out)
    if args.mixed_precision == "fp16" and not args.on_gpu:
        raise bad("mixed_precision", "no or bf16 on a CPU", "fp16")
    if args.compare and (args.resume or args.save_every):
        raise UsageError(
            "--compare without --resume and --save-every",
            "both",
            "compare in one go, or train one --attention with checkpoints",
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not args.on_gpu:
        raise UsageError(
            "GPUs for FSDP: on CPUs accelerate ignores it, and trains by DDP in silence",
            "--cpu" if args.cpu else "no GPU",
            "examples/accelerate/ddp.yaml on a CPU",
        )
    if args.liger and not args.on_gpu:
        raise UsageError(
            "a GPU for --liger, whose kernels are Triton's",
            "--cpu" if args.cpu else "no GPU",
            "leave out --liger on a CPU",
        )


def bad(name: str, expected: str, got: object) -> UsageError:
    flag = "--" + name.replace("_", "-")
    return UsageError(f"{expected} for {flag}", str(got), f"choose another {flag}")
