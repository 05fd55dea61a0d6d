"""docs/coverage.py: its outcomes, and that docs/coverage.md leaves no model type out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_flashattn

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))  # at the end: coverage.py there is no package of others

from model_walk import configs, examine, inputs, processes, tasks  # noqa: E402
from model_walk import page as page_module  # noqa: E402

# Transformers 5.17 lacks them, refuses their tiny configs, or (BLT) gives rows that see nothing,
# which others read, another value under sdpa.
OF_THE_PAGE = (
    "blt",
    "diffusion_gemma",
    "musicgen",
    "wavtokenizer",
    "videoprism",
    "sam2_video",
    "edgetam_video",
    "pi0",
    "nemotron_asr_streaming",
    "gemma4_assistant",
    "voxtral_realtime_text",
    "apertus1p5_text",
)


@pytest.mark.parametrize(
    ("model", "task", "outcome", "why"),
    [
        ("bert", "masked", "kernel", ""),
        ("gpt2", "causal", "kernel", ""),
        ("llama", "causal", "kernel", ""),
        ("bart", "seq2seq", "kernel", ""),
        ("bart", "causal", "kernel", "never called: model.decoder.layers.0.encoder_attn"),
        ("t5", "seq2seq", "fallback", "an additive bias (position bias"),
        ("megatron-bert", "masked", "kernel", ""),
        ("falcon", "causal", "kernel", ""),
        ("mpnet", "masked", "fallback", "position bias"),
        ("deberta", "masked", "unsupported", "products of queries and keys with positions"),
        ("perceiver", "masked", "kernel + fallback", "head dims differ: queries 32, values 8"),
        ("dinat", "base", "not built", "needs natten, which is not installed"),
        ("reformer", "masked", "unsupported", "attends within"),
        ("musicgen", "causal", "kernel", ""),
        ("zamba", "causal", "kernel", ""),
        # Rows that see nothing are read by others there.
        ("blt", "causal", "kernel + fallback", "padded left: as sdpa, which eager differs from"),
        ("vit", "base", "kernel", ""),
        ("wav2vec2", "base", "kernel", ""),
        ("clip", "base", "kernel", ""),
        # Its layers between text and image say causal; its eager attention is not.
        ("bridgetower", "base", "kernel", ""),
        # Attention code of their own: text and image, images of one size and in stages, sound.
        ("blip", "base", "kernel", "never called: text_model.encoder.layer.0.crossattention.self"),
        ("canine", "base", "kernel", ""),
        ("imagegpt", "base", "kernel", ""),
        ("vilt", "base", "kernel", ""),
        ("led", "seq2seq", "kernel + unsupported", "slides a window beside global tokens"),
        ("cvt", "base", "kernel", ""),
        ("pvt", "base", "kernel", ""),
        ("timesformer", "base", "kernel", ""),
        (
            "grounding-dino",
            "base",
            "fallback + unsupported",
            "as sdpa, which eager differs from",  # its choice of proposals has ties
        ),
        ("siglip_vision_model", "base", "kernel", ""),
        ("wavtokenizer", "base", "kernel", ""),
        ("swinv2", "base", "fallback", "an additive bias (position bias"),
        ("sam_vision_model", "base", "fallback", "an additive bias (position bias"),
        ("wavlm", "base", "fallback", "an additive bias (position bias"),
        ("speecht5", "base", "kernel + fallback", "an additive bias (position bias"),
        # Its decoder passes a window on that it does not mean.
        ("diffusion_gemma", "base", "kernel + fallback", "padded left: as sdpa"),
        # Under a flash name it would hand our carriers to SDPA.
        ("sam3", "base", "kernel + fallback", "additive 4-D mask"),
        # Inputs by the names of what it asks for.
        ("qwen3_vl_vision", "base", "kernel", ""),
        ("lxmert", "base", "kernel", ""),
        ("bros", "base", "fallback", "an additive bias (position bias"),
        # Its convolutions read the layers' mask.
        ("lasr_encoder", "base", "kernel", ""),
        # One of a kind: no forward, a cache of another model's, a session instead of a batch, more
        # than one image, a class that Transformers does not export.
        ("bark", "base", "kernel", ""),
        ("gemma4_assistant", "causal", "kernel + fallback", "sliding window of 8 tokens"),
        ("sam2_video", "base", "kernel", ""),
        ("edgetam_video", "base", "kernel", ""),  # named after attention is its MLP too
        ("efficientloftr", "base", "kernel", ""),
        ("pi0", "base", "kernel + fallback", "boolean 4-D mask"),
        ("voxtral_realtime_text", "base", "kernel + fallback", "sliding window of 8 tokens"),
        # Code of its own beside the text is of pixels: it asks for no masks in eager's form.
        ("chameleon", "base", "kernel", "never called: vqmodel.encoder.mid.attn_1"),
        ("apertus1p5_text", "causal", "kernel", ""),
        # Its text model's modules say that they are not causal.
        ("videoprism", "base", "kernel + fallback", "softcap 50.0 is not there yet"),
        ("nemotron_asr_streaming", "base", "fallback", "against sdpa: eager takes its mask"),
        ("distilbert", "masked", "kernel", "packed documents see each other, on eager too"),
    ],
)
def test_outcomes(model, task, outcome, why):
    if model in OF_THE_PAGE and not page_module.read_page():
        pytest.skip(f"docs/coverage.md was not made with {page_module.versions()}")
    result = examine.examine(model, task)
    assert result.outcome == outcome and why in result.why, result


@pytest.mark.parametrize("model", ["timm_wrapper", "pe_video_encoder"])
def test_parts_of_timms(model):
    pytest.importorskip("timm")  # with torchvision: more than the other tests need
    result = examine.examine(model, "base")
    assert result.outcome == "kernel", result


def test_a_row_stays_where_a_package_is_missing():
    built = examine.Result("a", "base", "kernel")
    missing = examine.Result("a", "base", "not built", why=f"needs timm{configs.MISSING}")
    assert page_module.merge([built], [missing]) == [built]
    assert page_module.merge([], [missing]) == [missing]
    assert page_module.merge([missing], [built]) == [built]


def test_no_row_says_only_that_the_code_is_its_own():
    rows = page_module.read_page()
    if not rows:
        pytest.skip(f"docs/coverage.md was not made with {page_module.versions()}")
    assert not [row for row in rows if "has attention code of its own" in row.why]


def test_a_config_inside_another_keeps_what_is_special_to_it():
    """PaliGemma's Gemma has one key head, Gemma by itself sixteen."""
    text = configs.tiny_config("paligemma", "base").text_config
    assert (text.num_attention_heads, text.num_key_value_heads) == (4, 1)


def test_what_is_unknown_is_asked_for():
    class Odd(nn.Module):
        main_input_name, config = "smell", configs.tiny_config("bert", "masked")

        def forward(self, smell): ...

    with pytest.raises(configs.NotBuilt, match="asks for smell"):
        list(inputs.make_batches(Odd()))


def test_wrong_attention_shows(monkeypatch):
    """A mask that is dropped must not pass: the weights are large enough for it to matter."""
    forward = hf_flashattn.attention._run
    monkeypatch.setattr(hf_flashattn.attention, "_quick", lambda *_: None)
    monkeypatch.setattr(
        hf_flashattn.attention,
        "_run",
        lambda call: forward(type(call)(**{**vars(call), "mask": None, "found": None})),
    )
    result = examine.examine("bert", "masked")
    assert result.outcome == "differs", result
    assert "padded right: logits" in result.why and "without padding" not in result.why


def test_packed_documents_that_see_each_other_show(monkeypatch):
    """Where eager keeps them apart and we do not, the row says so."""
    monkeypatch.setattr(hf_flashattn.masks, "encode_segments", lambda *_, **__: None)
    result = examine.examine("llama", "causal")
    assert result.outcome == "differs" and result.why.startswith("packed: logits by"), result


def test_a_model_that_raises_only_when_patched_says_so(monkeypatch):
    def refuse(call):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(hf_flashattn.attention, "_run", refuse)
    result = examine.examine("gpt2", "causal")
    assert result.outcome == "raises" and "no such thing" in result.why, result


def test_values_that_are_not_finite_differ():
    pair = torch.tensor([1.0, torch.nan]), torch.ones(2)
    assert examine._relative([pair]) == "nan"
    assert examine._relative([(torch.ones(2), torch.ones(2))]) is None


def test_a_process_that_dies_is_a_row(monkeypatch):
    monkeypatch.setattr(processes, "_work", lambda *_: sys.exit(3))
    (result,) = processes.walk([("gpt2", "causal")], jobs=2, timeout=60)
    assert (result.outcome, result.why) == ("not built", "its process ended: 3")


def test_a_process_that_hangs_is_a_row(monkeypatch):
    monkeypatch.setattr(processes, "_work", lambda *_: __import__("time").sleep(60))
    (result,) = processes.walk([("gpt2", "causal")], jobs=1, timeout=0.5)
    assert (result.outcome, result.why) == ("not built", "took longer than 0.5 s")


def test_the_page_can_be_read_back(tmp_path):
    page = tmp_path / "coverage.md"
    results = [
        examine.Result("a", "causal", "kernel", "2 kernel", "8"),
        examine.Result("b", "masked", "not built", why="takes pixels"),
    ]
    page_module.write_page(results, page)
    assert page_module.read_page(page) == results
    assert "**1 kernel, 1 not built**" in page.read_text()


def test_the_page_names_every_model_type():
    rows = page_module.read_page()
    if not rows:
        pytest.skip(f"docs/coverage.md was not made with {page_module.versions()}")
    assert sorted((row.model, row.task) for row in rows) == tasks.all_models()
    bad = [row for row in rows if row.outcome in ("differs", "raises")]
    assert not bad, bad


def test_every_site_left_uncalled_is_a_finding():
    class Idle(nn.Module):
        pass

    site = hf_flashattn.report.Site("layer.0.attn", Idle())
    report = hf_flashattn.Report("Model", [site])
    result = examine._judge("a", "causal", report, [])
    assert result.outcome == "differs" and "no module was ever called" in result.why
