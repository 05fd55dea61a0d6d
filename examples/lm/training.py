"""One optimizer step, and the loop around it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from lm.failures import UsageError
from lm.packing import Batch, BlockBatches

UNLIMITED = 2**40
REFRESH = 0.5 if sys.stderr.isatty() else 10.0  # seconds between two states of the progress bar
FLUSH_EVERY = 10  # steps between two looks at the losses, each of which waits for the device
SCHEDULES = ("cosine", "wsd")
LOWEST_RATE = 0.1  # of the peak, at the end of the cosine
DECAY = 0.2  # share of the run, with wsd


@dataclass(frozen=True)
class Recipe:
    """How to train. `batch_size` is per process and microbatch, in blocks."""

    steps: int  # UNLIMITED: `max_seconds` alone ends the run
    batch_size: int
    accumulate: int
    lr: float
    warmup: float  # share of the run
    weight_decay: float
    clip: float
    seed: int
    max_seconds: float | None = None
    schedule: str = "cosine"
    decay: float = DECAY  # share of the run; 0: constant to the end

    def per_step(self, processes: int) -> int:
        """Blocks of one optimizer step over all processes."""
        return self.batch_size * self.accumulate * processes

    def learning_rate(self, done: float) -> float:
        """Linear warm-up, then a cosine down to a tenth, or (wsd: warm-up, stable, decay) constant
        and at last linear down to 0; `done` is the share of the run, 0 to 1."""
        if done < self.warmup:
            return self.lr * done / self.warmup
        if self.schedule == "wsd":
            decay = min(self.decay, 1 - self.warmup)
            return self.lr * (min((1 - min(done, 1)) / decay, 1) if decay else 1)
        rest = min((done - self.warmup) / max(1 - self.warmup, 1e-9), 1.0)
        return self.lr * (LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * rest)))


@dataclass
class Progress:
    """What a checkpoint carries besides weights, optimizer and random states."""

    step: int = 0
    seconds: float = 0.0  # in training steps; evaluation and checkpoints do not count
    losses: list[float] = field(default_factory=list)
    perplexities: list[dict[str, float]] = field(default_factory=list)
    marks: list[tuple[int, float]] = field(default_factory=list)  # (step, seconds) when in sync

    def __post_init__(self) -> None:
        self.pending: list[torch.Tensor] = []  # losses still on the device

    def flush(self) -> None:
        """Moves pending losses to `losses`; waits for the device.

        Raises:
            UsageError: a loss is not finite.
        """
        for loss in (loss.item() for loss in self.pending):
            require_finite(loss, len(self.losses) + 1)
            self.losses.append(loss)
        self.pending.clear()

    def seconds_per_step(self) -> float:
        """Without the steps before the first mark: they compile, allocate and warm up."""
        if len(self.marks) > 1:
            (first, start), (last, end) = self.marks[0], self.marks[-1]
            return (end - start) / (last - first)
        return self.seconds / max(self.step, 1)


def require_finite(loss: float, step: int) -> None:
    """Raises UsageError for infinity and NaN."""
    if not math.isfinite(loss):
        raise UsageError(
            "a finite loss",
            f"{loss} at step {step}",
            "a lower --lr, more --warmup, or --mixed-precision bf16 instead of fp16",
        )


@dataclass
class Trainee:
    """A model with its optimizer, both prepared by the accelerator."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    report: Any = None
    form: Callable[[Batch], Batch] = lambda batch: batch  # a batch as this attention wants it


def make_trainee(
    name: str,
    model: torch.nn.Module,
    report: Any,
    recipe: Recipe,
    accelerator: Accelerator,
    compiled: bool,
) -> Trainee:
    """AdamW (fused on CUDA), no weight decay on biases and norms; compiled in place if asked."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(0.9, 0.95),
        fused=accelerator.device.type == "cuda",
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    if compiled:
        model.compile()
    return Trainee(name, model, optimizer, accelerator, report)


def train_step(
    trainee: Trainee, microbatches: list[Batch], recipe: Recipe, done: float
) -> torch.Tensor:
    """One optimizer step; the mean loss of all processes, on the device, no sync."""
    accelerator, model = trainee.accelerator, trainee.model
    model.train()
    for group in trainee.optimizer.param_groups:
        group["lr"] = recipe.learning_rate(done)
    total = torch.zeros((), device=accelerator.device)
    for number, micro in enumerate(microbatches):
        last = number == len(microbatches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = model(**micro).loss / len(microbatches)
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    return total if accelerator.num_processes == 1 else accelerator.reduce(total, "mean")


def train(
    trainee: Trainee,
    batches: BlockBatches,
    recipe: Recipe,
    progress: Progress,
    after_step: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Goes on from `progress` to the last step or the time limit, whichever comes first.

    `after_step` sees every step; what it does (evaluation, checkpoints) is not timed.

    Raises:
        UsageError: the loss is no longer finite.
    """
    accelerator = trainee.accelerator
    bar = tqdm(
        total=None if recipe.steps == UNLIMITED else recipe.steps,
        initial=progress.step,
        unit="step",
        desc=trainee.name,
        disable=not accelerator.is_main_process,
        mininterval=REFRESH,
    )
    while progress.step < recipe.steps:
        done = _share_done(recipe, progress, accelerator)
        if done >= 1:
            break
        started = time.perf_counter()
        microbatches, tokens = batches.step(progress.step)
        loss = train_step(trainee, microbatches, recipe, max(done, 1 / recipe.steps))
        progress.pending.append(loss)
        progress.step += 1
        flushed = progress.step % FLUSH_EVERY == 0
        if flushed:
            progress.flush()
        progress.seconds += time.perf_counter() - started
        bar.update()
        if flushed:
            progress.marks.append((progress.step, progress.seconds))
            rate = tokens * accelerator.num_processes / progress.seconds_per_step()
            bar.set_postfix(
                loss=f"{progress.losses[-1]:.3f}", tokens_per_s=f"{rate:,.0f}", refresh=False
            )
        after_step(progress)
    progress.flush()
    if progress.step % FLUSH_EVERY:
        progress.marks.append((progress.step, progress.seconds))
    bar.close()


def _share_done(recipe: Recipe, progress: Progress, accelerator: Accelerator) -> float:
    """Share of the run that is over, by steps or by the clock, equal on all processes."""
    done = progress.step / recipe.steps
    if recipe.max_seconds is None:
        return done
    seconds = progress.seconds
    if accelerator.num_processes > 1:  # else they would stop at different steps, and one would wait
        local = torch.tensor(seconds, device=accelerator.device)
        seconds = accelerator.reduce(local, "mean").item()
    return max(done, seconds / recipe.max_seconds)
