"""The options of `train_bert.py`, with defaults that depend on the device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from lm import options
from lm.bert import SIZES
from lm.failures import UsageError
from lm.masking import SHORTEST_PIECE
from lm.model import Size, require_unpad
from lm.options import bad
from lm.training import UNLIMITED, Recipe

BATCHINGS = ("padded", "unpadded", "packed")
CPU_DEFAULTS = {"size": "cpu", "context": 128, "batch_size": 8, "vocab_size": 4096, "dropout": 0.0,
                "log_every": 1, "workers": 0}  # fmt: skip
GPU_DEFAULTS = {"size": "bert-base", "context": 512, "vocab_size": 30522, "dropout": 0.1,
                "log_every": 10, "workers": 4}  # fmt: skip
GPU_TOKENS = 32 * 512  # of a microbatch
SHORTEST = 1 / 16  # of the context: half of a padded batch is padding
LR = 2e-4  # of a hidden size of 768


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """All options, filled in and checked.

    Raises:
        UsageError: a value that can not work, or flags that contradict each other.
    """
    args = _parser().parse_args(argv)
    args.on_gpu = torch.cuda.is_available() and not args.cpu
    args.attentions = options.attentions_of(args)
    options.fill(args, _on_gpu(args) if args.on_gpu else {}, CPU_DEFAULTS)
    options.check(args, ("log_every", "shortest"))
    if args.context < SHORTEST_PIECE:
        raise bad("context", f"at least {SHORTEST_PIECE} tokens", args.context)
    if args.shortest is None:
        args.shortest = max(SHORTEST_PIECE, round(args.context * SHORTEST))
    if not SHORTEST_PIECE <= args.shortest <= args.context:
        raise bad("shortest", f"{SHORTEST_PIECE} to --context {args.context}", args.shortest)
    if args.vocab_size < 100:
        raise bad("vocab_size", "at least 100", args.vocab_size)
    if args.workers < 0:
        raise bad("workers", "0 or more", args.workers)
    if args.target_accuracy is not None and not 0 < args.target_accuracy < 1:
        raise bad("target_accuracy", "a share between 0 and 1", args.target_accuracy)
    if args.target_accuracy is not None and (args.compare or not args.eval_every):
        raise UsageError(
            "--target-accuracy with --eval-every and without --compare",
            "--compare" if args.compare else "no --eval-every",
            "for example --attention sdpa --eval-every 100",
        )
    if args.steps == UNLIMITED:
        raise UsageError(
            "--steps for the schedule of the learning rate", "--max-seconds alone", "give both"
        )
    if args.batching == "unpadded":
        if "hf_flashattn" not in args.attentions:
            raise UsageError(
                "hf_flashattn for --batching unpadded",
                f"{', '.join(args.attentions)}, which can not unpad",
                "--attention hf_flashattn, or --batching padded",
            )
        require_unpad()
    if args.output is None:
        args.output = options.default_output(args)
    return args


def size_of(args: argparse.Namespace) -> Size:
    return options.size_of(args, SIZES)


def recipe_of(args: argparse.Namespace, steps: int | None = None) -> Recipe:
    return options.recipe_of(args, size_of(args), LR, steps)


def _on_gpu(args: argparse.Namespace) -> dict[str, object]:
    tokens = GPU_TOKENS // 4 if options.small_gpu() else GPU_TOKENS
    return GPU_DEFAULTS | {"batch_size": max(1, tokens // max(args.context or 512, 1))}


def _parser() -> argparse.ArgumentParser:
    parser = options.parser(
        "train_bert.py",
        "Train BERT of any size on any text by masked language modelling, with any attention.",
    )
    options.add_text(parser, "a WordPiece")
    add = options.add_model(parser, SIZES, "bert-base")
    add("--context", type=int, metavar="N", help="tokens of a row (default: GPU 512, CPU 128)")
    add(
        "--shortest",
        type=int,
        metavar="N",
        help="pieces of N to --context tokens, all lengths alike (default: a sixteenth, so that "
        "half of a padded batch is padding; --context: none is)",
    )
    add = options.add_attention(parser)
    add(
        "--batching",
        choices=BATCHINGS,
        default="padded",
        help="padded: a piece a row. unpadded: hf_flashattn drops the padding for the whole model, "
        "the others keep it. packed: rows full of pieces that do not see each other",
    )
    add = options.add_training(parser, "rows", "2e-4 for bert-base, higher for smaller")
    add("--workers", type=int, metavar="N", help="processes that mask (default: GPU 4, CPU 0)")
    add(
        "--target-accuracy",
        type=float,
        metavar="SHARE",
        help="stop when so much of the held-out masked tokens is predicted right",
    )
    add = options.add_output(parser, "rows")
    add("--log-every", type=int, metavar="N", help="losses are means of N steps (GPU 10, CPU 1)")
    return parser
