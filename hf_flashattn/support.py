"""What runs where, and why not: the one place that knows the limits of the kernels.

    explain(Request("cuda", (9, 0), torch.bfloat16, head_dim=90, heads_q=12, heads_k=12)).reason

`explain` never touches a tensor: patching, reports and the README's matrix are made from it. The
errors of calls with bad tensors are in checks.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops

CUDA_HEAD_DIMS = range(8, 257, 8)
KERNEL_HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # each serves the smaller ones down to the next
CUDA_DTYPES = (torch.float16, torch.bfloat16)
CPU_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CUDA_CAPABILITIES = ((9, 0),)


@dataclass(frozen=True)
class Request:
    """One attention call, described without its tensors."""

    device_type: str
    compute_capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    heads_q: int
    heads_k: int
    causal: bool = False
    dropout_p: float = 0.0
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    bias: bool = False
    sinks: bool = False
    deterministic: bool = False
    needs_grad: bool = False
    paged: bool = False

    @classmethod
    def of(cls, q: Tensor, k: Tensor, **options) -> Request:
        """The request of tensors in Transformers' layout, q (B, Hq, Sq, D) and k (B, Hkv, Sk, D).

        options: the fields from `causal` on.
        """
        capability = compute_capability(q.device)
        heads = q.shape[1], k.shape[1]
        return cls(q.device.type, capability, q.dtype, q.shape[-1], *heads, **options)


@dataclass(frozen=True)
class Support:
    """kernel: what runs, or None. Otherwise why not, the nearest that runs, and what to do."""

    kernel: str | None
    reason: str = ""
    nearest: str = ""
    next_step: str = ""

    @property
    def ok(self) -> bool:
        return self.kernel is not None

    def __str__(self) -> str:
        if self.ok:
            return self.kernel
        return f"{self.reason}. Nearest supported: {self.nearest}. Next step: {self.next_step}"


def explain(request: Request) -> Support:
    """The kernel that runs the request, or the first reason why none does."""
    r = request
    features = explain_features(
        window=r.window,
        causal=r.causal,
        softcap=r.softcap,
        alibi=r.alibi,
        bias=r.bias,
        sinks=r.sinks,
        paged=r.paged,
    )
    if refused := features or _shape(r):
        return refused
    if r.device_type == "cpu":
        if r.dtype not in CPU_DTYPES:
            return _no(
                f"dtype {dtype_name(r.dtype)} on the CPU",
                "float32, float64, bfloat16, float16",
                "cast q, k, v",
            )
        return Support("reference (CPU)" if r.dropout_p > 0 else "SDPA (CPU)")
    if r.device_type != "cuda":
        return _no(
            f"device type {r.device_type}",
            "cuda (Hopper), cpu",
            "move the tensors, or use attn_implementation='sdpa' there",
        )
    return _cuda(r)


def explain_features(
    *,
    window: tuple[int, int] = (-1, -1),
    causal: bool = False,
    softcap: float = 0.0,
    alibi: bool = False,
    bias: bool = False,
    sinks: bool = False,
    paged: bool = False,
) -> Support | None:
    """The first of the features that no kernel has yet, or None: what needs no tensor to see."""
    if not restricts_nothing(window, causal):
        return _no(
            f"a sliding window {window} is not there yet",
            "full attention (-1, -1) and causal (-1, 0)",
            "use attn_implementation='sdpa' for this model, or drop the window",
        )
    if softcap:
        return _no(
            f"softcap {softcap} is not there yet", "softcap=0.0", "use attn_implementation='eager'"
        )
    if alibi:
        return _no(
            "ALiBi slopes are not there yet", "alibi_slopes=None", "use attn_implementation='eager'"
        )
    if bias:
        return _no(
            "an additive bias (position bias, ALiBi, arbitrary mask) is not there yet",
            "causal, padding (key_start, key_len, key_bits) and packed sequences (cu_seqlens)",
            "use attn_implementation='sdpa' for this module",
        )
    if sinks:
        return _no(
            "attention sinks (s_aux) are not there yet",
            "s_aux=None",
            "use attn_implementation='eager' for this model",
        )
    if paged:
        return _no(
            "a paged KV cache (block_table) is not there yet",
            "block_table=None",
            "use contiguous keys",
        )
    return None


def _shape(r: Request) -> Support | None:
    if r.heads_k < 1 or r.heads_q % r.heads_k:
        return _no(
            f"{r.heads_q} query heads do not divide into {r.heads_k} key heads",
            "a multiple: equal (MHA), grouped (GQA) or one key head (MQA)",
            "check the head dimension of k and v",
        )
    if not 0.0 <= r.dropout_p < 1.0:
        return _no(
            f"dropout_p {r.dropout_p} is outside [0, 1)", "0 <= p < 1", "pass a probability below 1"
        )
    return None


def _cuda(r: Request) -> Support:
    if r.dtype not in CUDA_DTYPES:
        return _no(
            f"dtype {dtype_name(r.dtype)} on CUDA",
            "bfloat16, float16",
            "load the model with dtype=torch.bfloat16, or run it under torch.autocast",
        )
    if refused := _head_dim(r):
        return refused
    if r.compute_capability is not None and r.compute_capability not in CUDA_CAPABILITIES:
        major, minor = r.compute_capability
        return _no(
            f"compute capability {major}.{minor} is not there yet",
            "9.0 (Hopper: H100, H200)",
            "use attn_implementation='sdpa' on this GPU",
        )
    status = ops.library_status()
    if status.failed:
        return _no(
            f"the CUDA library is missing: {status.reason}",
            "the CPU",
            "run `hf-flashattn build`, then start anew",
        )
    return Support(f"sm90 d{min(d for d in KERNEL_HEAD_DIMS if d >= r.head_dim)}")


def _head_dim(r: Request) -> Support | None:
    sdpa = "use attn_implementation='sdpa' for this model"
    largest = max(CUDA_HEAD_DIMS)
    if r.head_dim > largest:
        return _no(f"head_dim {r.head_dim} on CUDA is not there yet", f"{largest}", sdpa)
    if r.head_dim not in CUDA_HEAD_DIMS:
        padded = next(d for d in CUDA_HEAD_DIMS if d > r.head_dim)
        return _no(
            f"head_dim {r.head_dim} is not a multiple of 8",
            f"{padded}",
            f"pad q, k and v with zeros to {padded}, with softmax_scale={r.head_dim}**-0.5, or "
            + sdpa,
        )
    return None


def _no(reason: str, nearest: str, next_step: str) -> Support:
    return Support(None, reason, nearest, next_step)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def restricts_nothing(window: tuple[int, int], causal: bool) -> bool:
    """Whether flash-attn's window (left, right), -1 for no limit, is plain full or causal."""
    left, right = window
    return left < 0 and (causal or right <= 0)


def refuse(support: Support | None) -> None:
    """Raise what `explain` or `explain_features` refused."""
    if support is not None and not support.ok:
        raise NotImplementedError(f"hf_flashattn: {support}")


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device; None elsewhere, and in a trace, which asks no device."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


_MARK = "_hf_flashattn_offsets"  # on the tensor object: (version, total, longest sequence)


def trust(cu_seqlens: Tensor, total: int, longest: int) -> Tensor:
    """Mark offsets whose values are known, because the caller made them or they have been read.

    total: the number of tokens they end at.  longest: no sequence is above it.
    """
    setattr(cu_seqlens, _MARK, (_version(cu_seqlens), total, longest))
    return cu_seqlens


def trusted(cu_seqlens: Tensor) -> tuple[int, int] | None:
    """(total, longest) of offsets that were marked and not written since; None if not known."""
    version, *known = getattr(cu_seqlens, _MARK, (None,))
    return tuple(known) if version == _version(cu_seqlens) else None


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
