"""The attention function registered with Transformers: the kernel, or an explained fallback.

    out, weights = attention_forward(module, q, k, v, attention_mask, dropout=0.1, scaling=0.125)

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

from hf_flashattn import _compat, environment, functional, masks, ops, paged, report, support
from hf_flashattn.call import Call, known_as_plain
from hf_flashattn.fallback import fall_back
from hf_flashattn.families.recognise import padding_alone
from hf_flashattn.key_bits import turned, words_of
from hf_flashattn.masks import KeyBits, KeyRange, Packed, Segments
from hf_flashattn.report import SETTINGS
from hf_flashattn.unpadding import VarlenPlan


@dataclass(frozen=True)
class Settings:
    """What patch_model decided for one module."""

    name: str = ""
    fallback: str = "sdpa"
    strict: bool = False
    excluded: str | None = None  # why the user keeps this module off the kernel
    tried: bool = False  # patch_model tries the model out: on the fallback, and nothing is counted


@torch.compiler.assume_constant_result  # a trace must neither read nor guard on the environment
def _settings_of_registered_name() -> Settings:
    """For the modules that patch_model has not seen. A compiled graph keeps those of its trace."""
    return _settings_of(environment.current())


@functools.lru_cache
def _settings_of(wish: environment.Environment) -> Settings:
    return Settings("", wish.fallback, wish.strict, wish.excluded)


class FallbackError(RuntimeError):
    """strict=True or HF_FLASHATTN_STRICT=1, and a call could not run on the kernel."""


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
    """Transformers' attention interface.

    Args:
        module: the attention module; its calls are counted, its Settings obeyed.
        query: (B, H, Sq, D).  key, value: (B, Hkv, Sk, D). fp32 is cast under autocast.
        attention_mask: what masks.attention_mask made, a mask of the caller's own (bool or
            additive, (B, 1, Sq, Sk)), or None.
        dropout: of the attention weights.  scaling: 1 / sqrt(D) unless told.
        is_causal: unless told, what the module says.
        kwargs: whatever the model passes on, such as position_ids, sliding_window, softcap,
            cu_seq_lens_q. own_code: () -> out, the module's own attention, where it has no eager
            function.

    Returns: out (B, Sq, H, D), and the attention weights or None.

    Raises:
        FallbackError: strict, and the kernel cannot take the call.
        NotImplementedError: neither the kernel nor a fallback can.
    """
    if kwargs.get("sliding_window") is not None and _compat.misstates_window(type(module)):
        kwargs["sliding_window"] = None
    if not torch.compiler.is_compiling():
        out = _quick(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
        if out is not None:
            return out, None
    if kwargs.get("cache") is not None:
        key, value, kwargs = paged.read_cache(module, key, value, kwargs)
    query, key, value = _autocast(query, key, value)
    if attention_mask is not None and attention_mask.is_floating_point():
        pattern = padding_alone(attention_mask) if kwargs.get("sliding_window") is None else None
        if pattern is not None:
            attention_mask, is_causal = pattern.carrier(query.shape[0], query.shape[2]), False
    call = Call(
        module,
        query,
        key,
        value,
        attention_mask,
        None
        if attention_mask is None
        else masks.decode(attention_mask, query.shape[2], key.shape[2]),
        _says_causal(module, attention_mask, is_causal),
        dropout,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        kwargs,
    )
    settings = getattr(module, SETTINGS, None)
    if settings is None:
        settings = _settings_of_registered_name()
    if settings.tried:
        return fall_back(call, settings.fallback)
    reason = settings.excluded or _why_not(call)
    if reason is None:
        implementation, reason = _supported(call)
    if reason is None:
        report.count_kernel(module, implementation)
        return _run(call), None
    _refuse_or_count(module, settings, reason)
    return fall_back(call, settings.fallback)


# ---- the short way ------------------------------------------------------------------------------

# Of a call's keywords, those that may ask for something else: see _is_plain.
_DECISIVE = frozenset(
    (
        "block_table",
        "cache",
        "cu_seq_lens_q",
        "deterministic",
        "indices",
        "output_attentions",
        "position_bias",
        "position_ids",
        "read_index",
        "s_aux",
        "sinks",
        "sliding_window",
        "softcap",
    )
)


def _quick(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    extra: dict[str, Any],
) -> Tensor | None:
    """The call of most layers, at a third of the cost: dense, hiding only later keys and padding.

    out (B, Sq, H, D), or None for a call that is not surely one of these: attention_forward then
    asks everything. It would do the same with those that are: nothing is remembered here but what
    support.explain said.
    """
    if not type(query) is type(key) is type(value) is Tensor:
        return None
    settings = module.__dict__.get(SETTINGS)
    if settings is None:
        settings = _settings_of_registered_name()
    if settings.tried or settings.excluded is not None:
        return None
    if _compat.attentions_wanted_of(module):
        return None
    if torch._C._is_any_autocast_enabled():
        query, key, value = _autocast(query, key, value)
    shape_q, shape_k, dtype = query.shape, key.shape, query.dtype
    if shape_k != value.shape or shape_k[3] != shape_q[3] or shape_k[0] != shape_q[0]:
        return None
    if dtype is not key.dtype or dtype is not value.dtype:
        return None
    start = length = None
    if mask is None:
        causal = _says_causal(module, None, is_causal)
    else:
        found = masks.recall(mask)
        if type(found) is not KeyRange or found.used is not None or found.window is not None:
            return None
        causal = found.causal
        if not found.full:
            start, length = found.start, found.length
    if not _DECISIVE.isdisjoint(extra) and not _is_plain(extra, mask, causal, shape_q, shape_k[2]):
        return None
    causal = causal and shape_q[2] > 1
    deterministic = torch.are_deterministic_algorithms_enabled()
    verdict = _explain_once(
        query.device,
        dtype,
        shape_q[3],
        shape_q[1],
        shape_k[1],
        causal,
        dropout,
        (-1, -1),
        0.0,
        deterministic,
        torch.is_grad_enabled() and query.requires_grad,
        False,  # bias
        False,  # sinks
    )
    kernel = verdict.kernel
    if kernel is None or (query.is_cuda and not ops.library_status().loaded):
        return None
    report.count_kernel(module, kernel)
    if scaling is None:
        scaling = shape_q[3] ** -0.5
    return functional.dense_attention(
        query, key, value, start, length, dropout, scaling, causal, deterministic, True
    )


def _is_plain(
    extra: dict[str, Any], mask: Tensor | None, causal: bool, shape_q: torch.Size, seqlen_k: int
) -> bool:
    """Whether the keywords surely ask for nothing that a dense call does not give."""
    for name in _DECISIVE.intersection(extra):
        wish = extra[name]
        if wish is None or wish is False:
            continue
        if name == "sliding_window":
            if not isinstance(wish, int) or seqlen_k > wish:
                return False
        elif name == "position_ids":  # which may say packed: see Call.unchecked_positions
            batch, _, seqlen_q, _ = shape_q
            if mask is not None or seqlen_q == 1 or seqlen_q != seqlen_k:
                continue
            if causal and extra.get("use_cache") is False:
                continue
            if not known_as_plain(wish, batch) or _captured(wish):
                return False
        elif name != "softcap" or wish:
            return False
    return True


def _captured(x: Tensor) -> bool:
    """_compat.is_tracing of an ordinary tensor outside torch.compile, at a tenth of its cost."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return capturing or torch.jit.is_tracing()


def _says_causal(module: nn.Module, mask: Tensor | None, is_causal: bool | None) -> bool:
    if mask is None and _compat.misstates_causality(type(module)):
        return False
    return bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))


def refuse_or_count(module: nn.Module, reason: str) -> None:
    """Counts a call that runs on the module's own code; FallbackError if that is not allowed."""
    settings = getattr(module, SETTINGS, None) or _settings_of_registered_name()
    _refuse_or_count(module, settings, settings.excluded or reason)


def _refuse_or_count(module: nn.Module, settings: Settings, reason: str) -> None:
    if settings.strict and settings.excluded is None:
        wish = "HF_FLASHATTN_STRICT=1" if environment.current().strict else "strict=True"
        raise FallbackError(
            f"hf_flashattn: {wish}, and {settings.name or type(module).__name__} cannot run "
            f"on the kernel: {reason}. "
            "Change the call, leave the module out with exclude=[...], or patch with strict=False."
        )
    report.count_fallback(module, reason)


# ---- what runs -----------------------------------------------------------------------------------


def _why_not(call: Call) -> str | None:
    """Why this call cannot go to the kernel, from what only Transformers knows, or None."""
    extra, mask, found = call.extra, call.mask, call.found
    if isinstance(found, Packed):
        mask, found = found.mask, found.found
    if call.weights_wanted:
        return "output_attentions=True: the kernel never builds attention weights"
    # Of the module, and so told before what the mask of this call says.
    bias, sinks = extra.get("position_bias") is not None, _sinks(call) is not None
    if (bias or sinks) and (refused := support.explain_features(bias=bias, sinks=sinks)):
        return refused.reason
    if extra.get("block_table") is not None:
        raise NotImplementedError(
            "hf_flashattn: expected the keys and values themselves, got the block table of a paged "
            "cache. Nearest supported: continuous batching by index. Next step: "
            "ContinuousBatchingConfig(max_blocks_per_request=0)."
        )
    if extra.get("indices") is not None:
        raise NotImplementedError(
            f"hf_flashattn: expected attention to all keys, got the indices of chosen ones from "
            f"{type(call.module).__name__}. Nearest supported: the model on its own masks. Next "
            'step: load it with attn_implementation="eager".'
        )
    if mask is not None and found is None and not _is_bias(call):
        kind = "boolean" if mask.dtype == torch.bool else "additive"
        if call.window != (-1, -1):
            return f"sliding window of {extra['sliding_window']} tokens: {kind} {mask.dim()}-D mask"
        return (
            f"{kind} {mask.dim()}-D mask: made by the caller, or neither causal, padded nor packed"
        )
    if isinstance(found, Segments) and found.plan is None and not call.has_lengths:
        return (
            "packed: a trace cannot count the sequences; pass cu_seq_lens_q, cu_seq_lens_k, "
            "max_length_q and max_length_k too, as DataCollatorWithFlattening and TRL do"
        )
    if (positions := call.unchecked_positions) is not None and _compat.is_tracing(positions):
        return "position_ids from the caller: packed or not cannot be seen while tracing"
    if _adds_bias(call) and support.explain_features(bias=True) is None and _is_varlen(call):
        return "adds a position bias to packed sequences"
    if call.value.shape[-1] != call.query.shape[-1]:
        return f"head dims differ: queries {call.query.shape[-1]}, values {call.value.shape[-1]}"
    if call.key.shape[0] != call.query.shape[0] or call.key.shape[:3] != call.value.shape[:3]:
        return "batch sizes of queries and keys differ, or shapes of keys and values"
    if not call.query.dtype == call.key.dtype == call.value.dtype:
        return f"mixed dtypes: {call.query.dtype}, {call.key.dtype}, {call.value.dtype}"
    return None


def _adds_bias(call: Call) -> bool:
    """Whether something is added to the scores: a position bias, or a mask that must be added."""
    return call.extra.get("position_bias") is not None or _is_bias(call)


def _is_bias(call: Call) -> bool:
    """Whether the mask, in which nothing simpler was found, goes to a kernel as a bias.

    Only the fallback knows masks and windows that may or may not be in them.
    """
    if call.mask is None or call.found is not None or call.window != (-1, -1):
        return False
    return support.explain_features(bias=True) is None


def _is_varlen(call: Call) -> bool:
    """Whether the call runs without padding: a bias is of rows as long as the longest."""
    if call.has_lengths or not isinstance(call.found, KeyRange | None):
        return True
    return call.packed_plan() is not None


def _sinks(call: Call) -> Tensor | None:
    """(H,), under either of its names in Transformers: a score beside those of each row."""
    sinks = call.extra.get("s_aux")
    return call.extra.get("sinks") if sinks is None else sinks


def _bias(call: Call) -> Tensor | None:
    """What a kernel adds to the scores: (B or 1, H or 1, Sq or 1, Sk), -inf hides."""
    bias, mask = call.extra.get("position_bias"), call.mask if _is_bias(call) else None
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=call.query.dtype, device=mask.device).where(mask, -torch.inf)
    return mask if bias is None else bias if mask is None else bias + mask


def _supported(call: Call) -> tuple[str, str | None]:
    """(the implementation that runs, None) or ("", the reason): support.explain decides."""
    query, extra = call.query, call.extra
    what = (
        query.device,
        query.dtype,
        query.shape[-1],
        query.shape[1],
        call.key.shape[1],
        call.causal,
        call.dropout,
        call.window,
        extra.get("softcap") or 0.0,
        call.deterministic,
        torch.is_grad_enabled() and query.requires_grad,
        _adds_bias(call),
        _sinks(call) is not None,
    )
    explain = _explain if torch.compiler.is_compiling() else _explain_once
    verdict = explain(*what)
    if not verdict.ok:
        return "", verdict.reason
    # Explaining builds nothing: whether the library can be had shows here, at the first call.
    if not report.is_cpu_implementation(verdict.kernel) and (missing := ops.missing_library()):
        return "", f"the CUDA library is missing: {missing}"
    return verdict.kernel, None


def _explain(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    heads_q: int,
    heads_k: int,
    causal: bool,
    dropout_p: float,
    window: tuple[int, int],
    softcap: float,
    deterministic: bool,
    needs_grad: bool,
    bias: bool,
    sinks: bool,
) -> support.Support:
    return support.explain(
        support.Request(
            device.type,
            support.compute_capability(device),
            dtype,
            head_dim,
            heads_q,
            heads_k,
            causal=causal,
            dropout_p=dropout_p,
            window=window,
            softcap=softcap,
            bias=bias,
            sinks=sinks,
            deterministic=deterministic,
            needs_grad=needs_grad,
        )
    )


# By what the layers of a model have in common: making and hashing a Request costs 5 us a call.
_explain_once = functools.lru_cache(maxsize=1024)(_explain)


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autocast does for scaled_dot_product_attention: fp32 operands go to its dtype."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = (
                x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value)
            )
    return query, key, value


# ---- the kernel ----------------------------------------------------------------------------------


def _run(call: Call) -> Tensor:
    """out (B, Sq, H, D)."""
    found, plan = call.found, None
    if isinstance(found, KeyBits) or (isinstance(found, KeyRange) and not found.full):
        return _run_dense(call, found)
    if not call.has_lengths and (found is None or isinstance(found, KeyRange)):
        plan = call.packed_plan()
        if plan is None:
            return _run_dense(call, None)
    q, k, v = _heads_last(call.query, call.key, call.value)
    options = _options(call)
    if isinstance(found, Segments) and found.plan is not None:
        return _run_varlen(q, k, v, found.plan, options)
    if isinstance(found, Packed):
        return _run_varlen(q, k, v, found.unpadding.varlen, options)
    if plan is not None:
        return _run_varlen(q, k, v, plan, options)
    return _run_given(q, k, v, call.extra, options)


def _options(call: Call) -> dict[str, Any]:
    """The keywords of flash_attn_func and flash_attn_varlen_func."""
    options = {
        "dropout_p": call.dropout,
        "softmax_scale": call.scaling,
        "causal": call.causal,
        "deterministic": call.deterministic,
    }
    if (window := call.window) != (-1, -1):
        options["window_size"] = window
    if softcap := call.extra.get("softcap"):
        options["softcap"] = softcap
    if (sinks := _sinks(call)) is not None:
        options["s_aux"] = sinks
    if (bias := _bias(call)) is not None:
        options["attn_bias"] = bias
    return options


# What dense_attention, the short way of flash_attn_func, does not take.
_BEYOND_DENSE = frozenset(("window_size", "softcap", "s_aux", "attn_bias"))


def _run_dense(call: Call, keys: KeyRange | KeyBits | None) -> Tensor:
    """As _quick runs it, to the tensors that are saved: checkpoints compare one call with another.

    A trace sees the transposes instead, which cost nothing there, and the op of every call.
    """
    q, k, v = call.query, call.key, call.value
    start, length = (None, None) if keys is None else (keys.start, keys.length)
    bits = keys.bits if isinstance(keys, KeyBits) else None
    if isinstance(keys, KeyBits) and keys.turn is not None:
        k, v = (turned(x, keys.turn, dim=2) for x in (k, v))
    if keys is not None and keys.used is not None:
        k, v = k[:, :, : keys.used], v[:, :, : keys.used]
        bits = None if bits is None else bits[:, : words_of(keys.used)]
    options = _options(call)
    if "attn_bias" in options:  # of a static cache, of which the keys were cut
        options["attn_bias"] = options["attn_bias"][..., : k.shape[2]]
    beyond = not _BEYOND_DENSE.isdisjoint(options) or bits is not None
    if torch.compiler.is_compiling() or beyond:
        q, k, v = _heads_last(q, k, v)
        shown = {"key_start": start, "key_len": length, "key_bits": bits}
        return functional.flash_attn_func(q, k, v, **options, **shown)
    return functional.dense_attention(q, k, v, start, length, **options, heads_first=True)


def _heads_last(*tensors: Tensor) -> list[Tensor]:
    """(B, H, S, D) -> (B, S, H, D): views, as the kernel takes strides, but of those it cannot."""
    if tensors[0].is_cuda:
        tensors = tuple(map(_aligned, tensors))
    return [x.transpose(1, 2) for x in tensors]


def _aligned(x: Tensor) -> Tensor:
    """x, copied only where TMA could not load it: strides and address in multiples of 16 bytes."""
    sizes, strides = x.shape, x.stride()
    odd = strides[-1] != 1 or any(
        n > 1 and stride % 8 for n, stride in zip(sizes[:-1], strides[:-1], strict=True)
    )
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
    """cu_seqlens from the caller: a flattening collator, a vision tower, continuous batching."""
    q_, k_, v_ = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    cu_q, cu_k = (extra[f"cu_seq_lens_{side}"].to(torch.int32) for side in "qk")
    max_q, max_k = (int(extra[f"max_length_{side}"]) for side in "qk")
    if paged.is_paged(extra) and not torch.compiler.is_compiling():
        # Transformers made them; rows beyond their end pad the batch to the size of a CUDA graph.
        cu_q, cu_k = (
            support.trust(cu.view_as(cu), x.shape[0], longest)
            for cu, x, longest in ((cu_q, q_, max_q), (cu_k, k_, max_k))
        )
    out = functional.flash_attn_varlen_func(q_, k_, v_, cu_q, cu_k, max_q, max_k, **options)
    return out.view(q.shape[0], q.shape[1], *out.shape[1:])
