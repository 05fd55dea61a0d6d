"""Held-out perplexity, and how it falls with the context that a token has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from accelerate.utils import gather_object

from lm.packing import to_device
from lm.training import Trainee

METRIC = Path(__file__).parents[1] / "metrics" / "perplexity"
FIRST_BIN = 128  # positions; every later bin is as wide as all before it


@torch.no_grad()
def held_out_perplexity(
    trainee: Trainee, held_out: np.ndarray, limit: int, batch_size: int, context: int
) -> dict[str, Any]:
    """Perplexity over held-out text, shared out between the processes.

    held_out: blocks of `context` tokens, of which each predicts all but its first; or windows of a
    multiple of `context` tokens and one more, of which each is cut into blocks that predict all of
    its tokens but the very first: the same tokens for every context.

    `by_position` has the loss by the place in its block of the last token that is seen: at place p
    a prediction has p + 1 tokens to go by. With windows longer than the context,
    `by_window_position` has it by that token's place in the window.
    """
    accelerator, model = trainee.accelerator, trainee.model
    model.eval()
    whole = held_out.shape[1] > context
    width = held_out.shape[1] - 1 if whole else context - 1
    numbers = np.arange(min(limit, len(held_out)))
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    # DDP and FSDP communicate in a forward: all processes do as many, some of them for nothing.
    share = math.ceil(len(numbers) / accelerator.num_processes)
    real, mine = len(mine), np.concatenate([mine, numbers[: share - len(mine)]])
    sums, rows = np.zeros(width), 0  # of the loss at each position
    nll: list[float] = []
    for start in range(0, len(mine), batch_size):
        chosen = mine[start : start + batch_size]
        tokens = to_device(held_out[chosen], accelerator.device)  # (B, width + 1)
        losses = torch.cat([_losses(model, *part) for part in _blocks(tokens, context)], 1)
        losses = losses[: max(real - start, 0)].double().cpu()
        nll += losses.sum(1).tolist()
        sums += losses.sum(0).numpy()
        rows += len(losses)
    counts = [width] * len(nll)
    gathered = [(sums, rows)]
    if accelerator.num_processes > 1:
        nll, counts = gather_object(nll), gather_object(counts)
        gathered = gather_object(gathered)
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    score = metric.compute(predictions=nll, references=counts)
    total, rows = sum(s for s, _ in gathered), sum(r for _, r in gathered)
    folded = total.reshape(-1, context) if whole else total[None]  # (blocks of a row, positions)
    score["by_position"] = bins(folded.sum(0), rows * len(folded))
    if whole and width > context:
        score["by_window_position"] = bins(total, rows)
    return score


def bins(sums: np.ndarray, rows: int) -> list[dict[str, float]]:
    """Mean loss in nats over positions [0, 128), [128, 256), [256, 512), ...

    sums: the loss at each position, summed over `rows` rows.
    """
    found, start, end = [], 0, FIRST_BIN
    while start < len(sums):
        part = sums[start:end]
        tokens = len(part) * rows
        nll = float(part.sum() / tokens)
        found.append({"from": start, "to": start + len(part), "nll": nll, "tokens": tokens})
        start, end = end, 2 * end
    return found


def _blocks(tokens: torch.Tensor, context: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) of at most `context` tokens that predict all of `tokens` but the first."""
    for start in range(0, tokens.shape[1] - 1, context):
        end = min(start + context, tokens.shape[1] - 1)
        yield tokens[:, start:end], tokens[:, start + 1 : end + 1]


def _losses(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods in nats, fp32 (B, S); the fp32 logits of one row at a time."""
    logits = model(input_ids=inputs).logits  # (B, S, V)
    return torch.stack(
        [
            torch.nn.functional.cross_entropy(row.float(), target, reduction="none")
            for row, target in zip(logits, targets, strict=True)
        ]
    )
