"""What each idea of the kernels gives: the kernels without it against the kernels as they are.

    python benchmarks/ablation.py build build/ablation   # with nvcc, on any machine: minutes each
    python benchmarks/ablation.py time build/ablation --json benchmarks/results/ablation.json
    python benchmarks/ablation.py time build/ablation --dropouts 0.1  # when words are drawn

An ablation is a copy of kernels/ in which a few lines are others (EDITS) and a library of it.
`time` runs attention_grid.py for each library in a process of its own, `--rounds` times in turns,
and compares by the rate over cuDNN in the same process: geometric means over the lengths. The
edits are meant to leave results as they are; rates alone are looked at here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from outcome import save

from hf_flashattn import build

ROOT = Path(__file__).resolve().parents[1]
AS_BUILT = "as built"


@dataclass(frozen=True)
class Edit:
    """One line or more of a file of kernels/, which must be there once."""

    file: str
    old: str
    new: str


def drawn(moment: str) -> tuple[Edit, ...]:
    """The random words of the forward's dropout at one moment for all head dims."""
    old = """kDraw = HeadDim == 64 || HeadDim == 96 ? Draw::kUnderScores
                                : HeadDim == 128               ? Draw::kBeforeScores
                                                               : Draw::kWithSoftmax;"""
    return (Edit("sm90/policy.cuh", old, f"kDraw = Draw::{moment};"),)


EDITS: dict[str, tuple[Edit, ...]] = {
    AS_BUILT: (),
    # Consumers issue their products whenever they get there (ping-pong).
    "without turns": (
        Edit(
            "sm90/forward.cuh",
            "    barrier_sync(kTensorCores + warpgroup, 2 * kWarpgroupThreads);\n",
            "",
        ),
        Edit(
            "sm90/forward.cuh",
            "    barrier_arrive(kTensorCores + next, 2 * kWarpgroupThreads);\n",
            "    (void)next;\n",
        ),
    ),
    # A consumer's softmax waits for O += P V of the block before; its exponentials for dP.
    "without overlap in a consumer": (
        Edit(
            "sm90/forward.cuh",
            "      wgmma_wait<1>();\n      pin_registers(scores);\n      mask_scores(scores);",
            "      wgmma_wait<0>();\n      pin_registers(scores);\n      mask_scores(scores);",
        ),
        Edit(
            "sm90/backward_consumer.cuh",
            "  wgmma_wait<1>();\n  pin_registers(scores);\n  if (keys",
            "  wgmma_wait<0>();\n  pin_registers(scores);\n  if (keys",
        ),
    ),
    # The producer warp can be no block ahead, as if the consumers loaded for themselves.
    "without loading ahead": (
        Edit("sm90/policy.cuh", "kStages = HeadDim <= 64 ? 3 : 2;", "kStages = 1;"),
    ),
    # Every stream has sums of dQ of its own, cleared before and rounded after the backward.
    "without recycled sums": (
        Edit("common/workspace.cuh", "if (enough < streams &&", "if (false &&"),
    ),
}
# Not without an idea but with another choice, which shows where there is dropout.
DRAWS = {
    "words before S": drawn("kBeforeScores"),
    "words under S": drawn("kUnderScores"),
    "words with the softmax": drawn("kWithSoftmax"),
}
EDITS |= DRAWS


def edited(source: str, edits: tuple[Edit, ...], file: str) -> str:
    for edit in edits:
        if edit.file == file:
            count = source.count(edit.old)
            if count != 1:
                raise SystemExit(
                    f"ablation: expected once in kernels/{file}, found {count} times: "
                    f"{edit.old!r}. Next step: bring EDITS up to date."
                )
            source = source.replace(edit.old, edit.new)
    return source


def copy_sources(name: str, target: Path) -> None:
    """kernels/ with the edits of an ablation."""
    shutil.copytree(ROOT / "kernels", target)
    for file in {edit.file for edit in EDITS[name]}:
        path = target / file
        path.write_text(edited(path.read_text(), EDITS[name], file))


def library_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.so"


def build_all(folder: Path, names: list[str]) -> None:
    """By the usual build, of a copy of the package and its kernels for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == AS_BUILT:
            shutil.copy2(build.find_or_build(), library_of(folder, name))
            continue
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary)
            shutil.copytree(ROOT / "hf_flashattn", copy / "hf_flashattn")
            copy_sources(name, copy / "kernels")
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "from hf_flashattn.build import find_or_build; find_or_build()",
                ],
                env={
                    **os.environ,
                    "PYTHONPATH": str(copy),
                    "HF_FLASHATTN_CACHE": str(copy / "cache"),
                },
                cwd=copy,
            )
            if done.returncode:
                raise SystemExit(f"ablation: {name!r} does not compile; its messages are above")
            library = next((copy / "cache").rglob(build.LIBRARY_NAME))
            shutil.copy2(library, library_of(folder, name))
        print(library_of(folder, name), flush=True)


def rates(library: Path, options: list[str]) -> list[dict[str, Any]]:
    """Rows of attention_grid.py with this library."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "grid.json"
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "benchmarks" / "attention_grid.py"),
                *options,
                "--json",
                str(path),
            ],
            env={**os.environ, "HF_FLASHATTN_LIBRARY": str(library), "PYTHONPATH": python_path()},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return json.loads(path.read_text())["rows"]


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def over_cudnn(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Geometric means over the lengths of each head dim, direction, mask and dropout."""
    logs: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        mask = "causal" if row["causal"] else "full"
        key = f"d{row['head_dim']} {row['direction']} {mask}"
        key += f" p{row['dropout']:g}" if row["dropout"] else ""
        logs[key].append(math.log(row["tflops"]["ours"] / row["tflops"]["cudnn"]))
    return {key: math.exp(sum(x) / len(x)) for key, x in logs.items()}


def time_all(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    names = [
        name
        for name in EDITS
        if library_of(folder, name).is_file() and (any(args.dropouts) or name not in DRAWS)
    ]
    if AS_BUILT not in names:
        raise SystemExit(
            f"ablation: expected libraries in {folder}, found no {library_of(folder, AS_BUILT)}. "
            f"Next step: python benchmarks/ablation.py build {folder}"
        )
    options = ["--head-dims", *map(str, args.head_dims), "--seqlens", *map(str, args.seqlens)]
    options += ["--dropouts", *map(str, args.dropouts), "--repeats", str(args.repeats)]
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(args.rounds):
        for name in names:
            rows[name] += rates(library_of(folder, name), options)
    means = {name: over_cudnn(of_one) for name, of_one in rows.items()}
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "protocol": __doc__,
        "over_cudnn": means,
        "of_as_built": {
            name: {key: ratio / means[AS_BUILT][key] for key, ratio in of_one.items()}
            for name, of_one in means.items()
        },
        "rows": rows,
    }


def table(of_as_built: dict[str, dict[str, float]]) -> str:
    keys = list(of_as_built[AS_BUILT])
    lines = [f"{'':<24}" + "".join(f"{name:>32}" for name in of_as_built)]
    for key in keys:
        cells = "".join(f"{ratios[key]:>32.3f}" for ratios in of_as_built.values())
        lines.append(f"{key:<24}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_build = commands.add_parser("build", help="a library for each ablation")
    of_build.add_argument("folder", type=Path)
    of_build.add_argument("--only", nargs="+", choices=EDITS, default=list(EDITS))
    of_time = commands.add_parser("time", help="their rates, on a Hopper GPU")
    of_time.add_argument("folder", type=Path)
    of_time.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    of_time.add_argument("--seqlens", type=int, nargs="+", default=[512, 2048, 8192])
    of_time.add_argument("--dropouts", type=float, nargs="+", default=[0.0])
    of_time.add_argument("--repeats", type=int, default=10)
    of_time.add_argument("--rounds", type=int, default=2)
    of_time.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.command == "build":
        build_all(args.folder, args.only)
        return
    outcome = time_all(args.folder, args)
    print(table(outcome["of_as_built"]))
    save(args.json, outcome)


if __name__ == "__main__":
    main()
