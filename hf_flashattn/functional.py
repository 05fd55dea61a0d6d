"""flash-attn's functions, by flash-attn's names, with its parameters, order, defaults and layouts.

    out = flash_attn_func(q, k, v, dropout_p=0.1, causal=True)      # (B, S, H, D), differentiable

Code written for flash-attn runs unchanged where it uses what is there: full and causal attention,
dropout, GQA and MQA, packed sequences, deterministic gradients. A sliding window, softcap, ALiBi,
attention sinks, a bias and a paged cache raise NotImplementedError. What flash-attn lacks comes as
keywords: key_start and key_len say per batch row which keys are real, so that left- and
right-padded batches run without a copy, and key_bits which of those are holes.

Causal means bottom-right aligned: the last query sees the last key. Rows that see no key give 0
(and no gradient). Under torch.autocast, inputs are cast to its dtype as PyTorch's own matrix
products do. With torch.use_deterministic_algorithms(True) gradients are deterministic whatever
`deterministic` says.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import checks, ops, support

Result = Tensor | tuple[Tensor, Tensor, None]

_NO_WINDOW = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: Tensor | None = None,
    s_aux: Tensor | None = None,
    attn_bias: Tensor | None = None,
) -> Result:
    """softmax(softmax_scale * q k^T + mask) v, per head.

    Args:
        q: (B, Sq, Hq, D).  k, v: (B, Sk, Hkv, D), Hq a multiple of Hkv.
            On CUDA: fp16 or bf16, D a multiple of 8 up to 256. On a CPU: any D, fp32 and
            fp64 too.
        dropout_p: probability of dropping an attention weight, rounded to 1/256ths; 0.0 when
            evaluating.
        softmax_scale: 1 / sqrt(D) unless told.
        causal: row r sees the keys c <= r + Sk - Sq.
        window_size, softcap, alibi_slopes: defaults only, the rest is not there yet; window_size
            (-1, 0) means causal.
        deterministic: gradients bitwise equal from run to run, somewhat slower.
        key_start, key_len: int32 (B,) on q's device, row b sees the keys
            key_start[b] <= c < key_start[b] + key_len[b]; None: from 0, and to the end.
        key_bits: int32 (B, ceil(Sk / 32)) on q's device, and of these keys only those whose bit is
            set: bit c % 32 of word c / 32 for key c. Comes with key_start and key_len, the first
            such key and how many from it to the last; key_bits_of(mask) makes the three.
        s_aux: (Hq,), attention sinks, a score beside those of each row.  attn_bias: added to the
            scores, (B or 1, Hq or 1, Sq or 1, Sk). None only, both are not there yet.

    Returns: out (B, Sq, Hq, D) in q's dtype. With return_attn_probs (out, softmax_lse, None),
        softmax_lse fp32 (B, Hq, Sq); flash-attn's third entry, the dropped probabilities, serves
        its tests and is never built here.

    Raises:
        TypeError, ValueError: tensors that cannot go together; see checks.py.
        NotImplementedError: what is not there yet: a dtype, head dim, GPU or option.
        RuntimeError: CUDA tensors, and the library is missing and cannot be built.
    """
    beyond = alibi_slopes is not None or s_aux is not None or attn_bias is not None
    if window_size != _NO_WINDOW or softcap or beyond:
        causal = _only_what_is_there(
            window_size, causal, softcap, alibi_slopes, s_aux=s_aux, attn_bias=attn_bias
        )
    flags = (dropout_p, softmax_scale, causal, deterministic)
    if return_attn_probs or key_bits is not None or torch.compiler.is_compiling():
        visible = (None, None, key_start, key_len, key_bits)
        out, lse = _attention(q, k, v, visible, 0, 0, *flags)
        return (out, lse, None) if return_attn_probs else out
    return dense_attention(q, k, v, key_start, key_len, *flags)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: Tensor | None = None,
) -> Result:
    """flash_attn_func with kv (B, Sk, 2, Hkv, D): no copy forward, one gradient tensor backward."""
    k, v = _unpack("kv", kv, 2, "(batch, seqlen, 2, heads, head_dim)")
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        key_start=key_start,
        key_len=key_len,
        key_bits=key_bits,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: Tensor | None = None,
) -> Result:
    """flash_attn_func with qkv (B, S, 3, H, D): no copy forward, one gradient tensor backward."""
    q, k, v = _unpack("qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        key_start=key_start,
        key_len=key_len,
        key_bits=key_bits,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
) -> Result:
    """Attention within each sequence of a packed batch.

    Args:
        q: (total_q, Hq, D).  k, v: (total_k, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,) on q's device: 0 and the running sum of the
            lengths; empty sequences are allowed. Their values are read once for each tensor (see
            checks.py).
        max_seqlen_q, max_seqlen_k: the longest lengths, or more.
        block_table: not there yet.
        The others as in flash_attn_func.

    Returns: out (total_q, Hq, D). With return_attn_probs (out, softmax_lse, None), softmax_lse fp32
        (Hq, total_q).

    Raises: as flash_attn_func.
    """
    causal = _only_what_is_there(
        window_size, causal, softcap, alibi_slopes, block_table, s_aux=s_aux
    )
    if not isinstance(cu_seqlens_q, Tensor) or not isinstance(cu_seqlens_k, Tensor):
        got = f"{type(cu_seqlens_q).__name__} and {type(cu_seqlens_k).__name__}"
        raise TypeError(
            f"hf_flashattn: expected tensors cu_seqlens_q and cu_seqlens_k, got {got}. Nearest "
            "supported: flash_attn_func for dense batches. Next step: pass int32 offsets"
        )
    longest = (
        int(max_seqlen_q) if isinstance(max_seqlen_q, Tensor) else max_seqlen_q,
        int(max_seqlen_k) if isinstance(max_seqlen_k, Tensor) else max_seqlen_k,
    )
    visible = (cu_seqlens_q, cu_seqlens_k, None, None, None)
    out, lse = _attention(
        q, k, v, visible, *longest, dropout_p, softmax_scale, causal, deterministic
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func with kv (total_k, 2, Hkv, D): no copy, one gradient tensor."""
    k, v = _unpack("kv", kv, 2, "(total, 2, heads, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func with qkv (total, 3, H, D): no copy, one gradient tensor."""
    q, k, v = _unpack("qkv", qkv, 3, "(total, 3, heads, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    key_len: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    heads_first: bool = False,
) -> Tensor:
    """flash_attn_func outside traces, checked and run: out (B, Sq, Hq, D).

    heads_first: q (B, Hq, Sq, D), k and v (B, Hkv, Sk, D), as Transformers has them; what the
        kernels cannot load is copied then, not refused.

    A call on a GPU is checked by the library anyway, at a tenth of what Python's checks cost; those
    run where it refuses, for the type of the error and its advice. There is no library for the CPU
    or a subclass, nor before the first use: a call that can never run is no reason to build one.
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v = _under_autocast(q, k, v)
    visible = (key_start, key_len)
    flags = (dropout_p, deterministic or torch.are_deterministic_algorithms_enabled())
    by_library = ops.checks_itself(q)
    if not by_library:
        _check_dense(q, k, v, *visible, dropout_p, heads_first)
    try:
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** -0.5
        return ops.call_dense(q, k, v, softmax_scale, causal, heads_first, *visible, *flags)
    except Exception:
        if by_library:
            _check_dense(q, k, v, *visible, dropout_p, heads_first)
        raise


def _check_dense(q, k, v, key_start, key_len, dropout_p, heads_first) -> None:
    if heads_first:
        q, k, v = (x.transpose(1, 2) if x.dim() == 4 else x for x in (q, k, v))
    checks.check_tensors(
        q,
        k,
        v,
        key_start=key_start,
        key_len=key_len,
        dropout_p=dropout_p,
        any_strides=heads_first,
    )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: tuple[Tensor | None, ...],
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Checks and runs one call, packed or traced too: (out, lse).

    visible: the op's five tensors that hide keys. The library cannot see what cu_seqlens say:
        where that is not known yet, Python checks everything.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        q, k, v = _under_autocast(q, k, v)
    shown = (q, k, v, visible, max_seqlen_q, max_seqlen_k, dropout_p)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    by_library = not torch.compiler.is_compiling() and ops.checks_itself(q) and _known(*shown[:6])
    if not by_library:
        _check(*shown)
    try:
        rng_state = ops.new_rng_state(q.device) if dropout_p > 0 else None
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** -0.5
        flags = (dropout_p, softmax_scale, causal, deterministic)
        return ops.call_forward((q, k, v, *visible, rng_state, max_seqlen_q, max_seqlen_k, *flags))
    except Exception:
        if by_library:
            _check(*shown)
        raise


def _known(q, k, v, visible, max_seqlen_q, max_seqlen_k) -> bool:
    """Whether nothing is to be read: the values of cu_seqlens are known, and fit."""
    cu_seqlens_q, cu_seqlens_k, *_ = visible
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return cu_seqlens_q is cu_seqlens_k
    fits = checks.values_are_known(cu_seqlens_q, q, max_seqlen_q)
    fits = fits and checks.values_are_known(cu_seqlens_k, k, max_seqlen_k)
    return fits and os.environ.get("HF_FLASHATTN_CHECK") != "1"


def _check(q, k, v, visible, max_seqlen_q, max_seqlen_k, dropout_p) -> None:
    cu_seqlens_q, cu_seqlens_k, key_start, key_len, key_bits = visible
    checks.check_tensors(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        key_start=key_start,
        key_len=key_len,
        key_bits=key_bits,
        dropout_p=dropout_p,
    )


def _only_what_is_there(
    window_size: tuple[int, int],
    causal: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    attn_bias: Tensor | None = None,
) -> bool:
    """Raise NotImplementedError for what is to come; return causal, which (-1, 0) also means."""
    window, tensors = tuple(window_size), (alibi_slopes, block_table, s_aux, attn_bias)
    if window != (-1, -1) or softcap or any(x is not None for x in tensors):
        support.refuse(
            support.explain_features(
                window=window,
                causal=causal,
                softcap=softcap,
                alibi=alibi_slopes is not None,
                bias=attn_bias is not None,
                sinks=s_aux is not None,
                paged=block_table is not None,
            )
        )
    return causal or window[1] == 0


def _under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to the inputs of a matrix product: cast all but fp64."""
    device_type = q.device.type
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if q.is_floating_point() and q.dtype != torch.float64:
            return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _unpack(name: str, x: Tensor, parts: int, layout: str) -> tuple[Tensor, ...]:
    """The parts as views.

    unbind's gradient is one stack, where a select for each part would fill and add.
    """
    if x.dim() != layout.count(",") + 1 or x.shape[-3] != parts:
        raise ValueError(
            f"hf_flashattn: {name}: expected shape {layout}, got {tuple(x.shape)}. Nearest "
            f"supported: torch.stack of the {parts} parts in dimension -3. Next step: check the "
            "order of the dimensions"
        )
    return x.unbind(-3)
