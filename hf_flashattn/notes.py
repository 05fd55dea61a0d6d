"""What was found out about a tensor, remembered while it lives and is not written to.

    notes = TensorNotes()
    notes[mask] = found       # beside the tensor, which is not kept alive
    notes.get(mask)           # None once something was written to it

torch's WeakTensorKeyDictionary does the first at five times the cost, and not the second.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


def version(x: Tensor) -> int:
    """Counts what is written to x. Of an inference tensor nobody counts: then -1."""
    return -1 if x.is_inference() else x._version


class TensorNotes:
    """A note for each tensor object; a copy of a tensor has none."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}  # by id

    def __setitem__(self, x: Tensor, note: Any) -> None:
        key, notes = id(x), self._notes

        def forget(gone: weakref.ref[Tensor]) -> None:
            if (entry := notes.get(key)) is not None and entry[0] is gone:
                notes.pop(key, None)

        notes[key] = weakref.ref(x, forget), version(x), note

    def get(self, x: Tensor) -> Any:
        """The note, or None. An id comes again when its object is gone: the reference decides."""
        entry = self._notes.get(id(x))
        if entry is None or entry[0]() is not x or entry[1] != version(x):
            return None
        return entry[2]

    def __len__(self) -> int:
        return len(self._notes)
