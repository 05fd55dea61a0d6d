"""The mask function: small tensors that say exactly what Transformers' own mask says."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from model_helpers import (
    BATCH,
    ENCODER_LENGTH,
    LENGTH,
    PADDINGS,
    Host,
    bert,
    gpt2,
    output,
    padding,
    tokens,
)
from transformers import masking_utils

import hf_flashattn
from hf_flashattn import _compat, masks

CAUSAL, FULL = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function


def make(q_length, kv_length, function=CAUSAL, mask=None, q_offset=None, **kwargs):
    return {
        "batch_size": BATCH,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": kv_length - q_length if q_offset is None else q_offset,
        "kv_offset": 0,
        "mask_function": function,
        "attention_mask": None if mask is None else mask.bool(),
        "device": torch.device("cpu"),
        **kwargs,
    }


def written_out(carrier, q_length, kv_length, causal):
    found = None if carrier is None else masks.decode(carrier, q_length, kv_length)
    mask = masks.dense(found, q_length, kv_length, causal=causal, device=torch.device("cpu"))
    full = torch.ones(BATCH, 1, q_length, kv_length, dtype=torch.bool)
    return full if mask is None else mask.expand_as(full)


CASES = [
    pytest.param(LENGTH, CAUSAL, {}, id="causal"),
    pytest.param(4, CAUSAL, {}, id="causal-chunk"),
    pytest.param(1, CAUSAL, {}, id="decode"),
    pytest.param(LENGTH, FULL, {"q_offset": 0, "allow_is_bidirectional_skip": True}, id="full"),
    pytest.param(5, FULL, {"q_offset": 0, "allow_is_bidirectional_skip": True}, id="cross"),
]


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize(("q_length", "function", "options"), CASES)
def test_says_what_transformers_says(q_length, function, options, kind):
    arguments = make(q_length, LENGTH, function, padding(kind), **options)
    carrier = masks.attention_mask(**arguments)
    got = written_out(carrier, q_length, LENGTH, function is CAUSAL)
    exact = masking_utils.sdpa_mask(
        **{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )
    if kind == "holed" and function is CAUSAL and q_length > 1:
        dropped = ~padding(kind)[:, None, -q_length:, None].bool()  # a hole asks nothing
        exact = exact & ~dropped
    assert torch.equal(got, exact)
    if carrier is not None:
        assert carrier.dtype == torch.int32 and carrier.numel() <= BATCH * 3 * (2 * LENGTH + 1)
        # Another device, a reentrant checkpoint: what was remembered is gone.
        lost = carrier.clone()
        assert torch.equal(written_out(lost, q_length, LENGTH, None), exact)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("kind", ["none", "ones", "left", "holed"])
@pytest.mark.parametrize(("offset", "q_length"), [(0, 6), (6, 1), (6, 4)])
def test_static_cache(offset, q_length, kind, tensor):
    """Keys beyond the last query do not exist yet."""
    mask = padding(kind)
    mask = None if mask is None else mask[:, : offset + q_length]
    q_offset = torch.tensor(offset) if tensor else offset
    arguments = make(q_length, 20, CAUSAL, mask, q_offset=q_offset)
    carrier = masks.attention_mask(**arguments)
    exact = masking_utils.sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    assert carrier.shape[2] == (3 if kind == "holed" else 1)
    assert torch.equal(written_out(carrier, q_length, 20, True), exact)
    assert torch.equal(written_out(carrier.clone(), q_length, 20, True), exact)


# ---- without reading the device -----------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch):
    """As torch.compile and graph capture have it: values may not be read."""
    monkeypatch.setattr(_compat, "is_tracing", lambda *_: True)
    for name in ("tolist", "item", "cpu", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("read"))
    yield
    monkeypatch.undo()


UNREAD = [(LENGTH, LENGTH), (4, LENGTH), (1, LENGTH), (70, 70), (6, 100), (1, 64), (32, 96)]


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("function", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize(("q_length", "kv_length"), UNREAD)
def test_key_bits_say_what_transformers_says(q_length, kv_length, function, kind, unread):
    """Every mask, with as many queries as keys or fewer; a query that is padding sees what others
    see, as with sdpa."""
    arguments = make(q_length, kv_length, function, padding(kind, kv_length))
    if function is FULL:
        arguments |= {"q_offset": 0, "allow_is_bidirectional_skip": True}
    carrier = masks.attention_mask(**arguments)
    assert (carrier is None) == (kind == "none")
    seen = [written_out(carrier, q_length, kv_length, function is CAUSAL)]
    if carrier is not None:
        words = -(-kv_length // 32)
        assert carrier.dtype == torch.int32
        assert carrier.shape == (BATCH, 1, 3, 2 + words + (function is CAUSAL and q_length > 1))
        assert carrier.untyped_storage().nbytes() <= 4 * BATCH * (words + 3)
        lost = carrier.clone()  # what a device map makes of it
        seen.append(written_out(lost, q_length, kv_length, None))
        found = masks.decode(lost, q_length, kv_length)
        assert found.start.is_contiguous() and found.length.is_contiguous()
    exact = masking_utils.sdpa_mask(
        **{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )
    for got in seen:
        assert got.to(torch.uint8).eq(exact.to(torch.uint8)).numpy().all()


@pytest.mark.parametrize("kind", ["ones", "left", "holed"])
@pytest.mark.parametrize("offset", [6, 19])
def test_one_token_in_a_static_cache_unread(offset, kind, unread):
    mask = padding(kind, 40)[:, : offset + 1]
    arguments = make(1, 40, CAUSAL, mask, q_offset=torch.tensor(offset))
    carrier = masks.attention_mask(**arguments)
    exact = masking_utils.sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    assert carrier.shape == (BATCH, 1, 3, 2 + 2)
    assert written_out(carrier, 1, 40, True).eq(exact).numpy().all()


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize(("offset", "q_length"), [(0, 6), (6, 4), (30, 10)])
def test_several_tokens_in_a_static_cache_unread(offset, q_length, kind, tensor, unread):
    """How many keys exist is not known, nor which is the last: they are turned until it is."""
    mask = padding(kind, 40)
    mask = None if mask is None else mask[:, : offset + q_length]
    q_offset = torch.tensor(offset) if tensor else offset
    arguments = make(q_length, 40, CAUSAL, mask, q_offset=q_offset)
    carrier = masks.attention_mask(**arguments)
    exact = masking_utils.sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    assert written_out(carrier, q_length, 40, True).eq(exact).numpy().all()
    if tensor or offset + q_length < 40:  # else all are in use, as without a static cache
        assert written_out(carrier.clone(), q_length, 40, None).eq(exact).numpy().all()
        assert masks.decode(carrier, q_length, 40).turn.eq(offset + q_length).numpy()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
def test_a_static_cache_compiles_for_the_cpu():
    """Inductor's own code, of a mask that is cast to bool in the graph."""

    def carrier(mask, offset):
        return masks.attention_mask(**make(1, 40, CAUSAL, mask, q_offset=offset))

    given = padding("holed"), torch.tensor(LENGTH - 1)
    got = torch.compile(carrier, fullgraph=True)(*given)
    kept = torch.zeros(BATCH, 40, dtype=torch.bool)
    kept[:, :LENGTH] = given[0].bool()
    assert torch.equal(got, masks.encode_bits(kept, causal=False))


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("kind", ["none", "ones", "left", "both", "holed"])
@pytest.mark.parametrize(("dropped", "q_length", "kv_length"), [(7, 1, 6), (5, 2, 8), (3, 1, 12)])
def test_a_sliding_cache(dropped, q_length, kv_length, kind, tensor):
    """It holds no more than a window, and not the first keys: those seen are all within reach."""
    window = masking_utils.sliding_window_causal_mask_function(kv_length)
    q_offset = LENGTH - q_length if kv_length != 12 else 8  # 12: a static one, not full yet
    mask = padding(kind)
    mask = None if mask is None else mask[:, : q_offset + q_length]
    q_offset = torch.tensor(q_offset) if tensor else q_offset
    arguments = make(q_length, kv_length, window, mask, q_offset=q_offset, local_size=kv_length)
    arguments["kv_offset"] = dropped
    carrier = masks.attention_mask(**arguments)
    exact = masking_utils.sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    if carrier is not None and carrier.dtype == torch.bool:
        assert tensor and q_length > 1
        assert torch.equal(carrier, exact)
        return
    got = written_out(carrier, q_length, kv_length, True)
    if kind == "holed" and q_length > 1:
        exact = exact & padding(kind)[:, None, -q_length:, None].bool()
    assert torch.equal(got, exact)


def test_patterns_beyond_the_kernel_come_as_transformers_mask():
    window = masking_utils.sliding_window_causal_mask_function(4)
    chunks = masking_utils.chunked_overlay(4, torch.zeros(BATCH, dtype=torch.long))
    for arguments in (
        make(LENGTH, LENGTH, masking_utils.and_masks(chunks, CAUSAL)),
        make(LENGTH, LENGTH, window),
        make(LENGTH, LENGTH, masking_utils.or_masks(CAUSAL, FULL), use_vmap=True),
        make(LENGTH, LENGTH, CAUSAL, allow_is_causal_skip=False),
        make(LENGTH, LENGTH, FULL, q_offset=0, allow_is_bidirectional_skip=False),
    ):
        got = masks.attention_mask(**arguments)
        assert got.dtype == torch.bool and got.shape == (BATCH, 1, LENGTH, LENGTH)
    idle = masking_utils.sliding_window_causal_mask_function(LENGTH)
    assert masks.attention_mask(**make(LENGTH, LENGTH, idle, local_size=LENGTH)) is None


def test_an_altered_carrier_is_refused():
    carrier = masks.attention_mask(**make(LENGTH, LENGTH, CAUSAL, padding("holed")))
    for altered in (
        carrier[..., :7].clone(),
        carrier.expand(-1, 2, -1, -1).clone(),
        carrier[:, :, :1],
    ):
        with pytest.raises(ValueError, match="changes its masks on their way"):
            masks.decode(altered, LENGTH, LENGTH)
    with pytest.raises(ValueError, match="for 5 queries"):
        masks.decode(carrier, 5, LENGTH)
    assert masks.decode(torch.ones(1, 1, 2, 2, dtype=torch.bool), 2, 2) is None
    assert masks.decode(torch.ones(1, 1, 2, 2), 2, 2) is None


# ---- how often the device is read ---------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Counts tolist(), item() and cpu(), syncs on CUDA; the op's CPU implementation may read."""
    counted = []

    def counting(original):
        def read(self, *args):
            caller = sys._getframe(1).f_globals["__name__"]
            if isinstance(self, Host):
                return original(self, *args)
            if caller.startswith("hf_flashattn.") and caller not in (
                "hf_flashattn.cpu",
                "hf_flashattn.reference",
            ):
                counted.append((caller, tuple(self.shape)))
            result = original(self, *args)
            return result.as_subclass(Host) if isinstance(result, torch.Tensor) else result

        return read

    monkeypatch.setattr(torch.Tensor, "tolist", counting(torch.Tensor.tolist))
    monkeypatch.setattr(torch.Tensor, "item", counting(torch.Tensor.item))
    monkeypatch.setattr(torch.Tensor, "cpu", counting(torch.Tensor.cpu))
    return counted


@pytest.mark.parametrize(
    ("kind", "expected"), [("none", 0), ("ones", 1), ("left", 1), ("right", 1), ("holed", 1)]
)
@pytest.mark.parametrize("make_model", [gpt2, bert], ids=["gpt2", "bert"])
def test_reads_per_forward(make_model, kind, expected, reads):
    """Once per mask for all layers."""
    model = make_model(**({"n_layer": 5} if make_model is gpt2 else {"num_hidden_layers": 5}))
    options = {"use_cache": False} if make_model is gpt2 else {}
    with hf_flashattn.patched(model), torch.no_grad():
        output(model, {"input_ids": tokens(), "attention_mask": padding(kind), **options})
    assert len(reads) == expected, reads


@pytest.mark.parametrize("use_cache", [False, True])
def test_reads_of_packed_positions(use_cache, reads):
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].repeat(3, 1)
    model = gpt2(n_layer=5)
    with hf_flashattn.patched(model), torch.no_grad():
        output(model, {"input_ids": tokens(), "position_ids": positions, "use_cache": use_cache})
    # Without a cache, Transformers has looked itself.
    assert len(reads) == (2 if use_cache else 1), reads


def test_cross_attention_of_equal_length_is_not_packed():
    """The decoder's positions say nothing about the encoder's tokens."""
    from model_helpers import bert_decoder, encoder_states

    model = bert_decoder()
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None].repeat(3, 1)
    inputs = {
        "input_ids": tokens(length=ENCODER_LENGTH),
        "position_ids": positions,
        "encoder_hidden_states": encoder_states(),
        "use_cache": False,
    }
    seen = []
    cross = model.bert.encoder.layer[0].crossattention.self
    cross.register_forward_hook(lambda module, args, out: seen.append((args, out[0])))
    with hf_flashattn.patched(model), torch.no_grad():
        output(model, inputs)
        hidden = seen[0][0][0]
        states = encoder_states()
        shape = (BATCH, ENCODER_LENGTH, 4, 8)
        q, k, v = (
            f(x).view(shape).transpose(1, 2)
            for f, x in ((cross.query, hidden), (cross.key, states), (cross.value, states))
        )
        expected = (
            torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
    assert (seen[0][1] - expected).abs().max() < 1e-5
