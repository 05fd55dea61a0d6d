"""benchmarks/context.py on a tiny model, on a CPU: the queue, what it keeps, what it continues."""

from __future__ import annotations

import hashlib
import importlib
import json
import lzma
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("torch")
pytest.importorskip("datasets")
pytest.importorskip("evaluate")

from example_helpers import WORDS  # noqa: E402


@pytest.fixture
def context(monkeypatch):
    """The script, with jobs that take seconds."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = importlib.import_module("context")
    jobs = [
        script.Job("tiny", 32, 0),
        script.Job("tiny", 64, 0),
        script.Job("tiny", 32, 0, "eager"),
    ]
    monkeypatch.setattr(script, "all_jobs", lambda: jobs)
    return script


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As prepare_corpus.py leaves it: 20 documents to train on, 4 held out."""
    folder = tmp_path_factory.mktemp("corpus")
    manifest: dict[str, object] = {"source": "test"}
    for side, numbers in (("train", range(20)), ("held_out", range(20, 24))):
        path = folder / f"{side}.jsonl.xz"
        with lzma.open(path, "wt") as file:
            for number in numbers:
                words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(400)]
                row = {"name": str(number), "text": " ".join(words)}
                file.write(json.dumps(row) + "\n")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest[side] = {"file": path.name, "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def options(corpus: Path, tmp_path: Path, *more: str) -> list[str]:
    given = ["--corpus", corpus, "--tokenizer", "corpus", "--cpu", "--no-compile"]
    given += ["--tokens", 512, "--tokens-per-step", 128, "--eager-steps", 2]
    given += ["--window", 64, "--eval-blocks", 4, "--runs", tmp_path / "runs"]
    given += ["--cache-dir", tmp_path / "cache", "--json", tmp_path / "context.json", *more]
    return list(map(str, given))


def test_contexts_train_on_equal_tokens_and_are_continued(context, corpus, tmp_path, capsys):
    assert context.main(options(corpus, tmp_path, "--jobs", "tiny-32-0,eager-*")) == 0
    first = json.loads((tmp_path / "context.json").read_text())["jobs"]
    assert [entry["name"] for entry in first] == ["tiny-32-0", "eager-32-0"]
    (tmp_path / "runs").rename(tmp_path / "lost")  # a machine that keeps nothing but the JSON

    assert context.main(options(corpus, tmp_path)) == 0
    jobs = json.loads((tmp_path / "context.json").read_text())["jobs"]
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["tiny-64-0"]
    short, long, eager = jobs
    assert (short, eager) == tuple(first)
    assert short["steps"] == long["steps"] == 4 and eager["steps"] == 2
    assert short["tokens"] == long["tokens"] == 512
    assert short["held_out_tokens"] == long["held_out_tokens"] == 4 * 64
    for entry in (short, long):
        assert len(entry["losses"]) == 4 and entry["losses_every"] == 1
        assert [row["to"] for row in entry["by_window_position"]][-1] == 64
        assert entry["perplexity"] > 1 and entry["wall_seconds"] > entry["training_seconds"]
        assert sum(entry["ran_on"].values()) == 2
    assert eager["ran_on"] is None and eager["attention"] == "eager"
    assert "3 of 3 jobs done" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "context.png").stat().st_size > 1000


def test_no_job_is_started_that_does_not_fit(context, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(context.Queue, "expected", lambda queue, job: job.context)
    assert context.main(options(corpus, tmp_path, "--max-seconds", "40", "--jobs", "tiny*")) == 0
    jobs = json.loads((tmp_path / "context.json").read_text())["jobs"]
    assert [entry["name"] for entry in jobs] == ["tiny-32-0"]
    assert "no time for tiny-64-0" in capsys.readouterr().out


def test_a_job_that_was_stopped_goes_on_from_its_checkpoint(context, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(context, "SAVE_EVERY", 2)
    monkeypatch.setattr(context.shutil, "rmtree", lambda folder: None)
    given = options(corpus, tmp_path, "--jobs", "tiny-32-0")
    assert context.main(given) == 0
    (whole,) = json.loads((tmp_path / "context.json").read_text())["jobs"]
    folder = tmp_path / "runs" / "tiny-32-0"  # as if it had been stopped after the third step
    for path in (tmp_path / "context.json", folder / "results.json", folder / "seconds.json"):
        path.unlink()
    (last,) = folder.glob("checkpoint-*4")
    last.rename(tmp_path / "lost")
    monkeypatch.undo()
    monkeypatch.setattr(context, "all_jobs", lambda: [context.Job("tiny", 32, 0)])
    assert context.main(given) == 0
    (resumed,) = json.loads((tmp_path / "context.json").read_text())["jobs"]
    assert (whole["resumed_at"], resumed["resumed_at"]) == (0, 2)
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert sorted(path.name for path in folder.iterdir()) == [
        "losses.png",
        "results.json",
        "seconds.json",
    ]


def test_a_job_that_fails_is_named(context, corpus, tmp_path, capsys):
    given = options(corpus, tmp_path, "--jobs", "tiny-32-0", "--window", "65")
    assert context.main(given) == 1
    assert "tiny-32-0" in capsys.readouterr().out
    assert "--eval-window" in (tmp_path / "runs" / "tiny-32-0.log").read_text()
    assert not (tmp_path / "context.json").exists()


def test_files_of_several_calls_are_merged(context, tmp_path, capsys):
    def entry(seed: int, context: int) -> dict:
        places = [{"from": 0, "to": context, "nll": 1.0, "tokens": context}]
        return {
            "name": f"tiny-{context}-{seed}",
            "model": "tiny",
            "attention": "hf_flashattn",
            "context": context,
            "perplexity": 3.0,
            "tokens": 512,
            "by_window_position": places,
            "device": {"name": "Card"},
            "versions": {},
        }

    a, b, both = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "both.json"
    a.write_text(json.dumps({"jobs": [entry(0, 64)]}))
    b.write_text(json.dumps({"jobs": [entry(0, 64), entry(0, 32)]}))
    assert context.main(["--merge", str(a), str(b), "--json", str(both)]) == 0
    result = json.loads(both.read_text())
    assert result["jobs"] == [entry(0, 32), entry(0, 64)]
    assert "--tokens 512 --jobs tiny-64-0,tiny-32-0" in result["command"]

    b.write_text(json.dumps({"jobs": [entry(0, 64) | {"perplexity": 4.0}]}))
    with pytest.raises(SystemExit, match="expected one entry of tiny-64-0"):
        context.main(["--merge", str(a), str(b), "--json", str(both)])
    b.write_text(json.dumps({"jobs": [entry(0, 32) | {"tokens": 64}]}))
    with pytest.raises(SystemExit, match="as many tokens each"):
        context.main(["--merge", str(a), str(b), "--json", str(both)])
    with pytest.raises(SystemExit):
        context.main(["--json", str(both)])
    assert "expected --corpus" in capsys.readouterr().err


def test_jobs_must_match(context, corpus, tmp_path):
    with pytest.raises(SystemExit, match="expected --jobs to match some of tiny-32-0"):
        context.main(options(corpus, tmp_path, "--jobs", "huge*"))


def test_every_context_has_as_many_steps(monkeypatch):
    """Of the list as it is: the options of train_gpt2.py make of it the same steps and rates."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    script = importlib.import_module("context")
    gpt2_options = importlib.import_module("lm.gpt2_options")
    args = script.parse(["--corpus", "corpus", "--cpu"])
    found = set()
    for job in script.all_jobs():
        given = gpt2_options.parse(job.command(args, Path("out"))[2:])
        recipe = gpt2_options.recipe_of(given)
        rates = tuple(recipe.learning_rate(step / recipe.steps) for step in range(recipe.steps))
        per_step = recipe.per_step(1) * given.context
        found.add((job.attention, recipe.steps, per_step, rates))
    assert {(attention, steps, n) for attention, steps, n, _ in found} == {
        ("hf_flashattn", 1602, 65536),
        ("eager", 40, 65536),
    }
    assert len(found) == 2 and os.environ.get("WORLD_SIZE") is None
