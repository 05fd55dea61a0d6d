"""How often a forward reads the device: every operator that would, seen below Python.

test_masks.py counts the reads themselves; here nothing can hide: indexing by a mask, nonzero and
truth values of tensors are operators too. tests/gpu/test_waits.py asks the driver.
"""

from __future__ import annotations

import sys

import pytest
import torch
from model_helpers import ENCODER_LENGTH, bert, bert_decoder, encoder_states, gpt2, padding, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import hf_flashattn

READING = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique",
    "aten.index.Tensor",  # by a boolean tensor
    "aten.is_nonzero",
    "aten.equal",
)
OURS_ON_THE_CPU = ("hf_flashattn.cpu", "hf_flashattn.reference")  # stand-ins for the kernels


class Reads(TorchDispatchMode):
    """Collects the reading operators that hf_flashattn asks for, with the line that does."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = not name.startswith("aten.index.Tensor") or any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if by_mask and name.startswith(READING):
            self._note(name)
        return function(*args, **(kwargs or {}))

    def _note(self, name):
        frame, ours = sys._getframe(2), None
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module in OURS_ON_THE_CPU:
                return
            if ours is None and module.startswith("hf_flashattn."):
                ours = f"{name} at {module}:{frame.f_lineno}"
            frame = frame.f_back
        if ours is not None:
            self.found.append(ours)


def make(family, layers):
    sizes = {"n_layer": layers} if family.startswith("gpt2") else {"num_hidden_layers": layers}
    if family == "bert":
        return bert(**sizes)
    if family == "bert-decoder":
        return bert_decoder(**sizes)
    return gpt2(**sizes, add_cross_attention=family == "gpt2-cross")


def reads(family, kind, layers, **more):
    model, found = make(family, layers), Reads()
    inputs = {"attention_mask": padding(kind), **more}
    if family in ("gpt2-cross", "bert-decoder"):
        inputs["encoder_hidden_states"] = encoder_states()
        inputs["encoder_attention_mask"] = padding(kind, ENCODER_LENGTH)
    with hf_flashattn.patched(model, strict=True), torch.no_grad():
        model(tokens(), **inputs)  # what is looked up once
        with found:
            model(tokens(), **inputs)
    return found.found


# The mask is read once, whole, and looked at on the host: all kept? neighbours? Then five numbers.
LOOKS = {"none": 0, "ones": 1, "left": 2, "right": 2, "holed": 2 + 5}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("kind", LOOKS)
@pytest.mark.parametrize("family", ["gpt2", "bert", "gpt2-cross", "bert-decoder"])
def test_reads_do_not_grow_with_layers(family, kind, use_cache):
    more = {} if family == "bert" else {"use_cache": use_cache}
    few, many = reads(family, kind, 1, **more), reads(family, kind, 6, **more)
    assert many == few
    masks = 2 if family in ("gpt2-cross", "bert-decoder") else 1
    # Beside a cache nobody else has looked whether GPT-2's positions restart.
    positions = family.startswith("gpt2") and use_cache and kind in ("none", "ones")
    assert len(few) <= LOOKS[kind] * masks + positions, few


def test_a_read_is_seen(monkeypatch):
    """A layer that looks at its mask shows in the count."""
    real = hf_flashattn.masks.recall

    def looking(mask):
        assert mask.any()
        return real(mask)

    monkeypatch.setattr(hf_flashattn.masks, "recall", looking)
    assert len(reads("gpt2", "left", 6)) == len(reads("gpt2", "left", 1)) + 5


@pytest.mark.parametrize("kind", ["ones", "left", "holed"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_none_under_fullgraph(family, kind):
    """fullgraph=True would break at a read; running the graph shows that it holds none either."""
    model, found = make(family, 2), Reads()
    options = {"use_cache": False} if family == "gpt2" else {}
    graphs = []

    def backend(graph, example):
        graphs.append(graph)

        def run(*args):
            with found:
                return graph.forward(*args)

        return run

    torch._dynamo.reset()
    with hf_flashattn.patched(model, strict=True), torch.no_grad():
        fast = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(2):
            fast(tokens(), attention_mask=padding(kind), **options)
    assert len(graphs) == 1 and found.found == []
