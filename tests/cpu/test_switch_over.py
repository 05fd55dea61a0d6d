"""What the kernels lack today and may have tomorrow: one yes of support.explain, and it runs there.

Tomorrow's kernel is a stand-in with flash-attn's window and softcap, patched over the functions
that call the op; support is patched to say yes. Nothing else is told.
"""

from __future__ import annotations

import pytest
import torch
from model_helpers import VOCAB, assert_same, build, padding, tokens
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
)

import hf_flashattn
from hf_flashattn import attention, functional, support

WINDOW = 4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


def mistral() -> MistralForCausalLM:
    return build(MistralForCausalLM, MistralConfig(**SIZES, **GROUPED, sliding_window=WINDOW))


def gemma2() -> Gemma2ForCausalLM:
    capped = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
    config = Gemma2Config(**SIZES, **GROUPED, **capped, sliding_window=WINDOW)
    return build(Gemma2ForCausalLM, config)


def modernbert() -> ModernBertModel:
    config = ModernBertConfig(**SIZES, local_attention=2 * WINDOW)
    return build(ModernBertModel, config)


def stand_in(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    *,
    deterministic: bool = False,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: None = None,
) -> Tensor:
    """flash_attn_func with a window and softcap: (B, S, H, D)."""
    assert dropout_p == 0.0 and not deterministic
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
    scores = scores * softmax_scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    ahead = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    left, right = window_size
    seen = torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool)
    seen = seen & (ahead <= 0 if causal else seen)
    seen = seen & (ahead >= -left if left >= 0 else seen) & (ahead <= right if right >= 0 else seen)
    if key_start is not None:
        keys, start, end = (
            torch.arange(seqlen_k),
            key_start[:, None],
            (key_start + key_len)[:, None],
        )
        seen = seen & ((keys >= start) & (keys < end))[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum(
        "bhqk,bkhd->bqhd", weights, v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    )


@pytest.fixture
def tomorrow(monkeypatch):
    monkeypatch.setattr(support, "explain_features", lambda **features: None)
    monkeypatch.setattr(functional, "flash_attn_func", stand_in)
    attention._explain_once.cache_clear()
    yield
    attention._explain_once.cache_clear()


@pytest.mark.parametrize("kind", ["none", "ones", "right", "left"])
@pytest.mark.parametrize("make", [mistral, gemma2, modernbert])
def test_windows_and_softcap_run_on_the_op(make, kind, tomorrow):
    with_cache = {} if make is modernbert else {"use_cache": False}
    inputs = {"input_ids": tokens(), "attention_mask": padding(kind), **with_cache}
    report = assert_same(make(), inputs, padding(kind))
    assert all(row.calls.cpu and not row.calls.fallback for row in report.rows), report


@pytest.mark.parametrize("make", [mistral, gemma2, modernbert])
def test_today_they_fall_back(make):
    """The same models without the stand-in: the test above would fail without a switch."""
    with_cache = {} if make is modernbert else {"use_cache": False}
    model = make()
    with hf_flashattn.patched(model) as report:
        model(tokens(), **with_cache)
    whys = {row.why for row in report.rows if row.calls.fallback}
    assert whys and all("window" in why or "softcap" in why for why in whys), report


@pytest.mark.parametrize("make", [mistral, modernbert])
def test_holes_in_a_window_fall_back_and_are_right(make, tomorrow):
    """A window counts the tokens of a hole, which leaving them out would not."""
    with_cache = {} if make is modernbert else {"use_cache": False}
    mask = padding("holed")
    report = assert_same(
        make(), {"input_ids": tokens(), "attention_mask": mask, **with_cache}, mask
    )
    assert any("window" in row.why for row in report.rows), report


@pytest.mark.parametrize("make", [mistral, gemma2])
def test_generation(make, tomorrow):
    model, mask = make(), padding("left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens(), **options)
    with hf_flashattn.patched(model) as report:
        got = model.generate(tokens(), **options)
    assert torch.equal(got, expected)
    assert all(row.calls.cpu for row in report.rows), report


@pytest.mark.parametrize("kind", ["none", "left"])
def test_compiled_windows_are_right(kind, tomorrow):
    """A trace reads no window from Transformers' closures: its own mask, on the fallback."""
    model, mask = mistral(), padding(kind)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    expected = model(**inputs).logits
    torch._dynamo.reset()
    with hf_flashattn.patched(model) as report:
        got = torch.compile(model, fullgraph=True, backend="eager")(**inputs).logits
    rows = slice(None) if mask is None else mask.bool()
    assert (got - expected)[rows].abs().max() < 1e-5
    assert all(row.runs == "fallback" and "window" in row.why for row in report.rows), report
