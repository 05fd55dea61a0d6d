"""Dense masks that say no more than which keys are padding, and whether later ones are hidden.

Models with attention code of their own often make a (B, 1, 1, Sk) or (B, 1, Sq, Sk) mask by
themselves. Such a mask is read once, whichever number of layers share it, and becomes a carrier.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_flashattn import _compat, masks
from hf_flashattn.families.deferred import LOWEST
from hf_flashattn.notes import TensorNotes, version_in_forward


@dataclass(eq=False)
class Pattern:
    """Keys that count, and whether a query sees those behind its own place."""

    kept: Tensor  # bool (B or 1, Sk)
    causal: bool
    carriers: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    _causal: Pattern | None = None

    def with_causal(self) -> Pattern:
        """The same with later keys hidden; one object, so that its carriers are made once."""
        if self._causal is None:
            self._causal = self if self.causal else Pattern(self.kept, causal=True)
        return self._causal

    def carrier(self, batch: int, rows: int) -> Tensor | None:
        """What masks.py hands to the layers; None where every key counts (or causal alone)."""
        if (batch, rows) not in self.carriers:
            kept = self.kept.expand(batch, -1)
            with torch.inference_mode(False):  # a later forward may save it for its backward
                self.carriers[batch, rows] = masks.padded(kept, rows, causal=self.causal)
        return self.carriers[batch, rows]


# mask -> {what view of it: Pattern, or None for any other mask}
_KNOWN = TensorNotes(version_in_forward)


def recognise(mask: Tensor, *, hides: bool = False) -> Pattern | None:
    """The pattern of a mask, or None if it says anything else.

    Args:
        mask: (B or 1, H or 1, Sq or 1, Sk). Boolean, True is seen; or floating
            point, 0 where a key is seen and LOWEST or less where not.
        hides: boolean, and True is hidden.
    """
    if mask.requires_grad or mask.dim() != 4 or _compat.is_tracing(mask):
        return None
    base = mask if mask._base is None else mask._base  # inference tensors' views have none
    if mask.shape[1] != 1 and mask.stride(1) == 0:
        mask = mask[:, :1]
    if mask.shape[2] != 1 and mask.stride(2) == 0:
        mask = mask[:, :, :1]
    strides = tuple(s for s, n in zip(mask.stride(), mask.shape, strict=True) if n > 1)
    place = (mask.shape, strides, mask.storage_offset(), hides)
    known = _KNOWN.get(base)
    if known is None:
        known = _KNOWN[base] = {}
    if place not in known:
        with torch.inference_mode(False):
            known[place] = _read(mask, hides)
    return known[place]


def _read(mask: Tensor, hides: bool) -> Pattern | None:
    seen = mask ^ hides if mask.dtype == torch.bool else mask == 0  # (B, 1, Sq, Sk)
    clear = torch.ones((), dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        clear = (seen | (mask <= LOWEST)).all()
    if seen.shape[1] != 1:
        clear = clear & (seen == seen[:, :1]).all()
    rows, columns = seen.shape[2:]
    kept = seen[:, 0, -1]  # (B, Sk): the last query sees all that any sees
    if rows == 1:
        return Pattern(kept, causal=False) if bool(clear) else None
    below = torch.ones(rows, columns, dtype=torch.bool, device=mask.device)
    below = below.tril(columns - rows)
    full = (seen[:, 0] == kept[:, None]).all()
    causal = (seen[:, 0] == (kept[:, None] & below)).all()
    full, causal = torch.stack([full & clear, causal & clear]).tolist()
    return Pattern(kept, causal=not full) if full or causal else None


def padding_alone(mask: Tensor) -> Pattern | None:
    """The pattern of an additive mask that is one for all heads and queries, or None for others.

    Some models that dispatch make it by themselves. Only a mask of this shape is worth the look.
    """
    if not mask.is_floating_point() or mask.dim() != 4:
        return None
    one = all(mask.shape[i] == 1 or mask.stride(i) == 0 for i in (1, 2))
    return recognise(mask) if one else None


def joined(patterns: list[Pattern]) -> Pattern | None:
    """All of them at once."""
    if len(patterns) < 2:
        return patterns[0] if patterns else None
    kept = patterns[0].kept
    for pattern in patterns[1:]:
        kept = kept & pattern.kept
    return Pattern(kept, any(pattern.causal for pattern in patterns))
