"""What train_bert.py adds to the Trainer, as one callback: speed, limits, verified checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lm import checkpoints
from lm.training import FLUSH_EVERY, Progress, require_finite


class Watch(TrainerCallback):
    """Counts seconds of training steps, without evaluation and checkpoints, and says when to stop.

    Stops at `max_seconds` of them, and when held-out accuracy reaches `target`. Makes every
    checkpoint one that `checkpoints.verify` takes: the Trainer's files, sizes and CRC-32 of them,
    the settings.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        max_seconds: float | None,
        target: float | None,
        evaluations: list[dict[str, float]],
    ) -> None:
        self.settings, self.max_seconds, self.target = settings, max_seconds, target
        self.progress = Progress()
        self.evaluations = evaluations
        self.reached: dict[str, float] | None = None
        self.barrier: Callable[[], None] = lambda: None
        self.slowest: Callable[[float], float] = lambda seconds: seconds
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.step = state.global_step
        self._since = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        progress = self.progress
        progress.step = state.global_step
        synced = progress.step % FLUSH_EVERY == 0 or progress.step == state.max_steps
        if synced and args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        now = time.perf_counter()
        progress.seconds += now - self._since
        self._since = now
        if synced:
            progress.marks.append((progress.step, progress.seconds))
        # At synchronised steps alone: all processes ask at the same one.
        if synced and self.max_seconds and self.slowest(progress.seconds) >= self.max_seconds:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        require_finite((logs or {}).get("loss", 0.0), state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        names = ("nll_per_token", "perplexity", "accuracy", "tokens")
        found = {"step": state.global_step, **{name: metrics[f"eval_{name}"] for name in names}}
        self.evaluations.append(found)
        if self.target and found["accuracy"] >= self.target and self.reached is None:
            self.reached = {**found, "training_seconds": self.progress.seconds}
            control.should_training_stop = True
        self._since = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.barrier()  # every process has written its random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{checkpoints.PREFIX}{state.global_step}"
            progress = {"step": state.global_step, "evaluations": self.evaluations}
            checkpoints.write_record(folder, self.settings, progress)
        self._since = time.perf_counter()


class Bar(ProgressCallback):
    """The Trainer's progress bar with the loss in it, instead of a line for every loss."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        if "eval_accuracy" in logs:
            self.training_bar.write(
                f"step {state.global_step}: held-out accuracy {logs['eval_accuracy']:.1%},"
                f" perplexity {logs['eval_perplexity']:,.1f}"
            )
