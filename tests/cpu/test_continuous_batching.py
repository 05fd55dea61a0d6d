"""Continuous batching with Transformers' own scheduler and paged cache: the tokens of eager."""

from __future__ import annotations

import inspect

import pytest
import torch
from model_helpers import VOCAB, build, calls, gpt2
from torch import nn
from torch.nn import functional as F
from transformers import (
    ContinuousBatchingConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import hf_flashattn
from hf_flashattn import report
from hf_flashattn.attention import attention_forward

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
}


def llama():
    return build(LlamaForCausalLM, LlamaConfig(**SMALL))


def mistral():
    return build(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=6))


def gemma2():
    extra = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
    return build(Gemma2ForCausalLM, Gemma2Config(**SMALL, sliding_window=6, **extra))


def gemma2_without_softcap():
    extra = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None}
    return build(Gemma2ForCausalLM, Gemma2Config(**SMALL, sliding_window=6, **extra))


PROMPTS = [[5, 6, 7, 8, 9], [3, 2, 1], list(range(10, 31)), [5, 6, 7, 8, 9, 10, 11]]
NEW = 6


def one_by_one(model) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [
        model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def batched(model) -> list[list[int]]:
    """16 tokens a step: the long prompt comes in pieces, beside requests that decode already."""
    generation = model.generation_config
    generation.update(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options = {"block_size": 4, "num_blocks": 64, "max_batch_tokens": 16, "use_cuda_graph": False}
    batching = ContinuousBatchingConfig(**options)
    outputs = model.generate_batch(
        PROMPTS,
        generation_config=generation,
        continuous_batching_config=batching,
        progress_bar=False,
    )
    by_number = sorted(outputs.values(), key=lambda x: int(x.request_id.rpartition("_")[2]))
    return [x.generated_tokens for x in by_number]


@pytest.mark.parametrize("way", ["name", "patch"])
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_same_tokens(make, way):
    """Not BERT: newer Transformers ask its cache for a length, which the paged one has not."""
    model = make()
    expected = one_by_one(model)
    if way == "name":
        model.set_attn_implementation("hf_flashattn")
        got, result = batched(model), hf_flashattn.attention_report(model)
    else:
        result = hf_flashattn.patch_model(model)
        got = batched(model)
    assert got == expected
    assert model.config._attn_implementation == "hf_flashattn"
    result.assert_all_on_kernel(allow_cpu=True)
    if way == "patch":
        hf_flashattn.unpatch_model(model)
        assert model.config._attn_implementation == "eager" and one_by_one(model) == expected


@pytest.mark.parametrize("fallback", ["sdpa", "eager"])
def test_sliding_layers_fall_back_while_the_window_bites(fallback):
    model = mistral()
    expected = one_by_one(model)
    with hf_flashattn.patched(model, fallback=fallback) as result:
        assert batched(model) == expected
        for row in result.rows:
            assert row.runs == "mixed" and "sliding window" in row.why
            # Steps that only decode read no more than a window from the cache.
            assert row.calls.cpu >= 2


def test_softcap_and_windows():
    model = gemma2()
    expected = one_by_one(model)
    with hf_flashattn.patched(model) as result:
        assert batched(model) == expected
        assert all("softcap" in row.why and row.runs == "fallback" for row in result.rows)
    model = gemma2_without_softcap()
    expected = one_by_one(model)
    with hf_flashattn.patched(model) as result:
        assert batched(model) == expected
        sliding, full = result.rows
        assert sliding.runs == "mixed" and full.runs == "cpu implementation"


def test_everything_excluded():
    model = llama()
    expected = one_by_one(model)
    for fallback in ("sdpa", "eager"):
        with hf_flashattn.patched(model, exclude="*", fallback=fallback) as result:
            assert batched(model) == expected
            assert calls(result, "cpu") == 0 and calls(result, "fallback") > 0


# ---- the attention function alone ----------------------------------------------------------------


class Layer(nn.Module):
    layer_idx, num_key_value_groups, is_causal = 3, 2, True


class Cache:
    """A paged cache as the attention function sees it: ten keys from before, then the new ones."""

    def __init__(self, past_k, past_v):
        self.past, self.updates = (past_k, past_v), 0

    def update(self, key_states, value_states, layer_idx, read_index, write_index):
        assert layer_idx == 3 and read_index == ["read"] and write_index == ["write"]
        self.updates += 1
        lengths = (6, 4)  # of the past; two requests with 2 and 3 new tokens
        both = []
        for past, new in zip(self.past, (key_states, value_states), strict=True):
            new = new[0].transpose(0, 1)  # (5, Hkv, D)
            a, b = past.split(lengths)
            both.append(torch.cat([a, new[:2], b, new[2:]]))
        return both


CU_Q, CU_K = torch.tensor([0, 2, 5]), torch.tensor([0, 8, 15])


def paged_call(padding: int = 0):
    """(q, k, v, keyword arguments, expected (5, H, D)) of two requests; k, v the new tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5 + padding, 8, generator=generator) for heads in (4, 2, 2))
    cache = Cache(*torch.randn(2, 10, 2, 8, generator=generator))
    keys, values = (
        x.transpose(0, 1)[None]
        for x in cache.update(k[:, :, :5], v[:, :, :5], 3, ["read"], ["write"])
    )
    cache.updates = 0
    parts = []
    for (q0, q1), (k0, k1) in (((0, 2), (0, 8)), ((2, 5), (8, 15))):
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - q1 + q0)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, q0:q1], keys[:, :, k0:k1], values[:, :, k0:k1], seen, enable_gqa=True
            )
        )
    expected = torch.cat(parts, dim=2).transpose(1, 2)[0]
    options = {
        "cache": cache,
        "read_index": ["read"],
        "write_index": ["write"],
        "cu_seq_lens_q": CU_Q.int(),
        "cu_seq_lens_k": {"full_attention": CU_K.int(), "sliding_attention": None},
        "max_seqlen_q": 3,
        "max_seqlen_k": {"full_attention": 8, "sliding_attention": 0},
        "block_table": None,
    }
    return q, k, v, options, expected


@pytest.mark.parametrize("per_layer_kind", [True, False])
def test_a_cache_that_the_attention_function_updates(per_layer_kind):
    q, k, v, options, expected = paged_call()
    if not per_layer_kind:
        options |= {"cu_seq_lens_k": CU_K.int(), "max_seqlen_k": 8}
    layer, cache = Layer(), options["cache"]
    out, _ = attention_forward(layer, q, k, v, None, **options)
    assert (out[0] - expected).abs().max() < 1e-6 and cache.updates == 1
    assert report.calls_of(layer).cpu == 1
    assert options["cache"] is cache  # the next layer's keywords are the same


def test_a_fallback_updates_the_cache_once(monkeypatch):
    q, k, v, options, expected = paged_call()
    layer = Layer()
    monkeypatch.setattr(hf_flashattn.attention, "_supported", lambda call: ("", "told so"))
    out, _ = attention_forward(layer, q, k, v, None, **options)
    assert (out[0] - expected).abs().max() < 1e-6 and options["cache"].updates == 1
    assert report.calls_of(layer).reasons == {"told so": 1}


def test_rows_beyond_the_last_request_are_padding():
    """A CUDA graph's batch: more rows than the requests have."""
    q, k, v, options, expected = paged_call(padding=3)
    cache = options.pop("cache")
    keys, values = cache.update(k[:, :, :5], v[:, :, :5], 3, ["read"], ["write"])
    keys, values = (F.pad(x.transpose(0, 1)[None], (0, 0, 0, 4), value=9.0) for x in (keys, values))
    options |= {"cu_seq_lens_k": CU_K.int(), "max_length_q": 8, "max_length_k": 1024}
    padded = {name: F.pad(options[name], (0, 2), mode="constant", value=0) for name in
              ("cu_seq_lens_q", "cu_seq_lens_k")}  # fmt: skip
    padded["cu_seq_lens_q"][3:], padded["cu_seq_lens_k"][3:] = 5, 15
    for changes in ({}, {"sliding_window": 100}):  # on the op; with a window as long as any: back
        layer = Layer()
        out, _ = attention_forward(layer, q, keys, values, None, **{**options, **padded, **changes})
        assert (out[0, :5] - expected).abs().max() < 1e-6 and torch.isfinite(out).all()
        assert (report.calls_of(layer).fallback == 1) == bool(changes)


def test_what_is_no_paged_cache_is_refused():
    q, k, v, options, _ = paged_call()
    with pytest.raises(NotImplementedError, match="read_index"):
        attention_forward(Layer(), q, k, v, None, cache=object())
    with pytest.raises(NotImplementedError, match="max_blocks_per_request=0"):
        attention_forward(Layer(), q, k, v, None, **{**options, "block_table": CU_Q})


def test_no_block_table_is_ever_asked_for():
    """Transformers makes one only for implementations that bring flash_attn_with_kvcache."""
    from transformers.generation.continuous_batching import initialization

    assert "flash_attn_with_kvcache is None" in inspect.getsource(initialization)
    assert hf_flashattn._compat.registered("hf_flashattn")[2][2] is None


@pytest.mark.parametrize("window", [None, 3])
def test_given_sequences_of_unequal_lengths(window):
    """cu_seqlens where keys outnumber queries: causal and the window end at each last key."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, n, 8, generator=generator) for h, n in ((4, 5), (2, 15), (2, 15)))
    given = {"cu_seq_lens_q": CU_Q, "cu_seq_lens_k": CU_K, "max_length_q": 3, "max_length_k": 8}
    parts = []
    for (q0, q1), (k0, k1) in (((0, 2), (0, 8)), ((2, 5), (8, 15))):
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - q1 + q0)
        if window:
            seen = seen.triu(k1 - k0 - q1 + q0 - window + 1)
        part = q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1]
        parts.append(F.scaled_dot_product_attention(*part, seen, enable_gqa=True))
    expected = torch.cat(parts, dim=2).transpose(1, 2)
    layer = Layer()
    out, _ = attention_forward(layer, q, k, v, None, sliding_window=window, **given)
    assert (out - expected).abs().max() < 1e-6
    assert (report.calls_of(layer).fallback == 1) == bool(window)
