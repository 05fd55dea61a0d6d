"""Folders that are expensive to make: made once, complete or not there at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from lm.failures import UsageError


def default_cache() -> Path:
    """Beside the built kernels: HF_FLASHATTN_CACHE, else in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("HF_FLASHATTN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(base) / "hf_flashattn") / "examples"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns `folder`; where it does not exist, `make` fills a temporary one that is then renamed.

    A process that wants it while another one makes it waits.
    """
    if folder.is_dir():
        return folder
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        lock.release()
        raise UsageError(
            f"to write below {folder.parent}", str(error), "name another folder with --cache-dir"
        ) from error
    try:
        if not folder.is_dir():
            make(work)
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()
    return folder
