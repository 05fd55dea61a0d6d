"""What takes the place of a module's forward: its own code, with the kernel inside.

    OwnForward(module, family)   # patch_model does it, and keeps it in its undo log

The scores of the module's own code are never computed; attention_forward gets queries, keys, values
and masks as for any model, so counting, reasons, strict and the fallback are the same. Dtypes: some
models turn queries and keys to fp32 for the scores alone. The kernel keeps scores and probabilities
in fp32 anyway, so they go there in the dtype of the values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_flashattn import _compat, masks
from hf_flashattn.attention import attention_forward, refuse_or_count
from hf_flashattn.descriptors import Packed
from hf_flashattn.families.deferred import Deferral, Deferred, MaskView, Notes
from hf_flashattn.families.recognise import Pattern, joined, recognise
from hf_flashattn.families.rules import begin
from hf_flashattn.families.table import Family
from hf_flashattn.families.whole import WHOLE


class OwnForward:
    """A module's own forward with its attention on the kernel. Copies and pickles with the model.

    former: the forward that stood on the instance itself, such as Accelerate's, or None.
    wanted: what was asked of the model about attention weights, of an untold module.
    """

    def __init__(self, module: nn.Module, family: Family) -> None:
        self.module, self.family = module, family
        self.former: Callable | None = module.__dict__.get("forward")
        self.removed = self.wanted = False
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        wish = "output_attentions"
        self.place_of_wish = names.index(wish) if wish in names else None
        module.__dict__["forward"] = self

    def remove(self) -> None:
        """Puts back what stood here; what has wrapped this one since goes on without it."""
        self.removed = True
        if self.module.__dict__.get("forward") is self:
            self.module.__dict__.pop("forward")
            if self.former is not None:
                self.module.__dict__["forward"] = self.former

    @property
    def __wrapped__(self) -> Callable:  # inspect.signature asks
        return self.former or functools.partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.removed:
            return self.__wrapped__(*args, **kwargs)
        module, family = self.module, self.family
        wanted = self._wants_weights(args, kwargs)
        run = Deferral(
            module,
            begin,
            functools.partial(_finish, module, family, wanted),
            whole=WHOLE,
            triangle=family.triangle_of(module),
            window=family.window(module),
            clamps=family.clamps,
            zeros=family.zeros,
            skips=family.skips,
        )
        if not family.keeps_masks(module):
            args = tuple(_viewed(run, x) for x in args)
            kwargs = {name: _viewed(run, x) for name, x in kwargs.items()}
        with run:
            out = self.__wrapped__(*args, **kwargs)
        if not run.finished:
            what = f"its own code goes on with {run.given_up} of the scores"
            refuse_or_count(module, what if run.given_up else "its own code has no scores")
        return _given_back(out, wanted)

    def _wants_weights(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        place = self.place_of_wish
        if "output_attentions" in kwargs:
            given = kwargs["output_attentions"]
        else:
            given = args[place] if place is not None and place < len(args) else False
        return bool(given) or self.wanted or _compat.attentions_wanted_of(self.module)


def _viewed(run: Deferral, x: Any) -> Any:
    """Masks of our mask function, to be told from a user's own by their dtype."""
    ours = isinstance(x, Tensor) and x.dim() == 4 and x.dtype in (torch.int32, torch.bool)
    return MaskView(run, x) if ours else x


def _given_back(x: Any, wanted: bool) -> Any:
    """What a forward returned, without what only stands for tensors."""
    if isinstance(x, (tuple, list)):
        return type(x)([_given_back(y, wanted) for y in x])
    if type(x) is dict:
        return {name: _given_back(y, wanted) for name, y in x.items()}
    if isinstance(x, MaskView):
        return x.mask
    if isinstance(x, Deferred):
        return x.evaluate() if wanted else None
    return x


# ---- the call ------------------------------------------------------------------------------------


def _finish(
    module: nn.Module,
    family: Family,
    wanted: bool,
    notes: Notes,
    value: Tensor,
    probabilities: Deferred,
) -> Tensor:
    """The product of the probabilities with the values, in the shape of that product."""
    heads = family.heads_of(module)
    q, k, v = (
        x if x.dim() == 4 else x.unflatten(0, (-1, heads))
        for x in (notes.query, notes.key.transpose(-1, -2), value)
    )
    if v.dtype in (torch.float16, torch.bfloat16):
        q, k = q.to(v.dtype), k.to(v.dtype)
    mask, causal, bias = _masks_of(module, family, notes, probabilities)
    extra: dict[str, Any] = {}
    if bias is not None:
        extra["position_bias"] = bias
    if notes.window is not None:
        extra["sliding_window"] = notes.window

    compiling = torch.compiler.is_compiling()  # then nothing is packed
    if mask is None or compiling or not isinstance(masks.recall(mask), Packed):
        # Without padding, the fallback puts it back first: the code's scores do not fit then.
        extra["own_code"] = functools.partial(_own_code, probabilities, value, heads)
    out, _ = attention_forward(
        module,
        q,
        k,
        v,
        mask,
        dropout=notes.dropout,
        scaling=notes.scaling,
        is_causal=causal,
        output_attentions=wanted,
        **extra,
    )
    out = out.transpose(1, 2)  # (B, H, Sq, D)
    return out if value.dim() == 4 else out.flatten(0, 1)


def _own_code(probabilities: Deferred, value: Tensor, heads: int) -> Tensor:
    """(B, Sq, H, D), as the model's code computes it."""
    out = torch.matmul(probabilities.evaluate().to(value.dtype), value)
    return (out if out.dim() == 4 else out.unflatten(0, (-1, heads))).transpose(1, 2)


def _masks_of(
    module: nn.Module, family: Family, notes: Notes, probabilities: Deferred
) -> tuple[Tensor | None, bool, Tensor | None]:
    """(mask for attention_forward, what is causal without one, bias or None)."""
    batch, heads = notes.query.shape[0], family.heads_of(module)
    batch = batch if notes.query.dim() == 4 else batch // heads
    rows, columns = probabilities.shape[-2:]
    ours: list[Tensor] = []  # as our mask function made them
    read: list[tuple[Pattern, Callable[[], Tensor]]] = []  # what could be read, and as an addend
    dense: list[Tensor] = []  # anything else that is added
    for addend in notes.addends:
        if isinstance(addend.value, MaskView):
            x = addend.value.mask
            pattern = recognise(x) if x.dtype == torch.bool else None
            if pattern is not None:  # made in full because the model asked for it
                read.append((pattern, functools.partial(addend.value.evaluate, probabilities)))
            elif ours:
                dense.append(addend.value.evaluate(probabilities))
            else:
                ours.append(x)
            continue
        x = _four_dims(addend.value, addend.dims, heads, batch)
        pattern = recognise(x)
        if pattern is None:
            x = _floating(x, notes.query.dtype)
            dense.append(x if addend.factor == 1.0 else x * addend.factor)
        else:
            read.append((pattern, functools.partial(_floating, x, notes.query.dtype)))
    for hidden in notes.hidden:
        x = _four_dims(hidden.value, hidden.dims, heads, batch)
        pattern = recognise(x, hides=True)
        if pattern is None:
            dense.append(_additive(~x, notes.query.dtype))
        else:
            read.append((pattern, functools.partial(_additive, ~x, notes.query.dtype)))
    causal = notes.causal and rows > 1
    if ours or dense:
        # One mask that is not plain makes them all dense, but for one of ours.
        dense += [addend() for _, addend in read]
        read = []
        if causal and not (ours and _says_causal(ours[0], rows, columns)):
            below = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=notes.query.device)
            below = _windowed(below.tril(columns - rows), notes.window, columns)
            dense.append(_additive(below, notes.query.dtype))
    if read:
        pattern = joined([pattern for pattern, _ in read])
        pattern = pattern.with_causal() if causal else pattern
        return pattern.carrier(batch, rows), pattern.causal, None
    added = functools.reduce(_added, dense) if dense else None
    if ours:
        return _windowed(ours[0], notes.window, columns), False, added
    if added is not None and family.bias(module) is None and added.shape[1] == 1:
        return added, False, None  # a mask, whoever made it
    return None, causal and added is None, added


def _says_causal(mask: Tensor, rows: int, columns: int) -> bool:
    return mask.dtype == torch.bool or masks.decode(mask, rows, columns).causal


def _windowed(mask: Tensor, window: int | None, columns: int) -> Tensor:
    """A boolean mask is taken as it is, so the module's window becomes part of it."""
    if window is None or mask.dtype != torch.bool:
        return mask
    rows = mask.shape[2]
    near = torch.ones(rows, columns, dtype=torch.bool, device=mask.device)
    return mask & near.triu(columns - rows - window + 1)


def _four_dims(x: Tensor, dims: int, heads: int, batch: int) -> Tensor:
    """As it broadcasts against scores (B, H, Sq, Sk)."""
    if dims == 5 and x.dim() == 5:  # (images or 1, windows, H or 1, Sq, Sk)
        return x.expand(batch // x.shape[1], *x.shape[1:]).flatten(0, 1)
    if dims == 3 and x.dim() == 3:
        return x.unflatten(0, (-1, heads)) if x.shape[0] != 1 else x[None]
    while x.dim() < 4:
        x = x[None]
    return x


def _floating(x: Tensor, dtype: torch.dtype) -> Tensor:
    """SDPA takes no integers, as (1 - mask) * -10000 may be."""
    return x if x.is_floating_point() else x.to(dtype)


def _added(x: Tensor, y: Tensor) -> Tensor:
    """Their sum, kept finite: what both hide would be -inf, and a row of that NaN."""
    total = x + y
    return total.clamp(min=torch.finfo(total.dtype).min)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return zero.where(seen, torch.finfo(dtype).min)
