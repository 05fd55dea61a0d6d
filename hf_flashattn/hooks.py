"""Hooks that come first in their module's row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle


def first_before(module: nn.Module, hook: Callable) -> RemovableHandle:
    """Registers a pre-hook (module, args, kwargs) ahead of the others."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    _settle(module._forward_pre_hooks)
    return handle


def first_after(module: nn.Module, hook: Callable, *, always: bool = False) -> RemovableHandle:
    """Registers a hook (module, args, output) ahead of the others; always: if forward raises, too.

    (module, args, None) are then its arguments.
    """
    handle = module.register_forward_hook(hook, prepend=True, always_call=always)
    _settle(module._forward_hooks)
    return handle


def _settle(hooks: OrderedDict[int, Callable]) -> None:
    """Makes the order of insertion that of the row.

    prepend=True moves a hook to the front of the OrderedDict, which the dict below it does not
    know. torch.compile of torch 2.11 counts in the one and looks up in the other: with two hooks on
    a module it guards on attributes that the wrong one lacks, and fails.
    """
    if list(dict.keys(hooks)) != list(hooks):
        row = list(hooks.items())
        hooks.clear()  # not a new one: handles of all hooks point to it
        hooks.update(row)
