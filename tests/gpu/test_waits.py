"""How often a padded forward waits for the device, as the driver sees it."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from test_models import MODELS, VOCABULARY, masks, no_dropout

from hf_flashattn import patched


def waits(kind, mask, layers, ours=True):
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    model = MODELS[kind](**no_dropout(kind)).cuda().eval().half()
    model = type(model)(type(model.config)(**{**model.config.to_dict(), name: layers}))
    model = model.cuda().eval().half()
    inputs = {"input_ids": torch.randint(VOCABULARY, (3, 150), device="cuda")}
    inputs["attention_mask"] = None if mask is None else mask.cuda()
    if kind == "gpt2":
        inputs["use_cache"] = False
    with patched(model, strict=True) if ours else nullcontext(), torch.no_grad():
        model(**inputs)
        model(**inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(x.message) for x in seen if "synchroniz" in str(x.message)]


# Without a mask and a cache, Transformers looks whether the positions of a causal model restart,
# whatever the attention; with a mask, ours is the only look.
MOST = {("bert", "none"): 0, ("bert", "holed"): 2, ("gpt2", "holed"): 2}


@pytest.mark.parametrize("padding", ["none", "right", "left", "holed"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_once_per_forward(kind, padding):
    mask = masks(150)[padding]
    few, many = waits(kind, mask, 1), waits(kind, mask, 6)
    assert len(many) == len(few) <= MOST.get((kind, padding), 1), many


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_without_a_mask_as_often_as_sdpa(kind):
    assert len(waits(kind, None, 6)) <= len(waits(kind, None, 6, ours=False))
