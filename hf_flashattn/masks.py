"""The mask function registered with Transformers, and the small tensors it hands to the layers.

A layer needs to know which keys each row of the batch sees. Instead of a (B, 1, Sq, Sk) mask, the
mask function makes one small int32 tensor per forward, which all layers share. It is a tensor
because `generate`, gradient checkpointing, device maps and torch.compile carry tensors through; its
shape says what it is, its contents say the whole truth, and what was computed from it once is
remembered beside it.

    KeyRange    (B, 1, 1, 2 | 3 | 4)  [start, length, 0, keys used]: padding; static caches
                (B, 1, 4 + window, 2 | 3)  the same in every line: a sliding window on top
    KeyBits     (B, 1, 3, 2 + words)  [start, length, a bit for each key] three times: any padding
    Segments    (B, 1, 2, Sq + Sk)    numbers of query and key tokens, 0 is nowhere: holes, packing
    Packed      (1, 1, 4, total)      an encoder's batch without its padding: encoder_unpadding.py

A causal KeyRange has 3 columns (4 if only the first `keys used` keys exist yet), a causal KeyBits
or Segments one column more (KeyBits two, likewise): causality is part of the shape, so that it is
known without reading the device. KeyBits with three columns more were turned: the keys in use, of
which nobody may read how many there are, have become the last ones, and the layer turns its keys
likewise.

Reading the device: outside torch.compile, once per 2-D mask, to learn whether the kept keys are
neighbours (KeyRange) or not (Segments; in a static cache KeyBits). Under torch.compile and CUDA
graph capture, never: a 2-D mask becomes KeyBits, right for every mask, which the kernels read
themselves. Packed positions become Segments whose layers need the caller's cu_seq_lens, as no trace
can count the sequences. Patterns that none of these can express become Transformers' boolean mask,
and the layer falls back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_flashattn import _compat, support
from hf_flashattn.descriptors import (
    Descriptor,
    KeyBits,
    KeyRange,
    Packed,
    Segments,
    Tokens,
)
from hf_flashattn.key_bits import kept_keys, key_bits_of, turned, words_of
from hf_flashattn.notes import TensorNotes, begin_forward
from hf_flashattn.unpadding import Unpadding, plan_varlen

_DECODED = TensorNotes()  # carrier -> what decode() made of it
_KNOWN = TensorNotes()  # mask -> it on the CPU


class TracedFacts:
    """What the caller of the model being traced passed; only read and written while tracing.

    Transformers cannot tell packed from plain `position_ids` while tracing and then assumes packed.
    Whether the caller passed any is known to the hook of `patch_model`, which leaves it here for
    the mask function of the same config.
    """

    def __init__(self) -> None:
        self.config: Any = None
        self.position_ids_given = True


TRACED = TracedFacts()


# ---- the mask function ---------------------------------------------------------------------------


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Transformers' mask interface.

    Args:
        q_offset: where the queries start among the keys; a tensor under a static cache.
        kv_offset: how many keys before the first one a sliding cache has dropped.
        mask_function: what each query may see; causal unless told.
        attention_mask: bool (B, at most kv_length), True is a token.
        kwargs: the rest of the interface, for Transformers' own mask where ours cannot say it.

    Returns: None where every key counts (or causal by the module), a carrier (int32, see above), or
        Transformers' boolean mask (B, 1, Sq, Sk).
    """
    arguments = dict(
        kwargs,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
    )
    if mask_function is not None:
        arguments["mask_function"] = mask_function
    device = (
        torch.device(kwargs.get("device", "cpu"))
        if attention_mask is None
        else attention_mask.device
    )
    tracing = _compat.is_tracing(attention_mask)
    if not tracing:
        begin_forward()
    pattern = _pattern(mask_function, kwargs, tracing)
    if pattern is None and _traced_packing(mask_function, arguments):
        ids = _traced_ids(mask_function, batch_size, q_length, device)
        return encode_segments(ids, ids, causal=True)
    if (
        pattern is None
        or not isinstance(kv_offset, int)
        or (kv_offset != 0 and pattern.packed_ids is not None)
        or (_windowed(pattern, kv_length) and not _window_runs(pattern, arguments, tracing))
        or _must_materialize(pattern, q_length, kwargs)
    ):
        return _compat.explicit_mask(**arguments)
    if kv_offset != 0:  # a sliding cache that has dropped its first keys: count from what it holds
        q_offset = q_offset - kv_offset
        if attention_mask is not None:
            attention_mask = attention_mask[:, kv_offset:]
        arguments.update(q_offset=q_offset, kv_offset=0, attention_mask=attention_mask)

    if pattern.packed_ids is not None:
        if q_length != kv_length:
            return _compat.explicit_mask(**arguments)
        ids = pattern.packed_ids.expand(batch_size, -1) + 1
        return encode_segments(ids, ids, causal=pattern.causal)

    if _windowed(pattern, kv_length):
        return _range_with_window(pattern, arguments, device)
    if pattern.causal and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_length):
        return _preallocated(arguments, device, tracing)
    if attention_mask is None:
        return None
    kept = _fit(attention_mask, kv_length)
    if tracing:
        return encode_bits(kept, causal=pattern.causal and q_length > 1)
    return padded(kept, q_length, causal=pattern.causal)


def stated_mask(**arguments: Any) -> Tensor:
    """attention_mask, but never None: for models whose modules do not say whether they are causal.

    Models that were only ever run on eager say it in the mask alone: `is_causal` may be missing on
    an encoder's module, or False on a decoder's.
    """
    carrier = attention_mask(**arguments)
    if carrier is not None:
        return carrier
    mask = arguments.get("attention_mask")
    pattern = _pattern(arguments.get("mask_function"), arguments, _compat.is_tracing(mask))
    device = arguments.get("device", "cpu") if mask is None else mask.device
    start = torch.zeros(arguments["batch_size"], dtype=torch.int32, device=device)
    length = start + arguments["kv_length"]
    return encode_range(start, length, causal=pattern.causal, full=True)


def legible_mask(**arguments: Any) -> Tensor | None:
    """attention_mask in Transformers' own form, bool (B, 1, Sq, Sk): for models that read it.

    What the carrier would have said is remembered of this tensor, and found by layers that get it
    as it is: neither copied nor written to. Under torch.compile it is not.
    """
    carrier = attention_mask(**arguments)
    if carrier is None or carrier.dtype == torch.bool:
        return carrier
    legible = _compat.explicit_mask(**arguments)
    found = None if torch.compiler.is_compiling() else _DECODED.get(carrier)
    if found is not None:
        _DECODED[legible] = found
    return legible


def _pattern(
    mask_function: Any, kwargs: dict[str, Any], tracing: bool
) -> _compat.MaskPattern | None:
    if mask_function is None or mask_function is _compat.masking_utils.causal_mask_function:
        return _compat.MaskPattern(causal=True)
    if mask_function is _compat.masking_utils.bidirectional_mask_function:
        return _compat.MaskPattern()
    nothing_packed = TRACED.config is kwargs.get("config") and not TRACED.position_ids_given
    if tracing and nothing_packed and _compat.traced_packing_only(mask_function, kwargs):
        return _compat.MaskPattern(causal=True, unpacked=True)
    # Closures cannot be read under torch.compile.
    return None if torch.compiler.is_compiling() else _compat.describe_mask(mask_function)


def _traced_packing(mask_function: Any, arguments: dict[str, Any]) -> bool:
    """Under torch.compile: packed sequences from their first token on, and nothing else?"""
    return (
        torch.compiler.is_compiling()
        and arguments["attention_mask"] is None
        and arguments["q_length"] == arguments["kv_length"]
        and isinstance(arguments["q_offset"], int)
        and arguments["q_offset"] == arguments["kv_offset"] == 0
        and _compat.traced_packing_only(mask_function, arguments)
    )


def _traced_ids(mask_function: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """int32 (B, S): the number of each token's sequence, from 1.

    A token that does not see the one before it is the first of its sequence.
    """
    rows = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(1, length, device=device)[None]
    sees = mask_function(rows, torch.zeros_like(rows), tokens, tokens - 1)  # (B, S - 1)
    return F.pad((~sees).cumsum(-1), (1, 0)).to(torch.int32) + 1


def _windowed(pattern: _compat.MaskPattern, kv_length: int) -> bool:
    return pattern.window is not None and kv_length > pattern.window


def _window_runs(pattern: _compat.MaskPattern, arguments: dict[str, Any], tracing: bool) -> bool:
    """Can a KeyRange say this windowed pattern, to kernels that have windows?"""
    q_length, kv_length, q_offset = (arguments[x] for x in ("q_length", "kv_length", "q_offset"))
    window = pattern.window - 1, 0 if pattern.causal else pattern.window - 1
    return (
        support.explain_features(window=window, causal=pattern.causal) is None
        and pattern.packed_ids is None
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_length
        and arguments["kv_offset"] == 0
        and not (tracing and arguments["attention_mask"] is not None)
    )


def _range_with_window(
    pattern: _compat.MaskPattern, arguments: dict[str, Any], device: torch.device
) -> Tensor:
    """A KeyRange, or Transformers' boolean mask if there are holes, for distances count them."""
    batch, kv_length, mask = (arguments[x] for x in ("batch_size", "kv_length", "attention_mask"))
    start = torch.zeros(batch, dtype=torch.int32, device=device)
    length, tokens = start + kv_length, None
    if mask is not None:
        kept = _fit(mask, kv_length)
        tokens = Tokens(kept, _read(kept))
        start, length, neighbours = _range_of(tokens.known)
        if not bool(neighbours.all()):
            return _compat.explicit_mask(**arguments)
        start, length = torch.stack([start, length]).to(device, non_blocking=True)
    causal = pattern.causal and arguments["q_length"] > 1
    return encode_range(start, length, causal=causal, tokens=tokens, window=pattern.window)


def _must_materialize(pattern: _compat.MaskPattern, q_length: int, kwargs: dict[str, Any]) -> bool:
    """Did the model ask for a real mask, to combine it with another?

    For one query the same flag only means a compiled decode.
    """
    if pattern.packed_ids is not None or pattern.unpacked:
        return False  # Transformers itself says "no skip" when it composes packing
    if pattern.causal:
        return q_length > 1 and not kwargs.get("allow_is_causal_skip", True)
    return not kwargs.get("allow_is_bidirectional_skip", True)


def padded(kept: Tensor, q_length: int, *, causal: bool) -> Tensor | None:
    """kept: bool (B, Sk). One read of the device, of all of it: asking there takes 15 launches."""
    known = _read(kept)
    if bool(known.all()):
        return None
    start, length, neighbours = _range_of(known)
    if bool(neighbours.all()):
        start, length = torch.stack([start, length]).to(kept.device, non_blocking=True)
        return encode_range(start, length, causal=causal, tokens=Tokens(kept, known))

    def ids(kept: Tensor) -> tuple[Tensor, Tensor]:
        key_ids = kept.to(torch.int32)
        if causal:  # the queries are the last tokens: those dropped as keys are dropped as queries
            return key_ids[:, -q_length:], key_ids
        return key_ids.new_ones(kept.shape[0], q_length), key_ids

    return encode_segments(*ids(kept), causal=causal, known=ids(known), tokens=Tokens(kept, known))


def _read(kept: Tensor) -> Tensor:
    """`kept` on the CPU; read once, where a model makes several masks of the same tensor."""
    known = _KNOWN.get(kept)
    if known is None or kept.is_inference():
        copy = kept.cpu()
        known = _KNOWN[kept] = copy.clone() if copy is kept else copy
    return known


def _preallocated(arguments: dict[str, Any], device: torch.device, tracing: bool) -> Tensor:
    """Causal, with keys beyond the last query that do not exist yet: a static cache.

    One query: what it sees ends behind it, on the device. Several: the last query must meet the
    last key, so those beyond are cut off. That reads q_offset; where nothing may be read, the keys
    are turned.
    """
    batch, q_length, kv_length = (
        arguments["batch_size"],
        arguments["q_length"],
        arguments["kv_length"],
    )
    q_offset, mask = arguments["q_offset"], arguments["attention_mask"]
    if q_length == 1:
        used, exists = None, torch.arange(kv_length, device=device) <= q_offset  # (Sk,)
        kept = exists.expand(batch, -1) if mask is None else _fit(mask, kv_length) & exists
        if mask is None:
            start, length, _ = _range_of(kept)
            return encode_range(start, length, causal=False)
        if tracing:
            return encode_bits(kept, causal=False)
    elif tracing:
        used = torch.zeros((), dtype=torch.int32, device=device) + (q_offset + q_length)
        kept = (torch.arange(kv_length, device=device) < used).expand(batch, -1)
        kept = kept if mask is None else _fit(mask, kv_length) & kept
        return encode_bits(turned(kept, used), causal=True, turn=used)
    else:
        used = int(q_offset) + q_length
        if used > kv_length:
            return _compat.explicit_mask(**arguments)
        if mask is None:
            zeros = torch.zeros(batch, dtype=torch.int32, device=device)
            return encode_range(zeros, zeros + used, causal=True, used=used)
        kept = _fit(mask, used)
    tokens = Tokens(kept, _read(kept))
    start, length, neighbours = _range_of(tokens.known)
    if not bool(neighbours.all()):
        return encode_bits(_fit(kept, kv_length), causal=q_length > 1, used=used)
    start, length = torch.stack([start, length]).to(device, non_blocking=True)
    return encode_range(start, length, causal=q_length > 1, used=used, tokens=tokens)


def _fit(mask: Tensor, length: int) -> Tensor:
    """bool (B, length): cut or continued with False."""
    missing = length - mask.shape[-1]
    if missing == 0:
        return mask
    if missing < 0:
        return mask[:, :length]
    # Not F.pad: of what a trace has cast to bool, inductor's code for the CPU does not compile.
    return torch.cat([mask, mask.new_zeros(mask.shape[0], missing)], dim=-1)


def _range_of(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bool (B, S) -> int32 (B,) first kept key, int32 (B,) how many, bool (B,) all neighbours?"""
    flags = kept.to(torch.int32)
    start = flags.argmax(-1)  # the first of the largest: 0 if nothing is kept
    last = kept.shape[-1] - 1 - flags.flip(-1).argmax(-1)
    length = flags.sum(-1)
    neighbours = (last - start + 1 == length) | (length == 0)
    return start.to(torch.int32), length.to(torch.int32), neighbours


# ---- carriers ------------------------------------------------------------------------------------


def encode_range(
    start: Tensor,
    length: Tensor,
    *,
    causal: bool,
    used: int | None = None,
    tokens: Tokens | None = None,
    full: bool = False,
    window: int | None = None,
) -> Tensor:
    """int32 (B, 1, 1, 2), causal 3, with `used` 4. `full` is only remembered, never encoded."""
    columns = [start, length]
    if causal:
        columns.append(torch.zeros_like(start))
    if used is not None:
        columns.append(torch.full_like(start, used))
    carrier = torch.stack(columns, dim=-1)[:, None, None]
    if window is not None:
        carrier = carrier.expand(-1, -1, 4 + window, -1)  # without memory
    if not _compat.is_tracing(carrier):
        start, length = start.contiguous(), length.contiguous()
        found = KeyRange(start, length, causal, used, tokens, full, window)
        _DECODED[carrier] = found
    return carrier


def encode_segments(
    query_ids: Tensor,
    key_ids: Tensor,
    *,
    causal: bool,
    known: tuple[Tensor, Tensor] | None = None,
    tokens: Tokens | None = None,
) -> Tensor:
    """int32 (B, 1, 2, Sq + Sk), causal one column more. The second row is there for the shape.

    known: the numbers on the CPU, where they were read already.
    """
    columns = [query_ids.to(torch.int32), key_ids.to(torch.int32)]
    if causal:
        columns.append(columns[1].new_zeros(key_ids.shape[0], 1))
    carrier = torch.cat(columns, dim=-1)[:, None, None].expand(-1, -1, 2, -1).contiguous()
    if not _compat.is_tracing(carrier):
        plan = plan_varlen(query_ids, key_ids, known)
        _DECODED[carrier] = Segments(*columns[:2], causal, plan, tokens)
    return carrier


def encode_packed(unpadding: Unpadding, mask: Tensor) -> Tensor:
    """int32 (1, 1, 4, total). The contents do not tell all: a copy of this carrier is refused.

    mask: what the layer got for the padded batch.
    """
    carrier = unpadding.query_ids[None, None].expand(1, 1, 4, -1)
    found = _DECODED.get(mask)
    _DECODED[carrier] = Packed(unpadding, mask, found)
    return carrier


def recall(mask: Tensor) -> Descriptor | None:
    """What is remembered of a carrier, without a look at its contents; None for any other mask."""
    return _DECODED.get(mask)


def encode_bits(
    kept: Tensor, *, causal: bool, used: int | None = None, turn: Tensor | None = None
) -> Tensor:
    """int32 (B, 1, 3, 2 + words), causal one column more, with `used` two, turned three.

    kept: bool (B, Sk).  turn: by which kept was turned.
    Never reads the device. The second and third row are there for the shape, without memory.
    """
    start, length, bits = key_bits_of(kept)
    columns = [start[:, None], length[:, None], bits]
    if causal:
        columns.append(torch.zeros_like(columns[0]))
    if used is not None:
        columns.append(torch.full_like(columns[0], used))
    if turn is not None:
        columns += [torch.zeros_like(columns[0]), turn.to(torch.int32).expand_as(columns[0])]
    carrier = torch.cat(columns, dim=-1)[:, None, None].expand(-1, -1, 3, -1)
    if not torch.compiler.is_compiling():  # nothing is read, so a captured graph may hold it too
        _DECODED[carrier] = KeyBits(start, length, bits, causal, used, turn)
    return carrier


def decode(mask: Tensor, seqlen_q: int, seqlen_k: int) -> Descriptor | None:
    """What a carrier says to a layer of seqlen_q queries and seqlen_k keys; None if it is not ours.

    Raises ValueError if a carrier was altered on its way, as masks of the usual form may be.
    """
    if mask.dtype not in (torch.int32, torch.bool) or mask.dim() != 4:
        return None
    known = None if torch.compiler.is_compiling() else _DECODED.get(mask)
    if mask.dtype == torch.bool and known is None:
        return None
    if known is not None:
        if isinstance(known, Segments):
            sizes = known.query_ids.shape[1], known.key_ids.shape[1]
            if sizes != (seqlen_q, seqlen_k):
                raise _altered(mask, seqlen_q, seqlen_k)
        elif isinstance(known, Packed) and known.unpadding.total != seqlen_q:
            raise _altered(mask, seqlen_q, seqlen_k)
        return known
    tracing = _compat.is_tracing(mask)
    # Compared by order alone: of symbols, "in (n, n + 1)" is False to torch.compile.
    rows, width = mask.shape[2], mask.shape[3]
    if mask.shape[1] != 1:
        raise _altered(mask, seqlen_q, seqlen_k)
    if (rows == 1 or rows > 4) and 2 <= width <= 4:
        start, length = mask[:, 0, 0, 0].contiguous(), mask[:, 0, 0, 1].contiguous()
        # Only after a copy to another device is this column read back.
        used = int(mask[0, 0, 0, 3]) if width == 4 else None
        window = rows - 4 if rows > 4 else None
        found = KeyRange(start, length, width > 2, used, window=window)
    elif rows == 2 and 0 <= width - (seqlen_q + seqlen_k) <= 1:
        query_ids, key_ids = mask[:, 0, 0, :seqlen_q], mask[:, 0, 0, seqlen_q : seqlen_q + seqlen_k]
        plan = None if tracing else plan_varlen(query_ids, key_ids)
        found = Segments(query_ids, key_ids, width > seqlen_q + seqlen_k, plan)
    elif rows == 3 and 0 <= (more := width - 2 - words_of(seqlen_k)) <= 3:
        start, length = mask[:, 0, 0, 0].contiguous(), mask[:, 0, 0, 1].contiguous()
        bits = mask[:, 0, 0, 2 : 2 + words_of(seqlen_k)]
        used = int(mask[0, 0, 0, -1]) if more == 2 else None
        turn = mask[0, 0, 0, -1] if more == 3 else None
        found = KeyBits(start, length, bits, more > 0, used, turn)
    else:
        raise _altered(mask, seqlen_q, seqlen_k)
    if not tracing:
        _DECODED[mask] = found
    return found


def _altered(mask: Tensor, seqlen_q: int, seqlen_k: int) -> ValueError:
    return ValueError(
        f"hf_flashattn: expected the attention mask as its mask function made it, for {seqlen_q} "
        f"queries and {seqlen_k} "
        f"keys, got an int32 tensor of shape {tuple(mask.shape)}. The model changes its masks on "
        "their way to the layers; "
        "pass a boolean 4-D mask (B, 1, Sq, Sk), or leave this model out with "
        "patch_model(exclude=...)."
    )


def dense(
    found: Descriptor | None, seqlen_q: int, seqlen_k: int, *, causal: bool, device: torch.device
) -> Tensor | None:
    """The boolean mask (B or 1, 1, Sq, Sk) that says the same, True where a query sees a key.

    None means that it sees all. causal: what holds without a descriptor, which knows its own.
    """
    keys = torch.arange(seqlen_k, device=device)
    mask, last_key = None, seqlen_k - 1
    if isinstance(found, KeyBits):
        causal = found.causal
        kept = kept_keys(found.bits, seqlen_k)
        if found.turn is not None:
            kept, last_key = turned(kept, -found.turn), found.turn - 1
        mask = kept[:, None, None, :]
    elif isinstance(found, KeyRange):
        causal = found.causal
        start, end = found.start[:, None], (found.start + found.length)[:, None]
        mask = ((keys >= start) & (keys < end))[:, None, None, :]  # (B, 1, 1, Sk)
    elif isinstance(found, Segments):
        causal = found.causal
        same = (found.query_ids[:, :, None] == found.key_ids[:, None, :]) & (
            found.key_ids[:, None, :] > 0
        )
        mask = same[:, None]
    if isinstance(found, (KeyRange, KeyBits)) and found.used is not None:
        last_key = found.used - 1
    rows = torch.arange(seqlen_q, device=device)[:, None] + (last_key + 1 - seqlen_q)
    if isinstance(found, KeyRange) and found.window is not None:
        mask = mask & ((keys - rows).abs() < found.window)[None, None]
    if causal and seqlen_q > 1:
        below = (keys <= rows)[None, None]
        mask = below if mask is None else mask & below
    if mask is not None:
        mask = mask.expand(-1, 1, seqlen_q, seqlen_k)
    return mask
