"""Documents to blocks of a fixed number of tokens, and blocks to the batch of a step.

Text becomes tokens once, on all cores; every context packs blocks of these. All of it is kept in
the cache, where a process that comes second waits for the first (cache.py).

Every document ends with the end-of-text token. Two ways to fill blocks, neither with padding:

chain  shuffled documents one after the other, cut every `context` tokens
whole  a document of at least `context` tokens starts its own block and fills as many as it can, so
       that its tokens see as much of their own document as possible; short documents and what is
       left of long ones are chained
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, Sequence, Value

from lm.cache import made_once
from lm.corpus import Corpus, unit_hash
from lm.failures import UsageError
from lm.tokenizer import Tokenizer, tokenizer_fingerprint

Batch = dict[str, torch.Tensor]  # the keyword arguments of a forward

DOCUMENTS_A_WORKER = 250  # below it, another process costs more than it saves
WHOLE_FROM = 2048  # from this context on, `auto` keeps documents whole


class Step(NamedTuple):
    """What one process trains on in one optimizer step."""

    microbatches: list[Batch]
    tokens: int  # without padding


@dataclass
class Tokens:
    """Documents one after the other, each with its end-of-text token."""

    ids: np.ndarray  # uint16 or int32 (tokens,), on disk
    ends: np.ndarray  # int64 (documents,): where each ends in ids
    text_bytes: int  # of the text that they were

    def documents(self, order: Rows[int] | np.ndarray | None = None) -> list[np.ndarray]:
        """Views of ids, in this order."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return [
            self.ids[starts[i] : self.ends[i]]
            for i in (range(len(self.ends)) if order is None else order)
        ]


@dataclass
class Blocks:
    """Blocks of `context` tokens on disk, uint16 or int32 (blocks, context)."""

    train: np.ndarray
    held_out: np.ndarray
    starts: np.ndarray  # int64 (blocks,): where those of train begin in the shuffled documents
    statistics: dict[str, float]


def tokenise(corpus: Corpus, side: str, tokenizer: Tokenizer, cache: Path) -> Tokens:
    """The tokens of corpus.train or corpus.held_out, made on all cores or found in the cache."""

    def make(folder: Path) -> None:
        ids, ends, size = _tokenise(getattr(corpus, side), tokenizer)
        np.save(folder / "ids.npy", ids)
        np.save(folder / "ends.npy", ends)
        (folder / "bytes.json").write_text(json.dumps(size))

    key = f"tokens-{corpus.fingerprint}-{tokenizer_fingerprint(tokenizer)}-{side}"
    folder = made_once(cache / key, make)
    return Tokens(
        np.load(folder / "ids.npy", mmap_mode="r"),
        np.load(folder / "ends.npy"),
        json.loads((folder / "bytes.json").read_text()),
    )


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
        for side in ("train", "held_out"):
            tokens = tokenise(corpus, side, tokenizer, cache)
            lengths = np.diff(tokens.ends, prepend=0)
            order = np.random.default_rng(seed).permutation(len(lengths))
            blocks = fill_blocks(tokens.documents(order), context, whole)
            if len(blocks) == 0:
                raise _too_short(side, context, len(tokens.ids), len(lengths))
            np.save(folder / f"{side}.npy", blocks)
            if side == "train":
                np.save(folder / "starts.npy", block_starts(lengths[order], context, whole))
            in_long = lengths[lengths >= context].sum()
            statistics |= {
                f"{side}_tokens": len(tokens.ids),
                f"{side}_blocks": len(blocks),
                f"{side}_bytes_per_token": tokens.text_bytes / len(tokens.ids),
                f"{side}_share_in_documents_of_a_block_or_more": float(in_long / len(tokens.ids)),
            }
        (folder / "statistics.json").write_text(json.dumps(statistics, indent=1))

    folder = made_once(cache / f"blocks-{key}", make)
    sides = [np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("train", "held_out")]
    starts = np.load(folder / "starts.npy")
    return Blocks(*sides, starts, json.loads((folder / "statistics.json").read_text()))


def fill_blocks(documents: Rows[Rows[int] | np.ndarray], context: int, whole: bool) -> np.ndarray:
    """(blocks, context) of the documents' dtype; what does not fill the last one is dropped."""
    blocks: list[np.ndarray] = []
    chain: list[np.ndarray] = []
    for document in documents:
        tokens = np.asarray(document)
        if whole:
            full = len(tokens) // context * context
            blocks.append(tokens[:full].reshape(-1, context))
            tokens = tokens[full:]
        chain.append(tokens)
    chained = np.concatenate(chain)
    full = len(chained) // context * context
    return np.concatenate([*blocks, chained[:full].reshape(-1, context)])


def block_starts(lengths: Rows[int] | np.ndarray, context: int, whole: bool) -> np.ndarray:
    """Where the blocks of fill_blocks begin, int64 (blocks,): the place of their first token in
    documents of these lengths, one after the other."""
    lengths = np.asarray(lengths, dtype=np.int64)
    begins = np.cumsum(lengths) - lengths
    full = lengths // context * context if whole else np.zeros_like(lengths)
    blocks = [begin + np.arange(0, n, context) for begin, n in zip(begins, full, strict=True)]
    left = lengths - full
    ends = np.cumsum(left)  # of what is left of each document, in the chain
    chain = np.arange(0, ends[-1] // context * context, context)
    document = np.searchsorted(ends, chain, side="right")
    inside = chain - (ends - left)[document]
    return np.concatenate([*blocks, (begins + full)[document] + inside])


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


class PartOrder:
    """As BatchOrder, of a part of the text: the blocks number `first` to `first + count`, by where
    they begin in the shuffled documents, which are read over and over.

    Two runs whose parts do not overlap see different text, whatever their contexts; to a block, as
    one that is chained reaches into documents behind it. What a part has of a pass is permuted.
    """

    def __init__(
        self, starts: np.ndarray, first: int, count: int, per_step: int, seed: int
    ) -> None:
        by_place = np.argsort(starts, kind="stable")
        blocks, end, parts = len(starts), first + count, []
        for number in range(first // blocks, -(-end // blocks)):
            here = by_place[max(first - number * blocks, 0) : end - number * blocks]
            parts.append(np.random.default_rng((seed, number)).permutation(here))
        self.numbers, self.per_step = np.concatenate(parts), per_step

    def step(self, step: int) -> np.ndarray:
        """Block numbers of `step`, int64, shape (per_step,)."""
        return self.numbers[step * self.per_step : (step + 1) * self.per_step]


class BlockBatches:
    """The steps of one process, from blocks of which each is a row; a label is the token itself."""

    def __init__(
        self, blocks: np.ndarray, batch_size: int, accumulate: int, seed: int, process: int = 0,
        processes: int = 1, device: torch.device | str = "cpu",
        order: BatchOrder | PartOrder | None = None,
    ) -> None:  # fmt: skip
        self.blocks, self.batch_size, self.device = blocks, batch_size, torch.device(device)
        mine = batch_size * accumulate
        self.order = order or BatchOrder(len(blocks), mine * processes, seed)
        self.mine = slice(process * mine, (process + 1) * mine)

    def step(self, step: int) -> Step:
        tokens = to_device(self.blocks[self.order.step(step)[self.mine]], self.device)
        rows = tokens.split(self.batch_size)
        return Step([{"input_ids": row, "labels": row} for row in rows], tokens.numel())


def to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64, of the same shape."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    return tokens.to(device, non_blocking=True)


def held_out_windows(
    corpus: Corpus, tokenizer: Tokenizer, window: int, limit: int, cache: Path
) -> np.ndarray:
    """Windows of window + 1 tokens, shape (up to limit, window + 1), each within a document.

    Which ones depends on names, text and tokenizer alone: they are the same for every context and
    seed, and so are the `window` tokens to predict in each.

    Raises:
        UsageError: no held-out document is that long.
    """
    key = f"{corpus.fingerprint}-{tokenizer_fingerprint(tokenizer)}-{window}"

    def make(folder: Path) -> None:
        names = corpus.held_out["name"][:]
        order = sorted(range(len(names)), key=lambda i: unit_hash("window:" + names[i]))
        tokens = tokenise(corpus, "held_out", tokenizer, cache)
        documents = tokens.documents(order)
        rows = [ids[: len(ids) // (window + 1) * (window + 1)] for ids in documents]
        windows = np.concatenate(rows).reshape(-1, window + 1)
        if len(windows) == 0:
            raise UsageError(
                f"a held-out document of more than {window} tokens for --eval-window {window}",
                f"{max(map(len, documents))} tokens in the longest",
                "a smaller --eval-window, or text with longer documents",
            )
        np.save(folder / "windows.npy", windows)

    return np.load(made_once(cache / f"windows-{key}", make) / "windows.npy")[:limit]


def _tokenise(documents: Dataset, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, ends, bytes of text), as in Tokens."""
    end = tokenizer.eos_token_id
    workers = min(len(os.sched_getaffinity(0)), len(documents) // DOCUMENTS_A_WORKER)

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        if workers > 1:  # this is one of them: else each would start as many threads again
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encoded = tokenizer(
            batch["text"],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return {
            "input_ids": [[*ids, end] for ids in encoded],
            "bytes": [len(text.encode()) for text in batch["text"]],
        }

    found = documents.map(
        encode,
        batched=True,
        batch_size=64,
        num_proc=workers if workers > 1 else None,
        remove_columns=documents.column_names,
        features=Features({"input_ids": Sequence(Value("int32")), "bytes": Value("int64")}),
    )
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    # Of the Arrow table: as lists of Python, 100 M tokens take minutes.
    chunks = found.with_format("arrow")[:]["input_ids"].chunks
    ids = np.concatenate([chunk.flatten().to_numpy().astype(dtype) for chunk in chunks])
    ends = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks]).cumsum()
    return ids, ends.astype(np.int64), sum(found["bytes"])


def _too_short(side: str, context: int, tokens: int, documents: int) -> UsageError:
    fitting = 2 ** max(tokens.bit_length() - 1, 0)
    more = "more text" if side == "train" else "more text or a larger --held-out"
    return UsageError(
        f"at least {context} tokens of {side.replace('_', '-')} text for --context {context}",
        f"{tokens} tokens in {documents} document(s)",
        f"--context {fitting} or less, or {more}",
    )
