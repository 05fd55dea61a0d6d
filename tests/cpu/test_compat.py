"""The private Transformers names this package relies on, and what it reads out of them."""

from __future__ import annotations

import pytest
import torch
from model_helpers import gpt2
from transformers import masking_utils, modeling_flash_attention_utils

import hf_flashattn
from hf_flashattn import _compat


def test_no_name_is_missing():
    assert _compat.missing() == []


def test_a_missing_name_is_named(monkeypatch):
    monkeypatch.delattr(masking_utils, "sdpa_mask")
    assert _compat.missing() == [
        "transformers.masking_utils.sdpa_mask (builds the explicit mask of everything else)"
    ]


def test_lazy_import_gives_our_functions_for_our_names_only():
    flash, varlen, kvcache, pad, unpad = modeling_flash_attention_utils._lazy_imports(
        "hf_flashattn"
    )
    assert (flash, varlen) == (hf_flashattn.flash_attn_func, hf_flashattn.flash_attn_varlen_func)
    assert kvcache is None and callable(pad) and callable(unpad)
    with pytest.raises(Exception):  # noqa: B017 - whatever Transformers says of a name it cannot load
        modeling_flash_attention_utils._lazy_imports("another_flash_name")


def test_registering_twice_wraps_once():
    before = modeling_flash_attention_utils._lazy_imports
    _compat._wrap_lazy_imports(frozenset({"hf_flashattn"}), lambda: ())
    assert modeling_flash_attention_utils._lazy_imports is before


def test_masks_are_recognised():
    causal, full = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    ids = torch.tensor([[0, 0, 1]])
    packed = masking_utils.and_masks(causal, masking_utils.packed_sequence_mask_function(ids))
    windowed = masking_utils.sliding_window_causal_mask_function(4)
    both = masking_utils.and_masks(windowed, masking_utils.packed_sequence_mask_function(ids))
    read = _compat.describe_mask
    assert (read(causal).causal, read(full).causal) == (True, False)
    assert read(packed).causal and read(packed).packed_ids is ids and read(packed).window is None
    assert read(windowed).causal and read(windowed).window == 4
    assert read(both).packed_ids is ids and read(both).window == 4


def test_unknown_masks_are_not_guessed():
    causal = masking_utils.causal_mask_function
    mine = lambda b, h, q, k: k <= q  # noqa: E731
    ids = torch.zeros(1, 3, dtype=torch.long)
    for unknown in (
        mine,
        masking_utils.and_masks(causal, mine),
        masking_utils.or_masks(causal, causal),
        masking_utils.chunked_causal_mask_function(4, torch.zeros(1)),
        masking_utils.and_masks(*[masking_utils.packed_sequence_mask_function(ids)] * 2),
    ):
        assert _compat.describe_mask(unknown) is None


def test_eager_function_of_a_module():
    from transformers.models.gpt2 import modeling_gpt2

    attention = gpt2().transformer.h[0].attn
    assert _compat.eager_function(attention) is modeling_gpt2.eager_attention_forward
    assert _compat.eager_function(torch.nn.Linear(2, 2)) is None
