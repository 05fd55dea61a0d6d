"""Sequence numbers per token <-> cu_seqlens: made once per forward, shared by all layers.

A number per token says where it belongs: 0 is nowhere (padding, a hole), 1, 2, ... are sequences.
Numbers do not decrease along a row (zeros aside), so that the tokens of a sequence stay neighbours
when the zeros are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flashattn import support


@dataclass(frozen=True, eq=False)
class VarlenPlan:
    """Where each token of a (B, S) batch goes in the packed layout (total, ...) of varlen."""

    cu_seqlens_q: Tensor  # int32 (sequences + 1,)
    cu_seqlens_k: Tensor  # int32 (sequences + 1,)
    max_seqlen_q: int
    max_seqlen_k: int
    index_q: Tensor | None  # int64 (total_q,) into (B * Sq); None: all tokens, in order
    index_k: Tensor | None  # int64 (total_k,) into (B * Sk); None: all tokens, in order

    def pack_q(self, x: Tensor) -> Tensor:
        """(B, Sq, H, D) -> (total_q, H, D)."""
        return _take(x, self.index_q)

    def pack_k(self, x: Tensor) -> Tensor:
        """(B, Sk, H, D) -> (total_k, H, D)."""
        return _take(x, self.index_k)

    def unpack(self, packed: Tensor, batch: int, seqlen_q: int) -> Tensor:
        """(total_q, H, D) -> (B, Sq, H, D); tokens that belong to no sequence get 0."""
        if self.index_q is not None:
            rows = packed.new_zeros(batch * seqlen_q, *packed.shape[1:])
            packed = rows.index_copy(0, self.index_q, packed)
        return packed.view(batch, seqlen_q, *packed.shape[1:])


@dataclass(frozen=True, eq=False)
class Unpadding:
    """A (B, S) batch of an encoder, and the same without padding: (1, total), row after row.

    Padding that comes first in its row stays, as heads pool the first token. It is no key.
    """

    batch: int
    seqlen: int
    total: int  # < batch * seqlen
    index: Tensor  # int64 (total,) into (B * S)
    known: Tensor  # bool (B, S) on the CPU: True is a token
    query_ids: Tensor  # int32 (1, total): number of the row, from 1
    varlen: VarlenPlan  # of the attention of the (1, total) tokens

    def is_packed(self, x: Tensor) -> bool:
        """Whether x is (1, total, ...), which no (B, S, ...) is."""
        return tuple(x.shape[:2]) == (1, self.total)

    def pack(self, x: Tensor) -> Tensor:
        """(B or 1, S, ...) -> (1, total, ...)."""
        index = self.index if x.shape[0] == self.batch else self.index % self.seqlen
        return x.reshape(-1, *x.shape[2:]).index_select(0, index)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, total, ...) -> (B, S, ...) with 0 in the places that were removed."""
        rows = packed.new_zeros(self.batch * self.seqlen, *packed.shape[2:])
        rows = rows.index_copy(0, self.index, packed[0])
        return rows.view(self.batch, self.seqlen, *packed.shape[2:])


def plan_unpadding(kept: Tensor, known: Tensor) -> Unpadding | None:
    """Plans the removal of padding; None if there is nothing to remove. Never reads the device.

    kept: bool (B, S), True is a token.  known: the same on the CPU.
    """
    batch, seqlen = known.shape
    lengths, led_by_padding = known.sum(-1), ~known[:, 0]
    total_k, extra = int(lengths.sum()), int(led_by_padding.sum())
    total = total_k + extra
    if total == known.numel() or total_k == 0:
        return None
    max_k, max_q = int(lengths.max()), int((lengths + led_by_padding).max())
    stays = kept
    if extra:
        stays = kept | (torch.arange(seqlen, device=kept.device) == 0)
    index = _index(stays, total)
    query_ids = (index // seqlen + 1).to(torch.int32)[None]
    cu_q = support.trust(_cumulate(stays.sum(-1, dtype=torch.int32)), total, max_q)
    cu_k, index_k = cu_q, None
    if extra:
        cu_k = support.trust(_cumulate(kept.sum(-1, dtype=torch.int32)), total_k, max_k)
        index_k = _index(kept.reshape(-1).index_select(0, index), total_k)
    varlen = VarlenPlan(cu_q, cu_k, max_q, max_k, None, index_k)
    return Unpadding(batch, seqlen, total, index, known, query_ids, varlen)


def plan_varlen(
    query_ids: Tensor, key_ids: Tensor, known: tuple[Tensor, Tensor] | None = None
) -> VarlenPlan:
    """Plans the varlen call of a batch. Reads five integers back from the device: one sync.

    query_ids: integer (B, Sq); key_ids: integer (B, Sk). Queries of a sequence see the keys of the
    same row and number.  known: both on the CPU; then nothing is read.
    """
    width = max(query_ids.shape[1], key_ids.shape[1])
    count_q, count_k = _count(query_ids, width), _count(key_ids, width)  # (B, width)
    if known is None:
        facts = _facts(query_ids, key_ids, count_q, count_k)
    else:
        facts = _facts(*known, *(_count(ids, width) for ids in known))
    sequences, max_q, max_k, total_q, total_k = torch.stack(facts).tolist()
    sequences = max(sequences, 1)
    return VarlenPlan(
        cu_seqlens_q=support.trust(_cumulate(count_q[:, :sequences]), total_q, max_q),
        cu_seqlens_k=support.trust(_cumulate(count_k[:, :sequences]), total_k, max_k),
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        index_q=_index(query_ids, total_q),
        index_k=_index(key_ids, total_k),
    )


def packed_ids(position_ids: Tensor) -> Tensor | None:
    """Sequence numbers, int64 (B, S), of positions that restart; None if they do not. One sync.

    Restarting means: every row is made of runs 0, 1, 2, ... (or all from the row's first position),
    at least two in some row, and some run has two tokens. Other positions, of an encoder with ideas
    of its own, say nothing about packing.
    """
    ids, packed = _judge(position_ids)
    return ids if packed.item() else None


def packed_ids_unread(position_ids: Tensor) -> Tensor:
    """packed_ids without reading the device; all 1 if the positions do not restart."""
    ids, packed = _judge(position_ids)
    return torch.where(packed, ids, torch.ones_like(ids))


def _judge(position_ids: Tensor) -> tuple[Tensor, Tensor]:
    follows = position_ids[:, 1:] - position_ids[:, :-1] == 1
    restarts = position_ids[:, 1:] == position_ids[:, :1]
    packed = (~follows).any() & (follows | restarts).all() & follows.any()
    first = torch.ones_like(position_ids[:, :1])
    return torch.cat([first, first + (~follows).cumsum(-1)], dim=-1), packed


def _facts(query_ids: Tensor, key_ids: Tensor, count_q: Tensor, count_k: Tensor) -> list[Tensor]:
    biggest_id = torch.maximum(query_ids.max(), key_ids.max())
    facts = [biggest_id, count_q.max(), count_k.max(), count_q.sum(), count_k.sum()]
    return [fact.long() for fact in facts]


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    flat = x.reshape(-1, *x.shape[2:])  # a view of a projection: batch and sequence adjoin
    return flat if index is None else flat.index_select(0, index)


def _count(ids: Tensor, width: int) -> Tensor:
    counts = torch.zeros(ids.shape[0], width + 1, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(1, ids.long(), torch.ones_like(ids, dtype=torch.int32))
    return counts[:, 1:]


def _cumulate(counts: Tensor) -> Tensor:
    ends = counts.reshape(-1).cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


def _index(ids: Tensor, total: int) -> Tensor | None:
    if total == ids.numel():
        return None
    # A stable sort brings the tokens forward in order and, as `total` is known, needs no sync.
    return torch.argsort((ids == 0).reshape(-1).to(torch.uint8), stable=True)[:total]
