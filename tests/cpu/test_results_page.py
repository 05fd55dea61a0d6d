"""benchmarks/RESULTS.md is what docs/results.py makes of the JSON files, and of nothing else."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_page", ROOT / "docs" / "results.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["results_page"] = module
    spec.loader.exec_module(module)
    return module


def write(folder: Path, name: str, **content: object) -> None:
    head = {
        "command": f"x.py --json {name}",
        "device": {"name": "Card"},
        "versions": {"torch": "2.11"},
    }
    (folder / name).write_text(json.dumps(head | content))


def row(page: str, claim: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {claim}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_current(results):
    assert results.PAGE.read_text() == results.page(results.RESULTS), "run: python docs/results.py"


def test_without_files_nothing_was_run(results, tmp_path: Path):
    page = results.page(tmp_path)
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(results.ROWS)
    assert all(f"| {results.NOT_RUN} |" in line for line in rows)


def test_numbers_are_those_of_the_files(results, tmp_path: Path):
    def step(ms: float) -> dict:
        return {"step_ms": {"median": ms}}

    def model(name: str, length: int, **runs: dict) -> dict:
        shape = {"batch": 4, "length": length}
        return {"name": name, "compile": False, "shape": shape, "runs": runs}

    full = {"out_of_memory": "CUDA out of memory"}
    write(
        tmp_path,
        "gpt2_grid.json",
        models=[
            model("gpt2", 512, eager=step(30.0), sdpa=step(12.0), hf_flashattn=step(10.0)),
            model("gpt2", 8192, sdpa=step(24.0), hf_flashattn=step(16.0), eager=full),
        ],
    )
    unpadded = {"eager": step(20.0), "hf_flashattn": step(10.0), "hf_flashattn_unpad": step(5.0)}
    write(tmp_path, "bert_large.json", models=[model("bert-large", 512, **unpadded)])
    half = [model("bert-large-half", 512, eager=step(40.0)), model("bert-large-half", 512)]
    half[1] |= {
        "compile": True,
        "runs": {"sdpa": step(20.0), "hf_flashattn_flat": step(10.0), "eager": full},
    }
    write(tmp_path, "bert_large_compiled.json", models=half)

    def job(name: str, perplexity: float, attention: str = "hf_flashattn", speed: float = 50.0):
        return {
            "model": name,
            "attention": attention,
            "context": 1024,
            "perplexity": perplexity,
            "tokens": 1000,
            "tokens_per_second": speed,
        }

    jobs = [job("mini", perplexity) for perplexity in (4.0, 5.0, 6.0)]
    jobs += [job("gpt2", 3.0), job("gpt2", 0.0, "eager", 10.0)]
    write(tmp_path, "context_start.json", jobs=jobs)
    runs = [
        {"layout": "one", "kind": "speed", "processes": 1, "speedup": 1.0, "gap": {}},
        {"layout": "ddp", "kind": "speed", "processes": 2, "speedup": 1.95, "gap": {}},
        {
            "layout": "fsdp",
            "kind": "curve",
            "processes": 2,
            "losses": [1.0, 2.0],
            "gap": {"mean": 1e-4, "largest": 2e-3},
        },
    ]
    write(tmp_path, "scaling.json", runs=runs)
    write(
        tmp_path,
        "memory.json",
        rows=[
            {"attention": "eager", "part": "body", "context": 512, "peak_gib": 1.0},
            {"attention": "eager", "part": "body", "context": 1024, "peak_gib": 3.5},
            {"attention": "eager", "part": "body", "context": 2048, "out_of_memory": "CUDA"},
            {"attention": "eager", "part": "whole", "context": 512, "peak_gib": 9.0},
        ],
    )
    page = results.page(tmp_path)
    _, ours, where, command, link = row(page, "the same at contexts of 512 to 8k")
    assert ours == (
        "4 x 512: 10.0 ms, x eager 3.00, x sdpa 1.20<br>"
        "4 x 8192: 16.0 ms, x sdpa 1.50, x eager out of memory<br>not run: 2048, 4096"
    )
    assert where == "Card, torch 2.11" and command == "`python x.py --json gpt2_grid.json`"
    assert link == "[gpt2_grid](results/gpt2_grid.json)"
    assert row(page, "GPT-2 medium")[1] == results.NOT_RUN  # the file has none
    assert "4 x 512 (unpad): 5.0 ms, x eager 4.00" in row(page, "BERT-large trains")[1]
    assert row(page, "(BERT-large with half of its places padding, under")[1] == (
        "4 x 512 (flat): 10.0 ms, x sdpa 2.00, x eager out of memory, x eager not compiled 4.00"
    )
    assert row(page, "GPT-2 small with 4 times")[1] == (
        "gpt2, context 1024: 3.000 after 0.0 M tokens, 1 seed(s), 20 s (eager at 1k: 100 s)<br>"
        "mini, context 1024: 5.000 +- 1.000 after 0.0 M tokens, 3 seed(s), 20 s"
    )
    assert row(page, "(data-parallel")[1] == (
        "ddp, 2 GPUs: x 1.95<br>fsdp, 2 GPUs: 2 steps, gap to one GPU 1.0e-04 nats, at most 2.0e-03"
    )
    assert row(page, "memory linear")[1] == (
        "eager: 1024 tokens in 3.5 GiB, last doubling x 3.50, out of memory at 2048"
    )


def test_worse_perplexity_of_longer_contexts_is_said(results, tmp_path: Path):
    def jobs(*perplexities: float) -> list[dict]:
        common = {
            "model": "mini",
            "attention": "hf_flashattn",
            "tokens": 10,
            "tokens_per_second": 1,
        }
        return [
            common | {"context": 1024 * 2**number, "perplexity": perplexity}
            for number, perplexity in enumerate(perplexities)
        ]

    write(tmp_path, "context.json", jobs=jobs(3.0, 4.0))
    claim = "(the same from scratch"
    assert row(results.page(tmp_path), claim)[1].startswith("**not reproduced**")
    write(tmp_path, "context.json", jobs=jobs(3.0, 2.0, 4.0))
    assert "not reproduced" not in row(results.page(tmp_path), claim)[1]


def test_seconds_of_a_context_are_its_own_and_its_start_s(results, tmp_path: Path):
    job = {"model": "mini", "attention": "hf_flashattn", "context": 8192, "perplexity": 3.0}
    job |= {"tokens": 4_000_000, "tokens_per_second": 10_000}
    job["start"] = {"tokens": 3_000_000, "tokens_per_second": 20_000, "context": 1024}
    write(tmp_path, "context_start.json", jobs=[job])
    assert row(results.page(tmp_path), "GPT-2 small with 4 times")[1] == (
        "mini, context 8192: 3.000 after 4.0 M tokens (3.0 M of them at 1024), 1 seed(s), 250 s"
    )


def test_files_are_named_only_where_they_say_something(results, tmp_path: Path, monkeypatch):
    runs = {name: {"step_ms": {"median": 1.0}} for name in ("eager", "hf_flashattn")}
    shape = {"batch": 4, "length": 1024}
    for size, model in (("small", "gpt2"), ("medium", "gpt2-medium")):
        entry = {"name": model, "compile": False, "shape": shape, "runs": runs}
        write(tmp_path, f"gpt2_grid_{size}.json", models=[entry], versions={"hf_flashattn": "1.0"})
    small = (tmp_path / "gpt2_grid_small.json").read_bytes()
    digest = hashlib.sha256(small).hexdigest()[:8]
    monkeypatch.setattr(
        results, "OLDER", {"gpt2_grid_small": digest, "gpt2_grid_medium": "another"}
    )
    page = results.page(tmp_path)
    _, _, where, _, link = row(page, "GPT-2 small trains")
    assert where == "Card, hf_flashattn 1.0"
    assert link == "[gpt2_grid_small](results/gpt2_grid_small.json) (older)"
    assert row(page, "GPT-2 medium")[4] == "[gpt2_grid_medium](results/gpt2_grid_medium.json)"


@pytest.mark.parametrize("content", ["{", '{"rows": [{}]}'])
def test_a_file_of_another_kind_is_an_error(results, tmp_path: Path, content, capsys):
    (tmp_path / "memory.json").write_text(content)
    page = tmp_path / "page.md"
    assert results.main(["--results", str(tmp_path), "--output", str(page)]) == 2
    assert "memory.py" in capsys.readouterr().err and not page.exists()
