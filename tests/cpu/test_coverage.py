"""docs/coverage.py: its outcomes, and that docs/coverage.md leaves no model type out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    name = "docs_coverage"  # not "coverage": that is a package of others
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "coverage.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


walk = load()


@pytest.mark.parametrize(
    ("model", "task", "outcome", "why"),
    [
        ("bert", "masked", "kernel", ""),
        ("gpt2", "causal", "kernel", ""),
        ("llama", "causal", "kernel", ""),
        ("bart", "seq2seq", "kernel", ""),
        ("bart", "causal", "kernel", "never called: model.decoder.layers.0.encoder_attn"),
        ("t5", "seq2seq", "fallback", "position bias"),
        ("megatron-bert", "masked", "kernel", ""),
        ("falcon", "causal", "kernel", ""),
        ("mpnet", "masked", "fallback", "position bias"),
        ("deberta", "masked", "unsupported", "products of queries and keys with positions"),
        ("perceiver", "masked", "not built", "takes inputs, not text"),
        ("vit", "base", "kernel", ""),
        ("wav2vec2", "base", "kernel", ""),
        ("clip", "base", "kernel", ""),
        # Its layers between text and image say causal; its eager attention is not.
        ("bridgetower", "base", "kernel + unsupported", "MultiheadAttention has attention code"),
        # Its convolutions read the layers' mask.
        ("lasr_encoder", "base", "kernel", ""),
        ("distilbert", "masked", "kernel", "packed documents see each other, on eager too"),
    ],
)
def test_outcomes(model, task, outcome, why):
    result = walk.examine(model, task)
    assert result.outcome == outcome and why in result.why, result


def test_wrong_attention_shows(monkeypatch):
    """A mask that is dropped must not pass: the weights are large enough for it to matter."""
    forward = walk.hf_flashattn.attention._run
    monkeypatch.setattr(walk.hf_flashattn.attention, "_quick", lambda *_: None)
    monkeypatch.setattr(
        walk.hf_flashattn.attention,
        "_run",
        lambda call: forward(type(call)(**{**vars(call), "mask": None, "found": None})),
    )
    result = walk.examine("bert", "masked")
    assert result.outcome == "differs", result
    assert "padded right: logits" in result.why and "without padding" not in result.why


def test_packed_documents_that_see_each_other_show(monkeypatch):
    """Where eager keeps them apart and we do not, the row says so."""
    monkeypatch.setattr(walk.hf_flashattn.masks, "encode_segments", lambda *_, **__: None)
    result = walk.examine("llama", "causal")
    assert result.outcome == "differs" and result.why.startswith("packed: logits by"), result


def test_a_model_that_raises_only_when_patched_says_so(monkeypatch):
    def refuse(call):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(walk.hf_flashattn.attention, "_run", refuse)
    result = walk.examine("gpt2", "causal")
    assert result.outcome == "raises" and "no such thing" in result.why, result


def test_values_that_are_not_finite_differ():
    pair = torch.tensor([1.0, torch.nan]), torch.ones(2)
    assert walk._relative([pair]) == "nan"
    assert walk._relative([(torch.ones(2), torch.ones(2))]) is None


def test_a_process_that_dies_is_a_row(monkeypatch):
    monkeypatch.setattr(walk, "_work", lambda *_: sys.exit(3))
    (result,) = walk.walk([("gpt2", "causal")], jobs=2, timeout=60)
    assert (result.outcome, result.why) == ("not built", "its process ended: 3")


def test_a_process_that_hangs_is_a_row(monkeypatch):
    monkeypatch.setattr(walk, "_work", lambda *_: __import__("time").sleep(60))
    (result,) = walk.walk([("gpt2", "causal")], jobs=1, timeout=0.5)
    assert (result.outcome, result.why) == ("not built", "took longer than 0.5 s")


def test_the_page_can_be_read_back(tmp_path):
    page = tmp_path / "coverage.md"
    results = [
        walk.Result("a", "causal", "kernel", "2 kernel", "8"),
        walk.Result("b", "masked", "not built", why="takes pixels"),
    ]
    walk.write_page(results, page)
    assert walk.read_page(page) == results
    assert "**1 kernel, 1 not built**" in page.read_text()


def test_the_page_names_every_model_type():
    rows = walk.read_page()
    if not rows:
        pytest.skip(f"docs/coverage.md was not made with {walk.versions()}")
    assert sorted((row.model, row.task) for row in rows) == walk.all_models()
    bad = [row for row in rows if row.outcome in ("differs", "raises")]
    assert not bad, bad


def test_every_site_left_uncalled_is_a_finding():
    class Idle(nn.Module):
        pass

    site = walk.hf_flashattn.report.Site("layer.0.attn", Idle())
    report = walk.hf_flashattn.Report("Model", [site])
    result = walk._judge("a", "causal", report, [])
    assert result.outcome == "differs" and "no module was ever called" in result.why
