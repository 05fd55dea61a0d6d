"""Walks Transformers' models and writes docs/coverage.md: what runs where, model by model.

    python docs/coverage.py --jobs 4                  # all of them
    python docs/coverage.py --models bert,gpt2        # these; the other rows stay as they are

Every model type of Transformers' mappings for causal, masked and sequence-to-sequence language
modelling, and of all others the base model ("base": images, sound, text with either), is built
tiny, on the CPU, in fp32 and with random weights. A copy runs on eager, the other is patched, both
on the same padded batches; what comes out at the tokens, gradients of all weights and a step with a
cache are compared, packed documents with each alone, and the report says what each attention module
ran on. Each model has a process of its own, so that none can hang or end the walk. Some need timm,
torchaudio or scipy: the rows of those that are not installed stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from model_walk.page import merge, read_page, write_page
from model_walk.processes import walk
from model_walk.tasks import all_models


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="model types, with commas; all unless told")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="a model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows that were run")
    args = parser.parse_args(argv)
    wanted = all_models()
    if args.models:
        names = args.models.split(",")
        if unknown := set(names) - {name for name, _ in wanted}:
            parser.error(f"--models: not in the mappings: {', '.join(sorted(unknown))}")
        wanted = [key for key in wanted if key[0] in names]
    results = []
    for result in walk(wanted, args.jobs, args.timeout):
        results.append(result)
        print(result.line(), flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(x) for x in results], indent=1) + "\n")
    before = read_page()
    if not args.models:
        before = [row for row in before if (row.model, row.task) in wanted]
    if before or not args.models:
        write_page(merge(before, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
