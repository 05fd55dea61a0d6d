"""`generate` of every family and mode, padded: patched gives the tokens of eager."""

from __future__ import annotations

import pytest
import torch
from model_helpers import VOCAB, bert_decoder, build, calls, gpt2, padding, tokens
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import is_hqq_available, is_optimum_quanto_available

import hf_flashattn

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
}
WINDOW = 6
GEMMA2 = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
SIDES = {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
}
BART = {
    "d_model": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 0,
    "initializer_factor": 3.0,
}

FAMILIES = {
    "gpt2": gpt2,
    "bert": bert_decoder,
    "llama": lambda: build(LlamaForCausalLM, LlamaConfig(**SMALL)),
    "mistral": lambda: build(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=WINDOW)),
    "gemma2": lambda: build(
        Gemma2ForCausalLM, Gemma2Config(**SMALL, **GEMMA2, sliding_window=WINDOW)
    ),
    "t5": lambda: build(T5ForConditionalGeneration, T5Config(**T5)),
    "bart": lambda: build(BartForConditionalGeneration, BartConfig(**BART)),
}
WHOLE = ("gpt2", "bert", "llama", "bart")  # every call of these is the kernel's

MODES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static-beams": {"num_beams": 2, "cache_implementation": "static"},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": None},
}
ONE_ROW = ("prompt-lookup", "assistant")  # modes that take a batch of one


def generate(model, ids, mask, **options):
    fixed = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(
        ids,
        attention_mask=mask,
        output_logits=True,
        return_dict_in_generate=True,
        **fixed | options,
    )
    return out.sequences, torch.stack(out.logits)


def assert_same(got, expected):
    """The same tokens, for the same reasons: logits equal as far as fp32 goes."""
    assert torch.equal(got[0], expected[0])
    assert (got[1] - expected[1]).abs().max() < 1e-4 * max(1.0, expected[1].abs().max())


def assistant_of(make):
    """The same model, somewhat off: some of what it proposes is taken, some is not."""
    assistant = make()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return assistant


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, "left") for mode in MODES] + [("dynamic", "holed"), ("static", "holed")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_eager(family, mode, kind):
    make, options = FAMILIES[family], dict(MODES[mode])
    model, ids, mask = make(), tokens(), padding(kind)
    if mode in ONE_ROW:  # row 1 is a row that every kind of padding touches
        ids, mask = ids[1:2], None if mask is None else mask[1:2]
    if mode == "prompt-lookup":
        ids = torch.cat([ids[:, :5], ids[:, :5], ids[:, 10:]], dim=1)
    if mode == "assistant":
        options["assistant_model"] = assistant_of(make)
    try:
        expected = generate(model, ids, mask, **options)
    except RuntimeError as error:
        if (family, mode) != ("gemma2", "assistant"):
            raise
        pytest.skip(f"this Transformers cannot under eager either: {error}")
    with hf_flashattn.patched(model) as report:
        assert_same(generate(model, ids, mask, **options), expected)
        if family in WHOLE:
            report.assert_all_on_kernel(allow_cpu=True, allow_uncalled=True)
        if family == "mistral" and mode in ("dynamic", "static", "beams", "static-beams"):
            # The prompt is longer than the window, a single token's keys never are.
            assert calls(report, "fallback") == 2 and calls(report, "cpu") == 14
            assert all("sliding window of 6" in row.why for row in report.rows)
        if family == "gemma2":
            assert all(row.runs == "fallback" for row in report.rows)
            assert any("softcap" in row.why for row in report.rows)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_an_assistant_that_is_patched_too(family):
    make = FAMILIES[family]
    model, assistant = make(), assistant_of(make)
    ids = tokens(1)
    expected = generate(model, ids, None, assistant_model=assistant)
    with hf_flashattn.patched(model) as report, hf_flashattn.patched(assistant) as second:
        assert_same(generate(model, ids, None, assistant_model=assistant), expected)
        assert calls(report, "cpu") > 0 and calls(second, "cpu") > 0


def test_sampling_draws_the_same():
    """Logits equal to 1e-5 and one generator: the same tokens."""
    model, sequences = FAMILIES["llama"](), []
    for patch in (False, True):
        if patch:
            hf_flashattn.patch_model(model)
        torch.manual_seed(7)
        sequences.append(generate(model, tokens(), padding("left"), do_sample=True, top_k=10))
    assert_same(*sequences)


BACKENDS = {
    "quanto": {"nbits": 4, "q_group_size": 8, "residual_length": 4},
    "hqq": {"nbits": 4, "q_group_size": 8, "residual_length": 4, "axis_key": 1, "axis_value": 1},
    "fp8": {},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_quantised_caches(family, backend):
    """optimum-quanto or hqq, which nothing here installs; newer Transformers bring fp8."""
    missing = {"quanto": is_optimum_quanto_available, "hqq": is_hqq_available}.get(backend)
    if missing is not None and not missing():
        pytest.skip(f"needs {'optimum-quanto' if backend == 'quanto' else backend}, found none")
    model, mask = FAMILIES[family](), padding("left")

    def run():
        config = {"backend": backend, **BACKENDS[backend]}  # generate takes entries out of it
        options = {"cache_implementation": "quantized", "cache_config": config}
        return generate(model, tokens(), mask, **options)

    try:
        expected = run()
    except ValueError as error:
        if "Unknown quantization backend" not in str(error):
            raise
        pytest.skip(str(error))
    with hf_flashattn.patched(model) as report:
        assert_same(run(), expected)
        report.assert_all_on_kernel(allow_cpu=True)
