"""benchmarks/context.py on a tiny model, on a CPU: the queue, what it keeps, what it continues."""

from __future__ import annotations

import hashlib
import importlib
import json
import lzma
import os
import time
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
    monkeypatch.setattr(script, "all_jobs", lambda args: jobs)
    return script


@pytest.fixture
def shared_start(context, monkeypatch):
    """The script with the jobs that it makes, of two seeds."""
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(context.SEEDS, "tiny", (0, 1))
    return context


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
    given += ["--cache-dir", tmp_path / "cache", "--json", tmp_path / "context.json"]
    given += ["--models", "tiny", "--contexts", "32,64", "--start-share", 0, *more]
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
    assert "no time or no start for tiny-64-0" in capsys.readouterr().out


def test_a_job_that_was_stopped_goes_on_from_its_checkpoint(context, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(context, "SAVE_EVERY", 2)
    monkeypatch.setattr(context.shutil, "rmtree", lambda folder, **_: None)
    given = options(corpus, tmp_path, "--jobs", "tiny-32-0")
    assert context.main(given) == 0
    (whole,) = json.loads((tmp_path / "context.json").read_text())["jobs"]
    folder = tmp_path / "runs" / "tiny-32-0"  # as if it had been stopped in the fourth step
    for path in (tmp_path / "context.json", folder / "results.json", folder / "seconds.json"):
        path.unlink()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-0000003"]
    monkeypatch.undo()
    monkeypatch.setattr(context, "all_jobs", lambda args: [context.Job("tiny", 32, 0)])
    assert context.main(given) == 0
    (resumed,) = json.loads((tmp_path / "context.json").read_text())["jobs"]
    assert (whole["resumed_at"], resumed["resumed_at"]) == (0, 3)
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
    assert "--tokens 512 --start-share 0 --jobs tiny-64-0,tiny-32-0" in result["command"]
    assert result["command"].endswith("--json benchmarks/results/both.json")

    b.write_text(json.dumps({"jobs": [entry(0, 64) | {"perplexity": 4.0}]}))
    with pytest.raises(SystemExit, match="expected one entry of tiny-64-0"):
        context.main(["--merge", str(a), str(b), "--json", str(both)])
    b.write_text(json.dumps({"jobs": [entry(0, 32) | {"tokens": 64}]}))
    with pytest.raises(SystemExit, match="as many tokens each"):
        context.main(["--merge", str(a), str(b), "--json", str(both)])
    b.write_text(json.dumps({"jobs": [entry(0, 32) | {"start": {"tokens": 384, "share": 0.75}}]}))
    with pytest.raises(SystemExit, match="as many of them at the start"):
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

    def found(*options: str) -> dict[tuple, tuple]:
        args = script.parse(["--corpus", "corpus", "--cpu", *options])
        kinds = {}
        for job in script.all_jobs(args):
            given = gpt2_options.parse(job.command(args)[2:])
            recipe = gpt2_options.recipe_of(given)
            rates = tuple(recipe.learning_rate(step / recipe.steps) for step in range(recipe.steps))
            per_step = recipe.per_step(1) * given.context
            kind = job.attention, "start" if job.begins else "rest"
            this = (recipe.steps, per_step, given.first_token, rates)
            assert kinds.setdefault(kind, this) == this  # of every context, model and seed
        return kinds

    kinds = found("--start-share", "0")
    assert {kind: this[:3] for kind, this in kinds.items()} == {
        ("hf_flashattn", "rest"): (1602, 65536, None),
        ("eager", "rest"): (40, 65536, None),
    }
    kinds = found()
    *start, start_rates = kinds["hf_flashattn", "start"]
    *rest, rest_rates = kinds["hf_flashattn", "rest"]
    assert start == [1202, 65536, 0] and rest == [400, 65536, 1202 * 65536]
    assert start_rates[-1] == max(start_rates) == max(rest_rates) == script.LR
    assert rest_rates[8] == script.LR and rest_rates[-1] < 0.01 * script.LR
    assert os.environ.get("WORLD_SIZE") is None


def test_contexts_continue_one_start(shared_start, corpus, tmp_path, capsys):
    context, runs = shared_start, tmp_path / "runs"
    given = options(corpus, tmp_path, "--start-share", "0.75", "--jobs", "tiny-*-0")
    given[given.index("--tokens") + 1] = "1024"
    assert context.main([*given, "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["tiny-start-0", "tiny-64-0", "tiny-32-0"]

    assert context.main([*given, "--jobs", "tiny-64-0"]) == 0
    assert (runs / "tiny-start-0" / "model" / "config.json").is_file()
    assert context.main([*given, "--list"]) == 0  # its start is there, what continues it is not
    assert capsys.readouterr().out.splitlines()[-1].startswith("tiny-32-0")
    assert context.main(given) == 0
    assert not (runs / "tiny-start-0" / "model").exists()
    long, short = json.loads((tmp_path / "context.json").read_text())["jobs"]
    assert (long["name"], short["name"]) == ("tiny-64-0", "tiny-32-0")
    assert long["start"] == short["start"] and short["start"]["share"] == 0.75
    for entry in (short, long):
        assert (entry["tokens"], entry["steps"], entry["start"]["tokens"]) == (1024, 2, 768)
        assert entry["start"]["wall_seconds"] > entry["start"]["training_seconds"] > 0
        assert [row["step"] for row in entry["perplexities"]] == [0, 2]
    begins = short["perplexities"][0]["perplexity"]
    assert begins == pytest.approx(short["start"]["perplexity"], rel=1e-6)
    assert "2 of 4 jobs done" in capsys.readouterr().out

    wanted = "expected tiny-start-0 with 1536 own tokens; got 768 own tokens in .*runs.tiny-start-0"
    with pytest.raises(SystemExit, match=wanted):
        context.main([*given, "--tokens", "2048"])
    runs.rename(tmp_path / "lost")
    wanted = "expected tiny-64-0 with 512 tokens of the start, 512 own tokens; got 768 .*context"
    with pytest.raises(SystemExit, match=wanted):
        context.main([*given, "--start-share", "0.5"])
    with pytest.raises(SystemExit, match="64 positions at the start; got 32 positions"):
        context.main([*given, "--shift-positions"])
    assert context.main([*given, "--list"]) == 0  # nothing is left to run
    args = context.parse([*given, "--shift-positions", "--jobs", "tiny-start-1"])
    (start,) = context.jobs_to_run(args, {})
    assert "--positions 64" in " ".join(start.command(args))


@pytest.mark.parametrize("fails", [(), ("tiny-start-0",)])
def test_a_continuation_waits_for_its_start(shared_start, corpus, tmp_path, monkeypatch, fails):
    """Two devices: the start of the other seed runs meanwhile; no start, no continuation."""
    args = shared_start.parse(options(corpus, tmp_path, "--start-share", "0.5"))
    began, ended = [], []

    def train(queue, job, device):
        began.append((job.name, set(ended)))
        time.sleep(0.1)
        if job.begins and job.name not in fails:
            (args.runs / job.name / "model").mkdir(parents=True)
            for name in ("results.json", "seconds.json", "model/config.json"):
                (args.runs / job.name / name).touch()
        ended.append(job.name)

    monkeypatch.setattr(shared_start.Queue, "_train", train)
    queue = shared_start.Queue(shared_start.jobs_to_run(args, {}), args, {})
    queue.run([None, None])
    assert [name for name, _ in began[:2]] == ["tiny-start-0", "tiny-start-1"]
    assert not began[1][1]
    for name, before in began[2:]:
        assert f"tiny-start-{name[-1]}" in before
    lost = ["tiny-64-0", "tiny-32-0"] if fails else []
    assert queue.left == lost and len(began) == 6 - len(lost) and not queue.waiting
