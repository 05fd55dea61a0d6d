"""Where calls go that the kernel cannot take: PyTorch's SDPA, or the model's own eager function.

The mask is written out in full; rows that see no key give 0 here too, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_flashattn import _compat, masks
from hf_flashattn.call import Call
from hf_flashattn.masks import Packed, Segments
from hf_flashattn.unpadding import packed_ids_unread


def fall_back(call: Call, choice: str) -> tuple[Tensor, Tensor | None]:
    """out (B, Sq, H, D) and the attention weights, if asked for. choice: "sdpa" or "eager".

    Raises NotImplementedError for what only an eager function can do, if the model has none.
    """
    if isinstance(call.found, Packed):
        out, _ = fall_back(call.padded(), choice)
        return call.found.unpadding.pack(out), None
    extra = call.extra
    needs_eager = call.weights_wanted or any(
        extra.get(name) is not None for name in ("softcap", "s_aux", "sinks")
    )
    own_code, bias = extra.get("own_code"), extra.get("position_bias")
    finer = bias is not None and bias.dtype != call.query.dtype  # than SDPA takes, such as fp32
    if own_code is not None and (needs_eager or finer or choice == "eager"):
        return own_code(), None
    eager = _compat.eager_function(call.module)
    if call.given:
        mask = _dense_of_given(call)
    elif call.mask is not None and call.found is None:
        mask = call.mask
    else:
        mask = _dense_mask(call)
    mask, empty_rows = _open_empty_rows(mask)
    if eager is not None and (needs_eager or choice == "eager"):
        out, weights = _eager(call, eager, mask)
    elif needs_eager:
        raise NotImplementedError(
            f"hf_flashattn: expected an eager_attention_forward next to "
            f"{type(call.module).__qualname__}, which softcap, sinks "
            "and attention weights need, got none. Leave this model unpatched, or load it with "
            'attn_implementation="eager".'
        )
    else:
        out, weights = _sdpa(call, mask), None
    if empty_rows is not None:  # (B or 1, 1, Sq, 1)
        out = out.masked_fill(empty_rows.transpose(1, 2), 0.0)
    return out, weights


def _sdpa(call: Call, mask: Tensor | None) -> Tensor:
    # PyTorch aligns causal at the top left, right for Sq == Sk only: any other comes as a mask.
    extra = {
        name: x
        for name, x in call.extra.items()
        if name not in ("is_causal", "softcap", "output_attentions", "own_code")
    }
    return _compat.sdpa_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        is_causal=mask is None and call.causal,
        **extra,
    )[0]


def _eager(call: Call, eager: Callable, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if mask is None and call.causal:
        device = call.query.device
        mask = masks.dense(None, call.seqlen_q, call.seqlen_k, causal=True, device=device)
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(call.query.dtype).min
        mask = torch.zeros((), dtype=call.query.dtype, device=mask.device).where(mask, lowest)
    return eager(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        **call.extra,
    )


def _dense_mask(call: Call) -> Tensor | None:
    found, device = call.found, call.query.device
    if found is None and (positions := call.unchecked_positions) is not None:
        ids = packed_ids_unread(positions).expand(call.query.shape[0], -1)
        found = Segments(ids, ids, call.causal, None)
    if found is None and call.window == (-1, -1) and call.seqlen_q in (1, call.seqlen_k):
        return None  # SDPA's own causal flag says it
    mask = masks.dense(found, call.seqlen_q, call.seqlen_k, causal=call.causal, device=device)
    if call.window != (-1, -1):
        left, right = call.window
        rows = torch.arange(call.seqlen_q, device=device)[:, None] + call.seqlen_k - call.seqlen_q
        distance = (rows - torch.arange(call.seqlen_k, device=device))[None, None]  # (1, 1, Sq, Sk)
        near = (distance <= left) & (distance >= -right)
        mask = near if mask is None else mask & near
    return mask


def _dense_of_given(call: Call) -> Tensor:
    """The boolean mask (1, 1, Sq, Sk) of the caller's cu_seqlens: a batch of one, end to end.

    Causal and windows are aligned at the last token of each sequence. Never reads the device.
    """
    ids, to_end = [], []
    for name, length in (("cu_seq_lens_q", call.seqlen_q), ("cu_seq_lens_k", call.seqlen_k)):
        ends, tokens = call.extra[name].long(), torch.arange(length, device=call.query.device)
        sequence = torch.searchsorted(ends, tokens, right=True)  # from 1; beyond the end: B + 1
        outside = sequence == ends.shape[0]
        to_end.append(ends[sequence.masked_fill(outside, 0)] - tokens)
        ids.append(sequence.masked_fill(outside, 0))
    seen = (ids[0][:, None] == ids[1]) & (ids[1] > 0)
    distance = to_end[1] - to_end[0][:, None]  # (Sq, Sk): how far the key is before the query
    left, right = call.window
    if call.module_causal:
        right = 0
    if left >= 0:
        seen = seen & (distance <= left)
    if right >= 0:
        seen = seen & (distance >= -right)
    return seen[None, None]


def _open_empty_rows(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask with empty rows opened, and those rows (B or 1, 1, Sq, 1), or None.

    A softmax over nothing is NaN, forward and backward: such rows see every key, and are set to 0
    afterwards.
    """
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return mask, None
    empty = ~mask.any(-1, keepdim=True)
    return mask | empty, empty
