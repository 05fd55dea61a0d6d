"""patch_model: per instance, idempotent, exactly reversible, and honest about what runs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from model_helpers import (
    VOCAB,
    bert,
    bert_decoder,
    build,
    calls,
    gpt2,
    output,
    padding,
    state_of,
    tokens,
)
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DebertaConfig,
    DebertaModel,
    DistilBertConfig,
    DistilBertModel,
    DogeConfig,
    DogeForCausalLM,
    EncoderDecoderModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_flashattn
from hf_flashattn import FallbackError, NotOnKernel, PatchError
from hf_flashattn.report import calls_of

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCAB, "num_hidden_layers": 2}
INPUTS = {"input_ids": tokens(), "attention_mask": padding("left")}


SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def encoder_decoder():
    return EncoderDecoderModel(encoder=bert(), decoder=bert_decoder()).eval()


# ---- undo ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, bert, encoder_decoder])
@pytest.mark.parametrize("forward", [False, True])
def test_undo_is_exact(make, forward):
    model = make()
    if forward:  # Transformers installs things of its own in the first forward
        output(model, INPUTS | ({"decoder_input_ids": tokens()} if make is encoder_decoder else {}))
    before = state_of(model)
    hf_flashattn.patch_model(model)
    assert state_of(model) != before
    assert hf_flashattn.unpatch_model(model) is True
    assert state_of(model) == before
    assert hf_flashattn.unpatch_model(model) is False


def test_patching_twice_changes_nothing_more():
    model = gpt2()
    before = state_of(model)
    hf_flashattn.patch_model(model)
    once = state_of(model)
    hf_flashattn.patch_model(model)
    assert state_of(model) == once
    hf_flashattn.patch_model(model, fallback="eager", exclude="*.0.*")
    hf_flashattn.unpatch_model(model)
    assert state_of(model) == before


def test_models_of_one_config_object_are_independent():
    """Transformers names the implementation in the config, which these two share."""
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0
    )
    first, second = build(GPT2LMHeadModel, config, "sdpa"), build(GPT2LMHeadModel, config, "sdpa")
    untouched = state_of(second)
    hf_flashattn.patch_model(first)
    assert config._attn_implementation == "sdpa" and second.config is config
    assert state_of(second) == untouched
    report = hf_flashattn.attention_report(second)
    second(**INPUTS)
    assert calls(report, "cpu") == 0 and {row.runs for row in report.rows} == {"unsupported"}
    hf_flashattn.patch_model(second)
    hf_flashattn.unpatch_model(first)
    assert first.config is config and second.config is not config
    second(**INPUTS)
    assert calls(report, "cpu") == 2
    hf_flashattn.unpatch_model(second)
    assert state_of(second) == untouched


def test_what_the_user_sets_on_the_config_meanwhile_survives():
    model = gpt2()
    original = model.config
    hf_flashattn.patch_model(model)
    model.config.use_cache = False
    model.config.pad_token_id = 7
    model.config.my_own = "kept"
    hf_flashattn.unpatch_model(model)
    assert model.config is original and original._attn_implementation == "eager"
    assert (original.use_cache, original.pad_token_id, original.my_own) == (False, 7, "kept")


def test_a_config_that_the_user_replaced_stays():
    model = gpt2()
    hf_flashattn.patch_model(model)
    mine = copy.deepcopy(model.config)
    model.transformer.h[0].attn.config = mine
    hf_flashattn.unpatch_model(model)
    assert model.transformer.h[0].attn.config is mine


def test_patched_restores_what_was_there():
    model = gpt2()
    before = state_of(model)
    with pytest.raises(KeyError), hf_flashattn.patched(model):
        raise KeyError
    assert state_of(model) == before
    hf_flashattn.patch_model(model, fallback="eager")
    with hf_flashattn.patched(model, fallback="sdpa"):
        pass
    with hf_flashattn.patched(model, fallback="eager"):
        hf_flashattn.unpatch_model(model)
    output(model, {"input_ids": tokens(), "attention_mask": torch.ones(3, 1, 13, 13).bool()})
    assert calls(hf_flashattn.attention_report(model), "fallback") == 2
    hf_flashattn.unpatch_model(model)
    assert state_of(model) == before


def test_nothing_global_changes():
    functions = {name: id(function) for name, function in ALL_ATTENTION_FUNCTIONS.items()}
    with hf_flashattn.patched(gpt2()) as report:
        assert len(report.rows) == 2
    assert {name: id(function) for name, function in ALL_ATTENTION_FUNCTIONS.items()} == functions


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_patched_model_is_patched_and_can_be_undone(clone):
    model = gpt2()
    expected = output(model, INPUTS)
    hf_flashattn.patch_model(model)
    twin = clone(model)
    hf_flashattn.unpatch_model(model)
    weight = padding("left").bool()
    assert (output(twin, INPUTS) - expected)[weight].abs().max() < 1e-5
    assert calls(hf_flashattn.attention_report(twin), "cpu") == 2
    assert hf_flashattn.unpatch_model(twin) and twin.config._attn_implementation == "eager"
    assert torch.equal(output(twin, INPUTS), expected)
    assert list(twin.__dict__) == list(model.__dict__)


def test_models_are_not_kept_alive():
    model = gpt2()
    hf_flashattn.patch_model(model)
    output(model, INPUTS)
    gone = weakref.ref(model.transformer.h[0].attn)
    del model
    gc.collect()
    assert gone() is None


def test_saving_and_loading_knows_nothing_of_the_patch(tmp_path):
    model = gpt2()
    with hf_flashattn.patched(model):
        model.save_pretrained(tmp_path)
    assert "flashattn" not in (tmp_path / "config.json").read_text()
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="hf_flashattn").eval()
    weight = padding("left").bool()
    assert (output(loaded, INPUTS) - output(model, INPUTS))[weight].abs().max() < 1e-5
    assert calls(hf_flashattn.attention_report(loaded), "cpu") == 2


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_flashattn", "hf_fused_attn"])
@pytest.mark.parametrize("cls", [GPT2LMHeadModel, BertModel])
def test_attn_implementation(cls, name):
    """By name and by set_attn_implementation; twice, as the first call may differ."""
    eager = gpt2() if cls is GPT2LMHeadModel else bert()
    expected, weight = output(eager, INPUTS), padding("left").bool()
    for _ in range(2):
        model = cls._from_config(copy.deepcopy(eager.config), attn_implementation=name).eval()
        model.load_state_dict(eager.state_dict())
        assert model.config._attn_implementation == name
        assert (output(model, INPUTS) - expected)[weight].abs().max() < 1e-5
        report = hf_flashattn.attention_report(model)
        report.assert_all_on_kernel(allow_cpu=True)
    eager.set_attn_implementation(name)
    assert (output(eager, INPUTS) - expected)[weight].abs().max() < 1e-5
    eager.set_attn_implementation("sdpa")
    assert (output(eager, INPUTS) - expected)[weight].abs().max() < 1e-5


def test_other_models_dispatch_too():
    """Nothing is written for BERT or GPT-2: what looks up ALL_ATTENTION_FUNCTIONS works."""
    llama = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
    makers = [
        (LlamaForCausalLM, LlamaConfig(**llama)),
        (MistralForCausalLM, MistralConfig(**llama, sliding_window=4096)),
        (RobertaModel, RobertaConfig(**SMALL, max_position_embeddings=64)),
        (
            DistilBertModel,
            DistilBertConfig(dim=32, n_heads=4, n_layers=2, hidden_dim=48, vocab_size=VOCAB),
        ),
    ]
    weight = padding("left").bool()
    for cls, config in makers:
        model = build(cls, config)
        expected = output(model, INPUTS)
        with hf_flashattn.patched(model) as report:
            error = (output(model, INPUTS) - expected)[weight].abs().max()
            assert error < 1e-5, f"{cls.__name__}: {error}\n{report}"
            report.assert_all_on_kernel(allow_cpu=True)


def test_an_encoder_decoder_and_a_vision_model():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDES.items()}
    bart = BartConfig(d_model=32, vocab_size=VOCAB, max_position_embeddings=64, **sizes)
    model = build(BartForConditionalGeneration, bart)
    inputs = {
        "input_ids": tokens(),
        "attention_mask": padding("holed"),
        "decoder_input_ids": tokens(seed=4),
    }
    expected = output(model, inputs)
    with hf_flashattn.patched(model) as report:
        assert (output(model, inputs) - expected).abs().max() < 1e-5
        report.assert_all_on_kernel(allow_cpu=True)
        assert len(report.rows) == 6
    small = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
    }
    model = build(ViTModel, ViTConfig(image_size=32, patch_size=8, **small))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    expected = output(model, inputs)
    with hf_flashattn.patched(model) as report:
        assert (output(model, inputs) - expected).abs().max() < 1e-5
        report.assert_all_on_kernel(allow_cpu=True)


# ---- what falls back ----------------------------------------------------------------------------


def test_a_sliding_window_that_bites_falls_back():
    config = MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=4)
    model = build(MistralForCausalLM, config)
    expected, weight = output(model, INPUTS), padding("left").bool()
    for fallback in ("sdpa", "eager"):
        with hf_flashattn.patched(model, fallback=fallback) as report:
            assert (output(model, INPUTS) - expected)[weight].abs().max() < 1e-5
            assert all(row.runs == "fallback" and "mask" in row.why for row in report.rows)


def test_softcap_and_window_of_one_model():
    config = Gemma2Config(
        **SMALL,
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        attn_logit_softcapping=2.0,
    )
    model = build(Gemma2ForCausalLM, config)
    expected, weight = output(model, INPUTS), padding("left").bool()
    with hf_flashattn.patched(model) as report:
        assert (output(model, INPUTS) - expected)[weight].abs().max() < 1e-5
        assert ["softcap" in row.why for row in report.rows] == [False, True]
        assert {row.runs for row in report.rows} == {"fallback"}


def test_position_bias_falls_back():
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
    )
    model = build(T5ForConditionalGeneration, config)
    inputs = {**INPUTS, "decoder_input_ids": tokens(seed=5)}
    expected = output(model, inputs)
    with hf_flashattn.patched(model) as report:
        assert (output(model, inputs) - expected).abs().max() < 1e-4
        kinds = {row.runs for row in report.rows}
        assert kinds <= {"fallback", "unsupported"}, report


def test_a_model_without_dispatch_is_reported_and_left_alone():
    config = DebertaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=48,
        vocab_size=VOCAB,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    model = build(DebertaModel, config)
    before, expected = state_of(model), output(model, INPUTS)
    with hf_flashattn.patched(model) as report:
        assert {row.runs for row in report.rows} == {"unsupported"} and len(report.rows) == 2
        assert all("products of queries and keys with positions" in row.why for row in report.rows)
        assert torch.equal(output(model, INPUTS), expected)
        with pytest.raises(NotOnKernel, match="DisentangledSelfAttention"):
            report.assert_all_on_kernel(allow_cpu=True)
    assert state_of(model) == before
    with pytest.raises(PatchError, match="DisentangledSelfAttention"):
        hf_flashattn.patch_model(model, strict=True)
    assert state_of(model) == before
    hf_flashattn.patch_model(model, strict=True, exclude="*")
    hf_flashattn.unpatch_model(model)
    assert state_of(model) == before


def test_models_that_say_in_the_mask_alone_what_is_causal():
    """NLLB-MoE's decoder modules say is_causal=False, and eager, all it supports, never asks."""
    config = NllbMoeConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_experts=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        init_std=0.2,
    )
    model = build(NllbMoeForConditionalGeneration, config)
    for mask in ({}, {"attention_mask": padding("right")}):
        inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=5), **mask}
        expected = output(model, inputs)
        with hf_flashattn.patched(model) as report:
            assert (output(model, inputs) - expected).abs().max() < 1e-4
            report.assert_all_on_kernel(allow_cpu=True)


@pytest.mark.parametrize("mask", [None, padding("left")])
def test_a_model_that_edits_its_masks_is_reported_and_left_alone(mask):
    config = DogeConfig(**SMALL, intermediate_size=48, num_key_value_heads=2)
    model = build(DogeForCausalLM, config)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    expected = output(model, inputs)
    with hf_flashattn.patched(model) as report:
        assert torch.equal(output(model, inputs), expected)
        assert {row.runs for row in report.rows} == {"unsupported"}
        assert all("edits its masks" in row.why for row in report.rows), report


def test_linear_attention_does_not_keep_the_rest_off_the_kernel():
    """Its mask is the tokens', so the layers with a softmax can have one in our form."""
    config = MiniMaxConfig(
        **SMALL,
        intermediate_size=48,
        num_key_value_heads=2,
        num_local_experts=2,
        layer_types=["linear_attention", "full_attention"],
    )
    model = build(MiniMaxForCausalLM, config)
    expected, weight = output(model, INPUTS), padding("left").bool()
    with hf_flashattn.patched(model) as report:
        assert (output(model, INPUTS) - expected)[weight].abs().max() < 1e-4
        assert [row.runs for row in report.rows] == ["unsupported", "cpu implementation"]


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_sinks_go_to_the_eager_function(name):
    module = gpt2().transformer.h[0].attn
    q = torch.randn(1, 4, 5, 8)
    extra = {name: torch.zeros(4)}
    hf_flashattn.attention_forward(module, q, q, q, None, **extra)
    assert calls_of(module).reasons == {"attention sinks (s_aux) are not there yet": 1}


def test_indices_of_sparse_attention_are_not_ignored():
    q = torch.randn(1, 2, 4, 8)
    module = gpt2().transformer.h[0].attn
    with pytest.raises(NotImplementedError, match="indices"):
        hf_flashattn.attention_forward(module, q, q, q, None, indices=torch.zeros(1, 4, 2))


def test_include_and_exclude():
    model = gpt2()
    expected, weight = output(model, INPUTS), padding("left").bool()
    for options in ({"exclude": "*.h.1.*"}, {"include": ["transformer.h.0.*"]}):
        with hf_flashattn.patched(model, **options) as report:
            assert (output(model, INPUTS) - expected)[weight].abs().max() < 1e-5
            first, second = report.rows
            assert (first.runs, second.runs) == ("cpu implementation", "fallback"), report
            assert "clude" in second.why
            with pytest.raises(NotOnKernel):
                report.assert_all_on_kernel(allow_cpu=True)


def test_strict():
    model = gpt2()
    with hf_flashattn.patched(model, strict=True):
        output(model, INPUTS)
        with pytest.raises(FallbackError, match=r"transformer\.h\.0\.attn.*4-D mask"):
            model(tokens(), attention_mask=torch.ones(3, 1, 13, 13))
    with hf_flashattn.patched(model, strict=True, exclude="*"):  # leaving out is not falling back
        output(model, INPUTS)


def test_bad_options():
    with pytest.raises(ValueError, match='expected "sdpa" or "eager", got \'flex\''):
        hf_flashattn.patch_model(gpt2(), fallback="flex")
    with pytest.raises(TypeError, match="expected a torch module, got str"):
        hf_flashattn.patch_model("gpt2")
    with pytest.raises(PatchError, match=r"include=\['h\.9'\].*'transformer.*attn' and 1 more"):
        hf_flashattn.patch_model(gpt2(), include="h.9")
    with pytest.raises(PatchError, match="expected attention modules in Linear, got none"):
        hf_flashattn.patch_model(nn.Linear(2, 2), strict=True)


# ---- wrappers -----------------------------------------------------------------------------------


class DataParallelLike(nn.Module):
    """As DDP does: the model under `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class PeftLike(nn.Module):
    """As PEFT does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base_model, self.peft_config = module, {}

    def get_base_model(self) -> nn.Module:
        return self.base_model


def test_wrappers_are_looked_through():
    model = gpt2()
    before = state_of(model)
    for wrap in (DataParallelLike, PeftLike, lambda m: torch.compile(m, backend="eager")):
        wrapper = wrap(DataParallelLike(model))
        report = hf_flashattn.patch_model(wrapper)
        assert [row.module for row in report.rows] == [
            "transformer.h.0.attn",
            "transformer.h.1.attn",
        ]
        assert hf_flashattn.unpatch_model(wrapper)
        assert state_of(model) == before


def test_a_plain_module_that_holds_a_model():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.head = bert(), nn.Linear(32, 2)

        def forward(self, **inputs):
            return self.head(self.text(**inputs).last_hidden_state)

    tower = Tower().eval()
    expected = tower(**INPUTS)
    with hf_flashattn.patched(tower) as report:
        assert (tower(**INPUTS) - expected).abs().max() < 1e-5
        assert report.rows[0].module == "text.encoder.layer.0.attention.self"
        report.assert_all_on_kernel(allow_cpu=True)


def test_patches_do_not_nest():
    config = BertConfig(**SMALL, intermediate_size=48)
    pair = nn.ModuleList([build(BertModel, config), build(BertModel, config)])
    before = state_of(pair)
    hf_flashattn.patch_model(pair[0])
    with pytest.raises(PatchError, match="'0' was"):
        hf_flashattn.patch_model(pair)
    hf_flashattn.unpatch_model(pair[0])
    hf_flashattn.patch_model(pair)
    assert pair[0].config is pair[1].config
    with pytest.raises(PatchError, match="larger model"):
        hf_flashattn.patch_model(pair[1])
    hf_flashattn.unpatch_model(pair)
    assert state_of(pair) == before
