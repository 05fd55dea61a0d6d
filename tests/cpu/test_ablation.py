"""The ablations of the kernels: their edits apply to the sources as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ablation


@pytest.mark.parametrize("name", ablation.EDITS)
def test_edits_apply(name, tmp_path):
    ablation.copy_sources(name, tmp_path / "kernels")
    changed = {
        path.relative_to(tmp_path / "kernels").as_posix()
        for path in (tmp_path / "kernels").rglob("*.cuh")
        if path.read_bytes() != (ablation.ROOT / path.relative_to(tmp_path)).read_bytes()
    }
    assert changed == {edit.file for edit in ablation.EDITS[name]}


def test_an_edit_of_something_else_is_an_error():
    edit = ablation.Edit("a.cuh", "not there", "")
    with pytest.raises(SystemExit, match="found 0 times"):
        ablation.edited("source", (edit,), "a.cuh")


def test_means_over_cudnn():
    case = {"head_dim": 64, "direction": "forward", "causal": True}
    rows = [
        {**case, "dropout": dropout, "tflops": {"ours": ours, "cudnn": 200}}
        for dropout, ours in ((0.0, 400), (0.0, 100), (0.1, 300))
    ]
    expected = {"d64 forward causal": 1.0, "d64 forward causal p0.1": 1.5}
    assert ablation.over_cudnn(rows) == pytest.approx(expected)


def test_no_libraries(tmp_path):
    with pytest.raises(SystemExit, match=r"ablation\.py build"):
        ablation.time_all(tmp_path, None)


def test_rates_are_those_of_the_library(tmp_path, monkeypatch):
    asked = []

    def run(command, env, **_):
        asked.append(env["HF_FLASHATTN_LIBRARY"])
        tflops = {"ours": 300.0 if "as_built" in asked[-1] else 270.0, "cudnn": 200.0}
        row = {"head_dim": 64, "direction": "forward", "causal": False, "dropout": 0.0}
        row["tflops"] = tflops
        (ablation.Path(command[-1])).write_text(json.dumps({"rows": [row]}))

    monkeypatch.setattr(ablation.subprocess, "run", run)
    monkeypatch.setattr(ablation.torch.cuda, "get_device_name", lambda: "none")
    for name in (ablation.AS_BUILT, "without turns", "words under S"):  # the last for dropout alone
        ablation.library_of(tmp_path, name).touch()
    args = ablation.argparse.Namespace(
        head_dims=[64], seqlens=[512], dropouts=[0.0], repeats=1, rounds=2
    )
    outcome = ablation.time_all(tmp_path, args)
    assert len(asked) == 4
    assert outcome["of_as_built"]["without turns"] == pytest.approx({"d64 forward full": 0.9})
    assert "0.900" in ablation.table(outcome["of_as_built"])
