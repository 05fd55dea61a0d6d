"""hf-flashattn report: a forecast from a config alone, without weights and without the network."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from model_helpers import bert, gpt2
from transformers import (
    BertConfig,
    BloomConfig,
    DebertaConfig,
    GptOssConfig,
    LlamaConfig,
    MegatronBertConfig,
    MistralConfig,
    PreTrainedConfig,
    SwinConfig,
    T5Config,
)
from transformers.utils import hub

from hf_flashattn import cli, patched, preview


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No GPU and no network, whatever this machine has."""

    def connect(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.delenv("HF_FLASHATTN_DISABLE", raising=False)


@pytest.fixture
def saved(tmp_path):
    """The folder of a config."""

    def save(config: PreTrainedConfig, *architectures: str) -> str:
        config.architectures = list(architectures) or None
        config.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.fixture
def run(capsys):
    def run_report(*arguments: str) -> tuple[int, dict]:
        status = cli.main(["report", *arguments, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run_report


def llama(**changes) -> LlamaConfig:
    """Of 16 GB an instance, were it not on the meta device."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    options = {"num_hidden_layers": 8, "dtype": "bfloat16", **sizes}
    return LlamaConfig(**(options | changes))


def test_a_folder_and_a_config_file(run, saved):
    folder = saved(llama(), "LlamaForCausalLM")
    status, data = run(folder)
    assert status == 0
    assert (data["model"], data["dtype"]) == ("LlamaForCausalLM", "bfloat16")
    assert data["device"] == "a Hopper GPU (assumed: this machine has no GPU)"
    assert data["all_on_kernel"] is True and data["counts"] == {"kernel": 8}
    assert data["modules"][0] == {
        "module": "model.layers.0.self_attn",
        "class": "LlamaAttention",
        "runs": "kernel",
        "name": "hf_flashattn",
        "why": "sm90 d128",
    }
    assert run(f"{folder}/config.json")[1]["modules"] == data["modules"]


def test_the_name_of_a_cached_model(run, monkeypatch, tmp_path):
    commit, folder = "0" * 40, tmp_path / "models--someone--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    BertConfig(num_hidden_layers=3).save_pretrained(folder / "snapshots" / commit)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    status, data = run("someone/tiny")
    assert status == 0 and data["source"] == "someone/tiny"
    assert data["model"] == "BertModel" and data["counts"] == {"kernel": 3}
    assert data["modules"][0]["why"] == "under autocast; fp32 calls fall back"


def test_no_weights_are_made(saved):
    model = preview._build(llama(), torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("make", [gpt2, bert])
def test_it_says_what_patch_model_says(make, run, saved):
    """And then happens: the forecast of the report, on a model with weights."""
    model = make()
    data = run(saved(model.config, type(model).__name__), "--device", "cpu", "--dtype", "fp32")[1]
    with patched(model) as report:
        expected = [
            (row.module, row.cls, row.runs, row.implementation, row.why) for row in report.rows
        ]
    assert [tuple(row.values()) for row in data["modules"]] == expected
    assert data["device"] == "the CPU" and data["counts"] == {"cpu implementation": 2}
    assert data["all_on_kernel"] is True


CASES = {
    "window": (
        MistralConfig(num_hidden_layers=1, sliding_window=512),
        ("kernel", "over 512 tokens a fallback: a sliding window (511, 0)"),
    ),
    "head_dim": (
        llama(num_hidden_layers=1, head_dim=300),
        ("fallback", "head_dim 300 on CUDA"),
    ),
    "bias": (T5Config(num_layers=1), ("fallback", "an additive bias")),
    "bias_of_windows": (SwinConfig(depths=[1], num_heads=[3]), ("fallback", "an additive bias")),
    "sinks": (
        GptOssConfig(num_hidden_layers=1, num_local_experts=2),
        ("fallback", "attention sinks"),
    ),
    "alibi": (BloomConfig(n_layer=1), ("fallback", "an additive bias")),
    "own_code": (
        MegatronBertConfig(num_hidden_layers=1),
        ("kernel", "under autocast"),
    ),
    "unlike": (
        DebertaConfig(num_hidden_layers=1),
        ("unsupported", "DisentangledSelfAttention adds products"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_run_on_the_kernel(case, run, saved):
    config, (runs, why) = CASES[case]
    folder = saved(config)
    status, data = run(folder)
    assert status == 0 and data["modules"]
    assert all(row["runs"] == runs and why in row["why"] for row in data["modules"]), data
    strict, _ = run(folder, "--strict")
    assert strict == (0 if runs == "kernel" else 1)
    assert data["all_on_kernel"] is (runs == "kernel")


def test_the_environment_shows(run, saved, monkeypatch):
    monkeypatch.setenv("HF_FLASHATTN_DISABLE", "1")
    monkeypatch.setenv("HF_FLASHATTN_STRICT", "1")  # of patch_model: a report never raises it
    status, data = run(saved(BertConfig(num_hidden_layers=1)))
    assert status == 0 and data["modules"][0]["why"] == "HF_FLASHATTN_DISABLE=1"


def test_a_bad_variable(saved, monkeypatch, capsys):
    monkeypatch.setenv("HF_FLASHATTN_LOG", "loud")
    assert cli.main(["report", saved(BertConfig(num_hidden_layers=1))]) == 1
    printed = capsys.readouterr()
    assert not printed.out and "HF_FLASHATTN_LOG: expected off or reasons or calls" in printed.err


def test_text(saved, capsys):
    assert cli.main(["report", saved(llama(num_hidden_layers=2)), "--device", "hopper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "hf_flashattn: LlamaModel, bfloat16 on a Hopper GPU: 2 kernel"
    assert lines[1].split() == ["module", "class", "runs", "on", "name", "why"]
    row = ["layers.0.self_attn", "LlamaAttention", "kernel", "hf_flashattn", "sm90", "d128"]
    assert lines[3].split() == row


@pytest.mark.parametrize("content", [None, "{}", "not JSON", '{"model_type": "nonsense"}'])
def test_what_is_no_config(content, tmp_path, capsys):
    source = tmp_path / "config.json"
    if content is not None:
        source.write_text(content)
    assert cli.main(["report", str(source)]) == 1
    printed = capsys.readouterr()
    assert not printed.out and "expected a model's folder, a config.json" in printed.err


def test_a_name_that_is_not_cached(capsys):
    assert cli.main(["report", "nobody/nothing-of-the-kind"]) == 1
    error = capsys.readouterr().err
    assert "got none of these" in error
    assert "hf download nobody/nothing-of-the-kind config.json" in error


def test_a_config_that_makes_no_model(saved, capsys):
    assert cli.main(["report", saved(BertConfig(hidden_size=31, num_hidden_layers=1))]) == 1
    assert "expected a config from which a model can be built, got ValueError" in (
        capsys.readouterr().err
    )
