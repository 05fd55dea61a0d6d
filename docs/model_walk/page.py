"""docs/coverage.md: the rows written, and read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from .configs import MISSING
from .examine import TOLERANCE, Result

PAGE = Path(__file__).parents[1] / "coverage.md"

PAGE_HEAD = """# Which models run on the kernel

Written by `python docs/coverage.py`; do not edit. {versions},
with timm, torchaudio and scipy installed: {total} models of {types} types:
**{counts}**.

Each model is built tiny with random weights and run on the CPU, in fp32 and eval mode: batches
padded right, padded left and short without padding, forward and backward, one step with a cache,
and packed documents where the model takes `position_ids`, which must be those of each document
alone. Eager and patched must agree to {tolerance} of the largest logit and of the largest gradient.
Of types without a language model in their name the base model is tried ("base"), on images,
sound or text; what the model itself runs without gradients has none to compare.
"Kernel" is here the operator's CPU implementation: the same calls, masks and reasons, but no GPU.
Head dims are made small too, so a size that the kernels don't take can hide;
`hf-flashattn report` tells it for a real config. Sliding windows and chunks are made shorter than
the padded batches: sequences within its window leave a layer on the kernel.

| outcome | |
|---|---|
| kernel, fallback, unsupported | what the attention modules ran on, all agree with eager |
| differs | logits or gradients are off by this much of the largest |
| raises | eager runs, the patched model does not |
| not built | no tiny model, or eager itself does not run on such a batch |

Calls: on the kernel + on the fallback.

| model type | task | outcome | attention modules | calls | why |
|---|---|---|---|---|---|
"""


def versions() -> str:
    return f"Transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"


def read_page(page: Path = PAGE) -> list[Result]:
    """The rows of the page; none if it was made with other versions."""
    text = page.read_text() if page.exists() else ""
    if versions() not in text:
        return []
    _, _, table = text.partition(PAGE_HEAD[PAGE_HEAD.index("| model type") :])
    return [Result(*(x.strip() for x in line[1:-1].split("|"))) for line in table.splitlines()]


def merge(before: Sequence[Result], results: Sequence[Result]) -> list[Result]:
    """The new rows over those of before, which stay where only a package is missing now."""
    rows = {(row.model, row.task): row for row in before}
    for result in results:
        key = (result.model, result.task)
        if key not in rows or not result.why.endswith(MISSING):
            rows[key] = result
    return list(rows.values())


def write_page(results: Sequence[Result], page: Path = PAGE) -> None:
    counts = Counter(result.outcome for result in results).most_common()
    page.write_text(
        PAGE_HEAD.format(
            versions=versions(),
            total=len(results),
            types=len({result.model for result in results}),
            counts=", ".join(f"{n} {outcome}" for outcome, n in counts),
            tolerance=f"{TOLERANCE:g}",
        )
        + "\n".join(result.line() for result in sorted(results, key=lambda x: (x.model, x.task)))
        + "\n"
    )
