"""Finds the attention modules of any model, and says why some are out of reach.

Within reach is what looks its attention function up in Transformers' registry; that search reads
source text, not names of models, so it holds for models written later. And what computes standard
attention itself, in a class that families/table.py knows.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable

from torch import nn

from hf_flashattn._compat import PreTrainedConfig, PreTrainedModel, plain_name
from hf_flashattn.families.table import family_of, is_no_attention, out_of_reach
from hf_flashattn.report import Site


def find_sites(model: nn.Module, excludes: Callable[[str], str | None]) -> list[Site]:
    """The attention modules of a model in order, those out of the dispatch's reach included.

    excludes(name): why the user keeps a module off the kernel, or None.
    """
    sites, modules, inside = [], dict(model.named_modules()), ()
    for name, module in modules.items():
        if name.startswith(inside):
            continue  # a part of a family's attention, such as a projection of it
        reached, family = dispatches(type(module)), None
        if not reached:
            family = family_of(type(module), type(modules[name.rpartition(".")[0]]))
        if reached or family is not None or _looks_like_attention(module):
            own = None
            if family is not None:
                inside = (*inside, f"{name}.")
            if not reached:
                own = out_of_reach(type(module)) if family is None else family.refuses(module)
            elif _edits_masks(type(module)):
                own = f"{type(module).__name__} edits its masks, which must be Transformers' own"
            plain = _WRAPPERS.sub("", name).lstrip(".")
            owner = owner_of(model, name)
            sites.append(Site(plain, module, own, excludes(plain), owner, family))
    _spoil_shared_masks(sites)
    for site in sites:
        site.implementation = _implementation_of(site)
    return sites


def _implementation_of(site: Site) -> str:
    """The name in the config that decides on a module's masks and function; "" where none does."""
    if site.unsupported is not None or (site.family and site.family.keeps_masks(site.module)):
        return ""
    return plain_name(config_of(site)._attn_implementation) or ""


# What FSDP, torch.compile and checkpointing of single layers add to names: a module that was
# patched by name before it was wrapped keeps its name.
_WRAPPERS = re.compile(r"(^|\.)_(fsdp_wrapped_module|orig_mod|checkpoint_wrapped_module)(?=\.|$)")


def _spoil_shared_masks(sites: list[Site]) -> None:
    """A model with both kinds stays as it is: masks are made once for both, in one form."""
    blockers: dict[int, str] = {}
    for site in sites:
        owner = site.owner
        if site.unsupported is not None and owner is not None and _takes_mask(type(site.module)):
            config = getattr(site.module, "config", None)
            if type(site.module).__module__ == type(owner).__module__ or isinstance(
                config, PreTrainedConfig
            ):
                blockers[id(config if isinstance(config, PreTrainedConfig) else owner.config)] = (
                    type(site.module).__name__
                )
                blockers[id(owner.config)] = type(site.module).__name__
    for site in sites:
        if site.unsupported is None and not (site.family and site.family.keeps_masks(site.module)):
            config = config_of(site)
            if not isinstance(config, PreTrainedConfig):
                site.unsupported = "has no config to name an implementation in"
            elif id(config) in blockers:
                site.unsupported = (
                    f"shares its masks with {blockers[id(config)]}, which stays as it is"
                )


def config_of(site: Site) -> PreTrainedConfig | None:
    """The config in which a name of ours gives this module its masks."""
    config = getattr(site.module, "config", None)
    if site.family is not None and not isinstance(config, PreTrainedConfig):
        config = getattr(site.owner, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


@functools.cache
def _takes_mask(cls: type[nn.Module]) -> bool:
    """Whether a module may be handed the (B, 1, Sq, Sk) mask of the others.

    Linear attention has no softmax to mask: its mask is the tokens', (B, S), in any model.
    """
    masked = any("mask" in name for name in inspect.signature(cls.forward).parameters)
    return masked and re.search(r"softmax|scaled_dot_product", _source(cls)) is not None


def _looks_like_attention(module: nn.Module) -> bool:
    """An attention module of its own: named so, with weights, and no wrapper of another one."""
    if is_no_attention(type(module)):
        return False
    if (
        not re.search(r"Attention|Attn", type(module).__name__)
        or next(module.parameters(), None) is None
    ):
        return False
    inside = (child for child in module.modules() if child is not module)
    return not any(re.search(r"Attention|Attn", type(child).__name__) for child in inside)


def dispatches(cls: type[nn.Module]) -> bool:
    """Whether a module class itself looks its attention function up in Transformers' registry."""
    return not issubclass(cls, PreTrainedModel) and "ALL_ATTENTION_FUNCTIONS" in _source(cls)


# Sparse attention narrows its mask further, merged attention joins two; some ask for the names
# "eager" and "sdpa" first, and under any other would attend to all.
_EDITS = re.compile(
    r"\battention_mask\[|\battention_mask & |\battention_mask\.masked_fill|merged_attention_mask"
    r"|\battention_mask = self\.|\bcat\(\s*\[attention_mask\b|\._attn_implementation in \("
)


def _edits_masks(cls: type[nn.Module]) -> bool:
    """Whether a module class computes with its mask, which carriers are not made for."""
    return _EDITS.search(_source(cls)) is not None


def reads_masks(cls: type[nn.Module]) -> bool:
    """Whether a module that is no attention computes with the layers' mask, bool (B, 1, Sq, Sk).

    Convolutions of speech encoders clear what padding holds, some poolers repeat the mask.
    """
    if issubclass(cls, PreTrainedModel) or dispatches(cls):
        return False
    return "attention_mask.dtype == torch.bool" in _source(cls)


def leaves_flash(cls: type[nn.Module]) -> bool:
    """Whether an attention class hands some calls to SDPA under the name of a flash implementation.

    SAM 2 and 3 do with biases: a carrier would reach SDPA as a mask.
    """
    return dispatches(cls) and 'ALL_ATTENTION_FUNCTIONS["sdpa"]' in _source(cls)


@functools.cache
def _source(cls: type[nn.Module]) -> str:
    """The source of a class and of its bases, torch's left out; "" for what has none."""
    parts = []
    for base in cls.__mro__:
        if base in (nn.Module, object) or base.__module__.startswith("torch."):
            continue
        with contextlib.suppress(OSError, TypeError):
            parts.append(inspect.getsource(base))
    return "\n".join(parts)


def owner_of(model: nn.Module, name: str) -> PreTrainedModel | None:
    """The innermost PreTrainedModel around the module of this name, which makes its masks."""
    owner = model if isinstance(model, PreTrainedModel) else None
    parts = name.split(".") if name else []
    for part in parts:
        model = model._modules[part]
        if isinstance(model, PreTrainedModel):
            owner = model
    return owner
