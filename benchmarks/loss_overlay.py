"""Loss curves of eager and hf_flashattn over each other: --overlay-steps of training_step.py."""

from __future__ import annotations

import statistics
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import Batch, Shape, contender, measure

OVERLAID = ("eager", "hf_flashattn")


def standard_library_bytes(limit: int = 2**25) -> torch.Tensor:
    """The .py files of the standard library as one uint8 tensor, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    content = bytearray()
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts and "dist-packages" not in path.parts:
            content += path.read_bytes() + b"\0"
        if len(content) >= limit:
            break
    return torch.frombuffer(content, dtype=torch.uint8)


def text_batches(text: torch.Tensor, shape: Shape, seed: int) -> Iterator[Batch]:
    """Endless batches of random windows of the text; a token is a byte."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - shape.length, (shape.batch,), generator=generator)
        ids = torch.stack([text[start : start + shape.length] for start in starts]).long()
        yield {"input_ids": ids, "labels": ids}


def overlay(shape: Shape, steps: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Loss curves of eager and hf_flashattn: same weights, same batches.

    The dropout inside attention is not the same random numbers, so the curves agree as two seeds
    do. `eager (other seed)`, on the same batches, shows how far apart that is.
    """
    contenders = [
        contender("gpt2", shape, attention, seed, device, False, lr=6e-4) for attention in OVERLAID
    ]
    batches = text_batches(standard_library_bytes(), shape, seed)
    measure(contenders, lambda: next(batches), steps, 0, device, seed)
    other = contender("gpt2", shape, "eager", seed, device, False, lr=6e-4)
    other.name = "eager (other seed)"
    batches = text_batches(standard_library_bytes(), shape, seed)
    measure([other], lambda: next(batches), steps, 0, device, seed + 10**6)
    reference = contenders[0].losses
    runs: dict[str, Any] = {}
    for current in [*contenders, other]:
        last = max(1, steps // 10)
        gaps = [abs(a - b) for a, b in zip(current.losses, reference, strict=True)]
        runs[current.name] = {
            "losses": current.losses,
            "mean_of_last_tenth": statistics.fmean(current.losses[-last:]),
            "largest_gap_to_eager": max(gaps),
            "mean_gap_to_eager": statistics.fmean(gaps),
        }
    return runs
