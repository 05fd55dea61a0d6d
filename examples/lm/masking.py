"""Documents to the masked rows of BERT: pieces, packs of pieces, masks, batches.

A piece is [CLS] text [SEP] from one document. Its length is drawn between `shortest` and `context`,
so that a padded batch has a known share of padding. A row holds one piece, or, packed, as many as
fit. Row and mask number i of a run are a function of seed and i alone: a resumed run goes on where
it stopped, any number of processes sees the same, and so do two attentions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Sequence, Value, load_from_disk
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from lm.bert import IGNORED
from lm.cache import made_once
from lm.corpus import Corpus
from lm.failures import UsageError
from lm.packing import Batch, BatchOrder, Step
from lm.tokenizer import Tokenizer, tokenizer_fingerprint

MASKED = 0.15  # of the tokens that are not special
SHORTEST_PIECE = 8  # tokens; what is left of a document below it is dropped
PIECES_PER_PACK = 4000  # packed together, longest first
ROWS = Features({"input_ids": Sequence(Value("int32")), "lengths": Sequence(Value("int32"))})


@dataclass
class Rows:
    """Columns `input_ids` (int32, pieces one after the other) and `lengths` (of these pieces)."""

    train: Dataset
    held_out: Dataset  # a piece a row, however training is batched
    statistics: dict[str, float]


def make_rows(
    corpus: Corpus,
    tokenizer: Tokenizer,
    context: int,
    shortest: int,
    packed: bool,
    seed: int,
    cache: Path,
) -> Rows:
    """Tokenises, cuts and packs, or finds all that in the cache.

    Raises:
        UsageError: one side has no piece.
    """
    parts = (tokenizer_fingerprint(tokenizer), context, shortest, "packed" if packed else "pieces")
    key = "-".join(map(str, (corpus.fingerprint, *parts, seed)))

    def make(folder: Path) -> None:
        statistics: dict[str, float] = {}
        for side, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
            pieces = _cut_documents(documents, tokenizer, context, shortest, seed)
            if len(pieces) == 0:
                raise UsageError(
                    f"{side.replace('_', '-')} text of at least {SHORTEST_PIECE} tokens",
                    f"less in each of {len(documents)} document(s)",
                    "more text, or a larger --held-out",
                )
            tokens = sum(sum(lengths) for lengths in pieces["lengths"])
            rows = pieces.shuffle(seed=seed)
            if packed and side == "train":
                rows = rows.map(
                    lambda batch: pack_pieces(batch["input_ids"], context),
                    batched=True,
                    batch_size=PIECES_PER_PACK,
                    features=ROWS,
                )
            rows.save_to_disk(str(folder / side))
            statistics |= {
                f"{side}_tokens": tokens,
                f"{side}_pieces": len(pieces),
                f"{side}_rows": len(rows),
                f"{side}_padding": 1 - tokens / (len(rows) * context),
            }
        (folder / "statistics.json").write_text(json.dumps(statistics, indent=1))

    folder = made_once(cache / f"rows-{key}", make)
    sides = [load_from_disk(str(folder / s)).with_format("numpy") for s in ("train", "held_out")]
    return Rows(*sides, json.loads((folder / "statistics.json").read_text()))


def cut(document: list[int], ends: tuple[int, int], lengths: Callable[[], int]) -> list[np.ndarray]:
    """Pieces of `lengths()` tokens, `ends` included, until the document is over."""
    pieces, start = [], 0
    while len(document) - start >= SHORTEST_PIECE - 2:
        end = start + lengths() - 2
        pieces.append(np.array([ends[0], *document[start:end], ends[1]], np.int32))
        start = end
    return pieces


def pack_pieces(pieces: list[list[int]], context: int) -> dict[str, list]:
    """Rows of at most `context` tokens: longest piece first, into the first row with room."""
    rows: list[list[int]] = []
    room = np.empty(len(pieces), np.int64)
    for number in sorted(range(len(pieces)), key=lambda n: -len(pieces[n])):
        length = len(pieces[number])
        fits = np.flatnonzero(room[: len(rows)] >= length)
        if len(fits) == 0:
            room[len(rows)] = context - length
            rows.append([number])
        else:
            room[fits[0]] -= length
            rows[fits[0]].append(number)
    return {
        "input_ids": [np.concatenate([pieces[n] for n in row]).astype(np.int32) for row in rows],
        "lengths": [[len(pieces[n]) for n in row] for row in rows],
    }


class MaskedRows(torch.utils.data.Dataset):
    """Row i as {"input_ids", "labels": int64 (n,), "lengths": of its pieces}.

    With `order` the rows of a training run of `length` rows; without, every row once, its mask the
    same for every seed.
    """

    def __init__(
        self, rows: Dataset, tokenizer: Tokenizer, length: int, order: BatchOrder | None, seed: int
    ) -> None:
        self.rows, self.length, self.order, self.seed = rows, length, order, seed
        self.masker = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
        self.special = torch.tensor(tokenizer.all_special_ids)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = self.rows[self.order.at(i) if self.order else int(i)]
        ids = torch.from_numpy(row["input_ids"].astype(np.int64))
        special = torch.isin(ids, self.special)
        seed = np.random.SeedSequence((self.seed, int(i))).generate_state(1, np.uint64)[0]
        self.masker.generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
        masked, labels = self.masker.torch_mask_tokens(ids.clone()[None], special[None])
        masked, labels = masked[0], labels[0]
        if (labels == IGNORED).all():  # a loss over no token is NaN
            place = len(ids) // 2
            labels[place], masked[place] = ids[place], self.masker.tokenizer.mask_token_id
        return {"input_ids": masked, "labels": labels, "lengths": torch.tensor(row["lengths"])}


class Collator:
    """Rows to a batch of width `context`, on the CPU.

    input_ids, labels  int64 (B, context); labels are IGNORED where nothing is to be predicted
    label_positions    int64 (N,): where there is a label, counted over the whole batch
    attention_mask     int64 (B, context), 1 for tokens, if a row is one piece
    position_ids       int64 (B, context), from 0 for every piece, if rows are packed; what is left
                       of a row is a piece of padding that no label looks at
    """

    def __init__(
        self, pad: int, context: int, packed: bool, form: Callable[[Batch], Batch] | None = None
    ) -> None:
        self.pad, self.context, self.packed, self.form = pad, context, packed, form

    def __call__(self, rows: list[dict[str, Tensor]]) -> Batch:
        shape = (len(rows), self.context)
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORED)
        extra = torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[number, :length], labels[number, :length] = row["input_ids"], row["labels"]
            if self.packed:
                pieces = [*row["lengths"].tolist(), self.context - length]
                extra[number] = torch.cat([torch.arange(piece) for piece in pieces])
            else:
                extra[number, :length] = 1
        batch = {
            "input_ids": ids,
            "labels": labels,
            "label_positions": (labels != IGNORED).flatten().nonzero().squeeze(1),
            "position_ids" if self.packed else "attention_mask": extra,
        }
        return self.form(batch) if self.form else batch


def state_packing_in_a_mask(batch: Batch) -> Batch:
    """For attentions that do not read packing off position_ids: fp32 (B, 1, S, S), 0 where a token
    sees another, else a value that is finite in bfloat16."""
    piece = (batch["position_ids"] == 0).cumsum(1)  # (B, S)
    apart = piece[:, None, :, None] != piece[:, None, None, :]
    lowest = torch.finfo(torch.bfloat16).min
    return batch | {"attention_mask": apart.float() * lowest}


class MaskedBatches:
    """The steps of one process, for a loop without a DataLoader."""

    def __init__(
        self, rows: MaskedRows, collator: Collator, batch_size: int, accumulate: int,
        process: int = 0, processes: int = 1, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.rows, self.collator, self.batch_size = rows, collator, batch_size
        self.mine, self.process, self.processes = batch_size * accumulate, process, processes
        self.device = torch.device(device)

    def step(self, step: int) -> Step:
        first = (step * self.processes + self.process) * self.mine
        rows = [self.rows[i] for i in range(first, first + self.mine)]
        parts = [rows[i : i + self.batch_size] for i in range(0, self.mine, self.batch_size)]
        batches = [
            {key: value.to(self.device) for key, value in self.collator(part).items()}
            for part in parts
        ]
        return Step(batches, sum(len(row["input_ids"]) for row in rows))


def _cut_documents(
    documents: Dataset, tokenizer: Tokenizer, context: int, shortest: int, seed: int
) -> Dataset:
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)

    def encode(batch: dict[str, list[str]], numbers: list[int]) -> dict[str, list]:
        random = np.random.default_rng((seed, numbers[0]))
        encoded = tokenizer(
            batch["text"],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        pieces = [
            piece
            for document in encoded
            for piece in cut(document, ends, lambda: int(random.integers(shortest, context + 1)))
        ]
        return {"input_ids": pieces, "lengths": [[len(piece)] for piece in pieces]}

    return documents.map(
        encode,
        with_indices=True,
        batched=True,
        batch_size=256,
        remove_columns=documents.column_names,
        features=ROWS,
    )
