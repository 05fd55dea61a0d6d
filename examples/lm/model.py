"""GPT-2 in any size with random weights, and the attention it computes with."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from transformers import GPT2Config, GPT2LMHeadModel

from lm.failures import UsageError

ATTENTIONS = ("eager", "sdpa", "hf_flashattn")


class Size(NamedTuple):
    layers: int
    hidden: int
    heads: int
    vocab: int = 0  # 0: as large as the tokenizer's


# Head dim 64 throughout, as in GPT-2 itself.
SIZES = {
    "tiny": Size(2, 64, 1),
    "cpu": Size(4, 256, 4),
    "mini": Size(8, 512, 8),
    "gpt2": Size(12, 768, 12, 50257),
    "gpt2-medium": Size(24, 1024, 16, 50257),
    "gpt2-large": Size(36, 1280, 20, 50257),
}


def gpt2_config(size: Size, tokenizer_size: int, context: int, dropout: float) -> GPT2Config:
    """Raises UsageError where the heads do not divide the hidden size."""
    if size.hidden % size.heads:
        raise UsageError(
            "a hidden size that is a multiple of the number of heads",
            f"--hidden {size.hidden} --heads {size.heads}",
            f"--hidden {size.hidden // size.heads * size.heads or size.heads} or other --heads",
        )
    return GPT2Config(
        vocab_size=max(size.vocab, tokenizer_size),
        n_positions=context,
        n_embd=size.hidden,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,  # training has no use for keys and values of earlier calls
        bos_token_id=None,
        eos_token_id=None,
    )


def build_model(
    config: GPT2Config, attention: str, seed: int, device: torch.device, strict: bool = False
) -> tuple[GPT2LMHeadModel, Any]:
    """The model on `device`, its weights a function of the seed, and hf_flashattn's report.

    Eager and sdpa are Transformers' own and have no report (None). With `strict`, hf_flashattn
    raises where a module can not run on the kernel.
    """
    set_seed(seed)
    config = copy.deepcopy(config)  # a model writes its attention into its config
    config._attn_implementation = "sdpa" if attention == "hf_flashattn" else attention
    model = GPT2LMHeadModel(config).to(device)
    model.loss_type = "ForCausalLM"  # what it falls back to, but with a warning
    if attention != "hf_flashattn":
        return model, None
    try:
        import hf_flashattn
    except ImportError as error:
        raise UsageError(
            "the package hf_flashattn for --attention hf_flashattn",
            str(error),
            "pip install . in the repository, or --attention sdpa",
        ) from error
    try:
        return model, hf_flashattn.patch_model(model, strict=strict)
    except hf_flashattn.PatchError as error:
        raise UsageError(
            "every attention module on the kernel (--strict)", str(error), "leave out --strict"
        ) from error


def parameter_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
