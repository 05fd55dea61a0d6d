"""hf-flashattn doctor: a real run, and that each thing that can be wrong is found and named."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import masking_utils
from transformers.modeling_utils import AttentionInterface

from hf_flashattn import attention, build, cli, doctor, environment, ops, support

NAMES = [
    "versions",
    "environment",
    "gpu",
    "library",
    "compiler",
    "names",
    "hooks",
    "bert",
    "gpt2",
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """As on a machine without one, whatever this one has; and no variable set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in environment.CHOICES:
        monkeypatch.delenv(environment.PREFIX + name, raising=False)
    monkeypatch.setattr(environment, "_current", None)


@pytest.fixture
def run(capsys):
    """Exit status and checks by name."""

    def run_doctor() -> tuple[int, dict]:
        status = cli.main(["doctor", "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run_doctor


def by_name(data: dict) -> dict:
    return {check["name"]: check for check in data["checks"]}


def test_a_sound_machine(run):
    status, data = run()
    checks = by_name(data)
    assert list(checks) == NAMES
    assert status == 0 and data["ok"] is True
    assert data["kernels_run"] is False  # there is no GPU
    assert checks["versions"]["facts"]["torch"] == torch.__version__
    assert checks["gpu"]["status"] == "note" and checks["gpu"]["facts"] == {"devices": []}
    assert checks["names"]["facts"]["names"] == ["hf_flashattn", "hf_fused_attn"]
    for name in ("bert", "gpt2"):
        facts = checks[name]["facts"]
        assert checks[name]["status"] == "ok"
        assert facts["calls"] == {"kernel": 0, "cpu": 2, "fallback": 0}
        assert facts["why"] == ["SDPA (CPU)"] and facts["device"] == "cpu"
        assert facts["errors"]["gradients"]["ours"] < 1e-5


def test_text(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1] if line[0] != " "] == NAMES
    assert lines[-1] == "No problem; the CUDA kernels do not run here."


def test_nothing_is_left_changed(run):
    before = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_hook_is_named(run, monkeypatch):
    monkeypatch.delattr(masking_utils, "and_masks")
    status, data = run()
    check = by_name(data)["hooks"]
    assert status == 1 and data["ok"] is False and check["status"] == "problem"
    assert check["facts"]["missing"] == [
        "transformers.masking_utils.and_masks (recognises packed sequences and windows)"
    ]
    assert "and_masks" in check["summary"] and "pip install 'transformers" in check["next_step"]


def test_a_name_that_another_package_took(run, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "hf_flashattn", print)
    status, data = run()
    check = by_name(data)["names"]
    assert status == 1 and check["status"] == "problem"
    assert check["facts"]["wrong"] == ["hf_flashattn: the attention function is not ours"]


def test_wrong_numbers(run, monkeypatch):
    original = ops.call_dense
    monkeypatch.setattr(ops, "call_dense", lambda *args: original(*args) * 1.01)
    status, data = run()
    for name in ("bert", "gpt2"):
        check = by_name(data)[name]
        assert check["status"] == "problem" and "logits: relative error" in check["summary"]
    assert status == 1


def test_not_a_number(run, monkeypatch):
    original = ops.call_dense
    monkeypatch.setattr(ops, "call_dense", lambda *args: original(*args) * float("nan"))
    status, data = run()  # and it is JSON all the same
    assert status == 1 and by_name(data)["gpt2"]["status"] == "problem"


def test_calls_that_did_not_run_where_expected(run, monkeypatch):
    refusal = support.Support(None, "no reason at all", "", "")
    monkeypatch.setattr(attention, "_explain_once", lambda *what: refusal)
    status, data = run()
    check = by_name(data)["bert"]
    assert status == 1 and "expected 2 cpu, got 0 kernel, 0 cpu, 2 fallback" in check["summary"]
    assert "no reason at all" in check["summary"]


def test_a_bad_variable_is_a_problem_and_no_crash(run, monkeypatch):
    monkeypatch.setenv("HF_FLASHATTN_FALLBACK", "flex")
    status, data = run()
    checks = by_name(data)
    assert status == 1 and checks["environment"]["status"] == "problem"
    assert "expected sdpa or eager, got 'flex'" in checks["environment"]["summary"]
    assert checks["bert"]["summary"] == "not tried: see environment"


def test_disabled_is_no_fault(run, monkeypatch):
    monkeypatch.setenv("HF_FLASHATTN_DISABLE", "1")
    monkeypatch.setenv("HF_FLASHATTN_STRICT", "1")
    status, data = run()
    checks = by_name(data)
    assert status == 0 and checks["environment"]["status"] == "note"
    assert checks["gpt2"]["status"] == "note"
    assert checks["gpt2"]["facts"]["calls"] == {"kernel": 0, "cpu": 0, "fallback": 2}
    assert checks["gpt2"]["facts"]["why"] == ["HF_FLASHATTN_DISABLE=1"]


def test_a_hopper_gpu_without_the_library(monkeypatch, capsys):
    absent = ops.LibraryStatus(None, "not built yet; next step: hf-flashattn build")
    monkeypatch.setattr(ops, "library_status", lambda: absent)
    assert cli.main(["doctor"]) == 0  # nobody needs it here
    capsys.readouterr()
    monkeypatch.setattr(doctor, "_on_hopper", lambda: True)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "problem  library      not built yet\n" in text
    assert "Next step: hf-flashattn build\n" in text
    assert text.endswith("1 problem; the CUDA kernels do not run here.\n")


def test_a_library_that_cannot_be_had_comes_with_the_next_step(run, monkeypatch):
    status = ops.LibraryStatus(None, "no such file. Next step: unset it", failed=True)
    monkeypatch.setattr(ops, "library_status", lambda: status)
    code, data = run()  # a problem on any machine: somebody asked for it
    check = by_name(data)["library"]
    assert code == 1 and (check["summary"], check["next_step"]) == ("no such file", "unset it")


def test_a_hopper_gpu_without_a_compiler(run, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert by_name(run()[1])["compiler"]["status"] == "note"
    absent = ops.LibraryStatus(None, "no nvcc", failed=True)
    monkeypatch.setattr(ops, "library_status", lambda: absent)
    monkeypatch.setattr(doctor, "_on_hopper", lambda: True)
    status, data = run()
    check = by_name(data)["compiler"]
    assert status == 1 and check["status"] == "problem"
    assert "nvcc: expected CUDA" in check["summary"] and check["next_step"]


def test_how_the_library_was_built(run, monkeypatch, tmp_path):
    key = build.library_key(build.source_root(), ("90a",))
    for folder, current in ((key, True), ("elsewhere", False)):
        path = tmp_path / folder / build.LIBRARY_NAME
        path.parent.mkdir()
        path.write_bytes(b"12345")
        monkeypatch.setattr(ops, "library_status", lambda path=path: ops.LibraryStatus(path, ""))
        check = by_name(run()[1])["library"]
        assert check["status"] == ("ok" if current else "note")
        facts = check["facts"]
        assert (facts["path"], facts["bytes"]) == (str(path), 5)
        assert facts["of_these_sources"] is current and facts["key"] == folder


def test_a_check_that_raises_is_a_problem(run, monkeypatch):
    def check_gpu():
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(doctor, "check_gpu", check_gpu)
    status, data = run()
    check = by_name(data)["gpu"]
    assert status == 1 and check["summary"] == "RuntimeError: the driver is gone"


def test_kernels_run_only_where_every_call_was_one():
    def diagnosis(*calls: dict) -> doctor.Diagnosis:
        checks = [doctor.Check("model", "ok", "", facts={"calls": c}) for c in calls]
        return doctor.Diagnosis((doctor.Check("gpu", "ok", ""), *checks))

    kernel = {"kernel": 2, "cpu": 0, "fallback": 0}
    assert diagnosis(kernel, kernel).kernels_run
    assert not diagnosis(kernel, {"kernel": 1, "cpu": 0, "fallback": 1}).kernels_run
    assert not diagnosis().kernels_run
