"""tools/transformers_tests.py on a source tree of two tests: what it runs, counts and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "transformers_tests.py"

COMMON = """
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from .exporters.test_export import ExportTesterMixin
from .generation.test_utils import GenerationTesterMixin

torch_device = "cpu"
WISH = {wish!r}


class ModelTesterMixin(ExportTesterMixin):
    def flash_attn_inference_equivalence(self, attn_implementation, padding_side):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0]._from_config(
            config, attn_implementation=attn_implementation, dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16 and attn_implementation == "hf_flashattn"
        model(**inputs)

    def flash_attn_can_dispatch_composite_models(self, attn_implementation):
        self.skipTest("not a composite model")

    def flash_attn_from_config(self, attn_implementation):
        assert WISH != "flash fails", "no such luck"

    def test_sdpa_is_ours(self):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__ == "hf_flashattn.attention"
        assert WISH != "sdpa fails", "first line\\nsecond line"

    def test_flash_attn_2_of_its_own(self):
        raise AssertionError("not one of ours to run")

    def test_config_attn_implementation_setter(self):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers.")
"""


def tree(tmp_path, wish=""):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_modeling_common.py").write_text(COMMON.format(wish=wish))
    return tmp_path


def run(*arguments, explained=None):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    if explained is not None:
        setup = f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); sys.argv = {command[1:]!r}"
        command = [sys.executable, "-c", f"{setup}\nimport transformers_tests as t\n"
                   f"t.EXPLAINED |= {explained!r}\nsys.exit(t.main())"]  # fmt: skip
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_counts_and_page(tmp_path):
    out, text = tmp_path / "out.json", tmp_path / "page.md"
    done = run(tree(tmp_path), "--families", "bert", "vit", "--json", out, "--page", text)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    for family in ("bert", "vit"):
        flash, sdpa = (result["families"][family][group] for group in ("flash", "sdpa"))
        assert (flash["passed"], flash["failed"], flash["skipped"]) == (6, 0, 1)
        assert flash["calls_on_the_op"] == 8  # two sides, two dtypes, two layers
        assert (sdpa["passed"], sdpa["failed"], sdpa["skipped"]) == (1, 0, 0)
    assert result["testers"] == "ours"
    page = text.read_text()
    assert "| bert | 6, 0, 1 | 8 | 1, 0, 0 | 0 |" in page and "None." in page
    assert "| not a composite model | 2 |" in page


def test_a_page_of_runs_that_were_apart(tmp_path):
    folder, text = tree(tmp_path, "sdpa fails"), tmp_path / "page.md"
    files = [tmp_path / f"{family}.json" for family in ("vit", "bert")]
    for file in files:
        assert run(folder, "--families", file.stem, "--json", file).returncode == 1
    why = {"*.sdpa.test_sdpa_is_ours": "It rains."}
    done = run("--from", *files, "--page", text, explained=why)
    assert done.returncode == 0, done.stdout + done.stderr
    page = text.read_text()
    assert page.index("| bert | 6, 0, 1 |") < page.index("| vit | 6, 0, 1 |")
    assert page.count("| It rains. |") == 2
    files[1].write_text(files[1].read_text().replace('"device": "CPU"', '"device": "other"'))
    done = run("--from", *files, "--page", text)
    assert done.returncode == 1 and "another device" in done.stderr
    assert "a source tree or --from" in run().stderr


@pytest.mark.parametrize("wish", ["flash fails", "sdpa fails"])
def test_a_failure_needs_an_explanation(tmp_path, wish):
    folder, text = tree(tmp_path, wish), tmp_path / "page.md"
    done = run(folder, "--families", "bert", "--page", text)
    name = "bert.flash.test_flash_from_config" if "flash" in wish else "bert.sdpa.test_sdpa_is_ours"
    assert done.returncode == 1 and f"unexplained failures: {name}" in done.stdout
    assert "**unexplained**" in text.read_text()
    assert ("no such luck" if "flash" in wish else "first line second line") in text.read_text()
    done = run(folder, "--families", "bert", "--page", text, explained={name: "It rains."})
    assert done.returncode == 0 and "| It rains. |" in text.read_text(), done.stdout


def test_an_explanation_of_what_passed_is_named(tmp_path):
    done = run(tree(tmp_path), "--families", "bert", explained={"bert.sdpa.*": "No more."})
    assert done.returncode == 0 and "did not fail here: bert.sdpa.*" in done.stdout


def test_a_checkout_brings_its_own_testers(tmp_path):
    folder, out = tree(tmp_path), tmp_path / "out.json"
    home = folder / "tests" / "models" / "bert"
    home.mkdir(parents=True)
    (home / "test_modeling_bert.py").write_text(
        "import unittest\n"
        "from ...test_modeling_common import ModelTesterMixin\n"
        "class TheirTest(ModelTesterMixin, unittest.TestCase):\n"
        "    def flash_attn_inference_equivalence(self, **options):\n"
        "        self.skipTest('theirs')\n"
    )
    done = run(folder, "--families", "bert", "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["testers"] == "Transformers'"
    assert result["families"]["bert"]["flash"]["skips"]["theirs"] == 4


def test_no_tree(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1 and "test_modeling_common.py, found none" in done.stderr
