"""The ops: the library, fakes, autograd, CPU implementations.

    hf_flashattn::forward, backward              every call; what torch.compile sees
    hf_flashattn::dense_forward, dense_backward  a dense call with few arguments, also of tensors
                                                 with heads first: what eager calls pass through,
                                                 but for those with key_bits, which are for graphs
    hf_flashattn::dense_inference                the same where no gradient is asked for: the output
                                                 alone, which never has one

Where the schemas come from. The compiled library defines them (kernels/torch_binding.cpp) and is
loaded at import if it is there. If it is not, they are defined here with the same text, so that the
CPU, fakes, torch.compile and opcheck work; the library that the first CUDA call then builds is
told, through an environment variable that holds this process's id, to register its CUDA
implementations only. So op objects that were taken early, compiled graphs among them, stay valid,
and loading the plain file with torch.ops.load_library works as with any other library.

Environment: HF_FLASHATTN_LIBRARY=/path/to/libhf_flashattn.so overrides the search and the build.
"""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import build, cpu

FORWARD_SCHEMA = (
    "forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? key_start, Tensor? key_len, Tensor? key_bits, Tensor? rng_state, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
    "bool deterministic) -> (Tensor out, Tensor lse)"
)
BACKWARD_SCHEMA = (
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_start, Tensor? key_len, "
    "Tensor? key_bits, Tensor? rng_state, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float dropout_p, float softmax_scale, bool causal, bool deterministic) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)
DENSE_FORWARD_SCHEMA = (
    "dense_forward(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal=False, "
    "bool heads_first=False, Tensor? key_start=None, Tensor? key_len=None, float dropout_p=0.0, "
    "Tensor? rng_state=None, bool deterministic=False) -> (Tensor out, Tensor lse)"
)
DENSE_BACKWARD_SCHEMA = (
    "dense_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float softmax_scale, bool causal=False, bool heads_first=False, Tensor? key_start=None, "
    "Tensor? key_len=None, float dropout_p=0.0, Tensor? rng_state=None, bool deterministic=False) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)
DENSE_INFERENCE_SCHEMA = (
    "dense_inference(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal=False, "
    "bool heads_first=False, Tensor? key_start=None, Tensor? key_len=None) -> Tensor"
)
# Read by schemas_are_defined() in torch_binding.cpp.
_DEFINED_BY = "HF_FLASHATTN_SCHEMAS_DEFINED_BY"


# -------------------------------------------------------------------------------------- the library


@dataclass(frozen=True)
class LibraryStatus:
    """What is known of the compiled library.

    path: the loaded library, or None.
    reason: why there is none, and the next step; empty when loaded.
    failed: it was wanted and is not to be had here, as opposed to not built yet.
    """

    path: Path | None
    reason: str
    failed: bool = False

    @property
    def loaded(self) -> bool:
        return self.path is not None


_lock = threading.Lock()
_status = LibraryStatus(None, "not asked for yet")
_tried = 0  # 1: looked for, 2: also tried to build
_schemas_in_python = False


def library_status() -> LibraryStatus:
    """The state as it is: looks for nothing, builds nothing."""
    return _status


def load_library(
    *, build_if_missing: bool = True, retry: bool = False, verbose: bool = True
) -> LibraryStatus:
    """Load the compiled library once a process, building it first where that is allowed.

    Never raises: the status says what is missing. What failed once is not tried again unless
    retry, for a build takes minutes and callers that fall back ask for every call.
    """
    global _status, _tried
    wanted = 2 if build_if_missing else 1
    if _status.loaded or (_tried >= wanted and not retry):
        return _status
    with _lock:
        if not _status.loaded and (_tried < wanted or retry):
            try:
                path = _find(build_if_missing, verbose)
                _status = (
                    _load(path)
                    if path
                    else LibraryStatus(None, "not built yet; next step: hf-flashattn build")
                )
            except (build.BuildError, OSError) as error:
                _status = LibraryStatus(None, str(error), failed=True)
                if build_if_missing:  # somebody wants it now, who may fall back
                    warnings.warn(f"hf_flashattn: no CUDA kernels. {error}", stacklevel=2)
            _tried = wanted
    return _status


def _find(build_if_missing: bool, verbose: bool) -> Path | None:
    if chosen := os.environ.get("HF_FLASHATTN_LIBRARY"):
        if not Path(chosen).is_file():
            raise OSError(
                f"HF_FLASHATTN_LIBRARY: expected the path of libhf_flashattn.so, got {chosen!r}, "
                "which is no file. Nearest supported: the library that hf-flashattn build prints. "
                "Next step: correct the variable, or unset it to search and build."
            )
        return Path(chosen)
    return build.find_or_build(verbose=verbose) if build_if_missing else build.library_path()


def _load(path: Path) -> LibraryStatus:
    if _schemas_in_python:
        os.environ[_DEFINED_BY] = str(os.getpid())
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise OSError(
            f"{path} does not load into torch {torch.__version__}: {error}. "
            "Nearest supported: torch >= 2.11 on Linux. Next step: upgrade torch, or rebuild "
            "with: hf-flashattn build --force"
        ) from error
    finally:
        os.environ.pop(_DEFINED_BY, None)
    return LibraryStatus(path, "")


def missing_library() -> str:
    """Why no CUDA call can run here, or "". Loads the library, or builds it, the first time."""
    # A trace must not read the status, which it would guard on while it changes.
    if torch.compiler.is_compiling() or not _status.loaded:
        return _load_or_say_why()
    return ""


@torch.compiler.assume_constant_result
def _load_or_say_why() -> str:
    return load_library().reason


def _library_for_cuda() -> None:
    """Load or build the library before the first CUDA call; raises if there is none."""
    if missing := missing_library():
        raise RuntimeError(f"hf_flashattn: the CUDA kernels are not available. {missing}")


# --------------------------------------------------------------------------------------- definition

load_library(build_if_missing=False)
_registry = torch.library.Library("hf_flashattn", "FRAGMENT")
if not _status.loaded:
    for _schema in (
        FORWARD_SCHEMA,
        BACKWARD_SCHEMA,
        DENSE_FORWARD_SCHEMA,
        DENSE_BACKWARD_SCHEMA,
        DENSE_INFERENCE_SCHEMA,
    ):
        _registry.define(_schema)
    _schemas_in_python = True
_forward = torch.ops.hf_flashattn.forward.default
_backward = torch.ops.hf_flashattn.backward.default
_dense_forward = torch.ops.hf_flashattn.dense_forward.default
_dense_backward = torch.ops.hf_flashattn.dense_backward.default
_dense_inference = torch.ops.hf_flashattn.dense_inference.default

for _name in ("forward", "backward", "dense_forward", "dense_backward", "dense_inference"):
    _registry.impl(_name, getattr(cpu, _name), "CPU")


@torch.library.register_fake("hf_flashattn::forward", lib=_registry)
def _forward_fake(q, k, v, cu_seqlens_q, *_):
    tokens, heads = q.shape[:-2], q.shape[-2]
    lse_shape = (*tokens[:-1], heads, tokens[-1])  # dense (B, Hq, Sq), packed (Hq, Tq)
    return q.new_empty(q.shape), q.new_empty(
        lse_shape, dtype=torch.promote_types(q.dtype, torch.float32)
    )


@torch.library.register_fake("hf_flashattn::backward", lib=_registry)
def _backward_fake(dout, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("hf_flashattn::dense_forward", lib=_registry)
def _dense_forward_fake(q, k, v, softmax_scale, causal=False, heads_first=False, *_):
    return _forward_fake(q.transpose(1, 2) if heads_first else q, k, v, None)


@torch.library.register_fake("hf_flashattn::dense_inference", lib=_registry)
def _dense_inference_fake(q, k, v, softmax_scale, causal=False, heads_first=False, *_):
    return _dense_forward_fake(q, k, v, softmax_scale, causal, heads_first)[0]


@torch.library.register_fake("hf_flashattn::dense_backward", lib=_registry)
def _dense_backward_fake(dout, q, k, v, out, lse, scale, causal=False, heads_first=False, *_):
    if not heads_first:
        return _backward_fake(dout, q, k, v)
    grads = _backward_fake(dout, *(x.transpose(1, 2) for x in (q, k, v)))
    return tuple(x.transpose(1, 2) for x in grads)


class _Attention(torch.autograd.Function):
    """The autograd node of forward. Inputs: q, k, v, and the op's other arguments as a tuple."""

    @staticmethod
    def forward(ctx, q, k, v, others):
        out, lse = _below_autograd(_forward, (q, k, v, *others))
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # else zeros are made for lse in every step
        ctx.save_for_backward(q, k, v, out, lse, *others[:6])
        ctx.flags = others[6:]
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return None, None, None, None
        return *_call_backward((dout, *ctx.saved_tensors, *ctx.flags)), None


# Function.apply is Python around this, for transforms and setup_context, at 2 us a call.
_record = super(torch.autograd.Function, _Attention).apply


class _Dense(torch.autograd.Function):
    """The node of an eager dense call. others: what follows v in the schema, as far as given.

    One output, for a second costs as much as the guard against the autograd kernels does.
    """

    @staticmethod
    def forward(ctx, q, k, v, others, deterministic):
        out, lse = _below_autograd(_dense_forward, (q, k, v, *others))
        flags = (*others, *_DENSE_DEFAULTS[len(others) :])
        softmax_scale, causal, heads_first, key_start, key_len, dropout_p, rng_state = flags
        ctx.save_for_backward(q, k, v, out, lse, key_start, key_len, rng_state)
        ctx.flags = (softmax_scale, causal, heads_first, dropout_p, deterministic)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, key_start, key_len, rng_state = ctx.saved_tensors
        softmax_scale, causal, heads_first, dropout_p, deterministic = ctx.flags
        tensors = (dout, q, k, v, out, lse)
        options = (softmax_scale, causal, heads_first)
        if deterministic or dropout_p > 0 or key_start is not None or key_len is not None:
            options += (key_start, key_len, dropout_p, rng_state, deterministic)
        return *_call_backward(tensors + options, _dense_backward), None, None


_DENSE_DEFAULTS = (None, False, False, None, None, 0.0, None)  # of a call's others
_record_dense = super(torch.autograd.Function, _Dense).apply


class _Gradient(torch.autograd.Function):
    """The autograd node of backward: a second derivative is an error, not silently zero."""

    @staticmethod
    def forward(ctx, op, *args):
        return _below_autograd(op, args)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "hf_flashattn: the gradient of a gradient is not there (create_graph=True reached "
            "attention). Nearest supported: first derivatives. Next step: use "
            "attn_implementation='eager' for this model"
        )


def _below_autograd(op, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op._op(*args)  # what op(*args) calls, without a Python frame in between


def _forward_autograd(*args):
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:3]):
        return _Attention.apply(*args[:3], args[3:])
    return _below_autograd(_forward, args)


def _backward_autograd(*args):
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:6]):
        return _Gradient.apply(_backward, *args)
    return _below_autograd(_backward, args)


def _dense_forward_autograd(
    q,
    k,
    v,
    softmax_scale,
    causal=False,
    heads_first=False,
    key_start=None,
    key_len=None,
    dropout_p=0.0,
    rng_state=None,
    deterministic=False,
):
    others = (softmax_scale, causal, heads_first, key_start, key_len, dropout_p, rng_state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        if heads_first:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        hidden = (None, None, key_start, key_len, None, rng_state, 0, 0)
        return _forward(q, k, v, *hidden, dropout_p, softmax_scale, causal, deterministic)
    return _below_autograd(_dense_forward, (q, k, v, *others))


def _dense_backward_autograd(*args):
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:6]):
        return _Gradient.apply(_dense_backward, *args)
    return _below_autograd(_dense_backward, args)


# torch.library.register_autograd does the same in general, at 50 us a call more than this.
_registry.impl("forward", _forward_autograd, "Autograd")
_registry.impl("backward", _backward_autograd, "Autograd")
_registry.impl("dense_forward", _dense_forward_autograd, "Autograd")
_registry.impl("dense_backward", _dense_backward_autograd, "Autograd")
_registry.impl("dense_inference", torch.library.fallthrough_kernel, "Autograd")


# ---------------------------------------------------------------------------------------- the calls


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """hf_flashattn::forward, differentiable in q, k, v: (out, lse).

    Shapes as in reference.attention_reference; nothing is checked here (see checks.py).
    deterministic: what backward will do.
    """
    hidden = (cu_seqlens_q, cu_seqlens_k, key_start, key_len, key_bits)
    tensors = (q, k, v, *hidden, rng_state)
    flags = (max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, deterministic)
    return call_forward(tensors + flags)


def call_forward(args: tuple) -> tuple[Tensor, Tensor]:
    """forward with the schema's arguments, by the shortest way that is right.

    The dispatcher enters Python's autograd kernel whenever q, k or v is an ordinary tensor, at 5 us
    and more a call. What that kernel would decide is decided here instead; subclasses and traces
    take the long way.
    """
    q, k, v = args[:3]
    if torch.compiler.is_compiling():
        if q.is_cuda:
            _library_for_cuda()
        return _forward(*args)
    if _status.path is None and q.is_cuda:
        _library_for_cuda()
    if torch.is_grad_enabled():
        ordinary = type(q) is type(k) is type(v) is Tensor
        if not ordinary or torch._C._are_functorch_transforms_active():
            return _forward(*args)
        if q.requires_grad or k.requires_grad or v.requires_grad:
            return _record(q, k, v, args[3:])
    return _below_autograd(_forward, args)


def call_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    heads_first: bool,
    key_start: Tensor | None,
    key_len: Tensor | None,
    dropout_p: float,
    deterministic: bool,
) -> Tensor:
    """A dense call outside traces, by the shortest way that is right: out (B, Sq, Hq, D).

    heads_first: q (B, Hq, Sq, D), k and v (B, Hkv, Sk, D), of any strides, instead of the layouts
        and strides of flash_attn_func. Dropout's state is drawn here.
    """
    if _status.path is None and q.is_cuda:
        _library_for_cuda()
    if dropout_p > 0:
        state = new_rng_state(q.device)
        others = (softmax_scale, causal, heads_first, key_start, key_len, dropout_p, state)
    elif key_start is None and key_len is None:
        others = (softmax_scale, causal, heads_first) if causal or heads_first else (softmax_scale,)
    else:
        others = (softmax_scale, causal, heads_first, key_start, key_len)
    if torch.is_grad_enabled():
        ordinary = type(q) is type(k) is type(v) is Tensor
        if not ordinary or torch._C._are_functorch_transforms_active():
            options = (*others, *_DENSE_DEFAULTS[len(others) :], deterministic)
            return _dense_forward(q, k, v, *options)[0]
        if q.requires_grad or k.requires_grad or v.requires_grad:
            return _record_dense(q, k, v, others, deterministic)
    if dropout_p > 0:
        return _below_autograd(_dense_forward, (q, k, v, *others))[0]
    return _dense_inference._op(q, k, v, *others)


def checks_itself(q: Tensor) -> bool:
    """Whether the library sees q as it is, and refuses what it cannot run."""
    return _status.path is not None and q.is_cuda and type(q) is Tensor


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    key_start: Tensor | None = None,
    key_len: Tensor | None = None,
    key_bits: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """hf_flashattn::backward: dq, dk, dv from forward's results and its own arguments."""
    if q.is_cuda:
        _library_for_cuda()
    hidden = (cu_seqlens_q, cu_seqlens_k, key_start, key_len, key_bits)
    tensors = (dout, q, k, v, out, lse, *hidden, rng_state)
    flags = (max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, deterministic)
    return _call_backward(tensors + flags)


def _call_backward(args: tuple, op=_backward) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    return _below_autograd(op, args)


def new_rng_state(device: torch.device) -> Tensor:
    """Seed and offset of one call's dropout, int64 (2,), from the device's generator: no sync.

    torch.manual_seed, gradient checkpointing and CUDA graphs thereby replay the mask.
    """
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
