"""How often a padded forward waits for the device, as the driver sees it."""

import warnings

import pytest
import torch
from test_models import MODELS, VOCABULARY, masks, no_dropout

from hf_flashattn import patched


def waits(kind, mask, layers):
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    model = MODELS[kind](**no_dropout(kind)).cuda().eval().half()
    model = type(model)(type(model.config)(**{**model.config.to_dict(), name: layers}))
    model = model.cuda().eval().half()
    inputs = {"input_ids": torch.randint(VOCABULARY, (3, 150), device="cuda")}
    inputs["attention_mask"] = None if mask is None else mask.cuda()
    if kind == "gpt2":
        inputs["use_cache"] = False
    with patched(model, strict=True), torch.no_grad():
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


@pytest.mark.parametrize("padding", ["none", "right", "left", "holed"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_once_per_forward(kind, padding):
    mask = masks(150)[padding]
    few, many = waits(kind, mask, 1), waits(kind, mask, 6)
    assert len(many) == len(few) <= {"none": 0, "holed": 2}.get(padding, 1), many
