"""What may be done to scores that are not computed, operation by operation.

A rule gets the torch function, its name and its arguments and returns the Deferred of the result,
or NotImplemented for what the notes cannot express. It serves every spelling of an operation: a
function of torch or torch.nn.functional, a method, an operator, the method in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_flashattn.families.deferred import (
    LOWEST,
    OPERATIONS,
    PRODUCTS,
    Addend,
    Deferral,
    Deferred,
    Hidden,
    MaskView,
    Notes,
    Operation,
)


def rule(*names: str) -> Callable[[Callable], Callable]:
    def enter(function: Callable) -> Callable:
        for name in names:
            for spelling, in_place in (
                *((name, False), (f"__{name}__", False)),
                *((f"{name}_", True), (f"__i{name}__", True)),
            ):
                for home in (torch, Tensor, F):
                    if callable(found := getattr(home, spelling, None)):
                        OPERATIONS[found] = Operation(name, function, in_place)
        return function

    return enter


for _name in ("matmul", "bmm", "baddbmm", "einsum"):
    for _spelling in (_name, f"__{_name}__"):
        for _home in (torch, Tensor):
            if hasattr(_home, _spelling):
                PRODUCTS[getattr(_home, _spelling)] = _name


# ---- the beginning: query @ key^T ----------------------------------------------------------------

_BATCHED_PRODUCT = re.compile(r"(\w+)(\w)(\w),\1\3(\w)->\1\2\4")
_TRANSPOSED_PRODUCT = re.compile(r"(\w+)(\w)(\w),\1(\w)\3->\1\2\4")  # q k^T without a transpose


def begin(
    run: Deferral, function: Callable, name: str, args: tuple, kwargs: dict
) -> Deferred | None:
    """The scores that a product of two tensors stands for, or None if it is another product."""
    addends: tuple[Addend, ...] = ()
    scaling = 1.0
    if name == "baddbmm":
        bias, query, key = _given(args, kwargs, ("input", "batch1", "batch2"))
        beta, scaling = kwargs.get("beta", 1), float(kwargs.get("alpha", 1))
        if not run.zeros and beta != 0:
            addends = (Addend(bias, 3, float(beta)),)
    elif name == "einsum":
        operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        letters = args[0].replace(" ", "")
        transposed = _TRANSPOSED_PRODUCT.fullmatch(letters) is not None
        if len(operands) != 2 or not (transposed or _BATCHED_PRODUCT.fullmatch(letters)):
            return None
        query, key = operands
        key = key.transpose(-2, -1) if transposed and isinstance(key, Tensor) else key
    else:
        query, key = _given(args, kwargs, ("input", "mat2" if name == "bmm" else "other"))
    if not (isinstance(query, Tensor) and isinstance(key, Tensor)):
        return None
    if query.dim() not in (3, 4) or key.dim() != query.dim():
        return None
    shape = (*query.shape[:-1], key.shape[-1])
    notes = Notes(query, key, scaling, addends)
    return Deferred(run, notes, shape, query.dtype, (function, args, kwargs))


def _given(args: tuple, kwargs: dict, names: tuple[str, ...]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


# ---- what may be done to the scores --------------------------------------------------------------


def _next(
    function: Callable,
    args: tuple,
    kwargs: dict,
    of: Deferred,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> Deferred:
    return Deferred(
        of.run,
        replace(of.notes, **changes) if changes else of.notes,
        of.shape if shape is None else shape,
        dtype or of.dtype,
        (function, args, kwargs),
    )


@rule("mul", "rmul", "multiply", "div", "divide", "truediv", "true_divide")
def _scale(function: Callable, name: str, scores: Any, factor: Any, **kwargs: Any) -> Any:
    left, right = scores, factor
    if not isinstance(scores, Deferred):
        scores, factor = factor, scores
    if kwargs or scores.notes.probabilities or scores.notes.multiplied:
        return NotImplemented
    if scores.run.is_triangle(factor) and "mul" in name:
        changes = {"causal": True, "window": scores.run.window, "multiplied": True}
        return _next(function, (left, right), {}, scores, **changes)
    if isinstance(factor, Tensor) and "mul" in name and not scores.notes.addends:
        # One factor per head: as well of the queries. (H, 1, 1), or (B, H, 1, 1).
        query = scores.notes.query
        if factor.dim() != 0 and (factor.shape[-1] != 1 or scores.ndim != query.dim()):
            return NotImplemented
        query = query * factor
        return _next(function, (left, right), {}, scores, query=query)
    if not isinstance(factor, (int, float)):
        return NotImplemented
    if "mul" not in name:
        if scores is not left:
            return NotImplemented
        factor = 1.0 / factor
    notes = scores.notes
    return _next(
        function,
        (left, right),
        {},
        scores,
        scaling=notes.scaling * factor,
        addends=tuple(replace(x, factor=x.factor * factor) for x in notes.addends),
    )


@rule("add", "radd")
def _add(function: Callable, name: str, left: Any, right: Any, **kwargs: Any) -> Any:
    scores, other = (left, right) if isinstance(left, Deferred) else (right, left)
    if not isinstance(scores, Deferred) or kwargs or scores.notes.probabilities:
        return NotImplemented
    if not isinstance(other, (Tensor, MaskView)) or other.dtype == torch.bool:
        return NotImplemented
    if isinstance(other, Tensor) and other.dim() == 0:
        return NotImplemented
    if scores.notes.multiplied:  # scores * triangle + lowest * (1 - triangle)
        return _next(function, (left, right), {}, scores, multiplied=False)
    addends = (*scores.notes.addends, Addend(other, scores.ndim))
    return _next(function, (left, right), {}, scores, addends=addends)


@rule("masked_fill")
def _masked_fill(function: Callable, name: str, scores: Any, mask: Any, value: Any) -> Any:
    if not isinstance(scores, Deferred):
        return NotImplemented
    if scores.notes.probabilities:  # what is hidden already has none
        known = any(hidden.value is mask for hidden in scores.notes.hidden)
        return scores if known and value == 0 else NotImplemented
    if not isinstance(value, (int, float)) or value > LOWEST or not isinstance(mask, Tensor):
        return NotImplemented
    hidden = (*scores.notes.hidden, Hidden(mask, scores.ndim))
    return _next(function, (scores, mask, value), {}, scores, hidden=hidden)


@rule("where")
def _where(function: Callable, name: str, condition: Any, scores: Any, other: Any = None) -> Any:
    """torch.where(triangle, scores, lowest)"""
    if not isinstance(scores, Deferred) or scores.notes.probabilities:
        return NotImplemented
    if not scores.run.is_triangle(condition):
        return NotImplemented
    changes = {"causal": True, "window": scores.run.window}
    return _next(function, (condition, scores, other), {}, scores, **changes)


def hide_later_keys(scores: Deferred) -> Deferred:
    """Causal, of as many queries as keys."""
    rows, columns = scores.shape[-2:]
    later = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).triu(1)
    return _next(Tensor.masked_fill, (scores, later, -torch.inf), {}, scores, causal=True)


@rule("max", "maximum")
def _clamp(function: Callable, name: str, scores: Any, other: Any = None) -> Any:
    """torch.max(scores, lowest): after the mask was added, so that the sum stays finite."""
    if not isinstance(scores, Deferred) or not scores.run.clamps:
        return NotImplemented
    if not isinstance(other, Tensor) or other.dim() != 0:
        return NotImplemented
    return _next(function, (scores, other), {}, scores)


@rule("softmax")
def _softmax(
    function: Callable, name: str, scores: Any, dim: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if not isinstance(scores, Deferred) or scores.notes.probabilities or scores.notes.multiplied:
        return NotImplemented
    if dim not in (-1, scores.ndim - 1):
        return NotImplemented
    dtype = kwargs.get("dtype") or scores.dtype
    given = {"dim": dim, **{name: x for name, x in kwargs.items() if name == "dtype"}}
    return _next(F.softmax, (scores,), given, scores, dtype=dtype, probabilities=True)


@rule("dropout")
def _dropout(
    function: Callable,
    name: str,
    probabilities: Any,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Any:
    if not isinstance(probabilities, Deferred) or not probabilities.notes.probabilities:
        return NotImplemented
    if not training or p == 0.0:
        return probabilities
    if probabilities.notes.dropout or probabilities.notes.transposed:
        return NotImplemented
    args = (probabilities, p, training)
    return _next(F.dropout, args, {}, probabilities, dropout=float(p))


@rule("to", "type", "float", "type_as", "contiguous")
def _cast(function: Callable, name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Kernels compute scores and probabilities in fp32, whatever the operands."""
    if not isinstance(x, Deferred):
        return x if isinstance(x, MaskView) else NotImplemented
    dtype = x.dtype
    if name == "float":
        dtype = torch.float32
    elif name == "type_as":
        dtype = args[0].dtype
    elif name in ("to", "type"):
        for y in (*args, *kwargs.values()):
            dtype = y if isinstance(y, torch.dtype) else getattr(y, "dtype", dtype)
    return _next(function, (x, *args), kwargs, x, dtype=dtype)


@rule("view", "reshape")
def _view(function: Callable, name: str, x: Any, *sizes: Any) -> Any:
    """Batch and heads folded into one, or unfolded; the batch split into images and windows."""
    if not isinstance(x, Deferred):
        return NotImplemented
    wanted = tuple(sizes[0]) if sizes and isinstance(sizes[0], (tuple, list)) else tuple(sizes)
    known = 1
    for n in wanted:
        known *= n if n != -1 else 1
    if -1 in wanted:
        wanted = tuple(x.shape.numel() // max(known, 1) if n == -1 else n for n in wanted)
    if len(wanted) not in (3, 4, 5) or wanted[-2:] != tuple(x.shape[-2:]):
        return NotImplemented
    if len(wanted) == 5 and (x.ndim != 4 or wanted[2] != x.shape[1]):
        return NotImplemented
    if torch.Size(wanted).numel() != x.shape.numel():
        return NotImplemented
    query = x.notes.query
    if len(wanted) == query.dim() == 4 and wanted[:2] != tuple(query.shape[:2]):
        return NotImplemented
    return _next(function, (x, *sizes), {}, x, shape=wanted)


@rule("expand_as")
def _expand_as(function: Callable, name: str, x: Any, other: Any) -> Any:
    return x.expand(other.shape) if isinstance(x, Tensor) else NotImplemented


@rule("reshape_as", "view_as")
def _reshape_as(function: Callable, name: str, x: Any, other: Any) -> Any:
    return x.reshape(other.shape) if isinstance(x, Tensor) else NotImplemented


@rule("permute", "transpose")
def _transpose(function: Callable, name: str, x: Any, *dims: Any) -> Any:
    """Of probabilities (B, Sq, Sk), whose product with the values is then the other way round."""
    if not isinstance(x, Deferred) or not x.notes.probabilities or x.notes.transposed:
        return NotImplemented
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    places = {dim % 3 for dim in dims} == {1, 2} if name == "transpose" else dims == (0, 2, 1)
    if x.ndim != 3 or not places:
        return NotImplemented
    shape = (x.shape[0], x.shape[2], x.shape[1])
    return _next(function, (x, *dims), {}, x, shape=shape, transposed=True)


# ---- the end: probabilities @ value --------------------------------------------------------------


@rule("matmul", "bmm", "einsum")
def _product(function: Callable, name: str, *args: Any, **kwargs: Any) -> Any:
    if name == "einsum":
        operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        if not _BATCHED_PRODUCT.fullmatch(args[0].replace(" ", "")):
            return NotImplemented
    else:
        operands = args if not kwargs else (*args, *kwargs.values())
    if len(operands) != 2:
        return NotImplemented
    probabilities, value = operands
    if torch.compiler.is_compiling() and isinstance(value, Deferred):
        probabilities, value = value, probabilities  # how Dynamo hands on `probabilities @ value`
    if isinstance(value, Deferred) and value.notes.transposed and isinstance(probabilities, Tensor):
        # values^T @ probabilities^T: of the probabilities before they were transposed
        out = _product(torch.matmul, "matmul", value.made_by[1][0], probabilities.transpose(1, 2))
        return out if out is NotImplemented else out.transpose(1, 2)
    if not isinstance(probabilities, Deferred) or not isinstance(value, Tensor):
        return NotImplemented
    if probabilities.notes.transposed:
        return NotImplemented
    run = probabilities.run
    if not probabilities.notes.probabilities or run.finished or run.given_up:
        return NotImplemented
    if value.dim() != probabilities.ndim:
        return NotImplemented
    run.finished = True
    if torch.compiler.is_compiling():
        return run.finish(probabilities.notes, value, probabilities)
    with torch._C.DisableTorchFunction():  # the mode has nothing to look for in our own calls
        return run.finish(probabilities.notes, value, probabilities)
