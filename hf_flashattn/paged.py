"""Continuous batching: Transformers' paged cache, in the terms of a call of packed sequences.

The queries of all requests come end to end, (1, H, total_q, D), and each request sees its own keys
up to its own last one. Where the keys are is said in two ways:

    updated already       by the model: keys of all requests end to end, cu_seq_lens_k a tensor
    cache, write_index    the attention function is to update it; cu_seq_lens_k and max_seqlen_k
                          may be a dict, one entry per kind of layer

read_cache turns the second into the first. Which one it is depends on the version of Transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_paged(extra: dict[str, Any]) -> bool:
    """Whether the keywords of a call are those of continuous batching, in either way."""
    return extra.get("cache") is not None or extra.get("read_index") is not None


def read_cache(
    module: nn.Module, key: Tensor, value: Tensor, extra: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Writes the new keys and values to the cache of `extra` and reads what the requests see.

    Args:
        key, value: (1, Hkv, total_q, D), the new tokens.
        extra: the keywords of the call, with `cache`. Not changed.

    Returns: keys and values (1, Hkv, total_k, D) of all requests end to end, and the keywords with
        cu_seq_lens_k (int (requests + 1,)), max_length_q and max_length_k of this kind of layer.

    Raises NotImplementedError for a cache that is not one of continuous batching.
    """
    extra = dict(extra)
    cache = extra.pop("cache")
    wanted = ("read_index", "write_index", "cu_seq_lens_q", "cu_seq_lens_k")
    if missing := [name for name in wanted if extra.get(name) is None]:
        raise NotImplementedError(
            f"hf_flashattn: cache: expected the paged one of continuous batching with {wanted}, "
            f"got {type(cache).__name__} without {missing}. Nearest supported: a cache that the "
            "model updates before it attends. Next step: load this model with "
            'attn_implementation="sdpa".'
        )
    kind = "full_attention" if _window_of(module, extra) is None else "sliding_attention"
    for name in ("cu_seq_lens_k", "max_seqlen_k"):
        if isinstance(per_kind := extra.get(name), dict):
            extra[name] = per_kind[kind]
    extra["max_length_q"] = extra.pop("max_seqlen_q")
    extra["max_length_k"] = extra.pop("max_seqlen_k")
    key, value = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=extra["read_index"],
        write_index=extra["write_index"],
    )  # (total_k, Hkv, D)
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None], extra


def _window_of(module: nn.Module, extra: dict[str, Any]) -> int | None:
    return extra.get("sliding_window") or getattr(module, "sliding_window", None)
