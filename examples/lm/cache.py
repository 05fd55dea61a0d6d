"""Folders that are expensive to make: made once, complete or not there at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lm.failures import UsageError


def default_cache() -> Path:
    """Beside the built kernels: HF_FLASHATTN_CACHE, else in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("HF_FLASHATTN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(base) / "hf_flashattn") / "examples"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns `folder`; where it does not exist, `make` fills a temporary one that is then renamed.

    Two processes may do so at the same time: the first rename wins and both results are equal.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    except OSError as error:
        raise UsageError(
            f"to write below {folder.parent}", str(error), "name another folder with --cache-dir"
        ) from error
    try:
        make(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
