"""benchmarks/training_step.py and examples/plots.py on tiny shapes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
torch = pytest.importorskip("torch")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    """Imports a script of benchmarks/ by name, as they import each other."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def training_step(script):
    return script("training_step")


def test_times_both_models_and_writes_json(training_step, tmp_path: Path, capsys):
    path = tmp_path / "sub" / "steps.json"
    options = ["--tiny", "--cpu", "--attention", "eager,sdpa", "--steps", "3", "--warmup", "1"]
    assert training_step.main([*options, "--json", str(path)]) == 0
    outcome = json.loads(path.read_text())
    assert [model["name"] for model in outcome["models"]] == ["gpt2", "bert-large"]
    for model in outcome["models"]:
        eager, sdpa = model["runs"]["eager"], model["runs"]["sdpa"]
        assert len(eager["step_ms"]["all"]) == 3 and len(sdpa["losses"]) == 4
        # Same weights, same batch: the first losses differ by bf16 and attention dropout alone.
        assert eager["losses"][0] == pytest.approx(sdpa["losses"][0], rel=0.05)
        assert eager["speedup"] == 1
    assert "bert-large, 2 x 32" in capsys.readouterr().out


def test_times_bert_without_padding(training_step, tmp_path: Path, capsys):
    path = tmp_path / "steps.json"
    names = "hf_flashattn,hf_flashattn_unpad"
    options = ["--tiny", "--cpu", "--models", "bert-large", "--attention", names, "--steps", "1"]
    assert training_step.main([*options, "--warmup", "1", "--json", str(path)]) == 0
    (model,) = json.loads(path.read_text())["models"]
    plain, unpadded = (model["runs"][name] for name in names.split(","))
    assert plain["losses"][0] == pytest.approx(unpadded["losses"][0], rel=0.05)
    assert "2 forwards without padding" in unpadded["ran_on"]
    assert "padding" not in plain["ran_on"]
    assert "unpadding: bert: 2 forwards" in capsys.readouterr().out


def test_unpadding_is_for_padded_models_only(training_step):
    assert "hf_flashattn_unpad" not in training_step.parse([]).attention
    with pytest.raises(SystemExit, match="expected --models bert-large or bert-large-half with hf"):
        training_step.parse(["--models", "gpt2", "--attention", "hf_flashattn_unpad"])
    with pytest.raises(SystemExit, match="expected hf_flashattn_flat to compile"):
        options = ["--models", "bert-large", "--attention", "hf_flashattn_unpad"]
        training_step.parse([*options, "--compile", "yes"])


def test_what_was_timed_survives_a_failing_overlay(training_step, tmp_path: Path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_step, "overlay", fail)
    path = tmp_path / "steps.json"
    options = ["--tiny", "--cpu", "--models", "gpt2", "--attention", "sdpa", "--steps", "1"]
    with pytest.raises(KeyboardInterrupt):
        training_step.main([*options, "--warmup", "0", "--overlay-steps", "1", "--json", str(path)])
    (model,) = json.loads(path.read_text())["models"]
    assert model["runs"]["sdpa"]["step_ms"]["median"] > 0


def test_rows_of_bert_have_the_asked_lengths_and_labels_on_real_tokens(script):
    contenders = script("contenders")
    shape = contenders.TINY["bert-large"]
    batch = contenders.random_batch("bert-large", shape, torch.Generator().manual_seed(0))
    lengths = batch["attention_mask"].sum(1)
    assert lengths.min() >= shape.shortest and lengths.max() <= shape.length
    labelled = batch["labels"] != contenders.IGNORED
    assert labelled.any(1).all() and not (labelled & (batch["attention_mask"] == 0)).any()
    assert contenders.real_tokens(batch) == lengths.sum()


def test_overlay_trains_on_the_same_bytes(script, monkeypatch):
    overlay, shape = script("loss_overlay"), script("contenders").TINY["gpt2"]
    monkeypatch.setattr(overlay, "OVERLAID", ("eager", "sdpa"))
    runs = overlay.overlay(shape, 3, 0, torch.device("cpu"))
    assert list(runs) == ["eager", "sdpa", "eager (other seed)"]
    assert all(len(run["losses"]) == 3 for run in runs.values())
    assert runs["sdpa"]["largest_gap_to_eager"] < 0.2


def test_refuses_unknown_names(training_step):
    with pytest.raises(SystemExit, match="expected --models out of gpt2, gpt2-medium, bert-large"):
        training_step.main(["--models", "llama"])


def test_plots_overlay_files(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    plots = load(ROOT / "examples" / "plots.py")
    assert plots.smooth([1.0, 2.0, 3.0, 4.0], share=0.5) == [1.0, 1.5, 2.5, 3.5]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run = {"losses": [3.0, 2.0, 1.5], "step_ms": {"median": 4.0}}
        (tmp_path / name / "results.json").write_text(
            json.dumps({"command": "x", "runs": {"sdpa": run}})
        )
    files = [str(tmp_path / name / "results.json") for name in ("a", "b")]
    assert list(plots.load_runs([Path(file) for file in files])) == ["sdpa", "sdpa (b)"]
    assert plots.main([*files, "--out", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert plots.main([str(tmp_path / "missing.json")]) == 2
    assert "next step" in capsys.readouterr().err
