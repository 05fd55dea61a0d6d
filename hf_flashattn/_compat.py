"""Every private Transformers name this package touches, in one place.

    python -c "import hf_flashattn._compat as c; print(c.missing() or 'all names found')"

Supported: transformers >= 5.17, < 6. Features are detected (hasattr, signature, qualified name),
versions are never compared. `missing()` is the self-test: it names each attribute that this
Transformers does not have.
"""

from __future__ import annotations

import functools
import importlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    masking_utils,
    modeling_flash_attention_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils import import_utils

try:
    from transformers.utils.output_capturing import _active_collector as _ACTIVE_COLLECTOR
except ImportError:
    _ACTIVE_COLLECTOR = None

_PAGED = (
    "paged|"  # before an implementation's name: in continuous batching, for as long as it lasts
)

# A config's attribute that holds the implementation's name; setting it leaves sub-configs alone.
CONFIG_NAME = "_attn_implementation_internal"

# (module, attribute, what it is for)
PRIVATE_NAMES = (
    (
        "transformers.modeling_utils",
        "ALL_ATTENTION_FUNCTIONS",
        "the registry of attention functions",
    ),
    (
        "transformers.modeling_utils",
        "AttentionInterface.register",
        "registers our attention function",
    ),
    (
        "transformers.masking_utils",
        "AttentionMaskInterface.register",
        "registers our mask function",
    ),
    (
        "transformers.masking_utils",
        "ALL_MASK_ATTENTION_FUNCTIONS",
        "the registry of mask functions",
    ),
    ("transformers.masking_utils", "causal_mask_function", "recognises a plain causal mask"),
    ("transformers.masking_utils", "bidirectional_mask_function", "recognises a plain full mask"),
    ("transformers.masking_utils", "and_masks", "recognises packed sequences and windows"),
    ("transformers.masking_utils", "packed_sequence_mask_function", "recognises packed sequences"),
    ("transformers.masking_utils", "sliding_window_overlay", "recognises a sliding window"),
    ("transformers.masking_utils", "sdpa_mask", "builds the explicit mask of everything else"),
    ("transformers.masking_utils", "eager_mask", "the mask of models that run their own code"),
    ("transformers.integrations.sdpa_attention", "sdpa_attention_forward", "the fallback"),
    (
        "transformers.modeling_flash_attention_utils",
        "_lazy_imports",
        "lets our name pass as a flash name",
    ),
    (
        "transformers.modeling_utils",
        "PreTrainedModel._check_and_adjust_attn_implementation",
        "lets our name reach models that take only some flash implementations",
    ),
    ("transformers.modeling_flash_attention_utils", "_pad_input", "handed out with our functions"),
    (
        "transformers.modeling_flash_attention_utils",
        "_unpad_input",
        "handed out with our functions",
    ),
    ("transformers.utils.import_utils", "is_tracing", "tells when a tensor may not be read"),
    (
        "transformers.utils.output_capturing",
        "_active_collector",
        "tells that attention weights or hidden states are wanted",
    ),
    ("transformers", "PreTrainedConfig._attn_implementation", "selects the implementation"),
)

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CONFIG_NAME",
    "PRIVATE_NAMES",
    "MaskPattern",
    "PreTrainedConfig",
    "PreTrainedModel",
    "attentions_wanted",
    "attentions_wanted_of",
    "checkpoints_reentrantly",
    "describe_mask",
    "eager_function",
    "eager_mask",
    "explicit_mask",
    "hidden_states_collector",
    "is_tracing",
    "missing",
    "misstates_causality",
    "misstates_window",
    "plain_name",
    "register",
    "register_masked",
    "registered",
    "sdpa_attention_forward",
]


def missing() -> list[str]:
    """What this Transformers lacks of PRIVATE_NAMES: "module.attribute (what it is for)" each."""
    absent = []
    for module_name, attribute, purpose in PRIVATE_NAMES:
        try:
            found: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            absent.append(f"{module_name}.{attribute} ({purpose})")
    return absent


# ---- registration --------------------------------------------------------------------------------


def register(
    names: tuple[str, ...],
    attention: Callable,
    mask: Callable,
    flash_functions: Callable[[], tuple],
) -> None:
    """Adds `names` to the registries of attention and mask functions.

    A name with "flash" in it also passes Transformers' lazy flash import, which is handed
    flash_functions() -> (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache or None).
    Models that list the flash implementations they take get the last name instead, which has none.
    Additive and idempotent: what other implementations get is untouched.
    """
    for name in names:
        register_masked(name, attention, mask)
        if _PAGED + "sdpa" in ALL_ATTENTION_FUNCTIONS:  # later versions drop the prefix themselves
            AttentionInterface.register(_PAGED + name, attention)
    _wrap_lazy_imports(frozenset(names), flash_functions)
    _wrap_name_check(names[0], names[-1])


def plain_name(implementation: str | None) -> str | None:
    """The name of an implementation without what continuous batching may prepend to it."""
    return implementation and implementation.removeprefix(_PAGED)


def register_masked(name: str, attention: Callable, mask: Callable) -> None:
    """Adds a name without "flash" in it to both registries."""
    AttentionInterface.register(name, attention)
    masking_utils.AttentionMaskInterface.register(name, mask)


def registered(name: str) -> tuple[Any, Any, tuple]:
    """What Transformers has under `name` now: attention, mask, flash functions.

    None and () for what it has not. Only for a name whose flash functions are not downloaded.
    """
    flash = modeling_flash_attention_utils._lazy_imports
    ours = name in getattr(flash, "_hf_flashattn_names", ())
    return (
        ALL_ATTENTION_FUNCTIONS.get(name),
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(name),
        flash(name)[:3] if ours else (),
    )


def _wrap_lazy_imports(names: frozenset[str], flash_functions: Callable[[], tuple]) -> None:
    original = modeling_flash_attention_utils._lazy_imports
    if getattr(original, "_hf_flashattn_names", None) is not None:
        return

    def _lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> tuple:
        if plain_name(implementation) in names:
            pads = (
                modeling_flash_attention_utils._pad_input,
                modeling_flash_attention_utils._unpad_input,
            )
            return (*flash_functions(), *pads)
        return original(implementation, *args, **kwargs)

    _lazy_imports._hf_flashattn_names = names
    modeling_flash_attention_utils._lazy_imports = _lazy_imports


def _wrap_name_check(flash_name: str, other: str) -> None:
    """Transformers would put the first of the model's own list in the place of a flash name."""
    original = PreTrainedModel._check_and_adjust_attn_implementation
    if getattr(original, "_hf_flashattn_wrapped", False):
        return

    @functools.wraps(original)
    def check(self: PreTrainedModel, name: str | None, *args: Any, **kwargs: Any) -> str:
        if plain_name(name) == flash_name and self._compatible_flash_implementations:
            name = name.removesuffix(flash_name) + other
        return original(self, name, *args, **kwargs)

    check._hf_flashattn_wrapped = True
    PreTrainedModel._check_and_adjust_attn_implementation = check


# ---- masks ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MaskPattern:
    """What a Transformers mask function says, as far as it can be recognised."""

    causal: bool = False
    packed_ids: Tensor | None = None  # (B, S) integer: tokens with equal numbers belong together
    window: int | None = None  # keys this far away, or further, are masked
    unpacked: bool = False  # composed for packed sequences, of which there are none


def describe_mask(mask_function: Callable) -> MaskPattern | None:
    """Reads a mask function's structure, without evaluating it; None if any part of it is unknown.

    Transformers composes closures (`and_masks(packed, causal)`); their qualified names and cells
    say what they are.
    """
    if mask_function is masking_utils.causal_mask_function:
        return MaskPattern(causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return MaskPattern()
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    maker = getattr(mask_function, "__qualname__", "").partition(".<locals>.")[0]
    names, cells = mask_function.__code__.co_freevars, mask_function.__closure__ or ()
    held = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    try:
        if maker == "and_masks":
            return _merge([describe_mask(part) for part in held["mask_functions"]])
        if maker == "packed_sequence_mask_function":
            return MaskPattern(packed_ids=held["packed_sequence_mask"])
        if maker == "remap_positions_for_packed_sequence":
            return describe_mask(held["mask_function"])
        if maker == "sliding_window_overlay":
            return MaskPattern(window=int(held["sliding_window"]))
        if maker == "sliding_window_bidirectional_overlay":  # which counts without the token itself
            return MaskPattern(window=int(held["sliding_window"]) + 1)
    except KeyError:
        return None
    return None


def _merge(parts: list[MaskPattern | None]) -> MaskPattern | None:
    merged = MaskPattern()
    for part in parts:
        if part is None or (part.packed_ids is not None and merged.packed_ids is not None):
            return None
        windows = [w for w in (merged.window, part.window) if w is not None]
        merged = replace(
            merged,
            causal=merged.causal or part.causal,
            packed_ids=part.packed_ids if merged.packed_ids is None else merged.packed_ids,
            window=min(windows) if windows else None,
        )
    return merged


def traced_packing_only(mask_function: Callable, kwargs: dict[str, Any]) -> bool:
    """Under torch.compile: is this the causal mask with nothing but Transformers' packing on top?

    Closures cannot be read while tracing. Of what `create_causal_mask` composes with `and_masks`, a
    window brings `local_size` and a user's overlay brings `use_vmap`.
    """
    name = getattr(mask_function, "__name__", "")
    return (
        name == "and_mask"
        and not kwargs.get("use_vmap", False)
        and kwargs.get("local_size") is None
    )


def explicit_mask(**kwargs: Any) -> Tensor | None:
    """Transformers' own boolean mask, bool (B, 1, Sq, Sk), never skipped."""
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return masking_utils.sdpa_mask(**kwargs)


def eager_mask(**kwargs: Any) -> Tensor:
    """Transformers' own additive mask, (B, 1, Sq, Sk)."""
    return masking_utils.eager_mask(**kwargs)


def is_tracing(tensor: Tensor | None = None) -> bool:
    """Whether tensors' values may not be read: torch.compile, export, graph capture, fakes."""
    return torch.compiler.is_compiling() or import_utils.is_tracing(tensor)


# ---- modules -------------------------------------------------------------------------------------


def eager_function(module: nn.Module) -> Callable | None:
    """The `eager_attention_forward` next to the class of `module`, or None."""
    for cls in type(module).__mro__:
        home: ModuleType | None = sys.modules.get(cls.__module__)
        function = getattr(home, "eager_attention_forward", None)
        if function is not None:
            return function
    return None


# Models whose modules say causal, or not, against their own eager attention, which goes by masks
# alone: SDPA and flash attention are wrong there wherever there is no mask.
_MISSTATED = frozenset(
    f"transformers.models.{name}.{kind}_{name}"
    for name in (
        "aimv2",  # is_causal=False in its text model
        "bridgetower",  # is_causal=True in layers between text and image
        "videoprism",  # is_causal=False in its text model
    )
    for kind in ("modeling", "configuration")
)


def misstates_causality(cls: type) -> bool:
    """Whether a model, module or config class is of these; then no mask means: sees everything."""
    return cls.__module__ in _MISSTATED


def misstates_window(cls: type) -> bool:
    """Whether a module class passes a sliding window on that its eager attention does not heed.

    DiffusionGemma's decoder sees all of the canvas and of what came before, in every layer.
    """
    return cls.__name__ == "DiffusionGemmaDecoderTextAttention"


def attentions_wanted() -> bool:
    """True inside a forward whose caller asked for attention weights (output_attentions=True)."""
    collected = _collected()
    return collected is not None and any(key.endswith("attentions") for key in collected)


# Modules whose last forward was to give attention weights.
_GIVING_WEIGHTS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def attentions_wanted_of(module: nn.Module) -> bool:
    """Whether this run of `module` is to give attention weights, as its caller asked.

    A forward's answer is noted in _GIVING_WEIGHTS. Gradient checkpointing runs the module again in
    the backward, where the caller's wish is no longer to be seen; the note answers there. With
    another answer than its forward had, the module would save other tensors for its gradients,
    which without reentrance is an error.
    """
    if torch.compiler.is_compiling():
        return attentions_wanted()
    if _current_graph_task_id() != -1:  # in a backward
        return module in _GIVING_WEIGHTS
    wanted = attentions_wanted()
    if wanted:
        _GIVING_WEIGHTS.add(module)
    elif _GIVING_WEIGHTS:
        _GIVING_WEIGHTS.discard(module)
    return wanted


def hidden_states_collector() -> dict | None:
    """What Transformers collects hidden states in, inside a forward whose caller asked for them."""
    collected = _collected()
    return collected if collected is not None and "hidden_states" in collected else None


def _collected() -> dict | None:
    collector = _ACTIVE_COLLECTOR
    if collector is None:
        return None
    if torch.compiler.is_compiling():  # no trace reads a ContextVar: then it is an attribute
        return collector.global_var if collector.compiling else None
    return collector.get()


def checkpoints_reentrantly(layer: nn.Module) -> bool:
    """Whether gradient checkpointing of `layer`, or within it, hands on copies of its arguments."""
    return any(
        getattr(module, "gradient_checkpointing", False)
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get(
            "use_reentrant", False
        )
        for module in layer.modules()
    )
