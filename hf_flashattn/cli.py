"""The command `hf-flashattn`.

    hf-flashattn build            compile the CUDA library ahead of time and print where it is
    hf-flashattn build --force    recompile every unit

Exit status: 0 done, 1 the command could not do it (the reason is on stderr), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_flashattn import build as library_build


def build_command(args: argparse.Namespace) -> int:
    try:
        path = library_build.find_or_build(rebuild=args.force, verbose=not args.quiet)
    except library_build.BuildError as error:
        print(f"hf-flashattn: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hf-flashattn", description="IO-aware attention for Hugging Face models."
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
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
