"""Models of the families that were loaded under one of our names, but not patched.

A name in the config does not make their code call us; it does make Transformers ask our mask
function for their masks. What it makes for our own layers would mean nothing to their code, and
None, where causality goes without saying, would let them see the future. So they get eager's masks.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from hf_flashattn import _compat
from hf_flashattn.families.table import FAMILIES
from hf_flashattn.masks import attention_mask, legible_mask, stated_mask
from hf_flashattn.sites import dispatches, leaves_flash, reads_masks


def mask_of_a_name(**arguments: Any) -> Tensor | None:
    """masks.attention_mask for the names that a user may set; patch_model uses another for these
    families."""
    config = arguments.get("config")
    kind = "plain" if config is None else _kind_of_masks(type(config))
    return _MAKERS[kind](**arguments)


_MAKERS = {
    "plain": attention_mask,
    "eager": _compat.eager_mask,
    "stated": stated_mask,
    "legible": legible_mask,
}


@torch.compiler.assume_constant_result  # a trace neither follows the search nor guards on it
def _kind_of_masks(config_class: type) -> str:
    return _search(config_class)


def _asks_for_eager(cls: type[nn.Module]) -> bool:
    """Whether code of its own reads the masks; that of an image's tokens or pixels has none."""
    masked = any("mask" in name for name in inspect.signature(cls.forward).parameters)
    return masked and not dispatches(cls)


@functools.cache
def _search(config_class: type) -> str:
    if _compat.misstates_causality(config_class):
        return "stated"
    package, _, folder = config_class.__module__.rpartition(".configuration_")
    for key in FAMILIES:
        known, _, name = key.partition(".")
        if known == folder or known.startswith(f"{folder}_"):  # a model's part, as blip_text is
            home = sys.modules.get(f"{package}.modeling_{known}")
            if hasattr(home, name) and _asks_for_eager(getattr(home, name)):
                return "eager"
    home = sys.modules.get(f"{package}.modeling_{folder}")
    classes = () if home is None else vars(home).values()
    layers = [x for x in classes if isinstance(x, type) and issubclass(x, nn.Module)]
    return "legible" if any(reads_masks(x) or leaves_flash(x) for x in layers) else "plain"
