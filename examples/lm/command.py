"""What both training scripts do around the training: text, errors, the output folder, results."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plots import draw, title_of

from lm import checkpoints, corpus, results
from lm.failures import UsageError

RESULTS, PLOT, MODEL = "results.json", "losses.png", "model"


def exit_code(run: Callable[[], None]) -> int:
    """Runs it: 0, 2 for an error the user can put right, 130 after Ctrl-C."""
    try:
        run()
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":  # every process found the same
            print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(
            f"error: expected the step to fit into GPU memory\n  got:       {error}\n"
            "  next step: a smaller --batch-size with a larger --accumulate",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "FallbackError":  # hf_flashattn's, which may not be installed
            raise
        print(
            f"error: expected every call on the kernel (--strict)\n  got:       {error}\n"
            "  next step: leave out --strict, and read the report",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nstopped; checkpoints, if any, can be continued with --resume", file=sys.stderr)
        return 130
    return 0


def read_corpus(args: argparse.Namespace, say: Callable[[str], None]) -> corpus.Corpus:
    """The documents that the options name, train and held-out."""
    if args.corpus:
        text = corpus.prepared_corpus(args.corpus, args.cache_dir, args.max_bytes)
    else:
        if args.dataset:
            documents, source = corpus.hub_dataset(
                args.dataset,
                args.dataset_config,
                args.dataset_split,
                args.text_column,
                args.max_bytes,
            )
        elif args.text:
            documents, source = corpus.local_files(args.text, args.glob, args.max_bytes)
        else:
            documents, source = corpus.standard_library(args.max_bytes)
        text = corpus.split_documents(documents, source, args.held_out)
    say(
        f"text       {text.source}: {len(text.train):,} documents to train on,"
        f" {len(text.held_out):,} held out{'; ' + text.note if text.note else ''}"
    )
    return text


def checked_output(args: argparse.Namespace) -> Path | None:
    """The checkpoint to resume from; an error where the run would write over another one."""
    output: Path = args.output
    if args.resume:
        return checkpoints.newest(output) if args.resume == "newest" else Path(args.resume)
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not args.overwrite):
        raise UsageError(
            f"--output {output} to be new or empty",
            "it holds other files",
            "another --output, --resume to go on, or --overwrite to replace the run",
        )
    return None


def remove_earlier_run(output: Path) -> None:
    """Only what these scripts write: the folder may hold other things."""
    for path in (output / RESULTS, output / PLOT):
        path.unlink(missing_ok=True)
    for folder in (output / MODEL, *output.glob(f"{checkpoints.PREFIX}*")):
        shutil.rmtree(folder, ignore_errors=True)


def write_results(
    args: argparse.Namespace, outcome: dict[str, Any], say: Callable[[str], None]
) -> None:
    """The JSON and the plot; called by one process."""
    output: Path = args.output
    outcome["plot"] = PLOT
    output.mkdir(parents=True, exist_ok=True)
    try:
        draw(outcome.get("comparison", outcome)["runs"], output / PLOT, title_of(outcome))
    except ImportError as error:
        outcome["plot"] = f"skipped: {error}"
        say(f"\nno {PLOT}: {error}; later: python examples/plots.py {output / RESULTS}")
    results.write_json(output / RESULTS, outcome)
    if args.json:
        results.write_json(args.json, outcome)
    say(f"\nresults    {output / RESULTS}")


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
