"""What the benchmarks leave: JSON files with where they come from, and plots over lengths."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_flashattn import bench, ops


def environment(device: torch.device) -> dict[str, Any]:
    """What a JSON file says of where it comes from; without kernels library_sha256 is null."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "hf_flashattn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    has_kernels = device.type == "cuda" and not ops.missing_library()  # which loads them
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": " ".join(sys.argv),
        "versions": versions,
        "library_sha256": bench.library_sha256() if has_kernels else None,
        "device": {"type": device.type, "name": name, "cuda": torch.version.cuda},
    }


def save(path: Path | None, outcome: dict[str, Any]) -> None:
    """The JSON as far as it goes, replacing an earlier one at once; nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(outcome, indent=1) + "\n")
    partial.replace(path)


def in_k(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)


def length_axis(axis: Any, lengths: Sequence[int]) -> None:
    """A logarithmic x axis of a plot, with a tick at each of these lengths."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [in_k(length) for length in lengths])
    axis.minorticks_off()
