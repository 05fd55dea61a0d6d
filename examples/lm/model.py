"""A model with random weights, and the attention it computes with."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedConfig, PreTrainedModel

from lm.failures import UsageError

ATTENTIONS = ("eager", "sdpa", "hf_flashattn")


class Size(NamedTuple):
    layers: int
    hidden: int
    heads: int
    vocab: int = 0  # 0: as large as the tokenizer's


def random_model(
    make: Callable[[PreTrainedConfig], PreTrainedModel],
    config: PreTrainedConfig,
    attention: str,
    seed: int,
) -> PreTrainedModel:
    """`make(config)`, its weights a function of the seed; not patched yet."""
    set_seed(seed)
    config = copy.deepcopy(config)  # a model writes its attention into its config
    config._attn_implementation = "sdpa" if attention == "hf_flashattn" else attention
    return make(config)


def with_attention(
    model: PreTrainedModel, attention: str, strict: bool = False, unpad: bool = False
) -> Any:
    """Patches the model if `attention` is hf_flashattn; its report, None for Transformers' own.

    With `strict`, hf_flashattn raises where a module can not run on the kernel.
    """
    if attention != "hf_flashattn":
        return None
    hf_flashattn = own_package()
    given = {"strict": strict}
    if unpad:
        require_unpad()
        given["unpad"] = True
    try:
        return hf_flashattn.patch_model(model, **given)
    except hf_flashattn.PatchError as error:
        raise UsageError(
            "every attention module on the kernel (--strict)", str(error), "leave out --strict"
        ) from error


def own_package() -> Any:
    try:
        import hf_flashattn
    except ImportError as error:
        raise UsageError(
            "the package hf_flashattn for --attention hf_flashattn",
            str(error),
            "pip install . in the repository, or --attention sdpa",
        ) from error
    return hf_flashattn


def require_unpad() -> None:
    """Raises UsageError where the installed hf_flashattn can not unpad whole models."""
    hf_flashattn = own_package()
    if "unpad" not in inspect.signature(hf_flashattn.patch_model).parameters:
        raise UsageError(
            "hf_flashattn.patch_model(model, unpad=True) for --batching unpadded",
            f"hf_flashattn {hf_flashattn.__version__}, which has no such argument",
            "install a newer hf_flashattn, or --batching padded or packed",
        )


def parameter_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
