"""Documents to blocks of a fixed number of tokens, and blocks to the batch of a step.

Every document ends with the end-of-text token. Two ways to fill blocks, neither with padding:

chain  shuffled documents one after the other, cut every `context` tokens
whole  a document of at least `context` tokens starts its own block and fills as many as it can, so
       that its tokens see as much of their own document as possible; short documents and what is
       left of long ones are chained
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, Sequence, Value, load_from_disk

from lm.cache import made_once
from lm.corpus import Corpus, unit_hash
from lm.failures import UsageError
from lm.tokenizer import Tokenizer, tokenizer_fingerprint

Batch = dict[str, torch.Tensor]  # the keyword arguments of a forward

DOCUMENTS_PER_PACK = 1000  # packs are independent; less than one block is lost at the end of each
WHOLE_FROM = 2048  # from this context on, `auto` keeps documents whole


class Step(NamedTuple):
    """What one process trains on in one optimizer step."""

    microbatches: list[Batch]
    tokens: int  # without padding


@dataclass
class Blocks:
    """Blocks of `context` tokens on disk, column `input_ids` (int32, shape (context,))."""

    train: Dataset
    held_out: Dataset
    statistics: dict[str, float]


def pack_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    context: int,
    packing: str,
    seed: int,
    cache: Path,
) -> Blocks:
    """Tokenises and packs both sides of the corpus, or finds them in the cache.

    Raises:
        UsageError: one side has fewer than `context` tokens.
    """
    whole = packing == "whole" or (packing == "auto" and context >= WHOLE_FROM)
    key = "-".join(
        (
            corpus.fingerprint,
            tokenizer_fingerprint(tokenizer),
            str(context),
            "whole" if whole else "chain",
            str(seed),
        )
    )

    def make(folder: Path) -> None:
        statistics: dict[str, float] = {}
        for side, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
            tokens = _tokenise(documents, tokenizer)
            count = int(sum(tokens["tokens"]))
            blocks = _pack(tokens.shuffle(seed=seed), context, whole)
            if len(blocks) == 0:
                raise _too_short(side, context, count, len(documents))
            blocks.save_to_disk(str(folder / side))
            statistics |= {
                f"{side}_tokens": count,
                f"{side}_blocks": len(blocks),
                f"{side}_bytes_per_token": sum(tokens["bytes"]) / count,
                f"{side}_share_in_documents_of_a_block_or_more": sum(
                    n for n in tokens["tokens"] if n >= context
                )
                / count,
            }
        (folder / "statistics.json").write_text(json.dumps(statistics, indent=1))

    folder = made_once(cache / f"blocks-{key}", make)
    return Blocks(
        load_from_disk(str(folder / "train")).with_format("numpy"),
        load_from_disk(str(folder / "held_out")).with_format("numpy"),
        json.loads((folder / "statistics.json").read_text()),
    )


def fill_blocks(documents: list[list[int]], context: int, whole: bool) -> list[np.ndarray]:
    """Blocks of exactly `context` tokens; what does not fill the last one is dropped."""
    blocks: list[np.ndarray] = []
    chain: list[np.ndarray] = []
    for document in documents:
        tokens = np.asarray(document, dtype=np.int32)
        if whole:
            full = len(tokens) // context * context
            blocks.extend(tokens[:full].reshape(-1, context))
            tokens = tokens[full:]
        chain.append(tokens)
    chained = np.concatenate(chain) if chain else np.empty(0, np.int32)
    full = len(chained) // context * context
    blocks.extend(chained[:full].reshape(-1, context))
    return blocks


class BatchOrder:
    """Which blocks a step trains on: a function of seed and step alone, so a resumed run goes on
    where it stopped and two attentions see the same batches.

    Every epoch is a new permutation of all blocks; a batch may span two epochs.
    """

    def __init__(self, blocks: int, per_step: int, seed: int) -> None:
        self.blocks, self.per_step, self.seed = blocks, per_step, seed
        self._epochs: dict[int, np.ndarray] = {}

    def step(self, step: int) -> np.ndarray:
        """Block numbers of `step`, int64, shape (per_step,)."""
        first = step * self.per_step
        return np.array([self.at(position) for position in range(first, first + self.per_step)])

    def at(self, position: int) -> int:
        """The block number at a position of the whole run."""
        epoch, offset = divmod(int(position), self.blocks)
        return int(self._epoch(epoch)[offset])

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            generator = np.random.default_rng((self.seed, epoch))
            self._epochs[epoch] = generator.permutation(self.blocks)
        return self._epochs[epoch]


class BlockBatches:
    """The steps of one process, from blocks of which each is a row; a label is the token itself."""

    def __init__(
        self, blocks: Dataset, batch_size: int, accumulate: int, seed: int, process: int = 0,
        processes: int = 1, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.blocks, self.batch_size, self.device = blocks, batch_size, torch.device(device)
        mine = batch_size * accumulate
        self.order = BatchOrder(len(blocks), mine * processes, seed)
        self.mine = slice(process * mine, (process + 1) * mine)

    def step(self, step: int) -> Step:
        tokens = fetch(self.blocks, self.order.step(step)[self.mine], self.device)
        rows = tokens.split(self.batch_size)
        return Step([{"input_ids": row, "labels": row} for row in rows], tokens.numel())


def fetch(blocks: Dataset, numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Token ids of the blocks, int64, shape (len(numbers), tokens of a block), on the device."""
    return to_device(np.stack(blocks[numbers.tolist()]["input_ids"]), device)


def to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    tokens = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    return tokens.to(device, non_blocking=True)


def held_out_windows(
    corpus: Corpus, tokenizer: Tokenizer, window: int, limit: int, cache: Path
) -> np.ndarray:
    """Windows of window + 1 tokens, int32, shape (up to limit, window + 1), each within a document.

    Which ones depends on names, text and tokenizer alone: they are the same for every context and
    seed, and so are the `window` tokens to predict in each.

    Raises:
        UsageError: no held-out document is that long.
    """
    key = f"{corpus.fingerprint}-{tokenizer_fingerprint(tokenizer)}-{window}"

    def make(folder: Path) -> None:
        names = corpus.held_out["name"][:]
        order = sorted(range(len(names)), key=lambda i: unit_hash("window:" + names[i]))
        tokens = _tokenise(corpus.held_out.select(order), tokenizer)
        rows = [
            np.asarray(ids[: len(ids) // (window + 1) * (window + 1)], np.int32)
            for ids in tokens["input_ids"]
        ]
        windows = np.concatenate(rows).reshape(-1, window + 1)
        if len(windows) == 0:
            raise UsageError(
                f"a held-out document of more than {window} tokens for --eval-window {window}",
                f"{max(tokens['tokens'])} tokens in the longest",
                "a smaller --eval-window, or text with longer documents",
            )
        np.save(folder / "windows.npy", windows)

    return np.load(made_once(cache / f"windows-{key}", make) / "windows.npy")[:limit]


def _tokenise(documents: Dataset, tokenizer: Tokenizer) -> Dataset:
    end = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        encoded = tokenizer(
            batch["text"],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return {
            "input_ids": [[*ids, end] for ids in encoded],
            "tokens": [len(ids) + 1 for ids in encoded],
            "bytes": [len(text.encode()) for text in batch["text"]],
        }

    return documents.map(
        encode,
        batched=True,
        batch_size=256,
        remove_columns=documents.column_names,
        features=Features(
            {
                "input_ids": Sequence(Value("int32")),
                "tokens": Value("int64"),
                "bytes": Value("int64"),
            }
        ),
    )


def _pack(tokens: Dataset, context: int, whole: bool) -> Dataset:
    return tokens.select_columns(["input_ids"]).map(
        lambda batch: {"input_ids": fill_blocks(batch["input_ids"], context, whole)},
        batched=True,
        batch_size=DOCUMENTS_PER_PACK,
        features=Features({"input_ids": Sequence(Value("int32"), length=context)}),
    )


def _too_short(side: str, context: int, tokens: int, documents: int) -> UsageError:
    fitting = 2 ** max(tokens.bit_length() - 1, 0)
    more = "more text" if side == "train" else "more text or a larger --held-out"
    return UsageError(
        f"at least {context} tokens of {side.replace('_', '-')} text for --context {context}",
        f"{tokens} tokens in {documents} document(s)",
        f"--context {fitting} or less, or {more}",
    )
