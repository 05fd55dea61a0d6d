"""The report: a table of what ran, and an assertion for the tests of users."""

from __future__ import annotations

import pytest
import torch
from model_helpers import gpt2, output, tokens

import hf_flashattn
from hf_flashattn import NotOnKernel, report

INPUTS = {"input_ids": tokens()}


def test_table():
    with hf_flashattn.patched(gpt2(), exclude="*.1.*") as result:
        model = result.sites[0].module
        before = str(result)
        assert "2 attention" not in before and "cpu implementation (expected)" in before
        assert hf_flashattn.attention_report(model).rows  # of a part of a patched model, too
    lines = before.splitlines()
    assert lines[0] == "hf_flashattn: GPT2LMHeadModel, 1 cpu implementation, 1 fallback"
    counts = ["kernel", "cpu", "fallback"]
    assert lines[1].split() == ["module", "class", "runs", "on", "name", "why", *counts]
    assert lines[3].startswith("transformer.h.0.attn  GPT2Attention  cpu implementation (expected)")
    assert "fallback (expected)" in lines[4] and "excluded by '*.1.*'" in lines[4]


def test_counts_grow_and_the_report_is_live():
    model = gpt2()
    with hf_flashattn.patched(model) as result:
        for n in (1, 2, 3):
            output(model, INPUTS)
            assert [row.calls.cpu for row in result.rows] == [n, n]
        assert [row.runs for row in result.rows] == ["cpu implementation"] * 2
        assert all(row.calls.kernel == 0 and row.calls.fallback == 0 for row in result.rows)


def test_counts_start_anew_with_a_new_patch():
    model = gpt2()
    with hf_flashattn.patched(model, exclude="*") as result:
        output(model, INPUTS)
    assert [row.calls.fallback for row in result.rows] == [1, 1]  # still to be read
    hf_flashattn.patch_model(model)
    output(model, INPUTS)
    hf_flashattn.patch_model(model).assert_all_on_kernel(allow_cpu=True)


def test_a_long_reason_stays_on_its_line():
    why = "Missing:\n  - nvcc" + " x" * 200
    row = report.Row("m", "Attention", "fallback", why, report.Calls())
    table = report.format_rows([row]).splitlines()
    assert len(table) == 3 and "Missing: - nvcc x" in table[2] and " ..." in table[2]
    assert len(table[2]) < 250


def test_assert_all_on_kernel_never_passes_for_a_cpu_unless_told():
    model = gpt2()
    with hf_flashattn.patched(model) as result:
        with pytest.raises(NotOnKernel, match="Run a forward first"):
            result.assert_all_on_kernel(allow_cpu=True)
        result.assert_all_on_kernel(allow_cpu=True, allow_uncalled=True)
        output(model, INPUTS)
        result.assert_all_on_kernel(allow_cpu=True)
        with pytest.raises(NotOnKernel, match="On the CPU no kernel runs") as failure:
            result.assert_all_on_kernel()
        assert "transformer.h.1.attn" in str(failure.value) and isinstance(
            failure.value, AssertionError
        )
        model(tokens(), attention_mask=torch.ones(3, 1, 13, 13))
        with pytest.raises(NotOnKernel, match="mixed"):
            result.assert_all_on_kernel(allow_cpu=True)


def test_kernel_calls_pass():
    """As on a GPU: the names come from support.explain."""
    model = gpt2()
    with hf_flashattn.patched(model) as result:
        for site in result.sites:
            report.count_kernel(site.module, "sm90 d64")
        result.assert_all_on_kernel()
        assert all((row.runs, row.why) == ("kernel", "sm90 d64") for row in result.rows)
        report.count_fallback(result.sites[1].module, "fp32")
        with pytest.raises(NotOnKernel, match="fp32") as failure:
            result.assert_all_on_kernel()
        assert "h.0.attn" not in str(failure.value)


def test_nothing_to_report():
    result = hf_flashattn.patch_model(torch.nn.Linear(2, 2))
    assert str(result) == "hf_flashattn: no attention module found in Linear"
    with pytest.raises(NotOnKernel):
        result.assert_all_on_kernel()


def test_forecast_of_head_dims(monkeypatch):
    """What explain refuses of the module's own numbers is known before any call."""
    from hf_flashattn import support

    refusal = support.Support(None, "head_dim 8 on CUDA is not there yet", "64", "use SDPA")
    monkeypatch.setattr(support, "explain", lambda request: refusal)
    model = gpt2()
    with hf_flashattn.patched(model) as result:
        assert {row.runs for row in result.rows} == {"fallback"}
    with pytest.raises(hf_flashattn.PatchError, match="head_dim 8 on CUDA"):
        hf_flashattn.patch_model(model, strict=True)
