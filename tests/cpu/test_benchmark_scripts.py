"""memory.py, scaling.py, step_parts.py and training_step.py's contexts, tiny, on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
torch = pytest.importorskip("torch")

from example_helpers import write_documents  # noqa: E402


@pytest.fixture(scope="module")
def script():
    """Imports a script of benchmarks/ by name, as they import each other."""
    sys.path.insert(0, str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    sys.path.remove(str(ROOT / "benchmarks"))


def test_memory_goes_through_contexts_and_draws(script, tmp_path: Path):
    path = tmp_path / "memory.json"
    options = ["--tiny", "--cpu", "--first", "16", "--last", "32", "--attention", "eager", "sdpa"]
    assert script("memory").main([*options, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(r["part"], r["attention"], r["context"]) for r in rows] == [
        (part, attention, context)
        for part in ("body", "whole")
        for attention in ("eager", "sdpa")
        for context in (16, 32)
    ]
    assert all(row["ms"] > 0 and row["peak_gib"] is None for row in rows)
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_memory_stops_where_it_runs_out(script, tmp_path: Path, monkeypatch, capsys):
    memory = script("memory")
    two_steps = memory._two_steps

    def small_card(attention, part, shape, device):
        if attention == "eager" and shape.length > 16:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to\nmore")
        return two_steps(attention, part, shape, device) | {"peak_gib": shape.length / 16}

    monkeypatch.setattr(memory, "_two_steps", small_card)
    path = tmp_path / "memory.json"
    options = ["--tiny", "--cpu", "--first", "16", "--last", "64", "--attention", "eager", "sdpa"]
    assert memory.main([*options, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    eager = [row for row in rows if row["attention"] == "eager"]
    assert [row["context"] for row in eager] == [16, 32] * 2
    assert eager[1]["out_of_memory"] == "CUDA out of memory. Tried to"
    assert len(rows) == 2 * (2 + 3) and "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("last", [0, 1])
def test_contexts_share_the_tokens_and_leave_out_what_does_not_fit(
    script, tmp_path: Path, monkeypatch, capsys, last: int
):
    """`last`: steps that eager makes before the others' optimizer states leave no room for it."""
    training_step = script("training_step")
    step = training_step.Contender.step

    def small_card(self, batch):
        made = len(self.optimizer.state) > 0
        if self.name == "eager" and batch["input_ids"].shape[1] > 16 and made == bool(last):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return step(self, batch)

    monkeypatch.setattr(training_step.Contender, "step", small_card)
    path = tmp_path / "grid.json"
    options = ["--tiny", "--cpu", "--models", "gpt2,gpt2-medium", "--contexts", "16,32"]
    options += ["--tokens", "64", "--attention", "eager,sdpa", "--steps", "1", "--warmup", "0"]
    assert training_step.main([*options, "--json", str(path)]) == 0
    models = json.loads(path.read_text())["models"]
    assert [(m["name"], m["shape"]["batch"], m["shape"]["length"]) for m in models] == [
        (name, 64 // length, length) for name in ("gpt2", "gpt2-medium") for length in (16, 32)
    ]
    assert "step_ms" in models[0]["runs"]["eager"]
    assert models[1]["runs"]["eager"] == {"out_of_memory": "CUDA out of memory."}
    assert models[1]["runs"]["sdpa"]["step_ms"]["median"] > 0
    assert "eager" in capsys.readouterr().out


def test_steps_are_drawn(script, tmp_path: Path):
    pytest.importorskip("matplotlib")
    run = {"tokens_per_second": 1e5}
    runs = {"eager": {"out_of_memory": "CUDA"}, "sdpa": run, "hf_flashattn": run}
    shape = {"batch": 2, "length": 512}
    models = [
        {"name": name, "compile": compiled, "shape": shape, "runs": runs}
        for name, compiled in (("gpt2", False), ("gpt2", True), ("gpt2-medium", True))
    ]
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"device": {"name": "Card"}, "models": models}))
    script("plot_steps").main([str(path)])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


SEEN = ("attention", "MLP GEMMs", "other GEMMs", "output layer", "LayerNorm", "GELU", "loss")


@pytest.mark.parametrize("model", ["gpt2", "bert-large"])
def test_forward_and_backward_of_a_part_are_found(script, model: str):
    """Every operator of a step is in one part, every GEMM of both directions in the right one."""
    parts, contenders = script("step_parts"), script("contenders")
    shape, cpu = contenders.TINY[model], torch.device("cpu")
    current = contenders.contender(model, shape, "sdpa", 0, cpu, False)
    batch = contenders.random_batch(model, shape, torch.Generator().manual_seed(0))
    handles = parts.mark(current.model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        current.model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    events = profiler.events()
    times = parts.time_parts(events, on_gpu=False)
    expected = sum(e.self_cpu_time_total for e in events if not e.name.startswith(parts.MARK))
    assert sum(times.values()) == pytest.approx(expected / 1e3)

    gemms = [
        (event.name, part)
        for event, part in parts.parts_of(events)
        if event.name in ("aten::addmm", "aten::mm")
    ]
    assert {part for _, part in gemms} == {"MLP GEMMs", "other GEMMs", "output layer"}
    # Two in the MLP of each layer, and as many products for each of their two gradients.
    assert sum(part == "MLP GEMMs" for _, part in gemms) == 3 * 2 * shape.layers
    assert all(times[part] > 0 for part in SEEN)
    assert times["optimizer"] == 0
    assert not any(module._forward_hooks for module in current.model.modules())


def test_step_parts_writes_and_draws(script, tmp_path: Path):
    path = tmp_path / "parts.json"
    options = ["--tiny", "--cpu", "--models", "gpt2", "--attention", "sdpa", "hf_flashattn"]
    options += ["--steps", "1", "--warmup", "1", "--json", str(path)]
    assert script("step_parts").main(options) == 0
    (model,) = json.loads(path.read_text())["models"]
    for run in model["runs"].values():
        assert run["sum_ms"] == pytest.approx(sum(run["parts_ms"].values()))
        assert run["parts_ms"]["optimizer"] > 0 and run["all_kernels_ms"] is None
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").stat().st_size > 1000


def test_two_processes_are_measured_beside_one_and_continued(script, tmp_path: Path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("evaluate")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    scaling, path = script("scaling"), tmp_path / "scaling.json"
    given = scaling.command
    text = ["--text", str(write_documents(tmp_path)), "--vocab-size", "300"]
    monkeypatch.setattr(scaling, "command", lambda *args: given(*args) + text)
    options = ["--cpu", "--size", "tiny", "--context", "32", "--tokens-per-step", "256"]
    options += ["--curve-steps", "3", "--kinds", "curve", "--cache-dir", str(tmp_path / "cache")]
    options += ["--json", str(path), "--layouts"]
    assert scaling.main([*options, "one"]) == 0
    assert scaling.main([*options, "one", "ddp"]) == 0
    one, two = json.loads(path.read_text())["runs"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["efficiency"] == 1 and two["efficiency"] == pytest.approx(two["speedup"] / 2)
    assert two["gap"]["largest"] < 1e-3 and len(two["losses"]) == 3


def test_a_run_that_fails_is_said_and_others_go_on(script, tmp_path: Path, monkeypatch, capsys):
    scaling = script("scaling")
    monkeypatch.setattr(scaling, "command", lambda *args: [sys.executable, "-c", "exit('no room')"])
    options = ["--cpu", "--layouts", "one", "ddp", "--kinds", "curve"]
    assert scaling.main(options) == 1
    said = capsys.readouterr().err
    assert said.count("no room") == 2 and "expected ddp curve to train" in said


def test_two_gpus_are_needed_for_two_processes(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="expected 2 GPUs; got 1; next step"):
        script("scaling").main([])


def test_flat_batches_have_the_loss_of_padded_ones(script, monkeypatch):
    contenders = script("contenders")
    monkeypatch.setattr(contenders, "DROPOUT", 0.0)
    shape, cpu = contenders.TINY["bert-large-half"], torch.device("cpu")
    batch = contenders.random_batch("bert-large-half", shape, torch.Generator().manual_seed(0))
    losses = []
    for attention in ("eager", contenders.FLAT):
        current = contenders.contender("bert-large-half", shape, attention, 0, cpu, False)
        formed = contenders.to_device(current.form(batch), cpu)
        losses.append([current.step(formed).item() for _ in range(3)])
    flat = contenders.flattened(batch)
    assert flat["input_ids"].shape == (1, contenders.real_tokens(batch))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("multiple", [1, 16, 50, 80])
def test_filled_flat_batches_have_the_same_loss(script, monkeypatch, multiple):
    contenders = script("contenders")
    monkeypatch.setattr(contenders, "DROPOUT", 0.0)
    shape = contenders.TINY["bert-large-half"]
    generator, ends = torch.Generator().manual_seed(0), set()
    current = contenders.contender(
        "bert-large-half", shape, contenders.FLAT, 0, torch.device("cpu"), False
    )
    for _ in range(4):
        batch = contenders.random_batch("bert-large-half", shape, generator)
        flat, filled = contenders.flattened(batch), contenders.flattened(batch, multiple)
        total = filled["input_ids"].shape[1]
        assert total % multiple == 0 and total - flat["input_ids"].shape[1] < multiple
        assert filled["cu_seq_lens_q"][-1] == total
        assert int(filled["cu_seq_lens_q"].diff().max()) <= filled["max_length_q"]
        ends.add(len(filled["cu_seq_lens_q"]))
        with torch.no_grad():
            losses = [current.model(**x).loss.item() for x in (flat, filled)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(ends) == 1  # a graph has as many sequences for every batch


def test_attentions_without_padding_are_left_out_where_they_say_nothing(script):
    training_step = script("training_step")
    unpadded = [training_step.UNPADDED, training_step.FLAT, training_step.GRAPHS]
    for name, compiled, expected in (
        ("bert-large-half", False, unpadded[:2]),
        ("bert-large-half", True, unpadded[1:]),
        ("bert-large-full", False, []),
    ):
        shape = training_step.SHAPES[name]
        assert training_step.attentions_for(shape, compiled, ["eager", *unpadded]) == [
            "eager",
            *expected,
        ]
    assert "attention_mask" not in training_step.random_batch(
        "bert-large-full", training_step.TINY["bert-large-full"], torch.Generator()
    )


def test_nothing_is_begun_after_the_time_limit(script, tmp_path: Path, capsys):
    path = tmp_path / "steps.json"
    options = ["--tiny", "--cpu", "--models", "gpt2", "--steps", "1", "--max-seconds", "-1"]
    assert script("training_step").main([*options, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["models"] == []
    options = ["--tiny", "--cpu", "--parts", "body", "--last", "512", "--max-seconds", "-1"]
    assert script("memory").main(options) == 0
    assert capsys.readouterr().out.count("no time for") == 4
