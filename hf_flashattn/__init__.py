"""Hugging Face models on our own IO-aware attention kernels.

    import hf_flashattn

    report = hf_flashattn.patch_model(model)
    print(report)                 # which modules run on the kernel, which don't, and why

or, once it is imported:

    model = AutoModelForCausalLM.from_pretrained("gpt2", attn_implementation="hf_flashattn")

Importing registers names with Transformers and changes nothing else: "hf_flashattn", which
counts as a flash implementation, and "hf_fused_attn", the same without Transformers' rules for
names that contain "flash"; patch_model has a third for models whose masks must say what is causal.
"""

from hf_flashattn import _compat, support
from hf_flashattn.attention import FallbackError, attention_forward
from hf_flashattn.families.unpatched import mask_of_a_name
from hf_flashattn.functional import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from hf_flashattn.key_bits import key_bits_of
from hf_flashattn.masks import legible_mask, stated_mask
from hf_flashattn.names import ALIAS_NAME, FLASH_NAME, LEGIBLE_NAME, STATED_NAME
from hf_flashattn.patching import (
    PatchError,
    attention_report,
    patch_model,
    patched,
    unpatch_model,
)
from hf_flashattn.report import NotOnKernel, Report

__version__ = "0.1.0"

__all__ = [
    "FallbackError",
    "NotOnKernel",
    "PatchError",
    "Report",
    "attention_report",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "key_bits_of",
    "patch_model",
    "patched",
    "support",
    "unpatch_model",
]

_compat.register(
    (FLASH_NAME, ALIAS_NAME),
    attention=attention_forward,
    mask=mask_of_a_name,
    flash_functions=lambda: (flash_attn_func, flash_attn_varlen_func, None),
)
_compat.register_masked(STATED_NAME, attention=attention_forward, mask=stated_mask)
_compat.register_masked(LEGIBLE_NAME, attention=attention_forward, mask=legible_mask)
