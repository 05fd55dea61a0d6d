"""Several attentions in one run: same weights, same batches, interleaved step by step.

Interleaving makes the ratio robust: clocks, temperature and other users of the machine change for
all alike. The order rotates from step to step. Before a step every attention gets the same random
state, so that the dropout outside of attention is the same too.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from lm.packing import BlockBatches
from lm.training import REFRESH, Recipe, Trainee, train_step

WARM_UP = 5  # steps that are not timed: allocation, autotuning, the first kernel build


@dataclass
class Timed:
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)  # of the steps after warm-up
    peak_bytes: int = 0
    tokens: int = 0  # of the steps after warm-up, over all processes

    def summary(self) -> dict[str, Any]:
        median = statistics.median(self.milliseconds)
        deciles = (
            statistics.quantiles(self.milliseconds, n=10)
            if len(self.milliseconds) > 1
            else [median] * 9
        )
        return {
            "losses": self.losses,
            "step_ms": {
                "median": median,
                "p10": deciles[0],
                "p90": deciles[-1],
                "timed_steps": len(self.milliseconds),
            },
            "tokens_per_second": self.tokens / len(self.milliseconds) / median * 1e3,
            "peak_memory_gib": self.peak_bytes / 2**30 if self.peak_bytes else None,
        }


def compare(trainees: list[Trainee], batches: BlockBatches, recipe: Recipe) -> dict[str, Timed]:
    """Trains all of them for `recipe.steps` steps, timing each step on a quiet device."""
    accelerator = trainees[0].accelerator
    device = accelerator.device
    warm_up = min(WARM_UP, recipe.steps - 1)
    timed = {trainee.name: Timed() for trainee in trainees}
    steps = tqdm(
        range(recipe.steps),
        unit="step",
        desc="comparing",
        mininterval=REFRESH,
        disable=not accelerator.is_main_process,
    )
    for step in steps:
        given, tokens = batches.step(step)
        turn = step % len(trainees)
        for trainee in trainees[turn:] + trainees[:turn]:
            set_seed(recipe.seed * 1_000_003 + step, device_specific=True)
            entry = timed[trainee.name]
            microbatches = [trainee.form(batch) for batch in given]
            before = _reset_peak(device)
            started = time.perf_counter()
            loss = train_step(trainee, microbatches, recipe, (step + 1) / recipe.steps)
            _wait(device)
            elapsed = time.perf_counter() - started
            entry.losses.append(loss.item())
            if step >= warm_up:
                entry.milliseconds.append(elapsed * 1e3)
                entry.tokens += tokens * accelerator.num_processes
                entry.peak_bytes = max(entry.peak_bytes, _peak_above(device, before, trainee))
        steps.set_postfix(
            {t.name: f"{timed[t.name].losses[-1]:.3f}" for t in trainees}, refresh=False
        )
    return timed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_above(device: torch.device, before: int, trainee: Trainee) -> int:
    """Peak of one attention as if it were alone: its own weights and optimizer, and what its step
    allocated on top of what all of them hold."""
    if device.type != "cuda":
        return 0
    own = sum(p.numel() * p.element_size() for p in trainee.model.parameters())
    for state in trainee.optimizer.state.values():
        own += sum(v.numel() * v.element_size() for v in state.values() if torch.is_tensor(v))
    return own + torch.cuda.max_memory_allocated(device) - before
