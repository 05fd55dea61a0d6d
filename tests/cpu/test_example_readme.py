"""The README keeps its promises: its tables are current, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_support_matrix_is_current(tables):
    text = (ROOT / "README.md").read_text()
    matrix = re.search(r"<!-- support:begin -->\n(.*?)\n<!-- support:end -->", text, re.S)
    assert matrix[1] == tables.support_matrix(), "run: python docs/tables.py"


def test_the_first_screen_says_how_to_start():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("```"))
    assert first < 25
    screen = "\n".join(lines[:25])
    assert all(part in screen for part in ("pip install", "patch_model(model)", "make demo"))


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/training.md",
        "docs/design.md",
        "benchmarks/README.md",
        "benchmarks/RESULTS.md",
    ],
)
def test_links_lead_somewhere(page: str):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{page}: {target}"


def test_measured_tables_are_made_from_json(tables):
    def run(milliseconds: float) -> dict:
        return {"step_ms": {"median": milliseconds}, "peak_memory_gib": 2.0}

    shape = {"batch": 32, "length": 512, "shortest": 1}
    runs = {"eager": run(30.0), "sdpa": run(20.0), "hf_flashattn_unpad": run(10.0)}
    compiled = {"eager": {"out_of_memory": "CUDA"}, "sdpa": run(8.0), "hf_flashattn_flat": run(5.0)}
    steps = {
        "device": {"name": "GPU"},
        "versions": {"torch": "2.11"},
        "command": "benchmarks/training_step.py",
        "dropout": 0.1,
        "models": [
            {"name": "bert-large-half", "shape": shape, "compile": False, "runs": runs},
            {"name": "bert-large-half", "shape": shape, "compile": True, "runs": compiled},
        ],
    }
    table = tables.training_table({"a.json": steps})
    label = "BERT-large, ours unpadded, 32 x 512, lengths 1..512"
    assert f"| {label} | 30.0 (2.0) | 20.0 (2.0) | **10.0 (2.0)** | 3.00 | 2.00 |  |" in table
    assert (
        f"| {label}, compiled | out of memory | 8.0 (2.0) | **5.0 (2.0)** |  | 1.60 | 6.00 |"
        in (table)
    )
    assert table.endswith("fused AdamW; [a](benchmarks/results/a.json).")

    rows = [
        {"head_dim": 64, "causal": False, "dropout": 0.1, "direction": direction, "seqlen": seqlen,
         "tflops": {"ours": 4.0 * seqlen, "cudnn": 1.0 * seqlen}}
        for direction in ("forward", "backward") for seqlen in (64, 128)
    ]  # fmt: skip
    grid = {"device": "GPU", "torch": "2.11", "command": "python x.py", "rows": rows}
    assert "| head dim 64, full, dropout 0.1 | 512 | 4.00 | 512 | 4.00 |" in tables.grid_table(grid)


def test_only_the_text_between_markers_is_replaced(tables):
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    new = tables.replace_between_markers(text, "x", "new")
    assert new == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n"
    assert tables.replace_between_markers(new, "x", "new") == new
    with pytest.raises(ValueError, match="expected one <!-- y:begin -->"):
        tables.replace_between_markers(text, "y", "new")
