"""Attention that a model's own code hands to torch in one call, which becomes a call of ours.

scaled_dot_product_attention, and multi_head_attention_forward as torch.nn.MultiheadAttention makes
it. Each is spelled out on a Deferred: what the notes express goes to the kernel, and evaluating
that Deferred is the fallback. NotImplemented leaves the call to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_flashattn import _compat
from hf_flashattn.families.deferred import Deferral
from hf_flashattn.families.rules import hide_later_keys


def _attend(
    run: Deferral,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: list[Tensor],
    dropout: float,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Any:
    """softmax(scale * query @ key^T + masks) @ value, (..., Sq, D). Boolean masks: True hides."""
    args = (query, key.transpose(-2, -1))
    run.scores = scores = run.begin(run, torch.matmul, "matmul", args, {})
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    for mask in masks:
        hides = mask.dtype == torch.bool
        scores = scores.masked_fill(mask, -torch.inf) if hides else scores + mask
    if causal:
        scores = hide_later_keys(scores)
    probabilities = F.softmax(scores, dim=-1)
    return torch.matmul(F.dropout(probabilities, dropout, dropout > 0.0), value)


def _scaled_dot_product(
    run: Deferral,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if query.dim() != 4 or key.shape[:2] != query.shape[:2] or value.dim() != 4 or enable_gqa:
        return NotImplemented
    if is_causal and query.shape[2] != key.shape[2]:
        return NotImplemented  # torch aligns at the top left
    masks = []
    if attn_mask is not None:
        masks = [~attn_mask if attn_mask.dtype == torch.bool else attn_mask]
    return _attend(run, query, key, value, masks, dropout_p, scale=scale, causal=is_causal)


def _multi_head(
    run: Deferral,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """(out (Sq, B, E), None): only for callers that do without the weights (see table.py).

    is_causal is a hint there: the mask says it too.
    """
    if (
        query.dim() != 3
        or add_zero_attn
        or any(x is not None for x in (bias_k, bias_v, static_k, static_v))
    ):
        return NotImplemented
    if need_weights and _compat.attentions_wanted_of(run.module):
        run.give_up("the mean over heads")
        return NotImplemented
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        weights = in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, weight, bias).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )  # (B, H, S, D)
    masks = []
    if attn_mask is not None:
        by_head = attn_mask.dim() == 3  # (B * H, Sq, Sk)
        masks.append(attn_mask.unflatten(0, (-1, num_heads)) if by_head else attn_mask[None, None])
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    out = _attend(run, q, k, v, masks, dropout_p if training else 0.0)  # (B, H, Sq, D)
    return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None


WHOLE: dict[Callable, Callable] = {
    F.scaled_dot_product_attention: _scaled_dot_product,
    F.multi_head_attention_forward: _multi_head,
}
