"""The command line of examples/train_gpt2.py from end to end, and everything it must refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

torch = pytest.importorskip("torch")
pytest.importorskip("datasets")
pytest.importorskip("evaluate")

import train_gpt2  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from example_helpers import WORDS, refused, results, write_documents  # noqa: E402
from lm.gpt2 import ShiftedPositions  # noqa: E402
from lm.training import train  # noqa: E402


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Calls the command line with a tiny model; later options win over these."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--tiny-test"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(output: Path, *options: object) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        base = [
            "--cpu",
            "--text",
            text,
            "--size",
            "tiny",
            "--layers",
            2,
            "--context",
            32,
            "--vocab-size",
            300,
            "--batch-size",
            2,
            "--steps",
            6,
            "--eval-blocks",
            4,
            "--held-out",
            0.2,
            "--cache-dir",
            cache,
            "--output",
            output,
            "--attention",
            "sdpa",
        ]
        return train_gpt2.main([str(option) for option in [*base, *options]])

    yield call
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def _watched(seen: list):
    """`train` that keeps the weights it begins with."""

    def watched(trainee, *rest):
        seen.append({n: w.detach().clone() for n, w in trainee.model.named_parameters()})
        return train(trainee, *rest)

    return watched


def test_a_run_lowers_the_loss_and_leaves_its_results(run, tmp_path: Path):
    assert run(tmp_path / "out", "--steps", 60, "--lr", 5e-3, "--eval-every", 30) == 0
    result = results(tmp_path / "out")
    trained = result["runs"]["sdpa"]
    assert len(trained["losses"]) == trained["steps"] == 60
    assert trained["losses"][-1] < 0.7 * trained["losses"][0]
    assert [p["step"] for p in trained["perplexities"]] == [0, 30, 60]
    assert trained["perplexities"][-1]["perplexity"] < trained["perplexities"][0]["perplexity"]
    assert trained["tokens_per_second"] > 0
    assert result["versions"]["torch"] and result["settings"]["seed"] == 0
    assert (tmp_path / "out" / "losses.png").stat().st_size > 1000
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_resume_reaches_the_same_loss(run, tmp_path: Path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = ("--accumulate", 2, "--save-every", 3, "--dropout", 0.2)
    assert run(whole, *options) == 0
    assert run(halves, *options) == 0
    last = halves / "checkpoint-0000006"
    last.rename(tmp_path / "lost")
    assert run(halves, *options, "--resume") == 0
    expected, got = (results(folder)["runs"]["sdpa"] for folder in (whole, halves))
    assert got["resumed_at"] == 3
    assert got["losses"] == expected["losses"]
    assert got["perplexities"] == expected["perplexities"]


def test_a_run_begins_from_a_saved_model_with_more_positions(run, tmp_path: Path, monkeypatch):
    start, more = tmp_path / "start", tmp_path / "more"
    options = ("--lr", 5e-3, "--eval-window", 64, "--schedule", "wsd", "--tokens", 1280)
    assert run(start, *options, "--decay", 0, "--first-token", 0) == 0
    ended = results(start)["runs"]["sdpa"]["perplexities"][-1]
    options += ("--init-from", start / "model", "--first-token", 1280, "--decay", 1)
    seen = []
    monkeypatch.setattr(train_gpt2, "train", _watched(seen))
    assert run(tmp_path / "same", *options) == 0
    assert run(more, *options, "--context", 64) == 0
    same, longer = (results(tmp_path / name)["runs"]["sdpa"] for name in ("same", "more"))
    assert same["perplexities"][0]["perplexity"] == pytest.approx(ended["perplexity"], rel=1e-6)
    assert longer["perplexities"][0]["by_position"][0]["tokens"] == 4 * 64
    positions = seen[1]["transformer.wpe.weight"]
    assert positions.shape[0] == 64 and torch.equal(positions[:32], positions[32:])
    assert torch.equal(positions[:32], seen[0]["transformer.wpe.weight"])
    assert results(more)["settings"]["init_from"] == str(start / "model")


def test_a_short_context_trains_the_positions_of_a_longer_one(run, tmp_path: Path, monkeypatch):
    start, seen = tmp_path / "start", []
    monkeypatch.setattr(train_gpt2, "train", _watched(seen))
    assert run(start, "--positions", 128, "--lr", 1e-2, "--steps", 40) == 0
    assert run(tmp_path / "more", "--context", 128, "--init-from", start / "model") == 0
    assert run(tmp_path / "same", "--init-from", start / "model") == 0
    before, more, same = (weights["transformer.wpe.weight"] for weights in seen)
    moved = (more - before).norm(dim=1)[:-1]  # the last one of all predicts nothing
    assert before.shape[0] == 128 and moved.min() > 0.1 * moved.max()
    assert torch.equal(same, more[:32])
    ended, begins = (results(tmp_path / name)["runs"]["sdpa"] for name in ("start", "same"))
    assert begins["perplexities"][0]["perplexity"] == pytest.approx(
        ended["perplexities"][-1]["perplexity"], rel=1e-6
    )


def test_positions_of_a_batch_are_next_to_each_other_and_all_are_seen():
    table = ShiftedPositions.from_pretrained(torch.arange(10.0)[:, None])
    compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    firsts = []
    for _ in range(300):
        found = compiled(torch.arange(4)[None]).flatten()
        assert torch.equal(found, found[0] + torch.arange(4.0))
        firsts.append(int(found[0]))
    counts = [firsts.count(first) for first in range(7)]
    assert sum(counts) == 300 and min(counts) > 10 and counts[0] > counts[3]
    assert table.eval()(torch.arange(4)).flatten().tolist() == [0, 1, 2, 3]


def test_compared_attentions_begin_from_the_same_saved_model(run, tmp_path: Path):
    start = tmp_path / "start"
    assert run(start, "--lr", 5e-3, "--steps", 40) == 0
    options = ("--init-from", start / "model", "--compare", "eager,sdpa")
    assert run(tmp_path / "both", *options) == 0
    runs = results(tmp_path / "both")["runs"]
    assert runs["eager"]["losses"] == pytest.approx(runs["sdpa"]["losses"], rel=1e-4)
    assert runs["sdpa"]["losses"][0] < 0.8 * results(start)["runs"]["sdpa"]["losses"][0]


def test_a_checkpoint_wins_over_the_model_it_began_from(run, tmp_path: Path):
    start, out = tmp_path / "start", tmp_path / "out"
    assert run(start) == 0
    options = ("--save-every", 3, "--init-from", start / "model")
    assert run(out, *options) == 0
    expected = results(out)["runs"]["sdpa"]["losses"]
    (out / "checkpoint-0000006").rename(tmp_path / "lost")
    (start / "model").rename(tmp_path / "gone")
    assert run(out, *options, "--resume") == 0
    assert results(out)["runs"]["sdpa"]["losses"] == expected


def test_refuses_models_that_do_not_fit(run, tmp_path: Path, capsys):
    start, out = tmp_path / "start", tmp_path / "out"
    assert run(start, "--steps", 2) == 0
    model, before = start / "model", results(start)
    capsys.readouterr()

    def message(*options: object) -> str:
        code = run(start, "--overwrite", "--init-from", model, *options)
        assert results(start) == before  # nothing is overwritten
        return refused(capsys, code)

    assert "no such folder" in refused(capsys, run(out, "--init-from", tmp_path / "no"))
    assert "layers=2" in message("--layers", 3) and "hidden=64" in message("--hidden", 128)
    assert "vocabulary=300" in message("--vocab-size", 280)
    entries = json.loads((model / "tokenizer.json").read_text())
    entries["model"]["vocab"]["~~"] = entries["model"]["vocab"].pop("~")
    whole = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(json.dumps(entries))
    assert f"--tokenizer {model}" in message()
    (model / "tokenizer.json").write_text(whole)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:1000])
    assert "the weights of a GPT-2" in message()
    (model / "config.json").write_text('{"model_type": "bert"}')
    assert "a model of type bert" in message()
    (model / "config.json").unlink()
    assert f"a saved GPT-2 in {model}" in message()
    assert not out.exists()


def test_comparison_writes_ratios_and_a_plot(run, tmp_path: Path):
    assert run(tmp_path / "out", "--compare", "eager,sdpa", "--dropout", 0) == 0
    result = results(tmp_path / "out")
    eager, sdpa = result["runs"]["eager"], result["runs"]["sdpa"]
    assert eager["losses"] == pytest.approx(sdpa["losses"], rel=1e-4)
    assert result["ratios"]["eager"]["sdpa"] == pytest.approx(
        sdpa["step_ms"]["median"] / eager["step_ms"]["median"]
    )
    assert (tmp_path / "out" / "losses.png").stat().st_size > 1000


def test_without_matplotlib_the_results_are_kept(run, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tmp_path / "out", "--steps", 2) == 0
    assert results(tmp_path / "out")["plot"].startswith("skipped: ")
    assert not (tmp_path / "out" / "losses.png").exists()


def test_hf_flashattn_trains_and_reports(run, tmp_path: Path, capsys):
    hf_flashattn = pytest.importorskip("hf_flashattn")
    assert hasattr(hf_flashattn, "patch_model")
    assert run(tmp_path / "own", "--attention", "hf_flashattn", "--dropout", 0) == 0
    report = results(tmp_path / "own")["runs"]["hf_flashattn"]["attention_report"]["table"]
    assert report in capsys.readouterr().out
    assert run(tmp_path / "sdpa", "--dropout", 0) == 0
    own, sdpa = (results(tmp_path / name)["runs"] for name in ("own", "sdpa"))
    assert own["hf_flashattn"]["losses"] == pytest.approx(sdpa["sdpa"]["losses"], rel=1e-4)


def test_a_time_limit_ends_the_run(run, tmp_path: Path, capsys):
    assert run(tmp_path / "out", "--steps", 10**6, "--max-seconds", 0.5) == 0
    assert "the time limit of 0.5 s" in capsys.readouterr().out
    assert 0 < results(tmp_path / "out")["runs"]["sdpa"]["steps"] < 10**6


def test_the_standard_library_is_the_default_text(run, tmp_path: Path, cache: Path):
    AcceleratorState._reset_state(reset_partial_state=True)
    options = [
        "--cpu",
        "--size",
        "tiny",
        "--attention",
        "sdpa",
        "--max-bytes",
        "300000",
        "--context",
        "64",
        "--vocab-size",
        "400",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--eval-blocks",
        "2",
        "--cache-dir",
        str(cache),
        "--output",
        str(tmp_path / "out"),
    ]
    assert train_gpt2.main(options) == 0
    assert "standard library" in results(tmp_path / "out")["corpus"]["source"]


def test_a_data_set_by_name(run, tmp_path: Path, cache: Path):
    """`load_dataset` takes a folder where it takes a hub name."""
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"body": " ".join(WORDS * 20) + f" {i}"} for i in range(30)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    AcceleratorState._reset_state(reset_partial_state=True)
    options = [
        "--cpu",
        "--dataset",
        str(folder),
        "--text-column",
        "body",
        "--size",
        "tiny",
        "--attention",
        "sdpa",
        "--context",
        "32",
        "--vocab-size",
        "300",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--eval-blocks",
        "2",
        "--cache-dir",
        str(cache),
    ]
    assert train_gpt2.main([*options, "--output", str(tmp_path / "out")]) == 0
    assert results(tmp_path / "out")["corpus"]["train_documents"] > 20


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--text", "no/such/file.txt"), "no/such/file.txt"),
        (("--glob", "**/*.zig"), "a corpus with text"),
        (("--context", 100000), "--context 100000"),
        (("--attention", "hf_flashatn"), "did you mean 'hf_flashattn'?"),
        (("--compare", "eager,flash"), "'flash'"),
        (("--compare", "eager"), "two or more"),
        (("--hidden", 100, "--heads", 3), "multiple of the number of heads"),
        (("--tokenizer", "no/such/tokenizer"), "no/such/tokenizer"),
        (("--dropout", 1.5), "--dropout"),
        (("--steps", 0), "--steps"),
        (("--mixed-precision", "fp16"), "on a CPU"),
        (("--resume",), "a checkpoint in"),
        (("--positions", 16), "at least --context 32 for --positions"),
        (("--decay", 0.1), "--schedule cosine"),
        (("--schedule", "wsd", "--decay", 2), "a share from 0 to 1 for --decay"),
        (("--first-token", 64), "--first-token 64 alone"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value)),
)
def test_refuses(run, tmp_path: Path, capsys, options, expected):
    code = run(tmp_path / "out", *options)
    assert expected in refused(capsys, code)
    assert not (tmp_path / "out").exists()


def test_refuses_an_empty_corpus(run, tmp_path: Path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    code = run(tmp_path / "out", "--text", tmp_path)
    assert "2 files without text" in refused(capsys, code)


def test_refuses_a_data_set_that_is_not_there(run, tmp_path: Path, cache: Path, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    code = train_gpt2.main(
        [
            "--cpu",
            "--dataset",
            "no-such/data-set",
            "--attention",
            "sdpa",
            "--cache-dir",
            str(cache),
            "--output",
            str(tmp_path / "out"),
        ]
    )
    assert "no-such/data-set" in refused(capsys, code)


def test_refuses_to_overwrite(run, tmp_path: Path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    code = run(out)
    assert "new or empty" in refused(capsys, code)
    assert run(out, "--overwrite", "--steps", 2) == 0
    assert (out / "precious.txt").read_text() == "mine"


def test_refuses_checkpoints_that_do_not_fit(run, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert run(out, "--save-every", 3) == 0
    before = results(out)
    capsys.readouterr()

    assert "a checkpoint at step 6" in refused(capsys, run(out, "--resume"))
    message = refused(capsys, run(out, "--resume", "--steps", 9, "--seed", 1))
    assert "seed=0" in message and "seed=1" in message

    weights = out / "checkpoint-0000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-10] ^= 1
    weights.write_bytes(content)
    message = refused(capsys, run(out, "--resume", "--steps", 9))
    assert "damaged" in message and "checkpoint-0000003" in message

    (out / "checkpoint-0000006" / "checkpoint.json").write_text("{")
    assert "a complete checkpoint" in refused(capsys, run(out, "--resume", "--steps", 9))
    assert results(out) == before
    previous = out / "checkpoint-0000003"
    assert run(out, "--resume", previous, "--steps", 9) == 0
    assert results(out)["runs"]["sdpa"]["resumed_at"] == 3


def test_the_script_exits_with_2_and_no_traceback(tmp_path: Path):
    command = [
        sys.executable,
        str(EXAMPLES / "train_gpt2.py"),
        "--text",
        "missing.txt",
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "missing.txt" in done.stderr and "Traceback" not in done.stderr
