"""The names under which Transformers knows our attention, and which module gets which."""

from __future__ import annotations

from torch import nn

from hf_flashattn import _compat
from hf_flashattn._compat import PreTrainedConfig
from hf_flashattn.report import Site
from hf_flashattn.sites import config_of, leaves_flash, reads_masks

FLASH_NAME = "hf_flashattn"
ALIAS_NAME = "hf_fused_attn"
STATED_NAME = "hf_fused_attn_stated"  # the alias, with masks that always say what is causal
LEGIBLE_NAME = "hf_fused_attn_legible"  # the alias, with masks that the model can read


def names_of(site: Site) -> list[tuple[PreTrainedConfig | None, str]]:
    """The configs that decide on a module's masks and function, with the name that each gets."""
    if site.family is None:
        name = _choose_name(site.owner)
    elif site.family.keeps_masks(site.module):
        return []
    else:
        name = STATED_NAME  # code of its own says nothing of what is causal
    return [(config, name) for config in (config_of(site), getattr(site.owner, "config", None))]


def _choose_name(owner: nn.Module | None) -> str:
    """The flash name where the model takes any flash implementation, else the alias.

    No flash rule of Transformers applies to the alias. Where the model takes neither flash nor
    SDPA, no one has relied on its modules' is_causal yet: there the masks must state it.
    """
    takes_flash = getattr(owner, "_supports_flash_attn", False)
    takes_none = not takes_flash and not getattr(owner, "_supports_sdpa", False)
    if takes_none or (owner is not None and _compat.misstates_causality(type(owner))):
        return STATED_NAME
    if owner is not None and any(reads_masks(type(module)) for module in owner.modules()):
        return LEGIBLE_NAME
    if owner is not None and any(leaves_flash(type(module)) for module in owner.modules()):
        return ALIAS_NAME
    return (
        FLASH_NAME
        if takes_flash and not getattr(owner, "_compatible_flash_implementations", None)
        else ALIAS_NAME
    )
