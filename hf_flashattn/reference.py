"""Readable attention in fp32: the meaning of every flag, and the judge in every test.

    out, lse = attention_reference(q, k, v, causal=True, dropout_p=0.1, rng_state=rng_state)

Per query head, with S = scale * Q K^T and the keys that a row may not see set to -inf:

    LSE = log sum_c exp(S)                      natural log, -inf for a row that sees no key
    P   = exp(S - LSE)                          0 for a row that sees no key
    out = (P * keep / (1 - p)) V                keep: the Philox mask of (b, h, r, c)

Which keys a row sees: key_start[b] <= c < key_start[b] + key_len[b] and, if causal,
c <= r + Sk - Sq (the last row sees the last key). Query head h reads key head h // (Hq / Hkv).

Nothing here is fast; everything runs on any device and is differentiable by autograd. fp64 inputs
stay fp64.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
from torch import Tensor

from .key_bits import kept_keys

_MASK32 = 0xFFFFFFFF
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 7
# What a random word is multiplied by in each square of a tile: the first round constants of
# SHA-256, made odd.
_MULTIPLIERS = (
    (0x428A2F99, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5),
    (0x3956C25B, 0x59F111F1, 0x923F82A5, 0xAB1C5ED5),
    (0xD807AA99, 0x12835B01, 0x243185BF, 0x550C7DC3),
    (0x72BE5D75, 0x80DEB1FF, 0x9BDC06A7, 0xC19BF175),
)

# Score elements computed at once, 1 GiB of fp32; larger problems are cut into chunks of heads.
_MAX_SCORES = 1 << 28


def philox_4x32(
    counter: tuple[Tensor, ...], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, ...]:
    """Philox 4x32 with 7 rounds (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words.

    An int64 product wraps modulo 2^64, so its bits are those of the unsigned product; the
    arithmetic right shift brings in sign bits that the 32-bit mask removes.
    """
    x, y, z, w = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        p0, p1 = x * _PHILOX_M0, z * _PHILOX_M1
        hi0, lo0 = (p0 >> 32) & _MASK32, p0 & _MASK32
        hi1, lo1 = (p1 >> 32) & _MASK32, p1 & _MASK32
        x, y, z, w = hi1 ^ y ^ k0, lo1, hi0 ^ w ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return x, y, z, w


def drop_threshold(p: float) -> int:
    """How many of 256 random bytes drop an element: p in 1/256ths, 1 to 255 if p > 0.

    Up to 128 these are the lowest bytes, above it the highest.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(
            f"dropout_p: expected 0 <= p < 1, got {p}; nearest supported: "
            f"{0.0 if not p >= 0 else 255 / 256}. To drop everything, skip the attention."
        )
    return 0 if p == 0 else min(max(math.floor(p * 256 + 0.5), 1), 255)


def dropout_scale(p: float) -> float:
    """What kept probabilities are multiplied by: the inverse of the kept fraction."""
    return 256.0 / (256 - drop_threshold(p))


def dropout_mask(
    seed: int | Tensor,
    offset: int | Tensor,
    batch: int,
    heads: int,
    sq: int,
    sk: int,
    p: float,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The exact mask of the kernels: bool (batch, heads, sq, sk), True where an element is kept.

    seed, offset: 64-bit integers, or int64 tensors of one element, which stay on their device.
    """
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    index = torch.arange(batch * heads, device=device)
    return _keep(seed, offset, index, sq, sk, p).unflatten(0, (batch, heads))


def _keep(
    seed: int | Tensor, offset: int | Tensor, head_index: Tensor, sq: int, sk: int, p: float
) -> Tensor:
    """(N,) int64 indices b * Hq + h -> (N, sq, sk) bool.

    A 64 x 64 tile has 16 Philox calls. Of a call's four words each serves 4 elements of every
    16 x 16 square of the tile: rows 2 * gamma + alpha + {0, 8} and columns 2 * t + e + {0, 8}, by
    bits 16 .. 47 of its product with the square's multiplier.
    """
    device, heads = head_index.device, head_index.numel()
    rows, cols = -(-sq // 64), -(-sk // 64)
    seed, offset = (torch.as_tensor(number, device=device) for number in (seed, offset))
    zero = torch.zeros_like(offset)
    origin = philox_4x32(
        (offset & _MASK32, offset >> 32 & _MASK32, zero, zero),
        (seed & _MASK32, seed >> 32 & _MASK32),
    )
    counter = torch.broadcast_tensors(
        torch.arange(16, device=device),  # gamma * 4 + t
        origin[0] ^ torch.arange(rows, device=device).view(-1, 1, 1),
        head_index.view(-1, 1, 1, 1),
        origin[1] ^ torch.arange(cols, device=device).view(-1, 1),
    )
    words = torch.stack(philox_4x32(counter, (0, 0)), -1)
    words = words.view(heads, rows, cols, 1, 1, 4, 4, 2, 2)  # gamma, t, alpha, e
    multipliers = torch.tensor(_MULTIPLIERS, device=device).view(4, 4, 1, 1, 1, 1)
    products = words * multipliers  # modulo 2^64, of which bits 16 .. 47 are wanted
    halves = torch.stack((products >> 16 & 0xFFFF, products >> 32 & 0xFFFF), -1)  # b8
    random = torch.stack(((halves >> 7) & 0xFF, (halves << 1 | halves >> 15) & 0xFF), -1)  # d8
    threshold = drop_threshold(p)
    keep = random >= threshold if threshold <= 128 else random < 256 - threshold
    # (N, rows, cols, row16, col16, gamma, t, alpha, e, b8, d8), where
    # row = row16 * 16 + b8 * 8 + gamma * 2 + alpha, column = col16 * 16 + d8 * 8 + t * 2 + e
    keep = keep.permute(0, 1, 3, 9, 5, 7, 2, 4, 10, 6, 8).reshape(heads, rows * 64, cols * 64)
    return keep[:, :sq, :sk]


def visible_keys(
    sq: int,
    sk: int,
    *,
    causal: bool = False,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys each row sees: bool (B or 1, 1, sq, sk)."""
    columns = torch.arange(sk, device=device)
    visible = torch.ones(1, 1, sq, sk, dtype=torch.bool, device=device)
    if causal:
        rows = torch.arange(sq, device=device)
        visible = visible & (columns <= rows[:, None] + (sk - sq))
    if key_start is not None:
        visible = visible & (columns >= key_start.view(-1, 1, 1, 1))
    if key_len is not None:
        start = key_start.view(-1, 1, 1, 1).long() if key_start is not None else 0
        visible = visible & (columns < start + key_len.view(-1, 1, 1, 1).long())
    if key_bits is not None:
        visible = visible & kept_keys(key_bits, sk)[:, None, None]
    return visible


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    math_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with every flag spelled out.

    Args:
        q: dense (B, Sq, Hq, D), packed (Tq, Hq, D).
        k, v: dense (B, Sk, Hkv, D), packed (Tk, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) offsets of the packed sequences; both or neither.
        key_start, key_len: (B,), dense only: row b sees the keys
            key_start[b] <= c < key_start[b] + key_len[b].
        key_bits: (B, ceil(Sk / 32)): and of these only those whose bit is set; see key_bits.py.
        rng_state: (2,) int64 seed and offset of the dropout mask; needed if dropout_p > 0.
        math_dtype: what the matrix products and the softmax are computed in; fp32 (fp64 for fp64
            inputs) unless told. With q.dtype this is "the same PyTorch math in the low precision",
            whose error against fp32 is the yardstick of the tests.

    Returns: out, shaped as q and rounded to its dtype; lse, fp32 (fp64 for fp64 inputs), dense
        (B, Hq, Sq), packed (Hq, Tq).
    """
    scale = softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5
    math_dtype = math_dtype or torch.promote_types(q.dtype, torch.float32)
    dropout = (dropout_p, rng_state) if dropout_p > 0 else None
    if dropout and rng_state is None:
        raise ValueError("dropout_p > 0 needs rng_state: an int64 tensor (seed, offset)")
    if cu_seqlens_q is None:
        visible = visible_keys(
            q.shape[1],
            k.shape[1],
            causal=causal,
            key_start=key_start,
            key_len=key_len,
            key_bits=key_bits,
            device=q.device,
        )
        return _attend(q, k, v, visible, scale, dropout, 0, math_dtype)

    outs, lses = (
        [q[:0]],
        [torch.empty(q.shape[1], 0, device=q.device, dtype=_lse_dtype(math_dtype))],
    )
    for b, (qs, ks) in enumerate(sequences(cu_seqlens_q, cu_seqlens_k)):
        visible = visible_keys(
            qs.stop - qs.start, ks.stop - ks.start, causal=causal, device=q.device
        )
        out, lse = _attend(
            q[None, qs], k[None, ks], v[None, ks], visible, scale, dropout, b, math_dtype
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    """The token ranges (queries, keys) of every packed sequence. Reads the tensors on the host."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(slice(*qs), slice(*ks)) for qs, ks in zip(pairwise(q), pairwise(k), strict=True)]


def _lse_dtype(math_dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(math_dtype, torch.float32)


def _head_chunks(batch: int, heads: int, sq: int, sk: int) -> list[range]:
    step = max(1, min(heads, _MAX_SCORES // max(1, batch * sq * sk)))
    return [range(h, min(h + step, heads)) for h in range(0, heads, step)]


def _immune_to_autocast(function):
    """Autocast would round the products that are to be exact."""

    @functools.wraps(function)
    def wrapped(q, *args):
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args)

    return wrapped


@_immune_to_autocast
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    dropout: tuple[float, Tensor] | None,
    first_batch: int,
    math_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Dense attention under a visibility mask. first_batch: what the dropout mask calls q[0]."""
    (batch, sq, heads, _), sk = q.shape, k.shape[1]
    row_sees = visible.any(-1)  # (B or 1, 1, Sq)
    # What no row may see, and rows that see nothing, must not reach a product: 0 * NaN is NaN.
    q = torch.where(row_sees.transpose(1, 2)[..., None], q, 0)
    key_seen = visible.any(-2).transpose(1, 2)[..., None]  # (B or 1, Sk, 1, 1)
    k, v = torch.where(key_seen, k, 0), torch.where(key_seen, v, 0)

    outs, lses = [], []
    for chunk in _head_chunks(batch, heads, sq, sk):
        out, lse = _attend_heads(
            q, k, v, visible, row_sees, scale, dropout, first_batch, math_dtype, chunk
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=1)


def _attend_heads(q, k, v, visible, row_sees, scale, dropout, first_batch, math_dtype, chunk):
    """The heads of one chunk; see _attend."""
    (batch, sq, heads, _), (sk, heads_k) = q.shape, k.shape[1:3]
    qh, kh, vh = _heads(q, k, v, chunk, heads // heads_k, math_dtype)  # (B, h, S, D)
    scores = torch.matmul(qh, kh.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    # A row of -inf would make NaN in the softmax and in its gradient.
    scores = torch.where(row_sees[..., None], scores, 0)
    if sk == 0:
        lse = scores.new_full((batch, len(chunk), sq), -torch.inf, dtype=_lse_dtype(math_dtype))
    else:
        lse = torch.logsumexp(scores.to(_lse_dtype(math_dtype)), -1)
        lse = torch.where(row_sees, lse, -torch.inf)
    probs = torch.where(visible, torch.softmax(scores, -1), 0)
    if dropout:
        p, rng_state = dropout
        probs = (
            probs
            * _keep_heads(rng_state, first_batch, batch, heads, chunk, sq, sk, p)
            * dropout_scale(p)
        )
    out = torch.matmul(probs, vh)
    # The gradient of rows that see nothing ends here, NaN in it included.
    out = torch.where(row_sees[..., None], out, 0)
    return out.transpose(1, 2).to(q.dtype), lse


def _heads(q, k, v, chunk, group, math_dtype):
    """The chunk's heads as (B, h, S, D) in math_dtype, K/V repeated for their query heads."""
    q = q[:, :, chunk.start : chunk.stop].transpose(1, 2).to(math_dtype)
    kv_head = torch.arange(chunk.start, chunk.stop, device=k.device) // group
    k, v = (x.index_select(2, kv_head).transpose(1, 2).to(math_dtype) for x in (k, v))
    return q, k, v


def _keep_heads(rng_state, first_batch, batch, heads, chunk, sq, sk, p):
    """The dropout mask (B, h, Sq, Sk) of one chunk of heads."""
    device = rng_state.device
    b = torch.arange(first_batch, first_batch + batch, device=device)
    h = torch.arange(chunk.start, chunk.stop, device=device)
    index = (b[:, None] * heads + h).flatten()
    keep = _keep(rng_state[0], rng_state[1], index, sq, sk, p)
    return keep.view(batch, len(chunk), sq, sk)


def attention_backward_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient as the kernels compute it, from out and LSE instead of a stored P.

        Z  = keep / (1 - p)
        dV = (P * Z)^T dO
        dP = (dO V^T) * Z
        dS = P * (dP - rowsum(dO * O))
        dQ = scale * dS K
        dK = scale * dS^T Q

    Args: dout, out shaped as q; the others as in attention_reference, whose lse this takes.

    Returns: dq, dk, dv shaped and typed as q, k, v.
    """
    scale = softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5
    dropout = (dropout_p, rng_state) if dropout_p > 0 else None
    if cu_seqlens_q is None:
        visible = visible_keys(
            q.shape[1],
            k.shape[1],
            causal=causal,
            key_start=key_start,
            key_len=key_len,
            key_bits=key_bits,
            device=q.device,
        )
        return _attend_backward(dout, q, k, v, out, lse, visible, scale, dropout, 0)

    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for b, (qs, ks) in enumerate(sequences(cu_seqlens_q, cu_seqlens_k)):
        visible = visible_keys(
            qs.stop - qs.start, ks.stop - ks.start, causal=causal, device=q.device
        )
        grads = _attend_backward(
            *(x[None, qs] for x in (dout, q)),
            *(x[None, ks] for x in (k, v)),
            out[None, qs],
            lse[None, :, qs],
            visible,
            scale,
            dropout,
            b,
        )
        dq[qs], dk[ks], dv[ks] = (grad[0] for grad in grads)
    return dq, dk, dv


@_immune_to_autocast
def _attend_backward(dout, q, k, v, out, lse, visible, scale, dropout, first_batch):
    """Dense gradient under a visibility mask; see attention_backward_reference."""
    (batch, sq, heads, dim), (sk, heads_k) = q.shape, k.shape[1:3]
    math_dtype = torch.promote_types(q.dtype, torch.float32)
    row_sees, key_seen = visible.any(-1), visible.any(-2)
    q, dout, out = (torch.where(row_sees.transpose(1, 2)[..., None], x, 0) for x in (q, dout, out))
    k, v = (torch.where(key_seen.transpose(1, 2)[..., None], x, 0) for x in (k, v))
    dq = torch.zeros_like(q, dtype=math_dtype)
    dk, dv = (
        torch.zeros(batch, sk, heads, dim, device=q.device, dtype=math_dtype) for _ in range(2)
    )
    for chunk in _head_chunks(batch, heads, sq, sk):
        at = slice(chunk.start, chunk.stop)
        qh, kh, vh = _heads(q, k, v, chunk, heads // heads_k, math_dtype)
        do, o = (x[:, :, at].transpose(1, 2).to(math_dtype) for x in (dout, out))
        scores = torch.matmul(qh, kh.transpose(-1, -2)) * scale
        row_lse = torch.where(row_sees, lse[:, at].to(math_dtype), 0)[..., None]
        probs = torch.where(visible, torch.exp(scores - row_lse), 0)
        keep = 1.0
        if dropout:
            p, rng_state = dropout
            keep = _keep_heads(rng_state, first_batch, batch, heads, chunk, sq, sk, p).to(
                math_dtype
            )
            keep = keep * dropout_scale(p)
        d_probs = torch.matmul(do, vh.transpose(-1, -2)) * keep
        d_scores = probs * (d_probs - (do * o).sum(-1, keepdim=True)) * scale
        dq[:, :, at] = torch.matmul(d_scores, kh).transpose(1, 2)
        dk[:, :, at] = torch.matmul(d_scores.transpose(-1, -2), qh).transpose(1, 2)
        dv[:, :, at] = torch.matmul((probs * keep).transpose(-1, -2), do).transpose(1, 2)
    # A key head's gradient is the sum over its group of query heads.
    dk, dv = (x.unflatten(2, (heads_k, -1)).sum(3) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
