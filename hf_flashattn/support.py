"""What runs where, and why not: the one place that knows the limits of the kernels.

    explain(Request("cuda", (9, 0), torch.bfloat16, head_dim=96, heads_q=12, heads_k=12)).reason

`explain` answers a question and never touches a tensor: patching, reports and the README's matrix are made from
it. `check_tensors` raises for input that cannot run, before any launch, with what was expected, what was got, the
nearest that is supported and the next step: TypeError and ValueError for calls that make no sense,
NotImplementedError for what is not there yet.

Reading cu_seqlens. That they start at 0, never fall and end at the number of tokens can only be seen in their
values, which on CUDA costs a sync. Each tensor is therefore read once: the result is kept on the tensor object and
holds until its version changes, so the layers of a model share one read. Nothing is read under torch.compile or
CUDA graph capture (the kernels stay inside the tensors whatever cu_seqlens say), nor for tensors that this package
made itself (`trust`). HF_FLASHATTN_CHECK=0 turns the reading off for CUDA tensors, =1 reads on every call.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops

CUDA_HEAD_DIMS = (64, 128)
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
    deterministic: bool = False
    needs_grad: bool = False
    paged: bool = False


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
        window=r.window, causal=r.causal, softcap=r.softcap, alibi=r.alibi, bias=r.bias, paged=r.paged
    )
    if refused := features or _shape(r):
        return refused
    if r.device_type == "cpu":
        if r.dtype not in CPU_DTYPES:
            return _no(f"dtype {_name(r.dtype)} on the CPU", "float32, float64, bfloat16, float16", "cast q, k, v")
        return Support("reference (CPU)" if r.dropout_p > 0 else "SDPA (CPU)")
    if r.device_type != "cuda":
        return _no(f"device type {r.device_type}", "cuda (Hopper), cpu", "move the tensors, or use SDPA there")
    return _cuda(r)


def explain_features(
    *,
    window: tuple[int, int] = (-1, -1),
    causal: bool = False,
    softcap: float = 0.0,
    alibi: bool = False,
    bias: bool = False,
    paged: bool = False,
) -> Support | None:
    """The first of the features that no kernel has yet, or None: the part of `explain` that needs no tensor."""
    if not restricts_nothing(window, causal):
        return _no(
            f"a sliding window {window} is not there yet",
            "full attention (-1, -1) and causal (-1, 0)",
            "use attn_implementation='sdpa' for this model, or drop the window",
        )
    if softcap:
        return _no(f"softcap {softcap} is not there yet", "softcap=0.0", "use attn_implementation='eager'")
    if alibi:
        return _no("ALiBi slopes are not there yet", "alibi_slopes=None", "use attn_implementation='eager'")
    if bias:
        return _no(
            "an additive bias or an arbitrary mask is not there yet",
            "causal, padding (key_start, key_len) and packed sequences (cu_seqlens)",
            "use attn_implementation='sdpa' for this module",
        )
    if paged:
        return _no("a paged KV cache (block_table) is not there yet", "block_table=None", "use contiguous keys")
    return None


def _shape(r: Request) -> Support | None:
    if r.heads_k < 1 or r.heads_q % r.heads_k:
        return _no(
            f"{r.heads_q} query heads do not divide into {r.heads_k} key heads",
            "a multiple: equal (MHA), grouped (GQA) or one key head (MQA)",
            "check the head dimension of k and v",
        )
    if not 0.0 <= r.dropout_p < 1.0:
        return _no(f"dropout_p {r.dropout_p} is outside [0, 1)", "0 <= p < 1", "pass a probability below 1")
    return None


def _cuda(r: Request) -> Support:
    if r.dtype not in CUDA_DTYPES:
        return _no(
            f"dtype {_name(r.dtype)} on CUDA",
            "bfloat16, float16",
            "load the model with dtype=torch.bfloat16, or run it under torch.autocast",
        )
    if r.head_dim not in CUDA_HEAD_DIMS:
        nearest = min(CUDA_HEAD_DIMS, key=lambda d: (abs(d - r.head_dim), d))
        return _no(f"head_dim {r.head_dim} on CUDA is not there yet", f"{nearest}", "use SDPA for this model")
    if r.compute_capability is not None and r.compute_capability not in CUDA_CAPABILITIES:
        major, minor = r.compute_capability
        return _no(
            f"compute capability {major}.{minor} is not there yet", "9.0 (Hopper: H100, H200)", "use SDPA on this GPU"
        )
    status = ops.library_status()
    if status.failed:
        return _no(f"the CUDA library is missing: {status.reason}", "the CPU", "hf-flashattn doctor")
    return Support(f"sm90 d{r.head_dim}")


def _no(reason: str, nearest: str, next_step: str) -> Support:
    return Support(None, reason, nearest, next_step)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def restricts_nothing(window: tuple[int, int], causal: bool) -> bool:
    """Whether a flash-attn window (left, right), -1 meaning unlimited, is plain full or causal attention."""
    left, right = window
    return left < 0 and (causal or right <= 0)


def refuse(support: Support | None) -> None:
    """Raise what `explain` or `explain_features` refused."""
    if support is not None and not support.ok:
        raise NotImplementedError(f"hf_flashattn: {support}")


# -------------------------------------------------------------------------------------------------- the tensors


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
    dropout_p: float = 0.0,
) -> None:
    """Raise TypeError, ValueError or NotImplementedError for a call that must not be launched.

    Shapes as in reference.attention_reference.
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
        _bad(f"expected k and v of one shape, got {_shapes(k, v)}", "equal shapes", "check the packing of k and v")
    if qs[-1] != ks[-1] or (not packed and qs[0] != ks[0]):
        _bad(
            f"expected q and k with one batch size and one head_dim, got {_shapes(q, k)}",
            "differing seqlen and heads only",
            "check that the layout is (batch, seqlen, heads, head_dim), not (batch, heads, seqlen, head_dim)",
        )
    device, dtype = q.device, q.dtype
    if k.device != device or v.device != device:
        _bad(f"expected q, k, v on one device, got {device}, {k.device}, {v.device}", "one device", "move k and v")
    if k.dtype != dtype or v.dtype != dtype:
        names = ", ".join(_name(x.dtype) for x in (q, k, v))
        _bad(f"expected q, k, v of one dtype, got {names}", "one dtype", "cast them, or use autocast", TypeError)
    _check_kernel(q, ks[-2], dropout_p)
    if device.type == "cuda":
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_strides(name, x)
    if packed:
        _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_start, key_len)
    elif key_start is not None or key_len is not None:
        for name, x in (("key_start", key_start), ("key_len", key_len)):
            if x is not None:
                _check_index(name, x, device, (qs[0],), "one entry for each row of the batch")


def _check_kernel(q: Tensor, heads_k: int, dropout_p: float) -> None:
    """explain() for q, after a quick look at what is usual."""
    device_type, dtype, (heads, head_dim) = q.device.type, q.dtype, q.shape[-2:]
    tracing = torch.compiler.is_compiling()
    if 0.0 <= dropout_p < 1.0 and heads_k > 0 and heads % heads_k == 0:
        if device_type == "cpu" and dtype in CPU_DTYPES:
            return
        if device_type == "cuda" and dtype in CUDA_DTYPES and head_dim in CUDA_HEAD_DIMS:
            # A trace knows no device; the library asks it again at every launch.
            if tracing or _capability(q.device.index) in CUDA_CAPABILITIES:
                return
        if device_type == "meta":
            return
    capability = _capability(q.device.index) if device_type == "cuda" and not tracing else None
    support = explain(Request(device_type, capability, dtype, head_dim, heads, heads_k, dropout_p=dropout_p))
    if not 0.0 <= dropout_p < 1.0 or heads_k < 1 or heads % heads_k:
        raise ValueError(f"hf_flashattn: {support}")
    refuse(support)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def check_strides(name: str, x: Tensor) -> None:
    """Raise for a layout that the kernels cannot load without a copy (TMA: 16-byte strides and base).

    Expanded dimensions (stride 0) are copied by the op, and the stride of a dimension of size 1 has no meaning.
    """
    *outer, last = x.stride()
    if last != 1 and x.shape[-1] > 1:
        _bad_layout(name, x)
    for size, stride in zip(x.shape, outer):
        if stride % 8 and size > 1:
            _bad_layout(name, x)
    if not torch.compiler.is_compiling() and x.data_ptr() % 16:
        _bad_layout(name, x)


def _bad_layout(name: str, x: Tensor) -> None:
    aligned = torch.compiler.is_compiling() or x.data_ptr() % 16 == 0
    _bad(
        f"{name}: expected head_dim contiguous, the other strides multiples of 8 elements and data aligned to "
        f"16 bytes, got shape {tuple(x.shape)}, strides {x.stride()}{'' if aligned else ', unaligned data'}",
        "views of such tensors: transpose(1, 2) of (batch, heads, seqlen, head_dim), slices of a fused QKV",
        f"{name} = {name}.contiguous()",
    )


def _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_start, key_len) -> None:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        _bad("expected cu_seqlens_q and cu_seqlens_k, got one of them", "both", "pass the same tensor twice")
    if key_start is not None or key_len is not None:
        _bad("key_start and key_len: expected None with cu_seqlens", "either", "say the lengths in cu_seqlens")
    shape = cu_seqlens_q.shape
    if len(shape) != 1 or shape[0] < 1:
        _bad(f"cu_seqlens_q: expected shape (batch + 1,), got {tuple(shape)}", "(1,) and more", "prepend a 0")
    for name, cu, x, longest in (
        ("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k),
    ):
        _check_index(name, cu, q.device, tuple(shape), "offsets: one entry more than sequences, starting with 0")
        if not torch.compiler.is_compiling():
            _check_values(name, cu, x.shape[0], longest)


def _check_index(name: str, x: Tensor, device: torch.device, shape: tuple[int, ...], meaning: str) -> None:
    if x.dtype != torch.int32:
        _bad(f"{name}: expected dtype int32, got {_name(x.dtype)}", "int32", f"{name}.to(torch.int32)", TypeError)
    if x.device != device:
        _bad(f"{name}: expected on the device of q ({device}), got {x.device}", f"{device}", f"{name}.to(q.device)")
    if tuple(x.shape) != shape or (shape[0] > 1 and x.stride(0) != 1):
        _bad(
            f"{name}: expected a contiguous tensor of shape {shape}, got {tuple(x.shape)} with strides {x.stride()}",
            meaning,
            f"check the batch size, or {name}.contiguous()",
        )


# ------------------------------------------------------------------------------------------------- cu_seqlens

_MARK = "_hf_flashattn_checked"  # on the tensor object: (version, total, longest sequence)


def trust(cu_seqlens: Tensor, total: int, longest: int) -> Tensor:
    """Mark offsets that the caller has made itself as checked: `total` tokens, no sequence above `longest`."""
    setattr(cu_seqlens, _MARK, (_version(cu_seqlens), total, longest))
    return cu_seqlens


def _check_values(name: str, cu: Tensor, total: int, longest: int) -> None:
    """Raise unless cu starts at 0, never falls, ends at total, and no sequence is above longest."""
    policy = os.environ.get("HF_FLASHATTN_CHECK", "")
    known = getattr(cu, _MARK, None)
    if known and known[0] == _version(cu) and not (policy == "1" and cu.is_cuda):
        _, end, actual = known
    else:
        if type(cu) is not Tensor or cu.is_meta:
            return  # a fake or a wrapper: there are no values to read
        if cu.is_cuda and (policy == "0" or torch.cuda.is_current_stream_capturing()):
            return
        offsets = cu.tolist()
        lengths = [b - a for a, b in zip(offsets, offsets[1:])]
        end, actual = offsets[-1], max(lengths, default=0)
        if offsets[0] != 0 or min(lengths, default=0) < 0:
            _bad(f"{name}: expected offsets that start at 0 and never fall, got {_some(offsets)}", _CU, _CU_NEXT)
        setattr(cu, _MARK, (_version(cu), end, actual))
    if end != total:
        _bad(f"{name}: expected to end at the number of tokens, {total}, got {end}", _CU, _CU_NEXT)
    if actual > longest:
        _bad(
            f"max_seqlen{name[-2:]}: expected at least the longest sequence, {actual}, got {longest}",
            f"{actual}",
            "pass the longest length; a larger value is allowed",
        )


_CU = "the running sum of the lengths, (0, n0, n0 + n1, ..., total)"
_CU_NEXT = "F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))"


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _some(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _bad(got: str, nearest: str, next_step: str, error: type[Exception] = ValueError) -> None:
    raise error(f"hf_flashattn: {got}. Nearest supported: {nearest}. Next step: {next_step}")
