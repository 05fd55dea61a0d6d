"""patch_model(unpad=True): calls that run padded all the same, and models that say why they do."""

from __future__ import annotations

import pytest
import torch
import transformers
from encoder_models import SIZES, batch
from model_helpers import (
    BATCH,
    HIDDEN,
    LENGTH,
    VOCAB,
    assert_same,
    bert,
    bert_decoder,
    calls,
    gpt2,
    padding,
    state_of,
    tokens,
)

import hf_flashattn

# ---- calls that cannot ---------------------------------------------------------------------------


def test_output_attentions_runs_padded():
    model, inputs = bert(), batch("right")
    with hf_flashattn.patched(model, unpad=True) as report:
        got = model(**inputs, output_attentions=True)
    assert got.attentions[0].shape == (BATCH, 4, LENGTH, LENGTH)
    assert list(report.unpadding[0].padded) == [
        "output_attentions=True: the weights are those of the padded batch"
    ]


def test_a_mask_of_the_callers_own_runs_padded():
    inputs = batch("right")
    full = inputs["attention_mask"].bool()[:, None, None].expand(-1, 1, LENGTH, -1)
    inputs["attention_mask"] = torch.zeros(full.shape).masked_fill(~full, -1e9)
    report = assert_same(bert(), inputs, padding("right"), unpad=True)
    assert list(report.unpadding[0].padded) == ["a mask that says more than padding"]


def test_strange_arguments_of_layers_run_padded():
    model, inputs = bert(), batch("right")
    with hf_flashattn.patched(model, unpad=True) as report:
        expected = model(**inputs).last_hidden_state
        model(**inputs, num_items_in_batch=torch.tensor(3))
        got = model(**inputs, unheard_of=torch.ones(BATCH, LENGTH)).last_hidden_state
    assert report.unpadding[0].unpadded == 2
    assert report.unpadding[0].padded == {"its layers take unheard_of": 1}
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real])


def test_strange_arguments_of_a_later_layer():
    """Half way, the hidden states are padded again."""
    model, inputs = bert(), batch("right")

    def add(_, args, kwargs):
        return args, kwargs | {"unheard_of": torch.ones(BATCH, LENGTH)}

    with torch.no_grad(), hf_flashattn.patched(model, unpad=True):
        expected = model(**inputs).last_hidden_state
        layer = model.encoder.layer[1]
        handle = layer.register_forward_pre_hook(add, with_kwargs=True, prepend=True)
        got = model(**inputs).last_hidden_state
        handle.remove()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real])


def test_compiled_calls_run_padded():
    model, inputs = bert(), batch("right")
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), hf_flashattn.patched(model, unpad=True) as report:
        expected = model(**inputs).last_hidden_state[real]
        got = torch.compile(model, fullgraph=True, backend="eager")(**inputs).last_hidden_state
    torch.testing.assert_close(got[real], expected, rtol=1e-4, atol=1e-5)
    assert report.unpadding[0].unpadded == 1
    assert list(report.unpadding[0].padded) == [
        "torch.compile: the number of tokens cannot be read"
    ]


def test_hooks_lie_in_the_order_they_run_in():
    """Also in the dict below the OrderedDict: there torch 2.11 looks up hooks it compiles."""
    model = bert()
    layer = model.encoder.layer[0]
    for module in (model, layer):
        module.register_forward_pre_hook(lambda module, args: None)
        module.register_forward_hook(lambda module, args, output: None)
    before = [list(x._forward_pre_hooks) + list(x._forward_hooks) for x in (model, layer)]
    with hf_flashattn.patched(model, unpad=True):
        assert len(model._forward_pre_hooks) == 3 and len(layer._forward_pre_hooks) == 2
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                assert list(dict.keys(hooks)) == list(hooks)
        assert list(layer._forward_pre_hooks)[-1] == before[1][0]
    assert before == [list(x._forward_pre_hooks) + list(x._forward_hooks) for x in (model, layer)]


def test_compiled_with_two_hooks_on_an_inner_model(monkeypatch):
    """Compiles where dynamo counts hooks by the OrderedDict, as torch 2.11's does."""
    for home in (torch._dynamo.variables.nn_module, torch._dynamo.variables.builder):
        if hasattr(home, "enumerate_items_with_dict_position"):
            monkeypatch.setattr(
                home,
                "enumerate_items_with_dict_position",
                lambda hooks: ((i, *item) for i, item in enumerate(hooks.items())),
            )
    model, inputs = bert(transformers.BertForMaskedLM), batch("right")
    model.bert.register_forward_pre_hook(lambda module, args: None)
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), hf_flashattn.patched(model, unpad=True):
        expected = model(**inputs).logits[real]
        got = torch.compile(model, fullgraph=True, backend="eager")(**inputs).logits[real]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ---- models that cannot --------------------------------------------------------------------------


def mixing(model):
    """A layer that looks at its neighbour: a convolution over tokens."""

    class Mixing(type(model.encoder.layer[0])):
        def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
            hidden_states = hidden_states + hidden_states.roll(1, dims=1)
            return super().forward(hidden_states, attention_mask, *args, **kwargs)

    model.encoder.layer[1].__class__ = Mixing
    return model


REFUSED = {
    "gpt2": (gpt2, "only encoders"),
    "decoder": (bert_decoder, "only encoders"),
    "mixing": (lambda: mixing(bert()), "tried out: outputs differ by"),
    "chunks": (lambda: bert(chunk_size_feed_forward=2), "tried out: ValueError"),
    "meta": (lambda: bert().to("meta"), "meta device"),
    "t5": (
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=VOCAB, d_model=HIDDEN, num_layers=1, num_heads=4, d_kv=8, d_ff=32
            )
        ),
        "position bias",
    ),
    "own-attention": (
        lambda: transformers.DebertaV2Model(
            transformers.DebertaV2Config(**{**SIZES, "num_hidden_layers": 1})
        ),
        "adds products of queries and keys with positions",
    ),
    "vision": (
        lambda: transformers.ViTModel(
            transformers.ViTConfig(
                hidden_size=HIDDEN,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=32,
                image_size=16,
                patch_size=8,
            )
        ),
        "takes no input_ids",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    """The report says why in one line, the model runs padded; strict raises and changes nothing."""
    model = REFUSED[what][0]()
    before = state_of(model)
    with hf_flashattn.patched(model, unpad=True) as report:
        (entry,) = report.unpadding
        assert REFUSED[what][1] in entry.why_not
        (line,) = [line for line in str(report).splitlines() if line.startswith("unpadding:")]
        assert ": no: " in line
        if what in ("mixing", "chunks"):
            assert calls(report, "cpu") == calls(report, "fallback") == 0
            model(**(batch("right") if what == "mixing" else {"input_ids": tokens(3, 12)}))
    assert state_of(model) == before
    with pytest.raises(hf_flashattn.PatchError) as error:
        hf_flashattn.patch_model(model, unpad=True, strict=True)
    if what not in ("own-attention", "t5", "meta"):  # strict refuses their attention alone
        assert all(word in str(error.value) for word in ("expected", "got", "Nearest", "Next step"))
    assert state_of(model) == before


def test_disabled(monkeypatch):
    monkeypatch.setenv("HF_FLASHATTN_DISABLE", "1")
    with hf_flashattn.patched(bert(), unpad=True, strict=True) as report:
        assert "HF_FLASHATTN_DISABLE" in report.unpadding[0].why_not
