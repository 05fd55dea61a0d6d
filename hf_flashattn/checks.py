"""Errors for tensors that cannot run, before any launch.

Each says what was expected, what was got, the nearest that is supported and the next step:
TypeError and ValueError for calls that are wrong, NotImplementedError for what is not there yet.

Reading cu_seqlens. That they start at 0, never fall and end at the number of tokens can only be
seen in their values, which on CUDA costs a sync. Each tensor is therefore read once: the result is
kept on the tensor object and holds until its version changes, so the layers of a model share one
read. Nothing is read under torch.compile or CUDA graph capture (the kernels stay inside the tensors
whatever cu_seqlens say), nor for tensors that this package made itself (support.trust).
HF_FLASHATTN_CHECK=0 turns the reading off for CUDA tensors, =1 reads on every call.
"""

from __future__ import annotations

import itertools
import os

import torch
from torch import Tensor

from .key_bits import words_of
from .support import (
    CPU_DTYPES,
    CUDA_CAPABILITIES,
    CUDA_DTYPES,
    CUDA_HEAD_DIMS,
    Request,
    compute_capability,
    dtype_name,
    explain,
    refuse,
    trust,
    trusted,
)


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: Tensor | None = None,
    dropout_p: float = 0.0,
    any_strides: bool = False,
) -> None:
    """Raise TypeError, ValueError or NotImplementedError for a call that must not be launched.

    Shapes as in reference.attention_reference.  any_strides: what cannot be loaded is copied.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    qs, ks = q.shape, k.shape
    if len(qs) != (3 if packed else 4) or len(ks) != len(qs):
        layout = "(total, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
        _bad(
            f"expected q, k, v of shape {layout}, got {_shapes(q, k, v)}",
            "dense calls without cu_seqlens, packed ones with cu_seqlens_q and cu_seqlens_k",
            "call flash_attn_func for 4 dimensions, flash_attn_varlen_func for 3",
        )
    if ks != v.shape:
        _bad(
            f"expected k and v of one shape, got {_shapes(k, v)}",
            "equal shapes",
            "check the packing of k and v",
        )
    if qs[-1] != ks[-1] or (not packed and qs[0] != ks[0]):
        _bad(
            f"expected q and k with one batch size and one head_dim, got {_shapes(q, k)}",
            "differing seqlen and heads only",
            "check that the layout is (batch, seqlen, heads, head_dim): transpose(1, 2) if not",
        )
    device, dtype = q.device, q.dtype
    if k.device != device or v.device != device:
        _bad(
            f"expected q, k, v on one device, got {device}, {k.device}, {v.device}",
            "one device",
            "move k and v",
        )
    if k.dtype != dtype or v.dtype != dtype:
        names = ", ".join(dtype_name(x.dtype) for x in (q, k, v))
        _bad(
            f"expected q, k, v of one dtype, got {names}",
            "one dtype",
            "cast them, or use autocast",
            TypeError,
        )
    _check_kernel(q, ks[-2], dropout_p)
    if device.type == "cuda" and not any_strides:
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_strides(name, x)
    if packed:
        keys = (key_start, key_len, key_bits)
        _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, keys)
    elif key_start is not None or key_len is not None or key_bits is not None:
        for name, x in (("key_start", key_start), ("key_len", key_len)):
            if x is not None:
                _check_index(name, x, device, (qs[0],), "one entry for each row of the batch")
        if key_bits is not None:
            if key_start is None or key_len is None:
                _bad(
                    "key_bits: expected key_start and key_len with it, got one of them or none",
                    "all three: the first kept key, how many from it to the last, a bit for each",
                    _BITS_NEXT,
                )
            shape = (qs[0], words_of(ks[1]))
            _check_index("key_bits", key_bits, device, shape, "a bit for each key", _BITS_NEXT)


def _check_kernel(q: Tensor, heads_k: int, dropout_p: float) -> None:
    """explain() for q, after a quick look at what is usual."""
    device_type, dtype, (heads, head_dim) = q.device.type, q.dtype, q.shape[-2:]
    capability = compute_capability(q.device)
    if 0.0 <= dropout_p < 1.0 and heads_k > 0 and heads % heads_k == 0:
        if device_type == "cpu" and dtype in CPU_DTYPES:
            return
        # A trace has no capability; the library asks for it at every launch.
        if (
            device_type == "cuda"
            and dtype in CUDA_DTYPES
            and head_dim in CUDA_HEAD_DIMS
            and (capability is None or capability in CUDA_CAPABILITIES)
        ):
            return
        if device_type == "meta":
            return
    support = explain(
        Request(device_type, capability, dtype, head_dim, heads, heads_k, dropout_p=dropout_p)
    )
    if not 0.0 <= dropout_p < 1.0 or heads_k < 1 or heads % heads_k:
        raise ValueError(f"hf_flashattn: {support}")
    refuse(support)


def check_strides(name: str, x: Tensor) -> None:
    """Raise for a layout that the kernels cannot load without a copy (TMA: 16-byte strides, base).

    Expanded dimensions (stride 0) are copied by the op, and the stride of a dimension of size 1 has
    no meaning.
    """
    *outer, last = x.stride()
    fits = last == 1 or x.shape[-1] == 1
    for size, stride in zip(x.shape, outer, strict=False):
        fits = fits and (stride % 8 == 0 or size == 1)
    # Traces and fakes have no data; the op looks at the address again.
    unaligned = not torch.compiler.is_compiling() and type(x) is Tensor and x.data_ptr() % 16
    if not fits or unaligned:
        _bad(
            f"{name}: expected head_dim contiguous, the other strides multiples of 8 elements and "
            f"data aligned to 16 bytes, got shape {tuple(x.shape)}, strides {x.stride()}"
            f"{', unaligned data' if unaligned else ''}",
            "views such as transpose(1, 2) of (batch, heads, seqlen, head_dim), or of a fused QKV",
            f"{name} = {name}.contiguous()",
        )


_BITS_NEXT = "key_start, key_len, key_bits = hf_flashattn.key_bits_of(mask)"


def _check_packed(
    q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, keys: tuple[Tensor | None, ...]
) -> None:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        _bad(
            "expected cu_seqlens_q and cu_seqlens_k, got one of them",
            "both",
            "pass the same tensor twice",
        )
    if any(x is not None for x in keys):
        _bad(
            "expected cu_seqlens alone, got key_start, key_len or key_bits with them",
            "one of the two ways to say what is real",
            "say the lengths in cu_seqlens",
        )
    shape = cu_seqlens_q.shape
    if len(shape) != 1 or shape[0] < 1:
        _bad(
            f"cu_seqlens_q: expected shape (batch + 1,), got {tuple(shape)}",
            "(1,) and more",
            "prepend a 0",
        )
    for name, cu, x, longest in (
        ("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k),
    ):
        _check_index(
            name,
            cu,
            q.device,
            tuple(shape),
            "offsets: one entry more than sequences, starting with 0",
        )
        if not torch.compiler.is_compiling():
            _check_values(name, cu, x.shape[0], longest)


def _check_index(
    name: str,
    x: Tensor,
    device: torch.device,
    shape: tuple[int, ...],
    meaning: str,
    next_step: str = "",
) -> None:
    if x.dtype != torch.int32:
        _bad(
            f"{name}: expected dtype int32, got {dtype_name(x.dtype)}",
            "int32",
            next_step or f"{name}.to(torch.int32)",
            TypeError,
        )
    if x.device != device:
        _bad(
            f"{name}: expected on the device of q ({device}), got {x.device}",
            f"{device}",
            f"{name}.to(q.device)",
        )
    if tuple(x.shape) != shape or (shape[-1] > 1 and x.stride(-1) != 1):
        _bad(
            f"{name}: expected a contiguous tensor of shape {shape}, got {tuple(x.shape)} with "
            f"strides {x.stride()}",
            meaning,
            next_step or f"check the batch size, or {name}.contiguous()",
        )


# --------------------------------------------------------------------------------------- cu_seqlens


def values_are_known(cu: Tensor, x: Tensor, longest: int) -> bool:
    """Whether cu has been read or made here, and fits x (total, ...) and the longest sequence."""
    known = trusted(cu)
    return known is not None and x.shape[:1] == (known[0],) and known[1] <= longest


def _check_values(name: str, cu: Tensor, total: int, longest: int) -> None:
    """Raise unless cu starts at 0, never falls, ends at total, and no sequence is above longest."""
    policy = os.environ.get("HF_FLASHATTN_CHECK", "")
    known = trusted(cu)
    if known and not (policy == "1" and cu.is_cuda):
        end, actual = known
    else:
        if type(cu) is not Tensor or cu.is_meta:
            return  # a fake or a wrapper: there are no values to read
        if cu.is_cuda and (policy == "0" or torch.cuda.is_current_stream_capturing()):
            return
        offsets = cu.tolist()
        lengths = [b - a for a, b in itertools.pairwise(offsets)]
        end, actual = offsets[-1], max(lengths, default=0)
        if offsets[0] != 0 or min(lengths, default=0) < 0:
            _bad(
                f"{name}: expected offsets that start at 0 and never fall, got {_some(offsets)}",
                _CU,
                _CU_NEXT,
            )
        trust(cu, end, actual)
    if end != total:
        _bad(f"{name}: expected to end at the number of tokens, {total}, got {end}", _CU, _CU_NEXT)
    if actual > longest:
        _bad(
            f"max_seqlen{name[-2:]}: expected the longest length, {actual}, or more, got {longest}",
            f"{actual}",
            "pass the longest length; a larger value is allowed",
        )


_CU = "the running sum of the lengths, (0, n0, n0 + n1, ..., total)"
_CU_NEXT = "F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))"


def _some(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _bad(got: str, nearest: str, next_step: str, error: type[Exception] = ValueError) -> None:
    raise error(f"hf_flashattn: {got}. Nearest supported: {nearest}. Next step: {next_step}")
