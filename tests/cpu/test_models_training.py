"""Training and evaluation: dtypes, autocast, dropout, checkpointing, compilation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from model_helpers import (
    LENGTH,
    assert_replays_wish_for_weights,
    assert_same,
    bert,
    bert_decoder,
    calls,
    gpt2,
    llama,
    output,
    outputs_and_grads,
    padding,
    tokens,
)
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import hf_flashattn

KINDS = ("none", "left", "right", "ones", "holed", "empty")
MAKERS = pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
# New releases of Transformers prefer another name; this one works until 6, which is not supported.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("kind", ["none", "left", "holed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@MAKERS
def test_16_bit(make, dtype, kind):
    """No further from fp32 than twice eager in the same dtype."""
    mask = padding(kind)
    inputs, rows = (
        {"input_ids": tokens(), "attention_mask": mask},
        slice(None) if mask is None else mask.bool(),
    )
    with torch.no_grad():
        exact = output(make(), inputs)[rows]
        model = make().to(dtype)
        eager_error = (output(model, inputs)[rows].float() - exact).abs().mean()
        with hf_flashattn.patched(model) as report:
            got = output(model, inputs)
            assert calls(report, "cpu") == 2
    assert got.dtype == dtype
    assert (got[rows].float() - exact).abs().mean() <= 2 * eager_error


@MAKERS
def test_autocast(make):
    model, inputs = make(), {"input_ids": tokens(), "attention_mask": padding("left")}
    seen = []
    with hf_flashattn.patched(model), torch.autocast("cpu", torch.bfloat16):
        module = next(m for m in model.modules() if hasattr(m, "_hf_flashattn"))
        handle = module.register_forward_hook(lambda _, args, out: seen.append(out[0].dtype))
        got, grads = outputs_and_grads(model, inputs, padding("left"))
        handle.remove()
    expected, _ = outputs_and_grads(model, inputs, padding("left"))
    assert seen[0] == torch.bfloat16
    weight = padding("left").bool()
    assert (got.float() - expected)[weight].abs().mean() < 0.05 * expected.abs().mean()
    assert all(
        grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads.values()
    )


@pytest.mark.parametrize(("reentrant", "kind"), [(True, "holed"), (False, "holed"), (True, "left")])
@MAKERS
def test_checkpointing_replays_dropout(make, kind, reentrant):
    name = "attn_pdrop" if make is gpt2 else "attention_probs_dropout_prob"
    model = make(**{name: 0.4}).train()
    mask = padding(kind)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    with hf_flashattn.patched(model) as report:
        torch.manual_seed(5)
        expected, expected_grads = outputs_and_grads(model, inputs, mask)
        torch.manual_seed(6)
        other, _ = outputs_and_grads(model, inputs, mask)
        assert not torch.allclose(other, expected)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        got, grads = outputs_and_grads(model, inputs, mask)
        assert calls(report, "fallback") == 0
        model.gradient_checkpointing_disable()
    assert torch.equal(got, expected)
    for key, grad in expected_grads.items():
        assert torch.allclose(grads[key], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item()), key


@pytest.mark.parametrize("reentrant", [False, True])
@MAKERS
def test_checkpointing_replays_the_wish_for_weights(make, reentrant):
    """A layer that is run again in the backward runs on what its last forward ran on."""
    model = make().train()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": tokens(), "use_cache": False}
    report = assert_replays_wish_for_weights(model, inputs, reentrant)
    assert all((row.calls.fallback, row.calls.cpu) == (2, 2) for row in report.rows)


def test_checkpointing_replays_packing():
    model = gpt2().train()
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].repeat(3, 1)
    inputs = {"input_ids": tokens(), "position_ids": positions}
    with hf_flashattn.patched(model):
        expected, expected_grads = outputs_and_grads(model, inputs, None)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            got, grads = outputs_and_grads(model, inputs, None)
            assert torch.equal(got, expected)
            assert all(
                torch.allclose(grads[key], grad, rtol=1e-4, atol=1e-5)
                for key, grad in expected_grads.items()
            )


@MAKERS
def test_dropout_averages_to_no_dropout(make):
    """In training only; its mean is the model without it, in layer 1, where it enters linearly."""
    if make is gpt2:
        model = gpt2(n_layer=1, attn_pdrop=0.3)
        inner = model.transformer.h[0].attn
    else:
        model = bert(num_hidden_layers=1, attention_probs_dropout_prob=0.3)
        inner = model.encoder.layer[0].attention.self
    seen = []
    handle = inner.register_forward_hook(lambda _, args, out: seen.append(out[0].detach()))
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    with hf_flashattn.patched(model), torch.no_grad():
        output(model, inputs)
        output(model, inputs)
        assert torch.equal(seen[0], seen[1])
        model.train()
        for _ in range(60):
            output(model, inputs)
    handle.remove()
    weight = padding("left").bool()
    exact, mean = seen[0][weight], torch.stack(seen[2:]).mean(0)[weight]
    assert (mean - exact).abs().mean() < 0.12 * exact.abs().mean()
    assert not torch.equal(seen[2], seen[3])


@MAKERS
def test_a_few_steps_of_training_follow_eager(make):
    losses = {}
    for name in ("eager", "patched"):
        model = make().train()
        if name == "patched":
            hf_flashattn.patch_model(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[name] = []
        for step in range(4):
            loss = (
                output(model, {"input_ids": tokens(seed=step), "attention_mask": padding("right")})
                .square()
                .mean()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["patched"] == pytest.approx(losses["eager"], rel=1e-3)
    assert losses["eager"][-1] < losses["eager"][0]


# ---- torch.compile ------------------------------------------------------------------------------


def compiled(model, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


def assert_traced_on_op(report):
    used = [row for row in report.rows if row.calls.total]
    assert len(used) == 2 and all(row.runs == "cpu implementation" for row in used), report
    assert all(row.calls.traced for row in used) and "traced" in str(report)


@pytest.mark.parametrize(
    "make",
    [gpt2, bert, bert_decoder, llama],
    ids=["gpt2", "bert", "bert-decoder", "llama"],
)
def test_compile(make):
    """On the op without a graph break or a read of the device; one graph for all 2-D masks."""
    model, options = make(), {} if make is bert else {"use_cache": False}
    with torch.no_grad():
        expected = {
            k: output(model, {"input_ids": tokens(), "attention_mask": padding(k), **options})
            for k in KINDS
        }
        with hf_flashattn.patched(model) as report:
            fast = compiled(model)
            for kind in KINDS:
                mask = padding(kind)
                got = output(fast, {"input_ids": tokens(), "attention_mask": mask, **options})
                rows = torch.ones(3, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
                assert (got - expected[kind])[rows].abs().max() < 2e-5, kind
            assert_traced_on_op(report)
            traces = {row.calls.cpu for row in report.rows if row.calls.total}
            assert traces == {2}  # with and without a mask


@MAKERS
def test_compile_backward(make):
    model, mask = make(), padding("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask} | (
        {} if make is bert else {"use_cache": False}
    )
    _, expected = outputs_and_grads(model, inputs, mask)
    with hf_flashattn.patched(model) as report:
        _, grads = outputs_and_grads(compiled(model, "aot_eager"), inputs, mask)
        assert_traced_on_op(report)
    scale = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (grads[f"_orig_mod.{name}"] - grad).abs().max() < 1e-5 * scale, name


@MAKERS
def test_compiled_padding_gathers_nothing(make):
    """The kernels read a 2-D mask themselves: beside the one that makes bits of it for all layers,
    no operation of a graph moves tokens or makes a mask that the graph without padding has not."""
    model, options = make(), {} if make is bert else {"use_cache": False}

    def graphs(mask):
        targets = []

        def keep(graph, example):
            targets.append(Counter(str(node.target) for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        fast = torch.compile(
            model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
        )
        inputs = {"input_ids": tokens(), "attention_mask": mask, **options}
        output(fast, inputs).square().mean().backward()
        return targets

    with hf_flashattn.patched(model, strict=True):
        (forward, backward), plain = graphs(padding("holed")), graphs(None)
    assert forward["hf_flashattn.forward.default"] == 2
    assert backward["hf_flashattn.backward.default"] == 2
    moving = ("index", "gather", "scatter", "sort", "masked_fill", "where", "bmm")
    for padded, unpadded in zip((forward, backward), plain, strict=True):
        added = padded - unpadded
        assert not [x for x in added if x.startswith(tuple(f"aten.{y}" for y in moving))], added
    assert forward["aten.argmax.default"] == 2  # the first and the last key, once for all layers


def test_compile_with_positions_from_the_caller_is_right():
    """A trace cannot see whether they are packed: Transformers' mask, and the report says so."""
    model = gpt2()
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].repeat(3, 1)
    inputs = {"input_ids": tokens(), "position_ids": positions, "use_cache": False}
    expected = output(model, inputs)
    with hf_flashattn.patched(model) as report:
        got = output(compiled(model), inputs)
        assert {row.runs for row in report.rows} == {"fallback"}
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_compile_packed_with_lengths(make, use_cache):
    """Whoever also says where sequences end stays on the op; packings share their graphs."""
    model, eager = make(), make()
    options = {"use_cache": use_cache} if make is gpt2 else {}
    with hf_flashattn.patched(model, strict=True) as report:
        fast = compiled(model, "aot_eager")
        for lengths in ([6, 7], [3, 9, 1], [13], [2, 2, 9]):
            ids = tokens(1, seed=len(lengths))
            parts = torch.split(ids, lengths, dim=1)
            with torch.no_grad():
                expected = torch.cat([output(eager, {"input_ids": x})[0] for x in parts])
            cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            got = output(
                fast,
                {
                    "input_ids": ids,
                    "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
                    "cu_seq_lens_q": cu,
                    "cu_seq_lens_k": cu,
                    "max_length_q": max(lengths),
                    "max_length_k": max(lengths),
                    **options,
                },
            )
            assert (got[0] - expected).abs().max() < 2e-5, lengths
            got.square().mean().backward()
        assert_traced_on_op(report)
        assert {row.calls.cpu for row in report.rows if row.calls.total} == {2}


@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_capture_packed_with_lengths(make, monkeypatch):
    """As under CUDA graph capture, where closures can be read but no tensor."""
    for module in (hf_flashattn._compat, transformers.masking_utils):
        monkeypatch.setattr(module, "is_tracing", lambda tensor=None: True)
    model, ids, lengths = make(), tokens(1), [4, 9]
    cu = torch.tensor([0, 4, 13], dtype=torch.int32)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 9, "max_length_k": 9}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    options = {"use_cache": False} if make is gpt2 else {}
    inputs = {"input_ids": ids, "position_ids": positions, **options}
    with torch.no_grad():
        parts = [output(model, {"input_ids": x}) for x in torch.split(ids, lengths, dim=1)]
        with hf_flashattn.patched(model, strict=True):
            got = output(model, inputs | given)
        with hf_flashattn.patched(model) as report:
            assert (output(model, inputs) - torch.cat(parts, dim=1)).abs().max() < 2e-5
            assert {row.runs for row in report.rows} == {"fallback"}
    assert (got - torch.cat(parts, dim=1)).abs().max() < 2e-5


def test_compile_layer_by_layer():
    """Masks made outside the graph go through; the layers' numbers are no guards."""
    for kind in ("left", "none", "holed"):
        model, mask = bert(num_hidden_layers=3), padding(kind)
        inputs = {"input_ids": tokens(), "attention_mask": mask}
        expected = output(model, inputs)
        with hf_flashattn.patched(model):
            torch._dynamo.reset()
            for layer in model.encoder.layer:
                layer.compile(fullgraph=True, backend="eager")
            got = output(model, inputs)
        rows = torch.ones(3, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
        assert (got - expected)[rows].abs().max() < 1e-5


def test_same_after_compile_without_it():
    """Patching after compiling: the compiled model notices."""
    model = gpt2()
    inputs = {"input_ids": tokens(), "attention_mask": padding("left"), "use_cache": False}
    expected, weight = output(model, inputs), padding("left").bool()
    fast = compiled(model)
    assert (output(fast, inputs) - expected)[weight].abs().max() < 1e-5
    with hf_flashattn.patched(fast) as report:
        assert (output(fast, inputs) - expected)[weight].abs().max() < 1e-5
        assert calls(report, "cpu") == 2
    assert (output(fast, inputs) - expected)[weight].abs().max() < 1e-5


def test_eval_after_training_with_dropout():
    model = gpt2(attn_pdrop=0.5).train()
    with hf_flashattn.patched(model):
        output(model, {"input_ids": tokens()})
    assert_same(model.eval(), {"input_ids": tokens()})
