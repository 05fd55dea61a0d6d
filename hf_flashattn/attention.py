"""The attention function registered with Transformers: our kernels where they can, an explained
fallback where not.

    fn(module, q (B, H, Sq, D), k (B, Hkv, Sk, D), v, attention_mask, dropout=, scaling=, **kwargs)
        -> (out (B, Sq, H, D), attention weights or None)

Every call is counted on its module (see report.py). A call that the kernel cannot take goes to
PyTorch's SDPA, or to the model's own eager function where SDPA cannot express it; its reason is
kept. Rows that see no key give 0 in every path.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hf_flashattn import _compat, functional, masks, report, support
from hf_flashattn.masks import Compaction, Descriptor, KeyRange, Segments
from hf_flashattn.unpadding import VarlenPlan, packed_ids, plan_varlen

SETTINGS = "_hf_flashattn"  # the attribute of an attention module that holds its Settings

_PACKED: WeakTensorKeyDictionary = (
    WeakTensorKeyDictionary()
)  # position_ids -> (version, batch, VarlenPlan or None)


@dataclass(frozen=True)
class Settings:
    """What patch_model decided for one module."""

    name: str = ""
    fallback: str = "sdpa"
    strict: bool = False
    excluded: str | None = (
        None  # the reason why this module stays off the kernel by the user's wish
    )


_DEFAULTS = Settings()


class FallbackError(RuntimeError):
    """strict=True, and a call could not run on the kernel."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an attention function, in the terms of the kernel."""

    module: nn.Module
    query: Tensor  # (B, H, Sq, D)
    key: Tensor  # (B, Hkv, Sk, D)
    value: Tensor  # (B, Hkv, Sk, Dv)
    mask: Tensor | None  # as it came
    found: Descriptor | None  # what the mask says, if it is ours
    causal: bool  # of a call without a descriptor
    dropout: float
    scaling: float
    extra: dict[str, Any]

    @property
    def seqlen_q(self) -> int:
        return self.query.shape[2]

    @property
    def seqlen_k(self) -> int:
        return self.key.shape[2]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention interface. Raises FallbackError under strict=True,
    NotImplementedError if nothing fits.
    """
    query, key, value = _autocast(query, key, value)
    call = Call(
        module,
        query,
        key,
        value,
        attention_mask,
        None
        if attention_mask is None
        else masks.decode(attention_mask, query.shape[2], key.shape[2]),
        bool(is_causal if is_causal is not None else getattr(module, "is_causal", True)),
        dropout,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        kwargs,
    )
    settings = getattr(module, SETTINGS, _DEFAULTS)
    reason = settings.excluded or _why_not(call)
    if reason is None:
        implementation, reason = _supported(call)
    if reason is None:
        report.count_kernel(module, implementation)
        return _run(call), None
    if settings.strict and settings.excluded is None:
        raise FallbackError(
            f"hf_flashattn: strict=True, and {settings.name or type(module).__name__} cannot run "
            f"on the kernel: {reason}. "
            "Change the call, leave the module out with exclude=[...], or patch with strict=False."
        )
    report.count_fallback(module, reason)
    return _fall_back(call, settings.fallback)


# ---- what runs -----------------------------------------------------------------------------------


def _why_not(call: Call) -> str | None:
    """The reason why this call cannot go to the kernel, from what only Transformers knows; None
    if there is none.
    """
    extra, mask = call.extra, call.mask
    if extra.get("output_attentions") or _compat.attentions_wanted():
        return "output_attentions=True: the kernel never builds attention weights"
    if extra.get("position_bias") is not None:
        return "adds a position bias to the scores"
    if extra.get("s_aux") is not None:
        return "uses attention sinks (s_aux)"
    if extra.get("cache") is not None:
        return "reads a paged cache (continuous batching)"
    if mask is not None and call.found is None:
        kind = "boolean" if mask.dtype == torch.bool else "additive"
        return (
            f"{kind} {mask.dim()}-D mask: made by the caller, or neither causal, padded nor packed"
        )
    if isinstance(call.found, Segments) and call.found.plan is None:
        return "packed or holed mask made outside the compiled region"
    if call.value.shape[-1] != call.query.shape[-1]:
        return f"head dims differ: queries {call.query.shape[-1]}, values {call.value.shape[-1]}"
    if not call.query.dtype == call.key.dtype == call.value.dtype:
        return f"mixed dtypes: {call.query.dtype}, {call.key.dtype}, {call.value.dtype}"
    return None


def _window(call: Call) -> tuple[int, int]:
    """flash-attn's window of the call: Transformers' sliding_window counts the token itself;
    (-1, -1) if it is idle.
    """
    window = call.extra.get("sliding_window")
    if not isinstance(window, int) or call.seqlen_k <= window:
        return -1, -1
    return window - 1, 0 if call.causal else window - 1


def _supported(call: Call) -> tuple[str, str | None]:
    """(the implementation that runs, None) or ("", the reason): support.explain decides."""
    query = call.query
    request = support.Request(
        query.device.type,
        report.capability(query.device),
        query.dtype,
        query.shape[-1],
        query.shape[1],
        call.key.shape[1],
        causal=_is_causal(call),
        dropout_p=call.dropout,
        window=_window(call),
        softcap=call.extra.get("softcap") or 0.0,
        deterministic=_deterministic(call),
        needs_grad=torch.is_grad_enabled() and query.requires_grad,
    )
    explain = support.explain if torch.compiler.is_compiling() else _explain_once
    verdict = explain(request)
    return (verdict.kernel, None) if verdict.ok else ("", verdict.reason)


@functools.lru_cache(maxsize=1024)
def _explain_once(request: support.Request) -> support.Support:
    return support.explain(request)


def _deterministic(call: Call) -> bool:
    return bool(call.extra.get("deterministic") or torch.are_deterministic_algorithms_enabled())


def _is_causal(call: Call) -> bool:
    causal = call.causal if call.found is None else call.found.causal
    return causal and call.seqlen_q > 1  # one query is the last one: it sees every key


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autocast does for scaled_dot_product_attention: fp32 operands go to its dtype."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (
            x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value)
        )
    return query, key, value


# ---- the kernel ----------------------------------------------------------------------------------


def _run(call: Call) -> Tensor:
    """out (B, Sq, H, D). The transposes are views: the kernel takes strides."""
    q, k, v = (
        _aligned(x).transpose(1, 2) for x in (call.query, call.key, call.value)
    )  # (B, S, H, D)
    found, causal = call.found, _is_causal(call)
    options = {
        "dropout_p": call.dropout,
        "softmax_scale": call.scaling,
        "causal": causal,
        "deterministic": _deterministic(call),
    }
    if isinstance(found, Segments):
        return _run_varlen(q, k, v, found.plan, options)
    if isinstance(found, Compaction):
        return _run_compacted(q, k, v, found, options)
    if isinstance(found, KeyRange):
        if found.used is not None:
            k, v = k[:, : found.used], v[:, : found.used]
        return functional.flash_attn_func(
            q, k, v, **options, key_start=found.start, key_len=found.length
        )
    if call.extra.get("cu_seq_lens_q") is not None:
        return _run_given(q, k, v, call.extra, options)
    plan = _packed_plan(call)
    if plan is not None:
        return _run_varlen(q, k, v, plan, options)
    return functional.flash_attn_func(q, k, v, **options)


def _aligned(x: Tensor) -> Tensor:
    """x, copied only if its strides or its address are not the multiples of 16 bytes that TMA
    loads ask for.
    """
    if x.device.type != "cuda":
        return x
    odd = x.stride(-1) != 1 or any(stride % 8 for stride in x.stride()[:-1])
    if not odd and not torch.compiler.is_compiling():
        odd = x.data_ptr() % 16 != 0
    return x.clone(memory_format=torch.contiguous_format) if odd else x


def _run_varlen(
    q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, options: dict[str, Any]
) -> Tensor:
    out = functional.flash_attn_varlen_func(
        plan.pack_q(q),
        plan.pack_k(k),
        plan.pack_k(v),
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.max_seqlen_q,
        plan.max_seqlen_k,
        **options,
    )
    return plan.unpack(out, q.shape[0], q.shape[1])


def _run_given(
    q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    """cu_seqlens from the caller: a flattening collator, a vision tower."""
    out = functional.flash_attn_varlen_func(
        q.reshape(-1, *q.shape[2:]),
        k.reshape(-1, *k.shape[2:]),
        v.reshape(-1, *v.shape[2:]),
        extra["cu_seq_lens_q"].to(torch.int32),
        extra["cu_seq_lens_k"].to(torch.int32),
        int(extra["max_length_q"]),
        int(extra["max_length_k"]),
        **options,
    )
    return out.view(q.shape[0], q.shape[1], *out.shape[1:])


def _run_compacted(
    q: Tensor, k: Tensor, v: Tensor, found: Compaction, options: dict[str, Any]
) -> Tensor:
    """Kept keys first, so that a length is all the kernel needs; causal: queries in the same
    order, and back.
    """
    causal = options["causal"]
    out = functional.flash_attn_func(
        _reorder(q, found.order) if causal else q,
        _reorder(k, found.order),
        _reorder(v, found.order),
        **options,
        key_start=torch.zeros_like(found.count),
        key_len=found.count,
    )
    return _reorder(out, found.inverse) if causal else out


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """(B, S, H, D) with the tokens of row b in the order order[b]."""
    batch, seqlen = order.shape
    rows = torch.arange(batch, device=x.device)[:, None] * seqlen
    return (
        x.reshape(batch * seqlen, *x.shape[2:])
        .index_select(0, (order + rows).flatten())
        .view(x.shape)
    )


def _packed_plan(call: Call) -> VarlenPlan | None:
    """cu_seqlens of position_ids that restart, where Transformers did not look: a cache, a
    bidirectional model.

    Reads the device once per forward: what came out is remembered with the tensor, for the other
    layers.
    """
    positions = call.extra.get("position_ids")
    if (
        positions is None
        or positions.dim() != 2
        or call.seqlen_q == 1
        or _compat.is_tracing(positions)
    ):
        return None
    if call.seqlen_q != call.seqlen_k or positions.shape[1] != call.seqlen_q:
        return None
    if getattr(call.module, "is_cross_attention", False):
        return None
    if call.causal and call.extra.get("use_cache") is False:
        return None  # create_causal_mask has looked, and would have made a mask
    version = -1 if positions.is_inference() else positions._version
    known = _PACKED.get(positions)
    if known is not None and known[:2] == (version, call.query.shape[0]):
        return known[2]
    ids = packed_ids(positions, strict=True)
    ids = None if ids is None else ids.expand(call.query.shape[0], -1)
    plan = None if ids is None else plan_varlen(ids, ids)
    _PACKED[positions] = (version, call.query.shape[0], plan)
    return plan


# ---- the fallback --------------------------------------------------------------------------------


def _fall_back(call: Call, choice: str) -> tuple[Tensor, Tensor | None]:
    extra = call.extra
    weights_wanted = bool(extra.get("output_attentions")) or _compat.attentions_wanted()
    needs_eager = (
        weights_wanted or extra.get("softcap") is not None or extra.get("s_aux") is not None
    )
    eager = _compat.eager_function(call.module)
    if extra.get("cu_seq_lens_q") is not None and call.found is None:
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
    # PyTorch aligns a causal mask at the top left: right for Sq == Sk only, so that any other comes
    # as a mask.
    extra = {
        name: x
        for name, x in call.extra.items()
        if name not in ("is_causal", "softcap", "output_attentions")
    }
    return _compat.sdpa_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        is_causal=mask is None and _is_causal(call),
        **extra,
    )[0]


def _eager(call: Call, eager: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if mask is None and _is_causal(call):
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
    found = call.found
    plan_ids = None
    if (
        found is None
        and (positions := call.extra.get("position_ids")) is not None
        and _packed_plan(call) is not None
    ):
        plan_ids = packed_ids(positions, strict=True).expand(call.query.shape[0], -1)
        found = Segments(plan_ids, plan_ids, _is_causal(call), None)
    window = _window(call)
    if found is None and window == (-1, -1) and call.seqlen_q in (1, call.seqlen_k):
        return None  # SDPA's own causal flag says it
    device = call.query.device
    mask = masks.dense(found, call.seqlen_q, call.seqlen_k, causal=call.causal, device=device)
    if window != (-1, -1):
        rows = torch.arange(call.seqlen_q, device=device)[:, None] + call.seqlen_k - call.seqlen_q
        distance = (rows - torch.arange(call.seqlen_k, device=device))[None, None]  # (1, 1, Sq, Sk)
        near = (distance <= window[0]) & (distance >= -window[1])
        mask = near if mask is None else mask & near
    return mask


def _dense_of_given(call: Call) -> Tensor:
    """The boolean mask of the caller's cu_seqlens, whose sequences lie one behind the other in a
    batch of one.
    """
    ids = []
    for name, length in (("cu_seq_lens_q", call.seqlen_q), ("cu_seq_lens_k", call.seqlen_k)):
        tokens = torch.arange(length, device=call.query.device)
        ids.append(torch.searchsorted(call.extra[name].long(), tokens, right=True)[None])
    found = Segments(ids[0], ids[1], _is_causal(call), None)
    return masks.dense(found, call.seqlen_q, call.seqlen_k, causal=False, device=call.query.device)


def _open_empty_rows(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A softmax over nothing is NaN, forward and backward: such rows see every key, and are set
    to 0 afterwards.
    """
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return mask, None
    empty = ~mask.any(-1, keepdim=True)
    return mask | empty, empty
