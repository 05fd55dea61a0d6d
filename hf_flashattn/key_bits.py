"""A mask of keys as the kernels read it: their range in each row of the batch, and a bit for each.

key_start, key_len, key_bits = key_bits_of(attention_mask.bool())
out = flash_attn_func(q, k, v, key_start=key_start, key_len=key_len, key_bits=key_bits)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WORD = 32  # keys


def key_bits_of(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What flash_attn_func takes to hide keys anywhere, made on their device: nothing is read.

    Args:
        kept: bool (B, Sk), True for a key that may be seen.

    Returns: key_start, key_len and key_bits, int32 (B,), (B,) and (B, ceil(Sk / 32)): the first
        kept key, how many keys from it to the last one, bit c % 32 of word c / 32 for key c.
    """
    batch, seqlen = kept.shape
    flags = kept.to(torch.int32)
    start = flags.argmax(-1)  # the first of the largest: 0 if nothing is kept
    length = (seqlen - flags.flip(-1).argmax(-1) - start) * flags.amax(-1)
    words = words_of(seqlen)
    flags = F.pad(flags, (0, words * _WORD - seqlen)).view(batch, words, _WORD)
    bits = (flags << _places(kept.device)).sum(-1, dtype=torch.int32)
    return start.to(torch.int32), length.to(torch.int32), bits


def kept_keys(key_bits: Tensor, seqlen: int) -> Tensor:
    """bool (B, seqlen): the mask that the bits came from."""
    return (key_bits[..., None] >> _places(key_bits.device) & 1).flatten(1)[:, :seqlen] != 0


def turned(x: Tensor, turn: Tensor, dim: int = -1) -> Tensor:
    """x with its first `turn` places of a dimension behind all others; nothing is read.

    turn: integer (), on the device of x. The opposite is -turn.
    """
    places = torch.arange(x.shape[dim], device=x.device)
    return x.index_select(dim, (places + turn) % x.shape[dim])


def words_of(seqlen: int) -> int:
    """How many words have a bit for each of seqlen keys."""
    return (seqlen + _WORD - 1) // _WORD


def _places(device: torch.device) -> Tensor:
    return torch.arange(_WORD, dtype=torch.int32, device=device)
