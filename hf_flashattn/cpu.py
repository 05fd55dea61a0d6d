"""The ops on the CPU: PyTorch's SDPA where it can express the call, the reference elsewhere.

SDPA has no way to hand in a dropout mask, so calls with dropout go to the reference: slow, but the
very mask that the kernels use. Everything else (causal with Sq != Sk, key ranges, packed sequences)
becomes an additive mask or a loop over sequences. The ATen op behind `scaled_dot_product_attention`
on the CPU is called directly, because the public function does not return the LSE that the backward
needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import (
    attention_backward_reference,
    attention_reference,
    sequences,
    visible_keys,
)

_sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_sdpa_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


# The caller's autocast would round the reference's fp32 products.
@torch.autocast("cpu", enabled=False)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_len: Tensor | None,
    key_bits: Tensor | None,
    rng_state: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """hf_flashattn::forward on CPU tensors; shapes as in reference.attention_reference."""
    if dropout_p > 0:
        return _contiguous(
            attention_reference(
                q,
                k,
                v,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                key_start=key_start,
                key_len=key_len,
                key_bits=key_bits,
                causal=causal,
                softmax_scale=softmax_scale,
                dropout_p=dropout_p,
                rng_state=rng_state,
            )
        )
    if cu_seqlens_q is None:
        keys = (key_start, key_len, key_bits)
        return _contiguous(_dense(q, k, v, keys, softmax_scale, causal))
    out = q.new_zeros(q.shape)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=_lse_dtype(q))
    for qs, ks in sequences(cu_seqlens_q, cu_seqlens_k):
        part, part_lse = _dense(
            q[None, qs], k[None, ks], v[None, ks], _ALL_KEYS, softmax_scale, causal
        )
        out[qs], lse[:, qs] = part[0], part_lse[0]
    return out, lse


@torch.autocast("cpu", enabled=False)
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_len: Tensor | None,
    key_bits: Tensor | None,
    rng_state: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """hf_flashattn::backward on CPU tensors: dq, dk, dv shaped as q, k, v."""
    if dropout_p > 0:
        return _contiguous(
            attention_backward_reference(
                dout,
                q,
                k,
                v,
                out,
                lse,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                key_start=key_start,
                key_len=key_len,
                key_bits=key_bits,
                causal=causal,
                softmax_scale=softmax_scale,
                dropout_p=dropout_p,
                rng_state=rng_state,
            )
        )
    if cu_seqlens_q is None:
        keys = (key_start, key_len, key_bits)
        return _contiguous(_dense_backward(dout, q, k, v, out, lse, keys, softmax_scale, causal))
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for qs, ks in sequences(cu_seqlens_q, cu_seqlens_k):
        grads = _dense_backward(
            dout[None, qs],
            q[None, qs],
            k[None, ks],
            v[None, ks],
            out[None, qs],
            lse[None, :, qs],
            _ALL_KEYS,
            softmax_scale,
            causal,
        )
        dq[qs], dk[ks], dv[ks] = (grad[0] for grad in grads)
    return dq, dk, dv


def dense_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool = False,
    heads_first: bool = False,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """hf_flashattn::dense_forward on CPU tensors."""
    if heads_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    visible = (None, None, key_start, key_len, None, rng_state, 0, 0)
    return forward(q, k, v, *visible, dropout_p, softmax_scale, causal, deterministic)


def dense_inference(*args: Any) -> Tensor:
    """hf_flashattn::dense_inference on CPU tensors; its arguments are dense_forward's first."""
    with torch.no_grad():  # a GPU's has no gradient either
        return dense_forward(*args)[0]


def dense_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool = False,
    heads_first: bool = False,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """hf_flashattn::dense_backward on CPU tensors; heads first, gradients are views of the rest."""
    if heads_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    visible = (None, None, key_start, key_len, None, rng_state, 0, 0)
    flags = (dropout_p, softmax_scale, causal, deterministic)
    grads = backward(dout, q, k, v, out, lse, *visible, *flags)
    return tuple(x.transpose(1, 2) for x in grads) if heads_first else grads


_Keys = tuple[Tensor | None, Tensor | None, Tensor | None]  # key_start, key_len, key_bits
_ALL_KEYS: _Keys = (None, None, None)


class _Mask:
    """A dense call's visibility as SDPA takes it, and the rows and keys it must not be shown.

    causal: SDPA's own flag (top-left aligned, so Sq == Sk only).
    bias: (B or 1, 1, Sq, Sk), 0 or -inf; None if nothing is hidden.
    row_sees, key_seen: (B or 1, 1, Sq) and (B or 1, 1, Sk); None if all do, and all are.
    """

    def __init__(self, q: Tensor, k: Tensor, keys: _Keys, causal: bool) -> None:
        sq, sk = q.shape[1], k.shape[1]
        key_start, key_len, key_bits = keys
        ranged = any(x is not None for x in keys)
        self.causal = causal and sq == sk and not ranged
        self.bias = self.row_sees = self.key_seen = None
        if not ranged and (self.causal or not causal or sq == 1):
            return
        visible = visible_keys(
            sq,
            sk,
            causal=causal,
            key_start=key_start,
            key_len=key_len,
            key_bits=key_bits,
            device=q.device,
        )
        self.bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
        self.row_sees, self.key_seen = visible.any(-1), visible.any(-2)

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, Sq, D), rows that see nothing set to 0: their NaN must not reach a gradient."""
        return x if self.row_sees is None else torch.where(self.row_sees[..., None], x, 0)

    def keys(self, x: Tensor) -> Tensor:
        """(B, H, Sk, D) with keys that nobody sees set to 0: 0 * NaN is NaN."""
        return x if self.key_seen is None else torch.where(self.key_seen[..., None], x, 0)


def _dense(q, k, v, keys, scale, causal):
    """(B, S, H, D) tensors -> out (B, Sq, Hq, D), lse (B, Hq, Sq)."""
    if q.numel() == 0 or k.numel() == 0:
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=_lse_dtype(q))
        return torch.zeros_like(q), lse
    q, k, v = (_rows_in_one_piece(x) for x in (q, k, v))
    mask = _Mask(q, k, keys, causal)
    kh, vh = (mask.keys(_per_query_head(x, q.shape[2])) for x in (k, v))
    out, lse = _sdpa(
        mask.rows(q.transpose(1, 2)), kh, vh, 0.0, mask.causal, attn_mask=mask.bias, scale=scale
    )
    if mask.row_sees is not None:
        out = mask.rows(out)
        lse = torch.where(mask.row_sees, lse, -torch.inf)
    return out.transpose(1, 2), lse


def _dense_backward(dout, q, k, v, out, lse, keys, scale, causal):
    """Gradients (B, S, H, D) of _dense."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dout, q, k, v, out = (_rows_in_one_piece(x) for x in (dout, q, k, v, out))
    mask = _Mask(q, k, keys, causal)
    do, qh, oh = (mask.rows(x.transpose(1, 2)) for x in (dout, q, out))
    kh, vh = (mask.keys(_per_query_head(x, q.shape[2])) for x in (k, v))
    if mask.row_sees is not None:
        lse = torch.where(mask.row_sees, lse, 0)
    dq, dk, dv = _sdpa_backward(
        do, qh, kh, vh, oh, lse.contiguous(), 0.0, mask.causal, attn_mask=mask.bias, scale=scale
    )
    dk, dv = (
        x.unflatten(1, (k.shape[2], -1)).sum(2) if x.shape[1] != k.shape[2] else x for x in (dk, dv)
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _rows_in_one_piece(x: Tensor) -> Tensor:
    """x with its last dimension contiguous: the ATen ops take it for granted and read elsewhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """(B, Sk, Hkv, D) -> (B, Hq, Sk, D)."""
    x = x.transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _contiguous(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)
