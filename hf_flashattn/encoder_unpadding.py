"""patch_model(model, unpad=True): an encoder's layers without padding, whatever the model.

Hooks take the padding out of the hidden states that enter the first layer and put it back into what
the stack of layers returns: in between, attention, MLP, norms and dropout run on (1, total, hidden)
tokens, one row after the other. Embeddings, poolers and heads keep the padded layout, so position
ids and RoPE are those of the padded batch.

    model     the innermost PreTrainedModel around the attention modules, such as BertModel
    layers    the one ModuleList that holds them all
    stack     the module that holds that list: the model itself, or its encoder

    model's pre-hook     begins a forward
    each layer's         decides, once per forward, by the attention mask; takes padding out of
    pre-hook             hidden states, position_ids and position_embeddings that have any, and
                         hands on the mask as one carrier (Packed)
    stack's hook         puts padding back, as zeros
    model's hook         does so in the hidden states that were collected; ends the forward

The mask function reads the mask once (Tokens), and nothing here reads the device again: the
model's pre-hook makes the mask boolean, so that all kinds of layers are given the same tensor. What
was decided is remembered with the mask, so that a checkpointed layer, run again, decides alike.

A layer whose attention no kernel takes (a sliding window, a dtype) pads queries, keys and values
for it and runs the fallback on the padded batch's own mask: always right, at the price of copies.

Which models this is right for is found out when they are patched: encoder_trial.py. Under
torch.compile the number of tokens would have to be read: such a call runs padded, and the report
counts it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.comptime import comptime
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from hf_flashattn import _compat, masks
from hf_flashattn.hooks import first_after, first_before
from hf_flashattn.report import Unpadded
from hf_flashattn.unpadding import Unpadding, plan_unpadding

MASK = "attention_mask"
_PER_TOKEN = ("position_ids", "position_embeddings")  # (B or 1, S, ...): padding is taken out

NO_PADDING = "no padding"


@dataclass(eq=False)
class _Forward:
    """One forward of a model, from its pre-hook to its hook."""

    collector: Any  # of hidden states that a model around this one asked for
    unpadding: Unpadding | None = None
    reason: str | None = None  # why there is none
    carriers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (mask, carrier)
    packed: list[tuple[Any, Any]] = field(default_factory=list)  # (padded, packed) position data

    def holds(self, hidden: Any) -> bool:
        """Whether these hidden states are without padding."""
        return self.unpadding is not None and self.unpadding.is_packed(hidden)


_THREAD = threading.local()  # not in the hooks: they are copied with their model

# mask of a layer -> Unpadding, or None where its layers run padded
_DECISIONS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_UNDECIDED = object()


def _forwards() -> dict[int, _Forward]:
    """The forwards that this thread is in, by the id of their Unpadder."""
    if not hasattr(_THREAD, "forwards"):
        _THREAD.forwards = {}
    return _THREAD.forwards


class Unpadder:
    """The hooks of one stack of layers; counts in its entry of the report."""

    def __init__(self, entry: Unpadded, mask_index: int) -> None:
        self.entry = entry
        self.mask_index = mask_index  # of the mask among the model's positional arguments
        self.off = False

    def hook(
        self, model: nn.Module, stack: nn.Module, layers: nn.ModuleList
    ) -> list[RemovableHandle]:
        # First in their row, so that hooks of others see one layout in all layers and no
        # (1, total) outside of them. Ending is for forwards that raise, too.
        handles = [first_before(model, self.begin)]
        handles += [first_before(layer, self.before_layer) for layer in layers]
        if stack is not model:
            handles.append(first_after(stack, self.after_stack))
        handles.append(first_after(model, self.end, always=True))
        return handles

    def begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            _count_trace(self)
        elif _compat.is_tracing():
            self.entry.count_padded("captured or traced: the number of tokens cannot be read")
        elif not self.off:
            _forwards()[id(self)] = _Forward(_compat.hidden_states_collector())
            return self._with_boolean_mask(args, kwargs)
        return None

    def _with_boolean_mask(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The model's arguments with a mask that every mask function gets as it is, and reads once.

        Of any other, Transformers makes a copy for each kind of layer.
        """
        at = self.mask_index
        mask = args[at] if len(args) > at else kwargs.get(MASK)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype == torch.bool:
            return None
        if len(args) > at:
            return (*args[:at], mask.bool(), *args[at + 1 :]), kwargs
        return args, kwargs | {MASK: mask.bool()}

    def before_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling() or self.off:
            return None
        names = _parameters(type(layer).forward, len(args))
        named = dict(zip(names, args, strict=False)) | kwargs
        hidden, mask = named.get(names[0]), named.get(MASK)
        forward = _forwards().get(id(self))
        unpadding = self._unpadding(forward, layer, hidden, mask, named)
        changed = {}
        if unpadding is not None:
            if not unpadding.is_packed(hidden):
                changed[names[0]] = unpadding.pack(hidden)
            changed[MASK] = _carrier(forward, unpadding, mask)
            for name in _PER_TOKEN:
                if named.get(name) is not None:
                    changed[name] = _packed(forward, unpadding, named[name])
        elif forward is not None and forward.holds(hidden):
            changed[names[0]] = forward.unpadding.unpack(hidden)
        if not changed:
            return None
        args = tuple(changed.get(name, value) for name, value in zip(names, args, strict=False))
        return args, {name: changed.get(name, value) for name, value in kwargs.items()}

    def after_stack(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        forward = None if torch.compiler.is_compiling() else _forwards().get(id(self))
        if forward is None or forward.unpadding is None:
            return None
        return _restore(output, forward.unpadding)

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        forward = None if torch.compiler.is_compiling() else _forwards().pop(id(self), None)
        if forward is None:
            return None
        if forward.unpadding is None:
            self.entry.count_padded(forward.reason or NO_PADDING)
            return None
        batch = forward.unpadding
        self.entry.count_unpadded(batch.batch * batch.seqlen, batch.total)
        return _restore(output, batch)

    def _unpadding(
        self,
        forward: _Forward | None,
        layer: nn.Module,
        hidden: Any,
        mask: Any,
        named: dict[str, Any],
    ) -> Unpadding | None:
        """How this layer runs; None: padded."""
        if not isinstance(mask, Tensor) or not isinstance(hidden, Tensor):
            return None
        known = _DECISIONS.get(mask, _UNDECIDED)
        if known is _UNDECIDED:
            if forward is None:  # the stack was called past its model
                return None
            if forward.unpadding is None:
                forward.unpadding, reason = _decide(forward, layer, hidden, mask)
                forward.reason = forward.reason or reason
            elif not _same_tokens(forward.unpadding, mask):
                _DECISIONS[mask] = None
                return None
            known = _DECISIONS[mask] = forward.unpadding
        if known is None:
            return None
        reason = _strange(named, known)
        if reason is not None and forward is not None:
            forward.reason = reason
            if not known.is_packed(hidden) and forward.unpadding is known:
                forward.unpadding = _DECISIONS[mask] = None
        return known if reason is None else None


def _same_tokens(unpadding: Unpadding, mask: Tensor) -> bool:
    """Whether a second mask of the same forward drops the same padding, as far as it was read."""
    tokens = getattr(masks.recall(mask), "tokens", None)
    return tokens is None or torch.equal(tokens.known, unpadding.known)


def _decide(
    forward: _Forward, layer: nn.Module, hidden: Tensor, mask: Tensor
) -> tuple[Unpadding | None, str | None]:
    """(how to run this forward, None), or (None, why padded)."""
    found = masks.recall(mask)
    tokens = getattr(found, "tokens", None)
    if tokens is None:
        return None, None if found is not None else "a mask that says more than padding"
    if found.causal:
        return None, "causal: only encoders can do without padding"
    if _compat.attentions_wanted():
        return None, "output_attentions=True: the weights are those of the padded batch"
    collector = _compat.hidden_states_collector()
    if collector is not None and collector is forward.collector:
        return None, "a model around this one collects the hidden states of its layers"
    if layer.training and _compat.checkpoints_reentrantly(layer):
        return None, "checkpointing with use_reentrant=True: it copies the masks"
    if hidden.shape[:2] != tokens.kept.shape:
        return None, f"{tuple(hidden.shape)} hidden states for a {tuple(tokens.kept.shape)} mask"
    return plan_unpadding(tokens.kept, tokens.known), None


def _strange(named: dict[str, Any], unpadding: Unpadding) -> str | None:
    """What a layer is given that nobody knows how to take the padding out of, or None."""
    first = next(iter(named))
    for name, value in named.items():
        if name in (first, MASK) or value is None or isinstance(value, (bool, int, float, str)):
            continue
        if isinstance(value, Tensor) and value.dim() == 0:
            continue  # num_items_in_batch
        if name not in _PER_TOKEN:
            return f"its layers take {name}"
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if not (
                isinstance(x, Tensor)
                and x.dim() >= 2
                and x.shape[0] in (1, unpadding.batch)
                and x.shape[1] == unpadding.seqlen
            ):
                return f"its layers take {name} of another shape than (batch, tokens, ...)"
    return None


@functools.lru_cache(maxsize=256)
def _parameters(forward: Callable, given: int) -> tuple[str, ...]:
    """The names of the positional parameters of a layer's forward, self left out.

    given: there are so many at least; those that have no name of their own get one.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind in kinds][1:]
    return tuple(names + [f"unnamed argument {i}" for i in range(len(names), max(given, 1))])


def _carrier(forward: _Forward | None, unpadding: Unpadding, mask: Tensor) -> Tensor:
    """One carrier for all layers with this mask."""
    known = [] if forward is None else forward.carriers
    for of, carrier in known:
        if of is mask:
            return carrier
    carrier = masks.encode_packed(unpadding, mask)
    known.append((mask, carrier))
    return carrier


def _packed(forward: _Forward | None, unpadding: Unpadding, value: Any) -> Any:
    known = [] if forward is None else forward.packed
    for of, packed in known:
        if of is value:
            return packed
    if isinstance(value, (tuple, list)):
        packed = type(value)(unpadding.pack(x) for x in value)
    else:
        packed = unpadding.pack(value)
    known.append((value, packed))
    return packed


def _restore(output: Any, unpadding: Unpadding) -> Any:
    """output with every (1, total, ...) tensor in it padded: (B, S, ...)."""
    if isinstance(output, Tensor):
        packed = output.dim() >= 2 and unpadding.is_packed(output)
        return unpadding.unpack(output) if packed else output
    if type(output) in (tuple, list):
        return type(output)(_restore(x, unpadding) for x in output)
    if isinstance(output, dict):
        for name, value in output.items():
            output[name] = _restore(value, unpadding)
    return output


def _count_trace(unpadder: Unpadder) -> None:
    # Runs in the compiler and leaves nothing in the graph.
    comptime(_count_in_compiler)


def _count_in_compiler(ctx: Any) -> None:
    try:
        unpadder = ctx.get_local("unpadder")._i_will_not_complain_if_bc_breaks_VariableTracker()
        entry = unpadder.value.entry
    except (AttributeError, KeyError, NotImplementedError):
        return
    entry.count_padded("torch.compile: the number of tokens cannot be read")
