"""The attention function alone: what goes to the op, what falls back and why; both are right."""

from __future__ import annotations

import pytest
import torch
from model_helpers import (
    PADDINGS,
    assert_same,
    bert,
    calls,
    encoder_states,
    gpt2,
    output,
    padding,
    tokens,
)
from torch import nn
from torch.nn import functional as F

import hf_flashattn
from hf_flashattn import FallbackError, attention, ops, report, support
from hf_flashattn.attention import attention_forward


class Layer(nn.Module):
    """An attention module as Transformers has them: attributes, an eager function by its class."""

    def __init__(self, is_causal: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, groups


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs
):
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def qkv(seqlen_q=7, seqlen_k=7, heads=4, heads_k=4, dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, seqlen_q, dim), (2, heads_k, seqlen_k, dim), (2, heads_k, seqlen_k, dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture
def refused(monkeypatch):
    """support.explain refuses every call, as it does for fp32 on a GPU."""
    refusal = support.Support(None, "dtype float32 on CUDA", "bfloat16", "cast")
    monkeypatch.setattr(attention, "_explain_once", lambda *what: refusal)


@pytest.mark.parametrize("fallback", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_fallback_is_right_for_every_mask(make, kind, fallback, refused):
    mask = padding(kind)
    result = assert_same(
        make(), {"input_ids": tokens(), "attention_mask": mask}, mask, fallback=fallback
    )
    assert {row.runs for row in result.rows} == {"fallback"}
    assert {row.why for row in result.rows} == {"dtype float32 on CUDA"}


def test_a_library_that_cannot_be_had_is_a_fallback(monkeypatch):
    """A Hopper GPU on a machine without nvcc: explain says yes, the first call finds out."""
    kernel = support.Support("sm90 d64")
    monkeypatch.setattr(attention, "_explain_once", lambda *what: kernel)
    monkeypatch.setattr(ops, "missing_library", lambda: "no nvcc")
    result = assert_same(gpt2(), {"input_ids": tokens()}, padding("none"))
    assert {row.why for row in result.rows} == {"the CUDA library is missing: no nvcc"}
    model = gpt2()
    with hf_flashattn.patched(model, strict=True), pytest.raises(FallbackError, match="no nvcc"):
        model(tokens())


@pytest.mark.parametrize("fallback", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_fallback_generates_the_same(cache, fallback, refused):
    model = gpt2(add_cross_attention=True)
    options = {
        "attention_mask": padding("left"),
        "encoder_hidden_states": encoder_states(),
        "max_new_tokens": 5,
    }
    options |= {
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "cache_implementation": cache,
    }
    if cache == "static":
        del options["encoder_hidden_states"]
    expected = model.generate(tokens(), **options)
    with hf_flashattn.patched(model, fallback=fallback) as result:
        assert torch.equal(model.generate(tokens(), **options), expected)
        assert calls(result, "cpu") == 0


def test_strict_names_the_reason(refused):
    with hf_flashattn.patched(gpt2(), strict=True) as result:
        model = result.sites[0].module
        with pytest.raises(hf_flashattn.FallbackError, match="dtype float32 on CUDA"):
            attention_forward(model, *qkv(), None)


@pytest.mark.parametrize("seqlen_q", [1, 3, 7])
def test_no_mask(seqlen_q):
    """Causal is aligned with the last key; one query sees all."""
    q, k, v = qkv(seqlen_q)
    seen = torch.ones(seqlen_q, 7, dtype=torch.bool).tril(7 - seqlen_q)
    expected = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)
    out, weights = attention_forward(Layer(), q, k, v, None)
    assert weights is None and (out - expected).abs().max() < 1e-6
    full = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2)
    for layer, options in ((Layer(is_causal=False), {}), (Layer(), {"is_causal": False})):
        assert (
            attention_forward(layer, q, k, v, None, scaling=0.5, **options)[0] - full
        ).abs().max() < 1e-6


def test_grouped_heads():
    q, k, v = qkv(heads_k=2)
    layer = Layer(groups=2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
        1, 2
    )
    assert (attention_forward(layer, q, k, v, None)[0] - expected).abs().max() < 1e-6
    assert (
        attention_forward(layer, q, k, v, torch.ones(2, 1, 7, 7).bool().tril())[0] - expected
    ).abs().max() < 1e-6
    assert (report.calls_of(layer).cpu, report.calls_of(layer).fallback) == (1, 1)


def test_head_counts_come_from_the_tensors():
    """Under tensor parallelism a module has some of the heads that its config counts."""
    model = gpt2()
    module = model.transformer.h[0].attn
    assert model.config.n_head == 4
    q, k, v = qkv(heads=2, heads_k=1)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = attention_forward(module, q, k, v, None)[0]
    assert (out - expected.transpose(1, 2)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 3.0}, "softcap 3.0"),
        ({"sliding_window": 3}, "sliding window"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"output_attentions": True}, "output_attentions"),
        ({"position_bias": torch.zeros(1, 4, 7, 7)}, "position bias"),
    ],
)
def test_reasons(options, reason):
    q, k, v = qkv()
    layer = Layer()
    out, weights = attention_forward(layer, q, k, v, None, **options)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    if "sliding_window" in options:
        seen = seen.triu(-2)
    scores = (q @ k.transpose(2, 3)) * 8**-0.5
    if "softcap" in options:
        scores = 3.0 * torch.tanh(scores / 3.0)
    expected = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    assert (out - expected).abs().max() < 1e-5
    assert (weights is not None) == (
        "output_attentions" in options or "softcap" in options or "s_aux" in options
    )
    assert reason in next(iter(report.calls_of(layer).reasons))


def test_idle_window_and_other_keywords_stay_on_the_op():
    q, k, v = qkv()
    layer = Layer()
    attention_forward(
        layer, q, k, v, None, sliding_window=7, softcap=None, s_aux=None, anything_else=object()
    )
    assert report.calls_of(layer).cpu == 1


def test_values_of_another_width_fall_back():
    q, k, _ = qkv()
    v = torch.randn(2, 4, 7, 6)
    layer = Layer()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    assert (attention_forward(layer, q, k, v, None)[0] - expected).abs().max() < 1e-6
    assert "head dims differ: queries 8, values 6" in report.calls_of(layer).reasons


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()])
def test_a_batch_that_is_broadcast_falls_back(mask):
    (q, k, v), layer = qkv(), Layer()
    expected = F.scaled_dot_product_attention(q[:1], k, v, is_causal=True).transpose(1, 2)
    assert (attention_forward(layer, q[:1], k, v, mask)[0] - expected).abs().max() < 1e-6
    assert report.calls_of(layer).fallback == 1


def test_nothing_can_do_it():
    class Alone(Layer):
        __module__ = "torch.nn"

    layer = nn.Module()
    layer.is_causal = True
    with pytest.raises(NotImplementedError, match="eager_attention_forward next to Module"):
        attention_forward(layer, *qkv(), None, softcap=3.0)


def test_empty_rows_have_zero_gradients():
    q, k, v = (x.requires_grad_() for x in qkv())
    seen = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    seen[0, :, 2] = False
    out, _ = attention_forward(Layer(), q, k, v, seen)
    out.square().sum().backward()
    assert (out[0, 2] == 0).all() and (q.grad[0, :, 2] == 0).all()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_positions_under_capture_are_not_read(monkeypatch):
    """A trace makes a mask of given positions on the device: right whether packed or not."""
    q, k, v = qkv()
    packed = torch.cat([torch.arange(3), torch.arange(4)])[None].repeat(2, 1)
    layer = Layer(is_causal=False)
    expected = attention_forward(layer, q, k, v, None, position_ids=packed)[0]
    plain = attention_forward(layer, q, k, v, None)[0]
    assert report.calls_of(layer).cpu == 2 and not torch.allclose(expected, plain)
    monkeypatch.setattr(hf_flashattn._compat, "is_tracing", lambda tensor=None: True)
    assert (
        attention_forward(layer, q, k, v, None, position_ids=packed)[0] - expected
    ).abs().max() < 1e-6
    positions = torch.arange(7)[None]
    assert (
        attention_forward(layer, q, k, v, None, position_ids=positions)[0] - plain
    ).abs().max() < 1e-6
    assert "position_ids from the caller" in next(iter(report.calls_of(layer).reasons))


def test_a_changed_position_tensor_is_looked_at_again():
    model, positions = bert(), torch.arange(13)[None].repeat(3, 1)
    packed = torch.cat([torch.arange(6), torch.arange(7)])[None].repeat(3, 1)
    with hf_flashattn.patched(model), torch.no_grad():
        output(model, {"input_ids": tokens(), "position_ids": positions})
        expected = output(model, {"input_ids": tokens(), "position_ids": packed})
        positions.copy_(packed)
        assert torch.equal(
            output(model, {"input_ids": tokens(), "position_ids": positions}), expected
        )
    with torch.inference_mode(), hf_flashattn.patched(model):
        inputs = {"input_ids": tokens(), "position_ids": packed.clone()}
        assert (output(model, inputs) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_explained_once_for_all_layers_and_forwards(make, monkeypatch):
    explained = []
    real = support.explain
    monkeypatch.setattr(support, "explain", lambda r: explained.append(r) or real(r))
    model = make(**({"n_layer": 4} if make is gpt2 else {"num_hidden_layers": 4}))
    with hf_flashattn.patched(model) as result, torch.no_grad():
        attention._explain_once.cache_clear()
        explained.clear()
        model(tokens())
        model(tokens())
        assert calls(result, "cpu") == 8 and len(explained) == 1
        model.double()(tokens())
        assert len(explained) == 2


def test_no_address_is_read_on_the_cpu():
    """vmap's tensors and fake ones have none."""
    module = torch.nn.Module()
    q = torch.randn(2, 4, 16, 8)

    def attend(x):
        return attention_forward(module, x, x, x, None)[0]

    batched = torch.vmap(attend)(q.expand(3, -1, -1, -1, -1))
    torch.testing.assert_close(batched, attend(q).expand(3, -1, -1, -1, -1))
    graph = torch.fx.experimental.proxy_tensor.make_fx(attend, tracing_mode="fake")(q)
    torch.testing.assert_close(graph(q), attend(q))
