"""BERT and GPT-2, patched, equal eager: encoders, decoders, cross-attention; padded, packed."""

from __future__ import annotations

import pytest
import torch
from model_helpers import (
    BATCH,
    ENCODER_LENGTH,
    LENGTH,
    PADDINGS,
    assert_same,
    bert,
    bert_decoder,
    calls,
    encoder_states,
    gpt2,
    output,
    padding,
    tokens,
)

import hf_flashattn


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_padding(make, kind):
    mask = padding(kind)
    report = assert_same(make(), {"input_ids": tokens(), "attention_mask": mask}, mask)
    assert calls(report, "fallback") == 0


@pytest.mark.parametrize("kind", ["right", "left", "holed"])
def test_bert_padded_queries_too(kind):
    """An encoder's padded query still sees the tokens: eager's result everywhere, in holes too."""
    assert_same(bert(), {"input_ids": tokens(), "attention_mask": padding(kind)})


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("make", [gpt2, bert_decoder], ids=["gpt2", "bert"])
def test_cross_attention(make, kind):
    model = make(add_cross_attention=True) if make is gpt2 else make()
    encoder_mask = padding(kind, ENCODER_LENGTH)
    inputs = {
        "input_ids": tokens(),
        "attention_mask": padding("left"),
        "encoder_hidden_states": encoder_states(),
        "encoder_attention_mask": encoder_mask,
    }
    weight = padding("left")
    if kind == "empty":  # eager averages over all keys where none is left; ours gives 0
        weight[0] = 0
    report = assert_same(model, inputs, weight)
    assert calls(report, "fallback") == 0 and len(report.rows) == 4


def test_fully_masked_rows_give_zero():
    """The attention of a query that sees nothing is 0, on the kernel path and in both fallbacks."""
    for options in ({}, {"exclude": "*"}, {"exclude": "*", "fallback": "eager"}):
        model, seen = gpt2(), []
        with hf_flashattn.patched(model, **options):
            handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            model(tokens(), attention_mask=padding("empty"))
            handle.remove()
        assert (
            (seen[0][0] == 0).all() and (seen[0][1, :4] == 0).all() and (seen[0][1, 4:] != 0).any()
        )


@pytest.mark.parametrize(
    "changes", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}]
)
@pytest.mark.parametrize("upcast", [False, True])
def test_gpt2_scaling(changes, upcast):
    model = gpt2(reorder_and_upcast_attn=upcast, **changes)
    assert_same(model, {"input_ids": tokens(), "attention_mask": padding("left")}, padding("left"))


# ---- packed sequences ---------------------------------------------------------------------------


LENGTHS = ((5, 1, 7), (13,), (6, 7))


def packed_positions() -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


def one_by_one(model, ids):
    """The truth: each sequence in a forward of its own."""
    rows = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        parts = torch.split(row, list(lengths))
        rows.append(torch.cat([output(model, {"input_ids": part[None]})[0] for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"exclude": "*"}], ids=["op", "fallback"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("make", [gpt2, bert, bert_decoder], ids=["gpt2", "bert", "bert-decoder"])
def test_packed(make, use_cache, options):
    model, ids = make(), tokens()
    with torch.no_grad():
        expected = one_by_one(model, ids)
        with hf_flashattn.patched(model, **options):
            got = output(
                model,
                {"input_ids": ids, "position_ids": packed_positions(), "use_cache": use_cache},
            )
    assert (got - expected).abs().max() < 2e-5


def test_packed_gradients_are_those_of_the_sequences():
    model, ids = gpt2(), tokens()
    one_by_one(model, ids).square().sum().backward()
    expected = model.transformer.wte.weight.grad.clone()
    model.zero_grad()
    with hf_flashattn.patched(model):
        output(
            model, {"input_ids": ids, "position_ids": packed_positions()}
        ).square().sum().backward()
    assert (model.transformer.wte.weight.grad - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("way", ["patched", "by name"])
@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_positions_that_are_written_to_in_inference_mode(make, way):
    """A server's own buffer: nobody counts what is written to it, so each forward looks anew."""
    model, ids = make(), tokens()
    if way == "patched":
        hf_flashattn.patch_model(model)
    else:
        model.set_attn_implementation("hf_flashattn")
    with torch.inference_mode():
        positions = torch.arange(LENGTH).repeat(BATCH, 1)
        inputs = {"input_ids": ids, "position_ids": positions}
        plain = output(model, inputs)
        positions.copy_(packed_positions())
        packed = output(model, inputs)
        assert torch.equal(packed, output(model, {**inputs, "position_ids": packed_positions()}))
    assert (packed - plain).abs().max() > 0.1


@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_packed_is_found_in_inference_mode_and_trained_on(make):
    """What is remembered of positions can be saved for a backward."""
    model, inputs = make(), {"input_ids": tokens(), "position_ids": packed_positions()}
    with hf_flashattn.patched(model):
        with torch.inference_mode():
            expected = output(model, inputs)
        got = output(model, inputs)
        got.sum().backward()
    assert torch.equal(got, expected)


def test_flash_kwargs_of_a_flattening_collator():
    """cu_seq_lens and max_length from the caller, as DataCollatorWithFlattening makes them."""
    model, ids = gpt2(), tokens(1)
    cu = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS[0]])[None]
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 7, "max_length_k": 7}
    with torch.no_grad():
        expected = torch.cat(
            [output(model, {"input_ids": p})[0] for p in torch.split(ids, LENGTHS[0], dim=1)]
        )
        for options in ({}, {"exclude": "*"}):
            with hf_flashattn.patched(model, **options):
                got = output(model, {"input_ids": ids, "position_ids": positions, **given})
            assert (got[0] - expected).abs().max() < 2e-5


def test_a_compiled_flat_batch_is_traced_once_for_any_number_of_tokens():
    model, graphs = bert(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad(), hf_flashattn.patched(model) as report:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for lengths in ((5, 1, 7), (4, 4, 2), (1, 6, 5)):
            ids = tokens(1, sum(lengths))
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
            given |= {"max_length_q": LENGTH, "max_length_k": LENGTH}
            expected = [output(model, {"input_ids": p})[0] for p in ids.split(lengths, dim=1)]
            for x in (ids, positions):
                torch._dynamo.mark_dynamic(x, 1)
            got = output(compiled, {"input_ids": ids, "position_ids": positions, **given})
            assert (got[0] - torch.cat(expected)).abs().max() < 2e-5
        assert len(graphs) == 1
        assert {row.runs for row in report.rows} == {"cpu implementation"}


def test_compiled_padded_batches_of_another_length_are_one_graph():
    model = bert()
    torch.compiler.reset()
    with torch.no_grad(), hf_flashattn.patched(model):
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        for length in (LENGTH, LENGTH - 3):
            ids, mask = tokens()[:, :length], torch.ones(BATCH, length, dtype=torch.long)
            mask[0, length - 4 :] = 0
            batch = {"input_ids": ids, "attention_mask": mask}
            expected, got = output(model, batch), output(compiled, batch)
            assert ((got - expected) * mask[..., None]).abs().max() < 2e-5


@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_positions_that_do_not_restart_are_not_packed(make):
    """Shifted, constant, arbitrary or plain positions must not cut an encoder's sequence."""
    plain = torch.arange(LENGTH).expand(BATCH, -1)
    for positions in (
        plain,
        plain[:1],
        plain + 3,
        *([plain * 2, plain * 0] if make is bert else []),
    ):
        assert_same(make(), {"input_ids": tokens(), "position_ids": positions})


# ---- masks that are not 2-D ---------------------------------------------------------------------


@pytest.mark.parametrize("fallback", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_4d_masks_fall_back(make, kind, fallback):
    seen = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.6
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    model = make()
    expected = output(model, {"input_ids": tokens(), "attention_mask": additive})
    with hf_flashattn.patched(model, fallback=fallback) as report:
        got = output(
            model, {"input_ids": tokens(), "attention_mask": seen if kind == "bool" else additive}
        )
        assert {row.runs for row in report.rows} == {"fallback"}
        assert all("4-D mask" in row.why for row in report.rows)
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_output_attentions(make):
    """Attention weights come from eager, and only in the forward that asks for them."""
    model, inputs = make(), {"input_ids": tokens(), "attention_mask": padding("right")}
    expected = model(**inputs, output_attentions=True)
    with hf_flashattn.patched(model) as report:
        got = model(**inputs, output_attentions=True)
        assert len(got.attentions) == 2
        for a, b in zip(got.attentions, expected.attentions, strict=True):
            assert (a - b).abs().max() < 1e-5
        assert all("output_attentions" in row.why for row in report.rows)
        model(**inputs)
        assert all(row.runs == "mixed" and row.calls.cpu == 1 for row in report.rows)
