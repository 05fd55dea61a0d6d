"""What Transformers hands an attention function, translated into the terms of the kernel.

A model says causal, windowed or packed in several ways: by the mask, by the module, by keywords, by
position_ids that restart. Call answers each question once, for the kernel and for the fallback.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_flashattn import _compat
from hf_flashattn.masks import TRACED, Descriptor, KeyRange, Packed
from hf_flashattn.notes import TensorNotes, version_in_forward
from hf_flashattn.unpadding import VarlenPlan, packed_ids, plan_varlen

_PACKED = TensorNotes(version_in_forward)  # position_ids -> (batch, VarlenPlan or None)


def known_as_plain(positions: Tensor, batch: int) -> bool:
    """Whether packed_plan has already found that these position_ids do not restart."""
    return _PACKED.get(positions) == (batch, None)


@dataclass(eq=False)  # not frozen: that costs each call a microsecond
class Call:
    """One call of an attention function, in the terms of the kernel. Never changed once made."""

    module: nn.Module
    query: Tensor  # (B, H, Sq, D)
    key: Tensor  # (B, Hkv, Sk, D)
    value: Tensor  # (B, Hkv, Sk, Dv)
    mask: Tensor | None  # as it came
    found: Descriptor | None  # what the mask says, if it is ours
    module_causal: bool  # what holds without a descriptor
    dropout: float
    scaling: float
    extra: dict[str, Any]

    @property
    def seqlen_q(self) -> int:
        return self.query.shape[2]

    @property
    def seqlen_k(self) -> int:
        return self.key.shape[2]

    @property
    def causal(self) -> bool:
        """Whether later keys are hidden. One query is the last one: it sees every key."""
        causal = self.module_causal if self.found is None else self.found.causal
        return causal and self.seqlen_q > 1

    @property
    def window(self) -> tuple[int, int]:
        """flash-attn's window (left, right); (-1, -1) if it hides nothing.

        Transformers' sliding_window counts the token itself, flash-attn's does not.
        """
        window = self.extra.get("sliding_window")
        if isinstance(self.found, KeyRange) and self.found.window is not None:
            window = self.found.window
        longest = self.seqlen_k
        if isinstance(self.found, Packed):
            longest = self.found.unpadding.seqlen
        elif self.given and isinstance(self.extra.get("max_length_k"), int):
            longest = self.extra["max_length_k"]
        if not isinstance(window, int) or longest <= window:
            return -1, -1
        return window - 1, 0 if self.causal else window - 1

    @property
    def has_lengths(self) -> bool:
        """Whether the caller says where sequences end: cu_seq_lens_q (B + 1,), cu_seq_lens_k."""
        return self.extra.get("cu_seq_lens_q") is not None

    @property
    def given(self) -> bool:
        """Whether nothing but has_lengths says it."""
        return self.found is None and self.has_lengths

    @property
    def deterministic(self) -> bool:
        return bool(self.extra.get("deterministic") or torch.are_deterministic_algorithms_enabled())

    @property
    def weights_wanted(self) -> bool:
        """Whether the caller asked for the attention weights."""
        told = bool(self.extra.get("output_attentions"))
        return told or _compat.attentions_wanted_of(self.module)

    def padded(self) -> Call:
        """The call of a batch without padding (Packed) as the padded batch would make it."""
        packed = self.found
        q, k, v = (
            packed.unpadding.unpack(x.transpose(1, 2)).transpose(1, 2)
            for x in (self.query, self.key, self.value)
        )
        return replace(self, query=q, key=k, value=v, mask=packed.mask, found=packed.found)

    @property
    def unchecked_positions(self) -> Tensor | None:
        """position_ids (B or 1, S) that nobody has searched for packed sequences yet.

        Transformers looks where there is neither mask nor cache, in causal models, and then makes a
        mask. An all-ones mask is no mask; with another one, or where the caller says where
        sequences end, positions say nothing about packing.
        """
        positions = self.extra.get("position_ids")
        if positions is None or self.mask is not None or self.given or positions.dim() != 2:
            return None
        seqlen_q = self.seqlen_q
        if seqlen_q == 1 or seqlen_q != self.seqlen_k or positions.shape[1] != seqlen_q:
            return None
        if self._is_cross:
            return None
        if self.module_causal and self.extra.get("use_cache") is False:
            return None
        if _compat.is_tracing(positions):
            config = getattr(self.module, "config", None)
            if TRACED.config is config and not TRACED.position_ids_given:
                return None  # made by the model: 0, 1, 2, ...
        return positions

    @property
    def _is_cross(self) -> bool:
        named = "cross" in type(self.module).__name__.lower()
        return named or bool(getattr(self.module, "is_cross_attention", False))

    def packed_plan(self) -> VarlenPlan | None:
        """cu_seqlens of positions that restart, or None.

        Reads the device once per forward: what came out is remembered with the tensor, for the
        other layers.
        """
        positions = self.unchecked_positions
        if positions is None:
            return None
        batch, known = self.query.shape[0], _PACKED.get(positions)
        if known is not None and known[0] == batch:
            return known[1]
        with torch.inference_mode(False):  # a later forward may save the plan for its backward
            ids = packed_ids(positions)
            plan = None if ids is None else plan_varlen(*[ids.expand(batch, -1)] * 2)
        _PACKED[positions] = (batch, plan)
        return plan
