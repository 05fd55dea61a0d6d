"""Runs Transformers' own attention tests on our attention; counts, and explains every failure.

    pip download --no-deps --no-binary :all: transformers && tar xf transformers-*.tar.gz
    python tools/transformers_tests.py transformers-5.24.0        # or: make transformers-tests

Two groups for each family:

    flash   the helpers of tests/test_modeling_common.py for flash implementations, under the name
            "hf_flashattn": equal to eager with left and right padding in bf16 and fp16,
            from_config, composite models; and the tests that set implementations
    sdpa    every test with sdpa in its name, with our attention and mask function registered as
            "sdpa" while they run

Transformers itself is the installed one; of the tree only tests/ is used, so versions should agree.
A source distribution has no tests/models: the testers are then those of transformers_testers.py; a
full checkout brings its own. On a machine without a network: the unpacked tree, and wheels of
`parameterized` and `pytest` (and `datasets`, for a full checkout's generation tests).

Families may run apart, at a time: each with a --json of its own, and the page is made of them with
`--from one.json two.json --page FILE`.

On a CPU, tests that need a GPU skip and say so. Exit status 1: a failure that EXPLAINED does not
know, or an entry of it for a test that passed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import importlib
import inspect
import json
import os
import platform
import re
import sys
import types
import unittest
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("RUN_SLOW", "1")  # read when Transformers' test helpers are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers_testers import FAMILIES, make_class

import hf_flashattn
from hf_flashattn import _compat
from hf_flashattn.attention import attention_forward
from hf_flashattn.masks import attention_mask

PAGE = Path(__file__).resolve().parent.parent / "docs" / "transformers_tests.md"

# "family.group.test" as a glob -> why it fails; written by hand, one sentence each.
EXPLAINED: dict[str, str] = {
    "t5.sdpa.test_sdpa_can_dispatch_on_flash": "on a GPU: the test allows PyTorch's flash kernel "
    "alone, which takes no bias, and T5's falls back to SDPA with one",
    "mistral.sdpa.test_sdpa_can_dispatch_on_flash": "on a GPU: the test allows PyTorch's flash "
    "kernel alone, which takes no mask, and the tester's window of 5 falls back to SDPA with one",
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# ---- what to run ---------------------------------------------------------------------------------


def import_common(tree: Path) -> types.ModuleType:
    """tests/test_modeling_common.py of the tree; mixins that the tree lacks are empty."""
    if not (tree / "tests" / "test_modeling_common.py").is_file():
        raise SystemExit(
            f"transformers_tests: expected {tree}/tests/test_modeling_common.py, found none. "
            "Next step: pip download --no-deps --no-binary :all: transformers, and unpack it"
        )
    sys.path.insert(0, str(tree))
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        if not (tree / "tests" / (name.replace(".", "/") + ".py")).is_file():
            package = types.ModuleType(f"tests.{name.partition('.')[0]}")
            package.__path__ = []
            module = types.ModuleType(f"tests.{name}")
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules |= {package.__name__: package, module.__name__: module}
    try:
        return importlib.import_module("tests.test_modeling_common")
    except ImportError as error:
        raise SystemExit(
            f"transformers_tests: {error}. The tree's tests ask for it; installed is transformers "
            f"{transformers.__version__}. Next step: a tree of that version; pip install "
            "parameterized pytest"
        ) from error


def test_classes(family: str, tree: Path, mixin: type, device: str) -> list[type]:
    """The tree's own test classes of a family, or ours."""
    if not (tree / "tests" / "models" / family / f"test_modeling_{family}.py").is_file():
        return [make_class(family, mixin, device)]
    module = importlib.import_module(f"tests.models.{family}.test_modeling_{family}")
    return [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__
        and issubclass(cls, mixin)
        and issubclass(cls, unittest.TestCase)
    ]


def flash_class(cls: type) -> type:
    """The flash helpers of the mixin as tests, under our name, and the tests that set names."""
    name = "hf_flashattn"

    def equivalence(self, side: str, dtype: torch.dtype) -> None:
        # The helper has its dtype written into it, as torch.bfloat16.
        with mock.patch.object(torch, "bfloat16", dtype):
            self.flash_attn_inference_equivalence(attn_implementation=name, padding_side=side)

    body: dict[str, Any] = {
        f"test_flash_inference_equivalence_{side}_{kind}": functools.partialmethod(
            equivalence, side, dtype
        )
        for side in ("left", "right")
        for kind, dtype in DTYPES.items()
    }
    body["test_flash_can_dispatch_composite_models"] = lambda self: (
        self.flash_attn_can_dispatch_composite_models(attn_implementation=name)
    )
    body["test_flash_from_config"] = lambda self: self.flash_attn_from_config(
        attn_implementation=name
    )
    return type(cls.__name__, (cls,), body)


SETTERS = ("test_config_attn_implementation_setter", "test_can_set_attention_dynamically")


def flash_tests(cls: type) -> list[str]:
    return [x for x in dir(cls) if x.startswith("test_flash_") and "flash_attn" not in x] + [
        x for x in SETTERS if hasattr(cls, x)
    ]


def sdpa_tests(cls: type) -> list[str]:
    """All but those for another device; a parameterised test's own name is no test."""
    names = [x for x in dir(cls) if x.startswith("test_") and "sdpa" in x and "mps" not in x]
    return [x for x in names if not any(re.match(rf"{x}_\d", other) for other in names)]


@contextlib.contextmanager
def registered_as_sdpa() -> Iterator[None]:
    """Ours in the place of PyTorch's, for every model, until the block ends."""
    attentions = type(_compat.ALL_ATTENTION_FUNCTIONS)._global_mapping
    masks = type(_compat.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping
    before = attentions["sdpa"], masks["sdpa"]
    attentions["sdpa"], masks["sdpa"] = attention_forward, attention_mask
    try:
        yield
    finally:
        attentions["sdpa"], masks["sdpa"] = before


# ---- running -------------------------------------------------------------------------------------


class Result(unittest.TestResult):
    """Outcomes by name: "passed", "skipped" with the reason, "failed" with one line."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, tuple[str, str]] = {}

    def _note(self, test: unittest.TestCase, outcome: str, why: str = "") -> None:
        self.outcomes[test._testMethodName] = (outcome, why)

    def addSuccess(self, test):
        self._note(test, "passed")

    def addSkip(self, test, reason):
        self._note(test, "skipped", reason)

    def addFailure(self, test, err):
        lines = [line.strip() for line in str(err[1]).splitlines() if line.strip()]
        self._note(test, "failed", f"{err[0].__name__}: {' '.join(lines)[:200]}")

    addError = addFailure


def run(cls: type, names: list[str]) -> dict[str, tuple[str, str]]:
    result = Result()
    for name in names:
        torch.manual_seed(0)
        cls(name).run(result)
    return result.outcomes


def calls_seen(run_group) -> tuple[dict[str, tuple[str, str]], int]:
    """The outcomes of a group, and how many calls of ours on the op it made."""
    counted = Counter()
    real = hf_flashattn.report.count_kernel

    def counting(module, implementation):
        counted["op"] += 1
        real(module, implementation)

    with mock.patch.object(hf_flashattn.report, "count_kernel", counting):
        return run_group(), counted["op"]


def run_family(family: str, tree: Path, mixin: type, device: str) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for group in ("flash", "sdpa"):
        outcomes: dict[str, tuple[str, str]] = {}
        on_op = 0
        for cls in test_classes(family, tree, mixin, device):
            with registered_as_sdpa() if group == "sdpa" else contextlib.nullcontext():
                cls_ = flash_class(cls) if group == "flash" else cls
                names = flash_tests(cls_) if group == "flash" else sdpa_tests(cls_)
                more, seen = calls_seen(functools.partial(run, cls_, names))
            outcomes |= more
            on_op += seen
        counts = Counter(outcome for outcome, _ in outcomes.values())
        failed = [
            {"test": f"{family}.{group}.{name}", "message": why}
            for name, (outcome, why) in sorted(outcomes.items())
            if outcome == "failed"
        ]
        for failure in failed:
            failure["explained"] = explanation(failure["test"])
        groups[group] = {
            **{kind: counts[kind] for kind in ("passed", "failed", "skipped")},
            "calls_on_the_op": on_op,
            "failures": failed,
            "skips": Counter(why for outcome, why in outcomes.values() if outcome == "skipped"),
        }
    return groups


def explanation(test: str) -> str | None:
    return next((why for glob, why in EXPLAINED.items() if fnmatch.fnmatchcase(test, glob)), None)


def joined(paths: list[Path]) -> dict[str, Any]:
    """One result of those of several runs, explained as EXPLAINED says now."""
    results = [json.loads(path.read_text()) for path in paths]
    facts = {name: x for name, x in results[0].items() if name != "families"}
    for path, result in zip(paths, results, strict=True):
        differs = [name for name, x in facts.items() if result[name] != x]
        if differs:
            raise SystemExit(
                f"transformers_tests: expected runs of one machine, got another {differs[0]} in "
                f"{path}: {result[differs[0]]}. Next step: a page for each"
            )
    ran = {name: groups for result in results for name, groups in result["families"].items()}
    for groups in ran.values():
        for group in groups.values():
            for failure in group["failures"]:
                failure["explained"] = explanation(failure["test"])
    return facts | {"families": {name: ran[name] for name in FAMILIES if name in ran}}


# ---- the page ------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Transformers' own tests",
        "",
        "Made by `make transformers-tests` ([how](../tools/transformers_tests.py)): "
        f"transformers {result['transformers']}, torch {result['torch']}, {result['device']}; "
        f"testers: {result['testers']}.",
        "",
        "`flash`: the helpers for flash implementations under our name. `sdpa`: the sdpa tests "
        "with our functions registered as `sdpa`. On the op: calls that did not fall back; masks "
        "with a window, softcap and position bias do.",
        "",
        "| family | flash: passed, failed, skipped | on the op | sdpa: passed, failed, skipped "
        "| on the op |",
        "|---|---|---|---|---|",
    ]
    for family, groups in result["families"].items():
        cells = [family]
        for group in ("flash", "sdpa"):
            counts = groups[group]
            cells.append(", ".join(str(counts[k]) for k in ("passed", "failed", "skipped")))
            cells.append(str(counts["calls_on_the_op"]))
        lines.append(f"| {' | '.join(cells)} |")
    failures = [f for g in result["families"].values() for x in g.values() for f in x["failures"]]
    lines += ["", "## Failures", ""]
    if not failures:
        lines.append("None.")
    else:
        lines += ["| test | message | why |", "|---|---|---|"]
        for x in failures:
            message = x["message"].replace("|", "\\|")
            lines.append(f"| `{x['test']}` | {message} | {x['explained'] or '**unexplained**'} |")
    skips: Counter[str] = Counter()
    for groups in result["families"].values():
        for group in groups.values():
            skips.update(group["skips"])
    lines += ["", "## Skipped, by Transformers' own reasons", "", "| reason | tests |", "|---|---|"]
    lines += [f"| {why} | {n} |" for why, n in skips.most_common()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, nargs="?", help="a source tree of Transformers")
    parser.add_argument("--from", dest="runs", type=Path, nargs="+", help="JSON of earlier runs")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--json", type=Path, help="write the counts and messages here")
    parser.add_argument("--page", type=Path, help=f"write the page, usually to {PAGE.name}")
    options = parser.parse_args()
    if (options.tree is None) == (options.runs is None):
        parser.error("expected either a source tree or --from; next step: see --help")
    result = joined(options.runs) if options.runs else run_tree(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.page:
        options.page.write_text(page(result))
    return _verdict(result)


def run_tree(options: argparse.Namespace) -> dict[str, Any]:
    """The tests of the families asked for, printed as they end."""
    tree = options.tree.resolve()
    common = import_common(tree)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = common.torch_device
    result: dict[str, Any] = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device.upper(),
        "testers": "Transformers'" if (tree / "tests" / "models").is_dir() else "ours",
        "families": {},
    }
    for family in options.families:
        groups = run_family(family, tree, common.ModelTesterMixin, device)
        result["families"][family] = groups
        for group, counts in groups.items():
            numbers = (f"{counts[k]} {k}" for k in ("passed", "failed", "skipped"))
            print(f"{family:11} {group:6} {', '.join(numbers)}", flush=True)
            for failure in counts["failures"]:
                print(
                    f"    {failure['test']}: {failure['message']}\n        {failure['explained']}"
                )
    return result


def _verdict(result: dict[str, Any]) -> int:
    failures = [f for g in result["families"].values() for x in g.values() for f in x["failures"]]
    unexplained = [f["test"] for f in failures if not f["explained"]]
    silent = [name for name, g in result["families"].items() if not any(
        x["passed"] for x in g.values())]  # fmt: skip
    stale = [
        glob
        for glob in EXPLAINED
        if glob.partition(".")[0] in result["families"]
        and not any(fnmatch.fnmatchcase(f["test"], glob) for f in failures)
    ]
    for what, names in (
        ("unexplained failures", unexplained),
        ("families of which nothing passed", silent),
    ):
        if names:
            print(f"transformers_tests: {what}: {', '.join(names)}")
    if stale:
        print(f"transformers_tests: explained, and did not fail here: {', '.join(stale)}")
    return 1 if unexplained or silent else 0


if __name__ == "__main__":
    sys.exit(main())
