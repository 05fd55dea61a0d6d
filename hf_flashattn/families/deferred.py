"""Attention read off a model's own code while that code runs: scores that are not computed.

    with Deferral(module, family) as run:         # the module's own forward, unchanged
        out = forward(hidden_states, ...)

The first product of two batched tensors in it is `query @ key^T`. It returns a Deferred instead of
a tensor: a plain object that notes what is done to the scores - scaled, masked, biased, turned into
probabilities, dropped - and is never stored anywhere. The product with the values then is one call
of attention_forward. Projections, rotary embeddings, caches and what is returned stay the model's.

What the notes cannot express is computed as written: a Deferred remembers the calls that made it,
runs them, and the model goes on with a tensor. So the result is right whatever the code does; the
report counts a fallback and names the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hf_flashattn import masks


@dataclass(frozen=True)
class Operation:
    """A torch function, by the name that its spellings share, and what it does to the notes."""

    name: str
    rule: Callable
    in_place: bool = False


# By the function itself, for torch.compile reads no names of functions. rules.py fills both.
OPERATIONS: dict[Callable, Operation] = {}
PRODUCTS: dict[Callable, str] = {}
LOWEST = -1e4  # what is added to hide a key: this or less. exp(-1e4) is 0 in every dtype


@dataclass(frozen=True)
class Addend:
    """What was added to the scores, before they were scaled by `factor`."""

    value: Any  # Tensor or MaskView
    dims: int  # of the scores: 4; 3 with batch and heads in one; 5 with the batch in two
    factor: float = 1.0


@dataclass(frozen=True)
class Hidden:
    """A boolean mask, True hides, of scores with so many dims."""

    value: Tensor
    dims: int


@dataclass(frozen=True)
class Notes:
    """What is known of scores or probabilities that were not computed.

    softmax(scaling * query @ key + addends, where nothing hides), with dropout.
    """

    query: Tensor  # (B, H, Sq, D) or (B * H, Sq, D)
    key: Tensor  # the same with (D, Sk) at its end
    scaling: float = 1.0
    addends: tuple[Addend, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    causal: bool = False
    window: int | None = None  # keys a query sees, itself included
    multiplied: bool = False  # by the triangle: what it zeroed is hidden by the next addend
    probabilities: bool = False
    dropout: float = 0.0
    transposed: bool = False  # probabilities of which the last two dimensions have changed places


class Deferred:
    """Scores or probabilities, not computed: behaves like their tensor where it is asked."""

    def __init__(
        self,
        run: Deferral,
        notes: Notes,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        made_by: tuple[Callable, tuple, dict],
    ) -> None:
        self.run, self.notes, self.made_by = run, notes, made_by
        self.shape, self.dtype = torch.Size(shape), dtype
        self._value: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.notes.query.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def evaluate(self) -> Tensor:
        """The tensor, computed as the model's code says; once."""
        if self._value is None:
            function, args, kwargs = self.made_by
            args, kwargs = tree_map(lambda x: _evaluated(x, self), (args, kwargs))
            self._value = function(*args, **kwargs)
        return self._value

    def snapshot(self) -> Deferred:
        """As it is now: another object, which an operation in place leaves alone."""
        same = object.__new__(Deferred)
        same.__dict__.update(self.__dict__)
        return same

    def become(self, other: Deferred) -> Deferred:
        """Takes the other's place: what an operation in place does to its first argument."""
        self.__dict__.update(other.__dict__)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask before there is anything
            raise AttributeError(name)
        method = getattr(Tensor, name)
        if not callable(method):
            self.run.give_up(name)
            return getattr(self.evaluate(), name)
        return lambda *args, **kwargs: dispatch(method, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Any:
        return dispatch(Tensor.__getitem__, (self, index), {})

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})


class MaskView:
    """A mask of our mask function on its way through a model's own code.

    A carrier (see masks.py) or a boolean mask, True is seen; to the code it is the additive mask
    (B, 1, Sq, Sk) that eager would have had, made only if the code looks into it.
    """

    def __init__(self, run: Deferral, mask: Tensor) -> None:
        self.run, self.mask = run, mask

    @property
    def dtype(self) -> torch.dtype:
        return self.run.scores.dtype if self.run.scores is not None else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        return self.mask.device

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    @property
    def shape(self) -> torch.Size:
        if self.run.scores is None:
            return self.mask.shape
        batch, (rows, columns) = self.mask.shape[0], self.run.scores.shape[-2:]
        return torch.Size((batch, 1, rows, columns))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> MaskView:
        return self  # its dtype and device are those of the scores

    def evaluate(self, scores: Deferred) -> Tensor:
        """Additive, (B, 1, Sq, Sk), in the dtype of the scores."""
        rows, columns = scores.shape[-2:]
        seen = self.mask
        if seen.dtype != torch.bool:
            found = masks.decode(seen, rows, columns)
            seen = masks.dense(found, rows, columns, causal=False, device=seen.device)
            if seen is None:
                seen = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=self.device)
        hidden = torch.finfo(scores.dtype).min
        return torch.zeros((), dtype=scores.dtype, device=seen.device).where(seen, hidden)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_looked_into(self), name)

    def __getitem__(self, index: Any) -> Any:
        return _looked_into(self)[index]

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})


def _evaluated(x: Any, scores: Deferred) -> Any:
    if isinstance(x, MaskView):
        return x.evaluate(scores)
    return x.evaluate() if isinstance(x, Deferred) else x


def _looked_into(view: MaskView) -> Tensor:
    if view.run.scores is None:
        raise _too_early(view)
    view.run.give_up("its mask")
    return view.evaluate(view.run.scores)


def _too_early(view: MaskView) -> NotImplementedError:
    return NotImplementedError(
        f"hf_flashattn: expected {type(view.run.module).__name__} to hand its mask on, got code "
        "that looks into it before there are scores. Next step: leave this model unpatched"
    )


# ---- one run of a module's forward ---------------------------------------------------------------


class Deferral(TorchFunctionMode):
    """The mode under which one call of a module's own forward runs.

    begin: rules.begin, which knows the product of queries and keys.
    finish(notes, value, probabilities) -> out, in the shape of the product that it replaces.
    whole: by function, what does all of attention in one call (see whole.py).
    triangle: the buffer in which the module keeps its causal pattern, or None.
    window: of that pattern.  clamps: the code cuts the scores off at the lowest number.
    zeros: what it adds in torch.baddbmm is 0.  skips: batched products before that of the scores.
    """

    def __init__(
        self,
        module: nn.Module,
        begin: Callable[..., Deferred | None],
        finish: Callable[[Notes, Tensor, Deferred], Tensor],
        *,
        whole: Mapping[Callable, Callable] = MappingProxyType({}),
        triangle: Tensor | None = None,
        window: int | None = None,
        clamps: bool = False,
        zeros: bool = False,
        skips: int = 0,
    ) -> None:
        super().__init__()
        self.module, self.begin, self.finish, self.whole = module, begin, finish, whole
        self.triangle, self.window = triangle, window
        self.clamps, self.zeros, self.skips = clamps, zeros, skips
        self.scores: Deferred | None = None
        self.finished = False
        self.given_up: str | None = None  # the operation that the notes cannot express

    def give_up(self, what: str) -> None:
        self.given_up = self.given_up or what

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        if self.finished:
            return function(*args, **kwargs)
        if self.scores is None:
            whole = self.whole.get(function)
            if whole is not None and (done := whole(self, *args, **kwargs)) is not NotImplemented:
                return done
            name = PRODUCTS.get(function)
            if name is not None and (begun := self.begin(self, function, name, args, kwargs)):
                if self.skips == 0:
                    self.scores = begun
                    return begun
                self.skips -= 1
        elif _holds_deferred(args) or (kwargs and _holds_deferred(kwargs.values())):
            return dispatch(function, args, kwargs)
        return function(*args, **kwargs)

    def is_triangle(self, x: Any) -> bool:
        if self.triangle is None or not isinstance(x, Tensor):
            return False
        if torch.compiler.is_compiling():  # which reads no addresses
            return x.dtype == self.triangle.dtype and x.shape[:2] == self.triangle.shape[:2]
        return x.untyped_storage().data_ptr() == self.triangle.untyped_storage().data_ptr()


def _holds_deferred(args: Any) -> bool:
    for x in args:
        if isinstance(x, (Deferred, MaskView)):
            return True
        if isinstance(x, (tuple, list)) and _holds_deferred(x):
            return True
    return False


def dispatch(function: Callable, args: tuple, kwargs: dict) -> Any:
    """A torch function of which an argument is Deferred or a MaskView."""
    operation = OPERATIONS.get(function)
    if operation is not None:
        written = args[0] if operation.in_place else None
        if isinstance(written, Deferred):
            args_of_rule = (written.snapshot(), *args[1:])
            result = operation.rule(function, operation.name, *args_of_rule, **kwargs)
        else:
            result = operation.rule(function, operation.name, *args, **kwargs)
        if result is not NotImplemented:
            return written.become(result) if isinstance(written, Deferred) else result
    scores = _first_deferred(args) or _first_deferred(kwargs.values())
    if scores is None:
        view = _first_view(args, kwargs)
        scores = view.run.scores
        if scores is None:
            raise _too_early(view)
    scores.run.give_up(_name_of(function))
    args, kwargs = tree_map(lambda x: _evaluated(x, scores), (args, kwargs))
    return function(*args, **kwargs)


def _name_of(function: Callable) -> str:
    known = OPERATIONS.get(function)
    if known is not None:
        return known.name
    compiling = torch.compiler.is_compiling()
    return "an operation" if compiling else getattr(function, "__name__", "").strip("_")


def _first_deferred(args: Any) -> Deferred | None:
    for x in args:
        if isinstance(x, Deferred):
            return x
        if isinstance(x, (tuple, list)) and (found := _first_deferred(x)) is not None:
            return found
    return None


def _first_view(args: tuple, kwargs: dict) -> MaskView:
    found: list[MaskView] = []
    tree_map(lambda x: found.append(x) if isinstance(x, MaskView) else None, (args, kwargs))
    return found[0]


# ---- Python's operators --------------------------------------------------------------------------


def _operator(name: str) -> Callable:
    function = getattr(Tensor, name)

    def operator(self: Any, *others: Any) -> Any:
        return dispatch(function, (self, *others), {})

    return operator


for _name in (
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__"),
    *("__matmul__", "__eq__", "__ne__", "__lt__", "__gt__", "__le__", "__ge__", "__neg__"),
):
    setattr(Deferred, _name, _operator(_name))
    setattr(MaskView, _name, _operator(_name))
Deferred.__hash__ = MaskView.__hash__ = object.__hash__
