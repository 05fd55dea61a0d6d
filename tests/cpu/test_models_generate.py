"""KV caches and `generate`: the same tokens as eager, with the calls on the op."""

from __future__ import annotations

import pytest
import torch
from model_helpers import (
    BATCH,
    ENCODER_LENGTH,
    LENGTH,
    bert,
    bert_decoder,
    calls,
    encoder_states,
    gpt2,
    llama,
    output,
    padding,
    tokens,
)
from transformers import CompileConfig, DynamicCache, EncoderDecoderModel, StaticCache

import hf_flashattn

MAKERS = pytest.mark.parametrize("make", [gpt2, bert_decoder], ids=["gpt2", "bert"])


def generate(model, **options):
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    } | options
    result = model.generate(tokens(), output_logits=True, return_dict_in_generate=True, **options)
    return result.sequences, torch.stack(result.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["none", "ones", "left", "holed"])
@MAKERS
def test_generate(make, kind, cache):
    model, options = make(), {"attention_mask": padding(kind), "cache_implementation": cache}
    expected, expected_logits = generate(model, **options)
    with hf_flashattn.patched(model) as report:
        got, got_logits = generate(model, **options)
        assert calls(report, "fallback") == 0
        assert calls(report, "cpu") >= 14
    assert torch.equal(got, expected)
    assert (got_logits - expected_logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"use_cache": False}], ids=["beams", "no-cache"]
)
@MAKERS
def test_generate_otherwise(make, options):
    model, options = make(), {"attention_mask": padding("left"), **options}
    options["max_new_tokens"] = 4
    expected = model.generate(
        tokens(), do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    with hf_flashattn.patched(model) as report:
        got = model.generate(
            tokens(), do_sample=False, pad_token_id=0, eos_token_id=None, **options
        )
        assert calls(report, "fallback") == 0
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["none", "right", "holed"])
def test_generate_gpt2_with_cross_attention(kind):
    model = gpt2(add_cross_attention=True)
    options = {
        "attention_mask": padding("left"),
        "encoder_hidden_states": encoder_states(),
        "encoder_attention_mask": padding(kind, ENCODER_LENGTH),
    }
    expected, expected_logits = generate(model, **options)
    with hf_flashattn.patched(model) as report:
        got, got_logits = generate(model, **options)
        assert calls(report, "fallback") == 0
    assert torch.equal(got, expected)
    assert (got_logits - expected_logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["none", "right", "holed"])
def test_generate_bert2bert(kind):
    """Two BERTs with a config in a config each: padded encoder, cached decoder, cross-attention."""
    model = EncoderDecoderModel(encoder=bert(), decoder=bert_decoder()).eval()
    options = {"attention_mask": padding(kind), "decoder_start_token_id": 1}
    expected, expected_logits = generate(model, **options)
    with hf_flashattn.patched(model) as report:
        got, got_logits = generate(model, **options)
        assert calls(report, "fallback") == 0
        assert len(report.rows) == 6 and all(row.calls.total > 0 for row in report.rows)
    assert torch.equal(got, expected)
    assert (got_logits - expected_logits).abs().max() < 1e-4


def in_chunks(run, ids, mask, past):
    """Logits (BATCH, LENGTH, vocabulary) of a prompt in three pieces of several tokens."""
    rows, start = [], 0
    for stop in (6, 10, LENGTH):
        inputs = {"input_ids": ids[:, start:stop], "past_key_values": past, "use_cache": True}
        inputs["position_ids"] = torch.arange(start, stop).expand(BATCH, -1)
        if mask is not None:
            inputs["attention_mask"] = mask[:, :stop]
        rows.append(output(run, inputs))
        start = stop
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("kind", ["ones", "none", "left", "holed"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@MAKERS
def test_chunks(make, cache, kind):
    """Causal is aligned with the last key there is."""
    model, ids, mask = make(), tokens(), padding(kind)

    def logits():
        past = (
            DynamicCache(config=model.config)
            if cache == "dynamic"
            else StaticCache(model.config, max_cache_len=32)
        )
        return in_chunks(model, ids, mask, past)

    with torch.no_grad():
        expected = logits()
        with hf_flashattn.patched(model) as report:
            got = logits()
            assert calls(report, "fallback") == 0
    rows = torch.ones(BATCH, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    assert (got - expected)[rows].abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["none", "left", "holed", "empty"])
@pytest.mark.parametrize("cache", ["fresh", "used"])
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_compiled_chunks_in_a_static_cache(make, cache, kind):
    """Where the queries start is a tensor once the cache has memory: no trace may read it."""
    model, ids, mask = make(), tokens(), padding(kind)

    def logits(run):
        past = StaticCache(model.config, max_cache_len=40)
        if cache == "used":
            model(input_ids=ids, past_key_values=past, use_cache=True)
            past.reset()
        return in_chunks(run, ids, mask, past)

    torch._dynamo.reset()
    with torch.no_grad():
        expected = logits(model)
        with hf_flashattn.patched(model) as report:
            got = logits(torch.compile(model, fullgraph=True, backend="eager"))
            assert all(row.calls.traced for row in report.rows)
            assert calls(report, "fallback") == 0, report
        rows = torch.ones(BATCH, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
        assert (got - expected)[rows].abs().max() < 1e-4
        torch._dynamo.reset()
        with hf_flashattn.patched(model, exclude="*"):  # the fallback writes the mask out
            got = logits(torch.compile(model, fullgraph=True, backend="eager"))
    assert (got - expected)[rows].abs().max() < 1e-4


def test_first_forward_with_a_cache_is_not_mistaken_for_packed():
    """Left padding makes positions restart; under a mask of ones they cut no sequence."""
    model = gpt2()
    positions = torch.arange(LENGTH)[None].repeat(BATCH, 1)
    inputs = {"input_ids": tokens(), "position_ids": positions, "use_cache": True}
    expected = output(model, inputs)
    with hf_flashattn.patched(model):
        assert (output(model, inputs) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["ones", "left", "holed"])
def test_static_cache_with_compiled_decoding(kind):
    """What generate does on a GPU: masks made outside, the decoding step compiled."""
    config = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    model, options = gpt2(), {"attention_mask": padding(kind), "max_new_tokens": 4}
    expected, expected_logits = generate(model, **options)
    torch._dynamo.reset()
    with hf_flashattn.patched(model) as report:
        got, got_logits = generate(
            model, cache_implementation="static", compile_config=config, **options
        )
        assert all(row.calls.traced for row in report.rows)
        assert calls(report, "fallback") == 0, report
    assert torch.equal(got, expected)
    assert (got_logits - expected_logits).abs().max() < 1e-4
