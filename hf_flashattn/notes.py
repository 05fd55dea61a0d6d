"""What was found out about a tensor, remembered while it lives and is not written to.

    notes = TensorNotes()
    notes[mask] = found       # beside the tensor, which is not kept alive
    notes.get(mask)           # None once something was written to it

Nobody counts what is written to an inference tensor. Where a caller may have made it, who writes to
it between two forwards, notes of it last for one forward: TensorNotes(version_in_forward).

torch's WeakTensorKeyDictionary does the first at five times the cost, and not the second.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


def version(x: Tensor) -> int:
    """Counts what is written to x. Of an inference tensor nobody counts: then -1."""
    return -1 if x.is_inference() else x._version


class _Forwards:
    """Counts the forwards of models that have begun, downwards, so that none is a version."""

    numbers = itertools.count(-1, -1)
    now = next(numbers)


def begin_forward() -> None:
    """A model's forward begins, or a part of it that makes masks."""
    _Forwards.now = next(_Forwards.numbers)


def version_in_forward(x: Tensor) -> int:
    """version, but of an inference tensor another one in every forward."""
    return _Forwards.now if x.is_inference() else x._version


class TensorNotes:
    """A note for each tensor object; a copy of a tensor has none.

    version: counts what is written to a tensor.
    """

    def __init__(self, version: Callable[[Tensor], int] = version) -> None:
        self._version = version
        self._notes: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}  # by id

    def __setitem__(self, x: Tensor, note: Any) -> None:
        key, notes = id(x), self._notes

        def forget(gone: weakref.ref[Tensor]) -> None:
            if (entry := notes.get(key)) is not None and entry[0] is gone:
                notes.pop(key, None)

        notes[key] = weakref.ref(x, forget), self._version(x), note

    def get(self, x: Tensor) -> Any:
        """The note, or None. An id comes again when its object is gone: the reference decides."""
        entry = self._notes.get(id(x))
        if entry is None or entry[0]() is not x or entry[1] != self._version(x):
            return None
        return entry[2]

    def __len__(self) -> int:
        return len(self._notes)
