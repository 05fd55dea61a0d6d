"""patch_model(unpad=True): encoders without padding equal the padded ones, forward and backward."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
import transformers
from encoder_models import ENCODERS, batch, make
from model_helpers import (
    BATCH,
    HIDDEN,
    LENGTH,
    PADDINGS,
    Host,
    assert_same,
    bert,
    build,
    calls,
    outputs_and_grads,
    state_of,
    tokens,
)
from torch import nn

import hf_flashattn
from hf_flashattn import encoder_unpadding


@pytest.mark.parametrize("kind", ["right", "left", "holed"])
@pytest.mark.parametrize("what", ENCODERS)
def test_equals_eager_at_the_tokens(what, kind):
    """Outputs, and gradients of every parameter; positions and windows are the padded batch's."""
    inputs = batch(kind)
    with torch.random.fork_rng():
        report = assert_same(
            make(what), inputs, inputs["attention_mask"], unpad=True, tolerance=2e-5
        )
    (entry,) = report.unpadding
    assert entry.unpadded == 1 and not entry.padded and entry.tokens < entry.places
    if what == "modernbert-window":  # its windowed layers fall back, padded for attention alone
        assert calls(report, "fallback") == 1 and calls(report, "cpu") == 2
    else:
        assert calls(report, "fallback") == 0


@pytest.mark.parametrize(
    "options", [{"exclude": "*.0.*"}, {"exclude": "*.0.*", "fallback": "eager"}]
)
def test_layers_on_the_fallback(options):
    inputs = batch("holed")
    report = assert_same(bert(), inputs, inputs["attention_mask"], unpad=True, **options)
    assert calls(report, "fallback") == calls(report, "cpu") == 1
    assert report.unpadding[0].unpadded == 1


@pytest.mark.parametrize("kind", PADDINGS)
def test_what_padding_returns(kind):
    """0, but for the first place of a row, which heads pool: there it is what the padded gives."""
    model, inputs = bert(), batch(kind)
    with torch.no_grad(), hf_flashattn.patched(model):
        expected = model(**inputs)
    with torch.no_grad(), hf_flashattn.patched(model, unpad=True) as report:
        got = model(**inputs)
    (entry,) = report.unpadding
    if kind in ("none", "ones"):
        assert entry.unpadded == 0 and entry.padded == {"no padding": 1}
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
        return
    assert entry.unpadded == 1
    stays = inputs["attention_mask"].bool()
    stays[:, 0] = True
    torch.testing.assert_close(got.last_hidden_state[stays], expected.last_hidden_state[stays])
    torch.testing.assert_close(got.pooler_output, expected.pooler_output)
    assert (got.last_hidden_state[~stays] == 0).all()
    assert entry.tokens == stays.sum() and entry.places == BATCH * LENGTH


def test_without_padding_nothing_is_copied(monkeypatch):
    """No mask, or one of ones: the layers get what the embeddings made."""
    model, seen = bert(), []
    with hf_flashattn.patched(model, unpad=True):
        model.encoder.layer[0].attention.register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        model.embeddings.register_forward_hook(lambda _, __, out: seen.append(out))
        for kind in ("none", "ones"):
            model(**batch(kind))
    assert seen[0] is seen[1] and seen[2] is seen[3]


def test_only_tokens_reach_the_layers():
    model, seen = bert(), []
    model.encoder.layer[1].intermediate.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape)
    )
    inputs = batch("right")
    with hf_flashattn.patched(model, unpad=True):
        seen.clear()
        model(**inputs)
    assert seen == [(1, inputs["attention_mask"].sum(), HIDDEN)]


@pytest.mark.parametrize("what", ["bert", "modernbert-window", "albert", "bart-encoder"])
def test_hidden_states_and_tuples(what):
    model, inputs = make(what), batch("holed")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        with hf_flashattn.patched(model, unpad=True) as report:
            got = model(**inputs, output_hidden_states=True)
            plain = model(**inputs, output_hidden_states=True, return_dict=False)
    assert report.unpadding[0].unpadded == 2
    assert len(got.hidden_states) == len(expected.hidden_states)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)
        assert (a[:, 1:][~real[:, 1:]] == 0).all()
    assert isinstance(plain, tuple) and isinstance(plain[-1], tuple)
    for a, b in zip(plain[-1], got.hidden_states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "BertForMultipleChoice", "BertForPreTraining",
             "BertForQuestionAnswering", "BertForTokenClassification"]
)  # fmt: skip
def test_heads(name):
    cls = getattr(transformers, name)
    model, inputs = bert(cls), batch("left")
    if name == "BertForMultipleChoice":
        inputs = {key: x[:, None].repeat(1, 2, 1) for key, x in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs)
        with hf_flashattn.patched(model, unpad=True) as report:
            got = model(**inputs)
    assert report.unpadding[0].unpadded == 1
    for key, want in expected.items():
        real = inputs["attention_mask"].bool()
        if want.shape[:2] == (BATCH, LENGTH):
            torch.testing.assert_close(got[key][real], want[real], rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(got[key], want, rtol=1e-4, atol=1e-5)


def test_encoder_of_an_encoder_decoder():
    """Its padded output is what cross-attention reads; the decoder says why it stays as it is."""
    model = make("bart-encoder")
    model = build(transformers.BartForConditionalGeneration, model.config)
    inputs = batch("holed") | {"decoder_input_ids": tokens(BATCH, 5, seed=7)}
    report = assert_same(model, inputs, torch.ones(BATCH, 5), unpad=True)
    encoder, decoder = report.unpadding
    assert encoder.name == "model.encoder" and encoder.unpadded == 1
    assert "only encoders" in decoder.why_not and "no: a decoder" in str(report)


# ---- training -----------------------------------------------------------------------------------


def losses(model, seed: int, steps: int = 2) -> list[float]:
    torch.manual_seed(seed)
    inputs, found = batch("holed"), []
    for _ in range(steps):
        out = model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
        loss = (out * torch.linspace(-1, 1, HIDDEN)).sum() + out.square().sum()
        model.zero_grad()
        loss.backward()
        grads = [p.grad.double().norm().item() for p in model.parameters() if p.grad is not None]
        found += [loss.item(), sum(grads)]
    return found


def test_dropout_is_reproducible():
    model = bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    with hf_flashattn.patched(model, unpad=True) as report:
        first, again, other = losses(model, 5), losses(model, 5), losses(model, 6)
    assert report.unpadding[0].unpadded == 6 and model.training
    assert first == again and first[0] != other[0] and first[0] != first[2]
    assert all(torch.tensor(first).isfinite())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["bert", "modernbert-window"])
def test_gradient_checkpointing(what, reentrant):
    """Layers that run again give the same gradients, with dropout; copies of masks are refused."""
    base = make(what).base_model.train()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    with hf_flashattn.patched(base, unpad=True) as report:
        plain = losses(base, 3)
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        (entry,) = report.unpadding
        unpadded = entry.unpadded
        if reentrant:
            base.get_input_embeddings().weight.requires_grad_(True)
            losses(base, 3)
            assert entry.unpadded == unpadded
            assert all("use_reentrant" in reason for reason in entry.padded)
        else:
            assert losses(base, 3) == pytest.approx(plain, rel=1e-5)
            assert entry.unpadded == unpadded + 2


def test_checkpointing_of_the_whole_model():
    model, inputs = bert().train(), batch("right")
    weight = inputs["attention_mask"]
    expected = outputs_and_grads(model, inputs, weight)[1]
    with hf_flashattn.patched(model, unpad=True):

        def again(input_ids, attention_mask):
            return torch.utils.checkpoint.checkpoint(
                lambda i, m: model(i, attention_mask=m).last_hidden_state,
                input_ids,
                attention_mask,
                use_reentrant=False,
            )

        model.zero_grad()
        out = again(**inputs) * weight[..., None]
        (out * torch.linspace(-1, 1, HIDDEN) + out**2).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_autocast_and_bfloat16():
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    exact = bert()
    want = exact(**inputs).last_hidden_state[real]
    for model in (exact, copy.deepcopy(exact).bfloat16()):
        with (
            hf_flashattn.patched(model, unpad=True) as report,
            torch.autocast("cpu", torch.bfloat16),
        ):
            got = model(**inputs).last_hidden_state
            got.float().square().sum().backward()
        assert report.unpadding[0].unpadded == 1 and calls(report, "fallback") == 0
        assert (got[real].float() - want).norm() < 0.05 * want.norm()


# ---- syncs and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["right", "left", "holed", "ones"])
@pytest.mark.parametrize("what", ["bert", "modernbert", "modernbert-window", "distilbert"])
def test_the_device_is_read_once(what, kind, monkeypatch):
    """One copy of the mask to the CPU, and no read of any other tensor's values.

    The op's CPU implementation does read its cu_seqlens; the kernels don't.
    """
    model, inputs, reads = make(what), batch(kind), []

    def watch(name: str) -> None:
        plain = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            copies = name == "cpu" or (name == "to" and "cpu" in args)
            caller = sys._getframe(1).f_code.co_filename
            own = caller.endswith(("hf_flashattn/cpu.py", "hf_flashattn/reference.py"))
            if not isinstance(self, Host) and not own and (copies or name != "to"):
                reads.append((name, tuple(self.shape)))
            result = plain(self, *args, **kwargs)
            return result.as_subclass(Host) if copies else result

        monkeypatch.setattr(torch.Tensor, name, method)

    with torch.no_grad(), hf_flashattn.patched(model, unpad=True) as report:
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "numpy", "cpu", "to"):
            watch(name)
        model(**inputs)
        monkeypatch.undo()
    assert reads == [("cpu", (BATCH, LENGTH))]
    assert report.unpadding[0].unpadded == (kind != "ones")


def test_nothing_keeps_a_mask_alive():
    model, held = bert(), []
    with hf_flashattn.patched(model, unpad=True):
        model.encoder.layer[0].register_forward_pre_hook(
            lambda _, args, kwargs: held.append(weakref.ref(args[1])), with_kwargs=True
        )
        model(**batch("holed")).last_hidden_state.sum().backward()
        gc.collect()
        assert held and held[-1]() is None
        assert not encoder_unpadding._DECISIONS and not encoder_unpadding._forwards()


def test_a_forward_that_fails_leaves_nothing():
    model, inputs = bert(), batch("right")
    real = inputs["attention_mask"].bool()

    def fail(*_):
        raise RuntimeError("on purpose")

    with hf_flashattn.patched(model, unpad=True):
        expected = model(**inputs).last_hidden_state
        handle = model.encoder.layer[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**inputs)
        handle.remove()
        assert not encoder_unpadding._forwards()
        states = model.embeddings(inputs["input_ids"])
        assert model.encoder(states, attention_mask=None).last_hidden_state.shape == states.shape
        assert torch.equal(model(**inputs).last_hidden_state[real], expected[real])


# ---- patching ------------------------------------------------------------------------------------


def test_reversible_idempotent_and_without_a_trace():
    model = bert(transformers.BertForMaskedLM).train()
    before, rng = state_of(model), torch.get_rng_state()
    report = hf_flashattn.patch_model(model, unpad=True)
    assert torch.equal(rng, torch.get_rng_state()) and model.training
    assert all(module.training for module in model.modules())
    assert all(row.calls.total == 0 for row in report.rows)
    assert "unpadding: bert: yes (expected)" in str(report)
    patched = state_of(model)
    assert hf_flashattn.patch_model(model, unpad=True).unpadding[0] is report.unpadding[0]
    assert state_of(model) == patched
    assert hf_flashattn.patch_model(model).unpadding == []
    hf_flashattn.patch_model(model, unpad=True)
    with hf_flashattn.patched(model, unpad=False) as inner:
        assert not inner.unpadding
    assert len(hf_flashattn.attention_report(model).unpadding) == 1
    assert hf_flashattn.unpatch_model(model) and state_of(model) == before


def test_copies_and_pickles_of_a_patched_model():
    model, inputs = bert(), batch("holed")
    with torch.no_grad(), hf_flashattn.patched(model, unpad=True):
        expected = model(**inputs).last_hidden_state
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            entry = hf_flashattn.attention_report(twin).unpadding[0]
            entry.forget()
            assert torch.equal(twin(**inputs).last_hidden_state, expected)
            assert entry.unpadded == 1
            assert hf_flashattn.unpatch_model(twin)
            assert not twin._forward_hooks and not twin.encoder.layer[0]._forward_pre_hooks


def test_a_peft_or_data_parallel_wrapper_is_looked_through():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Wrapper(bert())
    report = hf_flashattn.patch_model(model, unpad=True)
    model.module(**batch("right"))
    assert report.unpadding[0].unpadded == 1
