"""Finds the attention modules of any model, and says why some are out of reach.

Within reach is what looks its attention function up in Transformers' registry. The search reads
source text, not names of models, so it holds for models written later.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

from torch import nn

from hf_flashattn._compat import PreTrainedConfig, PreTrainedModel
from hf_flashattn.report import Site


def find_sites(model: nn.Module, excludes: Callable[[str], str | None]) -> list[Site]:
    """The attention modules of a model in order, those out of the dispatch's reach included.

    excludes(name): why the user keeps a module off the kernel, or None.
    """
    sites = []
    for name, module in model.named_modules():
        dispatches = _dispatches(type(module))
        if dispatches or _looks_like_attention(module):
            own = None if dispatches else f"{type(module).__name__} has attention code of its own"
            plain = _WRAPPERS.sub("", name).lstrip(".")
            sites.append(Site(plain, module, own, excludes(plain), owner_of(model, name)))
    _spoil_shared_masks(sites)
    return sites


# What FSDP, torch.compile and checkpointing of single layers add to names: a module that was
# patched by name before it was wrapped keeps its name.
_WRAPPERS = re.compile(r"(^|\.)_(fsdp_wrapped_module|orig_mod|checkpoint_wrapped_module)(?=\.|$)")


def _spoil_shared_masks(sites: list[Site]) -> None:
    """A model with both kinds stays as it is: masks are made once for both, in one form."""
    blockers: dict[int, str] = {}
    for site in sites:
        owner = site.owner
        if site.unsupported is not None and owner is not None:
            config = getattr(site.module, "config", None)
            if type(site.module).__module__ == type(owner).__module__ or isinstance(
                config, PreTrainedConfig
            ):
                blockers[id(config if isinstance(config, PreTrainedConfig) else owner.config)] = (
                    type(site.module).__name__
                )
                blockers[id(owner.config)] = type(site.module).__name__
    for site in sites:
        if site.unsupported is None:
            config = getattr(site.module, "config", None)
            if not isinstance(config, PreTrainedConfig):
                site.unsupported = "has no config to name an implementation in"
            elif id(config) in blockers:
                site.unsupported = (
                    f"shares its masks with {blockers[id(config)]}, which does not dispatch"
                )


def _looks_like_attention(module: nn.Module) -> bool:
    """An attention module of its own: named so, with weights, and no wrapper of another one."""
    if (
        not re.search(r"Attention|Attn", type(module).__name__)
        or next(module.parameters(), None) is None
    ):
        return False
    inside = (child for child in module.modules() if child is not module)
    return not any(re.search(r"Attention|Attn", type(child).__name__) for child in inside)


@functools.cache
def _dispatches(cls: type[nn.Module]) -> bool:
    """Whether a module class itself looks its attention function up in Transformers' registry."""
    if issubclass(cls, PreTrainedModel):
        return False
    for base in cls.__mro__:
        if base in (nn.Module, object) or base.__module__.startswith("torch."):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        if "ALL_ATTENTION_FUNCTIONS" in source:
            return True
    return False


def owner_of(model: nn.Module, name: str) -> PreTrainedModel | None:
    """The innermost PreTrainedModel around the module of this name, which makes its masks."""
    owner = model if isinstance(model, PreTrainedModel) else None
    parts = name.split(".") if name else []
    for part in parts:
        model = model._modules[part]
        if isinstance(model, PreTrainedModel):
            owner = model
    return owner
