"""What the kernels lack today and may have tomorrow: one yes of support.explain, and it runs there.

Tomorrow's kernel is a stand-in with flash-attn's window and softcap, with sinks and a bias, patched
over the functions that call the op; support is patched to say yes. Nothing else is told.
"""

from __future__ import annotations

import pytest
import torch
from model_helpers import VOCAB, assert_same, build, padding, tokens
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
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
    s_aux: Tensor | None = None,
    attn_bias: Tensor | None = None,
) -> Tensor:
    """flash_attn_func with a window, softcap, sinks and a bias: (B, S, H, D)."""
    assert dropout_p == 0.0 and not deterministic
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
    scores = scores * softmax_scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if attn_bias is not None:
        scores = scores + attn_bias
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
    scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., :seqlen_k]
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


def gpt_oss() -> GptOssForCausalLM:
    options = {**SIZES, **GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = GptOssConfig(**options, layer_types=["full_attention"] * 2)
    model = build(GptOssForCausalLM, config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def t5() -> T5ForConditionalGeneration:
    options = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=VOCAB, dropout_rate=0.0, pad_token_id=0, **options)
    return build(T5ForConditionalGeneration, config)


def bloom() -> BloomForCausalLM:
    sizes = {"n_layer": 2, "n_head": 4, "hidden_size": 32, "initializer_range": 0.3}
    return build(BloomForCausalLM, BloomConfig(vocab_size=VOCAB, **sizes))


def mpnet() -> MPNetModel:
    return build(MPNetModel, MPNetConfig(**SIZES))


def spied(monkeypatch) -> list[dict]:
    """The keywords of every call of the stand-in."""
    seen = []
    monkeypatch.setattr(
        functional, "flash_attn_func", lambda *x, **kw: (seen.append(kw), stand_in(*x, **kw))[1]
    )
    return seen


@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_sinks_run_on_the_op(kind, tomorrow, monkeypatch):
    model, mask, seen = gpt_oss(), padding(kind), spied(monkeypatch)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    report = assert_same(model, inputs, mask)
    assert all(row.calls.cpu and not row.calls.fallback for row in report.rows), report
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    assert all(x["s_aux"] is y for x, y in zip(seen, sinks, strict=True))


@pytest.mark.parametrize("kind", ["none", "right", "left"])
@pytest.mark.parametrize("make", [t5, bloom, mpnet])
def test_a_position_bias_runs_on_the_op(make, kind, tomorrow, monkeypatch):
    """T5's from Transformers' dispatch; ALiBi and MPNet's, which their own code adds."""
    model, mask, seen = make(), padding(kind), spied(monkeypatch)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    if make is t5:
        inputs["decoder_input_ids"] = tokens(seed=3)
    report = assert_same(model, inputs, None if make is t5 else mask, tolerance=2e-5)
    assert all(row.calls.cpu and not row.calls.fallback for row in report.rows), report
    self_attention = [x for x in seen if x.get("attn_bias") is not None]
    assert len(self_attention) >= 2 and self_attention[0]["attn_bias"].shape[1] == 4


def test_windows_of_images_run_on_the_op(tomorrow, monkeypatch):
    """Swin's relative positions come as a mask, which is a bias where nothing simpler is in it."""
    sizes = {"embed_dim": 32, "depths": [2], "num_heads": [4], "window_size": 4}
    model, seen = build(SwinModel, SwinConfig(image_size=16, patch_size=2, **sizes)), []
    seen = spied(monkeypatch)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    report = assert_same(model, {"pixel_values": pixels})
    assert all(row.calls.cpu and not row.calls.fallback for row in report.rows), report
    assert len(seen) == 2 and all(x["attn_bias"].shape[1] == 4 for x in seen)


@pytest.mark.parametrize("additive", [False, True])
def test_an_arbitrary_mask_runs_on_the_op(additive, tomorrow):
    """Rows that see nothing give 0, as everywhere."""
    layer = torch.nn.Identity()
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=draw) for _ in range(3))
    seen = torch.rand(2, 1, 5, 5, generator=draw) > 0.4
    seen[0, 0, 3] = False
    mask = torch.zeros(()).where(seen, -torch.inf) if additive else seen
    out, _ = hf_flashattn.attention_forward(layer, q, k, v, mask, is_causal=False)
    scores = (q @ k.transpose(2, 3) * 8**-0.5).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)
    assert (out - expected).abs().max() < 1e-5 and not out[0, 3].any()
    calls = hf_flashattn.report.calls_of(layer)
    assert calls.cpu == 1 and not calls.fallback


def test_a_bias_of_packed_sequences_falls_back(tomorrow):
    """It is of rows, and there are none without padding."""
    layer = torch.nn.Identity()
    q, bias = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 6)
    ends = torch.tensor([0, 4, 6], dtype=torch.int32)
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    hf_flashattn.attention_forward(
        layer, q, q, q, None, is_causal=False, position_bias=bias, **given
    )
    reasons = hf_flashattn.report.calls_of(layer).reasons
    assert reasons == {"adds a position bias to packed sequences": 1}


@pytest.mark.parametrize("name", ["s_aux", "attn_bias"])
def test_today_the_function_refuses_both(name):
    q = torch.randn(1, 5, 4, 8)
    with pytest.raises(NotImplementedError, match="not there yet"):
        functional.flash_attn_func(q, q, q, **{name: torch.zeros(4)})


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
