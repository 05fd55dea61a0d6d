"""What a mask says to a layer, as masks.decode finds it: which keys each row of the batch sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_flashattn.unpadding import Unpadding, VarlenPlan


@dataclass(frozen=True, eq=False)
class Tokens:
    """A 2-D mask that was read."""

    kept: Tensor  # bool (B, Sk), True is a token
    known: Tensor  # the same on the CPU


@dataclass(frozen=True, eq=False)
class KeyRange:
    """Row b sees the keys start[b] <= c < start[b] + length[b].

    used: only so many keys exist yet, as in a static cache; None means all.
    full: known to be every key, so that the kernel needs no ranges.
    window: keys further away are hidden; the token itself counts.
    """

    start: Tensor  # int32 (B,)
    length: Tensor  # int32 (B,)
    causal: bool
    used: int | None = None
    tokens: Tokens | None = None  # the mask that it was made from
    full: bool = False
    window: int | None = None


@dataclass(frozen=True, eq=False)
class Segments:
    """A query sees the keys of its row that bear its number; 0 neither sees nor is seen."""

    query_ids: Tensor  # int32 (B, Sq)
    key_ids: Tensor  # int32 (B, Sk)
    causal: bool
    plan: VarlenPlan | None  # None while tracing
    tokens: Tokens | None = None


@dataclass(frozen=True, eq=False)
class KeyBits:
    """Row b sees the keys of its range whose bit is set: key_bits.py says how.

    used: as of a KeyRange.
    turn: how many keys exist, where nobody may read it. All of this is of the keys turned by it.
    """

    start: Tensor  # int32 (B,)
    length: Tensor  # int32 (B,)
    bits: Tensor  # int32 (B, ceil(Sk / 32))
    causal: bool
    used: int | None = None
    turn: Tensor | None = None  # integer ()


@dataclass(frozen=True, eq=False)
class Packed:
    """The tokens of an encoder's batch without its padding, each row a sequence."""

    unpadding: Unpadding
    mask: Tensor  # the layer's mask of the padded batch, for what no kernel takes
    found: KeyRange | KeyBits | Segments | None  # what that mask says; None: it is no carrier

    causal = False


Descriptor = KeyRange | KeyBits | Segments | Packed
