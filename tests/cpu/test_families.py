"""Families with attention code of their own: patched equals eager, and runs on the kernel."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from family_models import (
    BIASED_DECODERS,
    BIASED_ENCODERS,
    DECODERS,
    ENCODERS,
    SEQ2SEQ,
    make,
)
from model_helpers import (
    BATCH,
    ENCODER_LENGTH,
    HIDDEN,
    LENGTH,
    assert_replays_wish_for_weights,
    assert_same,
    build,
    calls,
    output,
    padding,
    state_of,
    tokens,
)
from transformers import StaticCache

import hf_flashattn
from hf_flashattn import FallbackError, PatchError

KERNEL = {**DECODERS, **{f"{name}_encoder": x for name, x in ENCODERS.items()}}
BIASED = {**BIASED_DECODERS, **BIASED_ENCODERS}
PADDINGS = ("none", "right", "left", "holed")


def inputs(kind: str = "none") -> tuple[dict, torch.Tensor | None]:
    mask = padding(kind)
    return {"input_ids": tokens()} | ({} if mask is None else {"attention_mask": mask}), mask


# ---- the same results, on the kernel -------------------------------------------------------------


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("name", KERNEL)
def test_equals_eager_on_the_kernel(name, kind):
    model = make(KERNEL[name])
    batch, mask = inputs(kind)
    report = assert_same(model, batch, mask, tolerance=2e-5, strict=True)
    assert calls(report, "fallback") == 0 and calls(report, "cpu") == 2, report
    assert all(row.runs == "cpu implementation" for row in report.rows)


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_falls_back_and_equals_eager(name, kind):
    """ALiBi, relative positions: the same way, up to what the kernels lack."""
    model = make(BIASED[name])
    batch, mask = inputs(kind)
    report = assert_same(model, batch, mask, tolerance=2e-5)
    assert calls(report, "fallback") == 2 and calls(report, "cpu") == 0, report
    assert all("an additive bias (position bias" in row.why for row in report.rows), report


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_sequence_to_sequence(name):
    """Self-attention both ways and cross-attention, with padding on both sides."""
    model = make(SEQ2SEQ[name])
    batch = {
        "input_ids": tokens(length=ENCODER_LENGTH, seed=3),
        "attention_mask": padding("left", ENCODER_LENGTH),
        "decoder_input_ids": tokens(),
        "decoder_attention_mask": padding("right"),
        "use_cache": False,
    }
    report = assert_same(model, batch, padding("right"), tolerance=2e-5, strict=True)
    assert calls(report, "cpu") == 6, report


@pytest.mark.parametrize("name", ["megatron_bert", "rembert", "roformer", "xglm"])
def test_cross_attention(name):
    model = make(DECODERS[name], add_cross_attention=True)
    # Megatron-BERT views the encoder's states in the shape of the decoder's.
    length = LENGTH if name == "megatron_bert" else ENCODER_LENGTH
    states = torch.randn(BATCH, length, HIDDEN, generator=torch.Generator().manual_seed(2))
    seen = padding("right", length)
    batch, mask = inputs("left")
    batch |= {"encoder_hidden_states": states, "encoder_attention_mask": seen}
    report = assert_same(model, batch, mask, tolerance=2e-5, strict=True)
    assert calls(report, "cpu") == 4, report


# ---- training, weights, dtypes -------------------------------------------------------------------

DROPOUT = {
    "gpt_neo": "attention_dropout",
    "gptj": "attn_pdrop",
    "gpt_neox_japanese": "attention_dropout",
    "xglm": "attention_dropout",
    "megatron_bert": "attention_probs_dropout_prob",
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_reaches_the_kernel(name, monkeypatch):
    model = make(DECODERS[name], **{DROPOUT[name]: 0.5}).train()
    seen = []
    forward = hf_flashattn.ops.call_dense
    monkeypatch.setattr(
        hf_flashattn.ops, "call_dense", lambda *args: seen.append(args[8]) or forward(*args)
    )
    batch, _ = inputs("left")
    with hf_flashattn.patched(model, strict=True):
        torch.manual_seed(5)
        first = output(model, batch)
        torch.manual_seed(5)
        again = output(model, batch)
        other = output(model, batch)
    assert seen == [0.5] * 6
    assert torch.equal(first, again) and not torch.allclose(first, other)
    with hf_flashattn.patched(model.eval(), strict=True):
        output(model, batch)
    assert seen[6:] == [0.0] * 2


@pytest.mark.parametrize("name", ["gpt_neo", "falcon_mqa", "megatron_bert", "xglm", "bloom", "mpt"])
def test_attention_weights_come_from_the_models_own_code(name):
    entry = {**DECODERS, **BIASED_DECODERS}[name]
    model, (batch, mask) = make(entry), inputs("right")
    batch |= {"output_attentions": True, "use_cache": False}
    with torch.no_grad():
        expected = model(**batch)
        with hf_flashattn.patched(model) as report:
            got = model(**batch)
            rows = report.rows
    assert all("output_attentions=True" in row.why and row.calls.fallback == 1 for row in rows)
    assert len(got.attentions) == len(expected.attentions) == 2
    kept = mask.bool()
    torch.testing.assert_close(got.logits[kept], expected.logits[kept], rtol=1e-5, atol=1e-5)
    for weights, wanted in zip(got.attentions, expected.attentions, strict=True):
        pick = kept[:, None, :, None].expand_as(wanted)
        torch.testing.assert_close(weights[pick], wanted[pick], rtol=1e-5, atol=1e-6)
    if name in DECODERS:
        with (
            hf_flashattn.patched(model, strict=True),
            pytest.raises(FallbackError, match="output_attentions"),
        ):
            model(**batch)


@pytest.mark.parametrize("way", ["argument", "config"])
def test_a_module_that_is_not_told_returns_its_weights_too(way):
    sizes = {
        "image_size": [8, 16],
        "patch_size": 4,
        "hidden_size": HIDDEN,
        "initializer_range": 0.3,
    }
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2.0}
    model = build(transformers.MgpstrModel, transformers.MgpstrConfig(**sizes, **layers))
    pixels, wish = torch.randn(2, 3, 8, 16), {}
    if way == "argument":
        wish = {"output_attentions": True}
    else:
        model.config.output_attentions = True
    with torch.no_grad():
        expected = model(pixels, **wish).attentions
        with hf_flashattn.patched(model) as report:
            got = model(pixels, **wish).attentions
            model(pixels, output_attentions=False)
            assert calls(report, "fallback") == calls(report, "cpu") == 2
    for weights, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gptj", "codegen", "gpt_neo", "falcon_gqa", "xglm"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision(name, how):
    """Code that turns q and k to fp32 for the scores: ours stay in the dtype of the values."""
    exact = make(DECODERS[name])
    batch, mask = inputs("left")
    with torch.no_grad():
        truth = output(exact, batch)
        model = copy.deepcopy(exact)
        model = model.to(torch.bfloat16) if how == "weights" else model
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            eager = output(model, batch)
            with hf_flashattn.patched(model, strict=True) as report:
                got = output(model, batch)
    assert calls(report, "cpu") == 2
    kept = mask.bool()
    error, usual = ((x.float() - truth)[kept].abs().mean() for x in (got, eager))
    assert error <= 1.5 * usual, (error, usual)


# ---- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [x for x in (*DECODERS, *BIASED_DECODERS) if x != "trocr"])
def test_generates_the_same_tokens(name):
    """Left padding, a dynamic cache; the scores of every step agree."""
    model = make({**DECODERS, **BIASED_DECODERS}[name])
    batch, _ = inputs("left")
    options = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(**batch, **options)
    with hf_flashattn.patched(model) as report:
        got = model.generate(**batch, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for step, wanted in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, wanted, rtol=1e-4, atol=1e-4)
    kind = "fallback" if name in BIASED_DECODERS else "cpu"
    assert calls(report, kind) == sum(row.calls.total for row in report.rows) == 6, report


@pytest.mark.parametrize("name", ["gptj", "gpt_neox_japanese", "falcon_mqa", "xglm"])
def test_static_cache(name):
    model = make(DECODERS[name])
    batch, mask = inputs("left")

    def two_steps():
        cache = StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            model(**batch, past_key_values=cache, use_cache=True)
            longer = torch.cat([mask, mask.new_ones(BATCH, 1)], dim=1)
            batch_of_one = {"input_ids": tokens(length=1, seed=4), "attention_mask": longer}
            return model(**batch_of_one, past_key_values=cache, use_cache=True).logits

    expected = two_steps()
    with hf_flashattn.patched(model) as report:
        got = two_steps()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert sum(row.calls.total for row in report.rows) == 4, report


# ---- windows, wishes, other masks ----------------------------------------------------------------


def test_gpt_neo_beyond_its_window_falls_back():
    model = make(DECODERS["gpt_neo"], window_size=5)
    for kind in ("none", "left"):
        batch, mask = inputs(kind)
        report = assert_same(model, batch, mask, tolerance=2e-5)
        full, local = report.rows
        assert full.runs == "cpu implementation" and local.runs == "fallback", report
        assert "sliding window (4, 0)" in local.why
    with hf_flashattn.patched(model) as report:
        assert "over 5 tokens a fallback" in report.rows[1].why
        output(model, {"input_ids": tokens(length=5)})
        assert report.rows[1].runs == "cpu implementation"


@pytest.mark.parametrize("name", ["megatron_bert", "gpt_neo", "falcon_mqa", "bloom"])
def test_fallback_eager_is_the_models_own_code(name):
    model = make({**DECODERS, **BIASED_DECODERS}[name])
    batch, mask = inputs("right")
    with torch.no_grad():
        expected = output(model, batch)
        with hf_flashattn.patched(model, fallback="eager", exclude="*") as report:
            got = output(model, batch)
    assert calls(report, "fallback") == 2
    assert torch.equal(got[mask.bool()], expected[mask.bool()])


def test_exclude_takes_one_layer():
    model = make(DECODERS["xglm"])
    report = assert_same(model, *inputs("left"), tolerance=2e-5, exclude="*.0.*")
    assert [row.runs for row in report.rows] == ["fallback", "cpu implementation"]


@pytest.mark.parametrize("name", ["megatron_bert", "gpt_neo"])
def test_an_additive_mask_of_the_callers_own(name):
    """GPT-Neo's window holds beside it."""
    model = make(DECODERS[name], **({"window_size": 5} if name == "gpt_neo" else {}))
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[7, 2] = seen[9, 0] = False
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(~seen, torch.finfo().min)
    report = assert_same(model, {"input_ids": tokens(), "attention_mask": mask}, tolerance=2e-5)
    assert all("4-D mask" in row.why for row in report.rows), report


# ---- forecast, undo, copies ----------------------------------------------------------------------


def test_an_additive_mask_that_is_written_to_in_inference_mode():
    """Nobody counts that: each forward reads the mask anew."""
    model, ids = make(ENCODERS["megatron_bert"]), tokens()
    lowest = torch.finfo(torch.float32).min
    with torch.inference_mode(), hf_flashattn.patched(model):
        mask = torch.zeros(BATCH, 1, 1, LENGTH)
        plain = output(model, {"input_ids": ids, "attention_mask": mask})
        mask.masked_fill_(padding("left")[:, None, None] == 0, lowest)
        got = output(model, {"input_ids": ids, "attention_mask": mask})
        expected = output(model, {"input_ids": ids, "attention_mask": padding("left")})
    assert torch.equal(got, expected) and not torch.equal(got, plain)


@pytest.mark.parametrize("name", {**KERNEL, **BIASED, **SEQ2SEQ})
def test_the_forecast_is_what_runs(name):
    entry = {**KERNEL, **BIASED, **SEQ2SEQ}[name]
    model = make(entry)
    batch, _ = inputs()
    with hf_flashattn.patched(model) as report:
        forecast = [row.runs for row in report.rows]
        assert all(row.expected for row in report.rows)
        output(model, batch)
        assert [row.runs for row in report.rows] == forecast, report
    biased = name in BIASED
    assert set(forecast) == {"fallback" if biased else "cpu implementation"}
    if biased:
        with pytest.raises(PatchError, match="additive bias"):
            hf_flashattn.patch_model(model, strict=True)


@pytest.mark.parametrize("name", ["gpt_neo", "bloom", "mpt", "falcon_alibi", "xglm"])
def test_undo_leaves_nothing_behind(name):
    model = make({**DECODERS, **BIASED_DECODERS}[name])
    before = state_of(model)
    hf_flashattn.patch_model(model)
    assert state_of(model) != before
    hf_flashattn.unpatch_model(model)
    assert state_of(model) == before


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_patched_model_uses_its_own_weights(way):
    model = make(DECODERS["xglm"])
    batch, mask = inputs("left")
    hf_flashattn.patch_model(model)
    expected = output(model, batch)
    other = way(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(output(other, batch), expected)
    assert calls(hf_flashattn.attention_report(other), "cpu") == 2
    hf_flashattn.unpatch_model(other)
    kept = mask.bool()
    plain = output(other, batch)
    torch.testing.assert_close(plain[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing():
    model = make(DECODERS["gpt_neo"]).train()
    model.gradient_checkpointing_enable()
    batch, mask = inputs("left")
    assert_same(model, batch | {"use_cache": False}, mask, tolerance=2e-5, strict=True)


@pytest.mark.parametrize("stable", [False, True])
def test_checkpointing_replays_the_wish_for_weights_in_one_call(stable):
    """WavLM's weights come out of torch's one call, in the forward and when it is run again."""
    config = transformers.WavLMConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=stable,
        layerdrop=0.0,
        apply_spec_augment=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
    )
    model = build(transformers.WavLMModel, config).train()
    # With reentrance WavLM's own backward does not end.
    inputs = {"input_values": torch.randn(2, 200)}
    report = assert_replays_wish_for_weights(model, inputs, reentrant=False)
    mean = "its own code goes on with the mean over heads of the scores"
    for row in report.rows:  # each twice: in the forward and again
        assert row.calls.fallback == 4 and row.calls.reasons[mean] == 2


def test_without_a_patch_the_report_promises_nothing():
    report = hf_flashattn.attention_report(make(DECODERS["xglm"]))
    assert {row.runs for row in report.rows} == {"unsupported"}
    assert all("not patched" in row.why for row in report.rows)


@pytest.mark.parametrize("loaded", ["hf_flashattn", "hf_fused_attn"])
@pytest.mark.parametrize("name", ["bloom", "mpt", "xglm", "megatron_bert"])
def test_a_name_alone_changes_nothing(name, loaded):
    """Their code runs as ever, with masks that it understands; and they may be patched then."""
    cls, config, options = {**DECODERS, **BIASED_DECODERS}[name]
    model = make((cls, config, options))
    named = build(getattr(transformers, cls), getattr(transformers, config)(**options), name=loaded)
    for kind in ("none", "left"):
        batch, _ = inputs(kind)
        assert torch.equal(output(named, batch), output(model, batch))
    assert {row.runs for row in hf_flashattn.attention_report(named).rows} == {"unsupported"}
    report = hf_flashattn.patch_model(named)
    batch, mask = inputs("left")
    kept = mask.bool()
    got, expected = output(named, batch), output(model, batch)
    torch.testing.assert_close(got[kept], expected[kept], rtol=1e-4, atol=1e-4)
    assert sum(row.calls.total for row in report.rows) == 2
    hf_flashattn.unpatch_model(named)


@pytest.mark.parametrize("way", ["patched", "by name"])
@pytest.mark.parametrize("kind", ["none", "left", "holed"])
def test_a_language_model_beside_an_autoencoder_stays_on_the_kernel(kind, way):
    """Apertus 1.5: the attention of its pixels is a family, but takes no masks."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "vocab_size": 60, "pad_token_id": 0}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    if not hasattr(transformers, "Apertus1p5TextConfig"):
        pytest.skip(f"Transformers {transformers.__version__} has no Apertus 1.5")
    config = transformers.Apertus1p5TextConfig(**sizes, **heads, initializer_range=0.3)
    model = build(transformers.Apertus1p5TextForCausalLM, config)
    batch, mask = inputs(kind)
    if way == "patched":
        report = assert_same(model, batch, mask, tolerance=2e-5)
    else:
        model.set_attn_implementation("hf_flashattn")
        output(model, batch)
        report = hf_flashattn.attention_report(model)
    assert calls(report, "fallback") == 0 and calls(report, "cpu") > 0, report


@pytest.mark.parametrize("name", ["megatron_bert", "rembert", "luke", "roformer"])
def test_encoders_without_padding(name):
    """unpad=True runs their layers without padding, or says why not; excluded layers agree too."""
    model = make(ENCODERS[name])
    batch, mask = inputs("left")
    for options in ({}, {"exclude": "*.0.*"}, {"exclude": "*.0.*", "fallback": "eager"}):
        report = assert_same(model, batch, mask, tolerance=2e-5, unpad=True, **options)
        assert sum(row.calls.total for row in report.rows) == 2, report


def test_integer_softmax_stays():
    model = make(ENCODERS["ibert"], quant_mode=True)
    report = hf_flashattn.patch_model(model)
    assert all(row.runs == "unsupported" and "quant_mode" in row.why for row in report.rows)


@pytest.mark.parametrize("name", ["megatron_bert", "gpt_neo", "xglm"])
def test_compiles_without_a_graph_break(name):
    model = make(DECODERS[name])
    batch, mask = inputs("left")
    batch |= {"use_cache": False}
    expected = output(model, batch)
    torch._dynamo.reset()
    with hf_flashattn.patched(model, strict=True) as report, torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        got = compiled(**batch).logits
    kept = mask.bool()
    torch.testing.assert_close(got[kept], expected[kept], rtol=1e-4, atol=1e-4)
    assert all(row.calls.traced and row.calls.cpu for row in report.rows)
