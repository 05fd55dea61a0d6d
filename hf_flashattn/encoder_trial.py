"""Which encoders can do without padding (encoder_unpadding.py): found by structure, tried out.

    entries, handles = install(model, sites)

An encoder is a PreTrainedModel that takes input_ids and an attention_mask and holds all its
attention modules in one list of layers. What its code does between and in these layers is not
known; so a batch of 16 tokens runs through it, with padding and without, and the outputs must
agree. Convolutions over tokens, chunks of fixed size, positions made in the layers show there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_flashattn._compat import PreTrainedModel
from hf_flashattn.encoder_unpadding import MASK, NO_PADDING, Unpadder
from hf_flashattn.report import SETTINGS, Site, Unpadded

# ---- which stacks --------------------------------------------------------------------------------


def install(model: nn.Module, sites: list[Site]) -> tuple[list[Unpadded], list[RemovableHandle]]:
    """Hooks for every stack of layers in `model` that can do without padding, once tried out.

    The sites' modules must have their Settings. Returns what the report shows, one entry for each
    PreTrainedModel with attention modules, and the handles of all hooks.
    """
    names = {module: name for name, module in model.named_modules()}
    groups: dict[nn.Module | None, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.owner, []).append(site)
    entries, handles = [], []
    for owner, group in groups.items():
        entry = Unpadded(names.get(owner, ""), type(owner).__name__)
        entry.why_not = _refusal_of(owner, group)
        if entry.why_not is None:
            found = _find_layers(owner, group)
            if isinstance(found, str):
                entry.why_not = found
            else:
                parameters = list(inspect.signature(owner.forward).parameters)
                unpadder = Unpadder(entry, parameters.index(MASK))
                hooks = unpadder.hook(owner, *found)
                entry.why_not = _try_out(owner, unpadder, group)
                if entry.why_not is None:
                    handles += hooks
                else:
                    for handle in hooks:
                        handle.remove()
        entries.append(entry)
    return entries, handles


def _refusal_of(owner: nn.Module | None, sites: list[Site]) -> str | None:
    if owner is None:
        return "no Transformers model around these attention modules"
    for site in sites:
        if site.unsupported is not None:
            return site.unsupported
        if site.adds_bias():
            return f"{type(site.module).__name__} adds a position bias of the padded lengths"
    if getattr(owner.config, "is_decoder", False) or any(
        getattr(site.module, "is_causal", False) for site in sites
    ):
        return "a decoder: only encoders can do without padding"
    if all(site.excluded is not None for site in sites):
        return sites[0].excluded
    parameters = inspect.signature(owner.forward).parameters
    for name in ("input_ids", MASK):
        if name not in parameters:
            return f"takes no {name}"
    devices = {str(parameter.device) for parameter in owner.parameters()}
    if len(devices) > 1:
        return f"its weights are on several devices: {', '.join(sorted(devices))}"
    return "its weights are on the meta device" if devices == {"meta"} else None


def _find_layers(owner: nn.Module, sites: list[Site]) -> tuple[nn.Module, nn.ModuleList] | str:
    """(stack, layers), or why there is no such pair."""
    wanted = {id(site.module) for site in sites}
    lists = {}
    for parent in owner.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList):
                inside = wanted & {id(module) for module in child.modules()}
                if inside:
                    lists[id(child)] = (parent, child, inside)
    for parent, child, inside in lists.values():  # outer lists come first
        if inside == wanted:
            return parent, child
    outer = len({frozenset(inside) for _, _, inside in lists.values()})
    return f"expected one list of layers around all attention modules, got {outer}"


# ---- trying it out -------------------------------------------------------------------------------


# Two rows of 8 tokens: right padding; left padding, a hole. 11 tokens stay, a prime: no layer can
# cut them into chunks as it would cut 8.
_TRIAL = ((1, 1, 1, 1, 1, 0, 0, 0), (0, 1, 1, 0, 1, 1, 1, 0))
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2}  # of a token's norm; other dtypes: 0.1


def _try_out(owner: PreTrainedModel, unpadder: Unpadder, sites: list[Site]) -> str | None:
    """Why this model is wrong without padding, or None. Attention runs on the fallback meanwhile.

    Nothing stays of it: no counts, no random state, no gradients.
    """
    try:
        with _trial(owner, sites):
            inputs, stays = _trial_inputs(owner)
            got = _tensors(owner(**inputs))
            if not unpadder.entry.unpadded:
                (reason,) = unpadder.entry.padded or (NO_PADDING,)
                return f"tried out: ran padded: {reason}"
            unpadder.off = True
            expected = _tensors(owner(**inputs))
    except Exception as error:  # whatever a model does with an input that it does not expect
        return f"tried out: {type(error).__name__}: {error}"
    finally:
        unpadder.off = False
        unpadder.entry.forget()
    if len(got) != len(expected):
        return f"tried out: {len(got)} outputs instead of {len(expected)}"
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            return f"tried out: an output of {tuple(a.shape)} instead of {tuple(b.shape)}"
        if a.dim() == 3 and a.shape[:2] == stays.shape:
            a, b = a[stays], b[stays]
        error = (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-30)
        tolerance = _TOLERANCE.get(a.dtype, 0.1)
        if not bool((error <= tolerance).all()):  # NaN is none
            return f"tried out: outputs differ by {error.max().item():.1g}, over {tolerance}"
    return None


def _trial_inputs(owner: PreTrainedModel) -> tuple[dict[str, Any], Tensor]:
    """(arguments of a forward, bool (2, 8): the tokens that are not removed)."""
    weight = owner.get_input_embeddings().weight
    mask = torch.tensor(_TRIAL)
    stays = mask.bool()
    stays[:, 0] = True
    padding = getattr(owner.config, "pad_token_id", None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weight.shape[0], mask.shape, generator=generator)
    if padding is not None:
        ids = torch.where(ids == padding, (ids + 1) % weight.shape[0], ids)
        ids = torch.where(mask.bool(), ids, padding)
    device = weight.device
    return {"input_ids": ids.to(device), MASK: mask.to(device)}, stays.to(device)


@contextmanager
def _trial(owner: nn.Module, sites: list[Site]) -> Iterator[None]:
    training = [module for module in owner.modules() if module.training]
    settings = [(site.module, site.module.__dict__[SETTINGS]) for site in sites]
    device = next(owner.parameters()).device
    try:
        for module in training:
            module.training = False
        for module, setting in settings:
            module.__dict__[SETTINGS] = replace(setting, tried=True)
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, setting in settings:
            module.__dict__[SETTINGS] = setting
        for module in training:
            module.training = True


def _tensors(output: Any) -> list[Tensor]:
    """All floating tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.dim() >= 2 else []
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return []
    return [x for part in output for x in _tensors(part)]
