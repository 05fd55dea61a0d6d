"""`hf-flashattn report`: what would run where, from a model's config alone.

The model is built on the meta device, without weights, and patched as patch_model would; nothing
is downloaded. Masks, and dtypes under autocast, only show in a call: see report.Site.forecast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_flashattn import support
from hf_flashattn.patching import patch_model
from hf_flashattn.report import Row, Target, format_rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICES = ("auto", "hopper", "cpu")  # auto: this machine's GPU; without one, hopper


class PreviewError(RuntimeError):
    """There is no model to look at. The message says what is missing and what to do."""


@dataclass(frozen=True)
class Preview:
    """One row for every attention module, and what they are a forecast of."""

    source: str
    model: str
    device: str
    dtype: str
    rows: tuple[Row, ...]
    kernel_expected: bool  # whether the device has kernels at all

    @property
    def all_on_kernel(self) -> bool:
        """On a CPU, our op's CPU implementation counts: that is as near as it gets there."""
        good = ("kernel",) if self.kernel_expected else ("kernel", "cpu implementation")
        return bool(self.rows) and all(row.runs in good for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return f"hf_flashattn: no attention module found in {self.model}"
        counts = Counter(row.runs for row in self.rows)
        summary = ", ".join(f"{n} {runs}" for runs, n in counts.items())
        title = f"hf_flashattn: {self.model}, {self.dtype} on {self.device}: {summary}"
        return f"{title}\n{format_rows(list(self.rows), forecast=True)}"

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "all_on_kernel": self.all_on_kernel,
            "counts": dict(Counter(row.runs for row in self.rows)),
            "modules": [
                {
                    "module": row.module,
                    "class": row.cls,
                    "runs": row.runs,
                    "name": row.implementation,
                    "why": row.why,
                }
                for row in self.rows
            ],
        }


def preview(source: str, *, device: str = "auto", dtype: str | None = None) -> Preview:
    """The forecast for a folder, a config file, or the name of a model in the hub's cache.

    Args:
        device: one of DEVICES.
        dtype: one of DTYPES; unless told, the config's.

    Raises:
        PreviewError: no config there, or no model that can be built from it.
    """
    target, where = _target(device)
    config = _load_config(source)
    chosen = DTYPES[dtype] if dtype else _dtype_of(config)
    try:
        model = _build(config, chosen)
    except Exception as error:  # models run code of their own: whatever it raises is the reason
        raise PreviewError(
            f"{source}: expected a config from which a model can be built, got "
            f"{type(error).__name__}: {error}. Next step: load the model and print "
            "hf_flashattn.patch_model(model)"
        ) from error
    sites = patch_model(model, strict=False).sites
    return Preview(
        source,
        type(model).__name__,
        where,
        support.dtype_name(chosen),
        tuple(site.expected_row(target) for site in sites),
        target.device_type == "cuda",
    )


def _target(device: str) -> tuple[Target, str]:
    if device == "cpu":
        return Target("cpu"), "the CPU"
    if device == "auto" and torch.cuda.is_available():
        return Target("cuda", torch.cuda.get_device_capability()), torch.cuda.get_device_name()
    assumed = " (assumed: this machine has no GPU)" if device == "auto" else ""
    return Target("cuda", support.CUDA_CAPABILITIES[0]), f"a Hopper GPU{assumed}"


def _load_config(source: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        got, download = f"{type(error).__name__}: {str(error).strip()}", ""
        if isinstance(error, OSError) and not Path(source).exists():
            got = "none of these"  # Transformers would speak of the network, which it was denied
            download = f", or download it: hf download {source} config.json"
        raise PreviewError(
            f"{source}: expected a model's folder, a config.json or the name of a model in the "
            f"hub's cache, got {got}. Next step: check the path or the name{download}"
        ) from error


def _dtype_of(config: PreTrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The first class that the config names, else the bare model of its type; no weights."""
    named = (getattr(transformers, x, None) for x in config.architectures or ())
    cls = next((x for x in named if x is not None), None)
    with _default_dtype(dtype), torch.device("meta"):
        return AutoModel.from_config(config) if cls is None else cls(config)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
