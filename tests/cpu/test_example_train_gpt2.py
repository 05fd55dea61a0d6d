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
