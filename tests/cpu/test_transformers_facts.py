"""Where Transformers' own flash or default path is wrong, silent or refuses, ours must be right.

By patch_model and by the registered names, which differ in what Transformers does with them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from model_helpers import (
    BATCH,
    ENCODER_LENGTH,
    HIDDEN,
    LENGTH,
    PADDINGS,
    VOCAB,
    assert_same,
    bert,
    bert_decoder,
    build,
    calls,
    encoder_states,
    gpt2,
    output,
    padding,
    tokens,
)
from transformers import (
    Aimv2TextConfig,
    Aimv2TextModel,
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2Model,
    FalconConfig,
    FalconForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LayoutLMConfig,
    LayoutLMModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarkupLMConfig,
    MarkupLMModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import hf_flashattn
from hf_flashattn import functional, masks

NAMES = ("hf_flashattn", "hf_fused_attn")
SMALL = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
}


def bart():
    layers = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    sides = {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in layers.items()}
    none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = BartConfig(
        d_model=HIDDEN, vocab_size=VOCAB, max_position_embeddings=64, init_std=0.2, **sides, **none
    )
    return build(BartForConditionalGeneration, config)


def t5():
    config = T5Config(
        d_model=HIDDEN,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        initializer_factor=2.0,
    )
    return build(T5ForConditionalGeneration, config)


def renamed(model, name, way):
    """The same weights under a registered name, set on the model or given to a new one."""
    if way == "set":
        new = copy.deepcopy(model)
        new.set_attn_implementation(name)
    else:
        new = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=name)
        new.load_state_dict(model.state_dict())
    return new.eval()


# ---- padded cross-attention: the stock path unpads the queries with the keys' mask --------------


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("make", [bart, t5], ids=["bart", "t5"])
def test_padded_encoder_decoder(make, kind):
    inputs = {"input_ids": tokens(), "attention_mask": padding(kind)}
    inputs["decoder_input_ids"] = tokens(length=7, seed=4)
    weight = torch.ones(BATCH, 7)
    if kind == "empty":  # eager averages over all keys where none is left; ours gives 0
        weight[0] = 0
    report = assert_same(make(), inputs, weight)
    assert all(row.calls.total for row in report.rows)
    if make is bart:
        assert calls(report, "fallback") == 0


@pytest.mark.parametrize("way", ["set", "new"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["right", "left", "holed"])
@pytest.mark.parametrize("family", ["gpt2", "bert", "bart", "t5"])
def test_padded_cross_attention_by_name(family, kind, name, way):
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    if family in ("gpt2", "bert"):
        model = gpt2(add_cross_attention=True) if family == "gpt2" else bert_decoder()
        inputs["encoder_hidden_states"] = encoder_states()
        inputs["encoder_attention_mask"] = padding(kind, ENCODER_LENGTH)
        rows = padding("left").bool()
    else:
        model = bart() if family == "bart" else t5()
        inputs = {"input_ids": tokens(), "attention_mask": padding(kind)}
        inputs["decoder_input_ids"] = tokens(seed=4)
        rows = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    expected = output(model, inputs)
    got = output(renamed(model, name, way), inputs)
    assert (got - expected)[rows].abs().max() < 1e-5 * max(1, expected.abs().max())


# ---- a name in the config is no proof of use -----------------------------------------------------


def test_a_report_by_name_says_which_modules_the_name_did_not_reach():
    """The T5 of some versions says the name and leaves its encoder and decoder on sdpa."""
    model = t5()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=4)}
    expected = output(model, inputs)
    model.set_attn_implementation("hf_flashattn")
    assert model.config._attn_implementation == "hf_flashattn"
    assert (output(model, inputs) - expected).abs().max() < 1e-4
    for row, site in zip(
        (report := hf_flashattn.attention_report(model)).rows, report.sites, strict=True
    ):
        reached = site.module.config._attn_implementation == "hf_flashattn"
        assert (row.calls.total == 1) == reached
        assert reached or (row.runs == "unsupported" and "not patched" in row.why)


def test_patching_reaches_what_the_name_does_not():
    model = t5()
    model.set_attn_implementation("sdpa")
    with hf_flashattn.patched(model) as report:
        output(model, {"input_ids": tokens(), "decoder_input_ids": tokens(seed=4)})
        assert len(report.rows) == 6 and all(row.calls.total == 1 for row in report.rows)


def test_a_model_that_never_asks_the_registry():
    """DeBERTa's scores have three terms: patched, it stays as it is."""
    config = DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p"])
    model = build(DebertaV2Model, config)
    inputs = {"input_ids": tokens(), "attention_mask": padding("right")}
    expected = output(model, inputs)
    with hf_flashattn.patched(model) as report:
        assert torch.equal(output(model, inputs), expected)
        assert {row.runs for row in report.rows} == {"unsupported"} and len(report.rows) == 2


def test_a_model_that_looks_its_name_up_in_a_table_of_its_own():
    """Under our name Falcon's constructor raises; patched, its own code runs on the kernel."""
    model = build(FalconForCausalLM, FalconConfig(**{**SMALL, "ffn_hidden_size": 48}))
    mask = padding("right")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    expected = output(model, inputs)[mask.bool()]
    with hf_flashattn.patched(model) as report:
        torch.testing.assert_close(output(model, inputs)[mask.bool()], expected)
        assert {row.runs for row in report.rows} == {"cpu implementation"}


# ---- packing by the names -----------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [gpt2, bert, bert_decoder], ids=["gpt2", "bert", "bert-decoder"])
def test_packed_by_name(make, name, use_cache):
    model, ids = make(), tokens(1)
    lengths = (5, 1, 7)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        parts = torch.split(ids, lengths, dim=1)
        expected = torch.cat([output(model, {"input_ids": part}) for part in parts], dim=1)
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": use_cache}
        assert (output(renamed(model, name, "set"), inputs) - expected).abs().max() < 2e-5


def test_lengths_that_come_as_tensors():
    model, ids = gpt2(), tokens(1)
    cu = torch.tensor([0, 5, 13], dtype=torch.int64)
    longest = torch.tensor(8)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    given |= {"max_length_q": longest, "max_length_k": longest}
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    with torch.no_grad():
        parts = torch.split(ids, (5, 8), dim=1)
        expected = torch.cat([output(model, {"input_ids": part}) for part in parts], dim=1)
        with hf_flashattn.patched(model) as report:
            got = output(model, {"input_ids": ids, "position_ids": positions, **given})
            report.assert_all_on_kernel(allow_cpu=True)
    assert (got - expected).abs().max() < 2e-5


# ---- static caches with a 2-D mask ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ones", "left", "holed"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [gpt2, bert_decoder], ids=["gpt2", "bert"])
def test_static_cache_by_name(make, name, kind):
    """A prefill into a longer cache, then a token: keys that do not exist yet stay out."""
    model, mask = make(), padding(kind)

    def logits(model):
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
        ids = tokens()
        positions = torch.arange(LENGTH)[None].expand(BATCH, -1)
        more = {"past_key_values": cache, "use_cache": True}
        first = model(
            ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], **more
        )
        last = model(ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], **more)
        return torch.cat([first.logits, last.logits], dim=1)

    with torch.no_grad():
        expected = logits(model)
        got = logits(renamed(model, name, "set"))
    assert (got - expected)[mask.bool()].abs().max() < 1e-4


# ---- vision towers -------------------------------------------------------------------------------


def qwen2_vl_tower():
    config = Qwen2VLVisionConfig(
        depth=2,
        embed_dim=HIDDEN,
        hidden_size=HIDDEN,
        num_heads=4,
        mlp_ratio=2,
        patch_size=4,
        spatial_merge_size=2,
        initializer_range=0.3,
    )
    return build(Qwen2VisionTransformerPretrainedModel, config)


@pytest.mark.parametrize("way", ["patch", *NAMES])
def test_images_of_several_sizes(way, monkeypatch):
    """A flash name gets them in one call with cu_seqlens, any other in one call for each image."""
    model = qwen2_vl_tower()
    grid = torch.tensor([[1, 4, 6], [2, 4, 4]])  # frames, patches down, patches across
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4)

    def run(model):
        out = model(pixels, grid_thw=grid)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state

    expected = run(model)
    packed, real = [], functional.flash_attn_varlen_func
    monkeypatch.setattr(
        functional,
        "flash_attn_varlen_func",
        lambda *args, **options: packed.append(options["causal"]) or real(*args, **options),
    )
    if way == "patch":
        report = hf_flashattn.patch_model(model)
    else:
        model.set_attn_implementation(way)
        report = hf_flashattn.attention_report(model)
    assert (run(model) - expected).abs().max() < 1e-5
    report.assert_all_on_kernel(allow_cpu=True)
    if way == "hf_fused_attn":
        assert packed == [] and all(row.calls.cpu == 3 for row in report.rows)
    else:
        assert packed == [False, False] and all(row.calls.cpu == 1 for row in report.rows)


# ---- models that take only some flash implementations --------------------------------------------


def gpt_oss():
    config = GptOssConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )
    return build(GptOssForCausalLM, config)


@pytest.mark.parametrize("way", ["patch", *NAMES, "loaded"])
def test_a_model_that_declares_its_flash_implementations(way, tmp_path):
    """GPT-OSS: Transformers would put one of its own in the place of any other flash name."""
    assert GptOssForCausalLM._compatible_flash_implementations
    model, mask = gpt_oss(), padding("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    expected = output(model, inputs)
    if way == "patch":
        report = hf_flashattn.patch_model(model)
        assert {row.implementation for row in report.rows} == {"hf_fused_attn"}
        assert "  hf_fused_attn  " in str(report)
    else:
        if way == "loaded":
            model.save_pretrained(tmp_path)
            model = GptOssForCausalLM.from_pretrained(tmp_path, attn_implementation=NAMES[0])
        else:
            model.set_attn_implementation(way)
        report = hf_flashattn.attention_report(model)
    assert model.config._attn_implementation == "hf_fused_attn"
    assert (output(model, inputs) - expected)[mask.bool()].abs().max() < 1e-5
    assert all(row.calls.fallback == 1 and "sinks" in row.why for row in report.rows)


# ---- masks beyond causal and padded: the flash names would drop them -----------------------------


def layoutlm():
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return build(LayoutLMModel, LayoutLMConfig(**SMALL, **none, max_position_embeddings=64))


def markuplm():
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"max_position_embeddings": 64, "max_depth": 4, "pad_token_id": 0}
    return build(MarkupLMModel, MarkupLMConfig(**SMALL, **none, **sizes))


def llama4():
    config = Llama4TextConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"],
    )
    return build(Llama4ForCausalLM, config)


def paligemma():
    vision = {"model_type": "siglip_vision_model", "hidden_size": HIDDEN, "intermediate_size": 48}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    text = {**SMALL, "model_type": "gemma", "num_key_value_heads": 2, "head_dim": 8}
    config = PaliGemmaConfig(
        vision_config={**vision, "projection_dim": HIDDEN},
        text_config=text,
        projection_dim=HIDDEN,
        image_token_id=VOCAB - 1,
    )
    return build(PaliGemmaForConditionalGeneration, config)


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("make", [layoutlm, markuplm])
def test_a_padding_mask_that_the_model_makes_itself(make, kind):
    """LayoutLM and MarkupLM add (B, 1, 1, S) to their scores: read once, for all layers."""
    model, mask = make(), padding(kind)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    report = assert_same(model, inputs, mask)
    report.assert_all_on_kernel(allow_cpu=True)


def test_an_additive_mask_of_one_row_hides_nothing_else():
    """GPT-2's modules are causal, but a mask of the caller's own says all there is to say."""
    model, seen = gpt2(), torch.zeros(BATCH, 1, 1, LENGTH)
    for mask in (seen, seen.masked_fill(padding("left")[:, None, None] == 0, -1e30), seen + 0.5):
        expected = output(model, {"input_ids": tokens(), "attention_mask": mask})
        with hf_flashattn.patched(model) as report:
            got = output(model, {"input_ids": tokens(), "attention_mask": mask})
            assert (got - expected).abs().max() < 1e-5
            assert calls(report, "cpu") == (0 if (mask == 0.5).any() else 2)


@pytest.mark.parametrize("way", ["patched", "by name"])
def test_chunked_attention(way):
    model, mask = llama4(), padding("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    expected = model(**inputs).logits
    whole = copy.deepcopy(model)
    whole.config.attention_chunk_size = 64  # within which all see each other: chunks do show
    assert (whole(**inputs).logits - expected)[mask.bool()].abs().max() > 1e-2
    got, report = output_by(way, model, inputs, whole=True, name=NAMES[1])
    assert (got.logits - expected)[mask.bool()].abs().max() < 1e-5
    chunked, full = report.rows
    assert chunked.runs == "fallback" and "boolean 4-D mask" in chunked.why
    assert full.runs == "cpu implementation" and full.implementation.startswith("hf_fused_attn")


@pytest.mark.parametrize("way", ["patched", "by name"])
def test_a_prefix_that_sees_itself(way):
    """PaliGemma: image and prompt see each other, the rest is causal."""
    model, ids, mask = paligemma(), tokens(2, 12, seed=5) % (VOCAB - 1), torch.ones(2, 12).long()
    ids[:, 2:6], mask[0, :2] = VOCAB - 1, 0
    types = (torch.arange(12) >= 8).long().expand(2, -1)  # 0 is the prefix
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    inputs["token_type_ids"] = types
    expected = model(**inputs).logits
    causal = model(**inputs | {"token_type_ids": torch.ones_like(types)}).logits
    assert (causal - expected)[mask.bool()].abs().max() > 1e-2  # the prefix does show
    got, report = output_by(way, model, inputs, whole=True, name=NAMES[1])
    assert (got.logits - expected)[mask.bool()].abs().max() < 1e-5
    text = [row for row in report.rows if "language_model" in row.module]
    assert len(text) == 2 and all(row.calls.fallback == 1 for row in text), report
    assert all("boolean 4-D mask" in row.why for row in text), report


# ---- names for parts of a model ------------------------------------------------------------------


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            projection_dim=HIDDEN,
        ),
        text_config=LlamaConfig(**SMALL, num_key_value_heads=2),
        image_token_index=VOCAB - 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return build(LlavaForConditionalGeneration, config)


LLAVA_INPUTS = {
    "input_ids": torch.cat([torch.full((2, 5), VOCAB - 1), tokens(2, 8) % (VOCAB - 1)], dim=1),
    "attention_mask": torch.ones(2, 13, dtype=torch.long),
    "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("way", ["set", "from_pretrained", "from_config"])
@pytest.mark.parametrize(
    "wish",
    [
        "hf_flashattn",
        {"vision_config": "hf_flashattn", "text_config": "eager"},
        {"vision_config": "sdpa", "text_config": "hf_flashattn"},
        {"": "eager", "vision_config": "hf_fused_attn", "text_config": "hf_flashattn"},
    ],
    ids=["all", "vision", "text", "both"],
)
def test_a_name_for_each_part(wish, way, tmp_path):
    eager = llava()
    expected = output(eager, LLAVA_INPUTS)
    if way == "set":
        model = copy.deepcopy(eager)
        model.set_attn_implementation(wish)
    elif way == "from_pretrained":
        eager.save_pretrained(tmp_path)
        model = type(eager).from_pretrained(tmp_path, attn_implementation=wish)
    else:
        model = type(eager)._from_config(copy.deepcopy(eager.config), attn_implementation=wish)
        model.load_state_dict(eager.state_dict())
    assert (output(model.eval(), LLAVA_INPUTS) - expected).abs().max() < 1e-5
    for row in hf_flashattn.attention_report(model).rows:
        part = "vision_config" if "vision" in row.module else "text_config"
        name = wish if isinstance(wish, str) else wish[part]
        named = name.startswith("hf_")
        assert row.implementation == (name if named else "")
        assert row.runs == ("cpu implementation" if named else "unsupported"), row


@pytest.mark.parametrize("name", NAMES)
def test_auto_classes(name, tmp_path):
    for model, auto in ((gpt2(), AutoModelForCausalLM), (bert(), AutoModel)):
        expected = output(model, {"input_ids": tokens()})
        model.save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path, attn_implementation=name).eval()
        assert (output(loaded, {"input_ids": tokens()}) - expected).abs().max() < 1e-5
        hf_flashattn.attention_report(loaded).assert_all_on_kernel(allow_cpu=True)
        fresh = auto.from_config(model.config, attn_implementation=name)
        assert fresh.config._attn_implementation == name


# ---- models whose masks are read, or say more than their modules ---------------------------------


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("way", ["patched", "by name"])
def test_a_text_model_whose_modules_deny_that_they_are_causal(way, kind):
    """AIMv2 says is_causal=False and means its mask, which stock SDPA drops without padding."""
    config = Aimv2TextConfig(**SMALL, max_position_embeddings=32)
    model, ids, mask = build(Aimv2TextModel, config), tokens(), padding(kind)
    expected = model(ids, attention_mask=mask).last_hidden_state
    got, report = output_by(way, model, {"input_ids": ids, "attention_mask": mask})
    rows = slice(None) if mask is None else mask.bool()
    assert (got - expected)[rows].abs().max() < 1e-5
    report.assert_all_on_kernel(allow_cpu=True)


def siglip2():
    config = Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_patches=16,
        patch_size=4,
    )
    return build(Siglip2VisionModel, config)


@pytest.mark.parametrize("way", ["patched", "by name", "compiled"])
def test_a_pooler_that_reads_the_mask(way):
    """SigLIP 2 asks for a mask that it repeats for each head; all of it still runs on the op."""
    model, kept = siglip2(), torch.ones(2, 16, dtype=torch.long)
    kept[1, 12:] = 0
    inputs = {
        "pixel_values": torch.randn(2, 16, 3 * 4 * 4),
        "pixel_attention_mask": kept,
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
    }
    expected = model(**inputs)
    got, report = output_by(way, model, inputs, whole=True)
    assert (got.pooler_output - expected.pooler_output).abs().max() < 1e-5
    assert (got.last_hidden_state - expected.last_hidden_state)[kept.bool()].abs().max() < 1e-5
    layers = [row for row in report.rows if row.calls.total]
    runs = "fallback" if way == "compiled" else "cpu implementation"
    # The pooler is torch's MultiheadAttention, which only patch_model reaches.
    count = 2 if way == "by name" else 3
    assert len(layers) == count and all(row.runs == runs for row in layers), report


def test_a_legible_mask_that_was_written_to_is_read_anew():
    given = {"batch_size": 3, "q_length": LENGTH, "kv_length": LENGTH}
    given["attention_mask"] = padding("left").bool()
    mask = masks.legible_mask(**given)
    assert masks.decode(mask, LENGTH, LENGTH).start.tolist() == [5, 1, 0]
    assert masks.decode(mask.clone(), LENGTH, LENGTH) is None
    mask[0, 0, :, 6] = False
    assert masks.decode(mask, LENGTH, LENGTH) is None


def output_by(way, model, inputs, whole=False, name=NAMES[0]):
    """(what the model gives, its report): patched, compiled too, or loaded anew under a name."""
    if way in ("patched", "compiled"):
        report = hf_flashattn.patch_model(model)
        if way == "compiled":
            torch._dynamo.reset()
            model = torch.compile(model, backend="eager")
    else:
        state = model.state_dict()
        model = build(type(model), copy.deepcopy(model.config), name)
        model.load_state_dict(state)
        report = hf_flashattn.attention_report(model)
    out = model(**inputs)
    return out if whole else out.last_hidden_state, report
