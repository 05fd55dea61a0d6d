"""Checkpoints: complete or not there, verified before they are loaded.

A checkpoint is what `Accelerator.save_state` writes (weights, optimizer, random states, loss
scaler), the progress of the run, the settings it must agree with, and a list of its files with size
and CRC-32. It is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lm.failures import UsageError
from lm.training import Progress

PREFIX = "checkpoint-"
RECORD = "checkpoint.json"
KEEP = 2
# GPT-2 ties its output to its embedding; that one of the two is left out is no news to anybody.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def save(folder: Path, accelerator: Accelerator, progress: Progress, settings: dict) -> Path:
    """Writes folder/checkpoint-<step> and drops all but the newest two. Called by every process."""
    target = folder / f"{PREFIX}{progress.step:07d}"
    work = folder / f"{target.name}.incomplete"
    progress.flush()
    if accelerator.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(work))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_record(work, settings, asdict(progress))
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        for old in _all(folder)[:-KEEP]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def write_record(folder: Path, settings: dict, progress: dict) -> None:
    """Makes the files in `folder` a checkpoint that `verify` takes; the last file to be written."""
    files = {path.relative_to(folder).as_posix(): _size_and_crc(path) for path in _files(folder)}
    record = {"settings": settings, "progress": progress, "files": files}
    (folder / RECORD).write_text(json.dumps(record))


def newest(folder: Path) -> Path:
    """Raises UsageError where the folder has no checkpoint."""
    found = _all(folder)
    if not found:
        raise UsageError(
            f"a checkpoint in {folder}",
            "none",
            "name the run's --output, or start anew without --resume (and --save-every N)",
        )
    return found[-1]


def verify(checkpoint: Path, settings: dict) -> dict[str, Any]:
    """The record of a complete checkpoint that was made with the same settings.

    Raises:
        UsageError: files are missing or damaged, or a setting differs.
    """
    others = [path.name for path in _all(checkpoint.parent) if path != checkpoint]
    again = "start anew with --overwrite"
    if others:
        again = f"--resume {checkpoint.parent / others[-1]}"
    try:
        record = json.loads((checkpoint / RECORD).read_text())
        expected_files = record["files"]
        saved = record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"a complete checkpoint in {checkpoint}", f"{type(error).__name__}: {error}", again
        ) from error
    for name, expected in expected_files.items():
        path = checkpoint / name
        got = _size_and_crc(path) if path.is_file() else None
        if got != expected:
            raise UsageError(
                f"{path} with size and CRC-32 {expected}",
                "no such file" if got is None else f"{got}: the checkpoint is damaged",
                again,
            )
    different = [key for key in settings if settings[key] != saved.get(key)]
    if different:
        raise UsageError(
            "the settings of the checkpoint: "
            + ", ".join(f"{key}={saved.get(key)}" for key in different),
            ", ".join(f"{key}={settings[key]}" for key in different),
            "resume with the same settings, or start anew in another --output",
        )
    return record


def load(checkpoint: Path, accelerator: Accelerator, record: dict[str, Any]) -> Progress:
    """Puts a verified checkpoint into everything that the accelerator has prepared."""
    try:
        accelerator.load_state(str(checkpoint))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UsageError(
            f"a checkpoint that fits this model and these {accelerator.num_processes} process(es)",
            f"{type(error).__name__}: {error}".splitlines()[0],
            "resume with the options of the run that wrote it",
        ) from error
    names = {field.name for field in fields(Progress)}
    progress = Progress(**{k: v for k, v in record["progress"].items() if k in names})
    progress.marks = []  # this process warms up anew
    return progress


def _all(folder: Path) -> list[Path]:
    found = [p for p in folder.glob(f"{PREFIX}*") if p.suffix == "" and p.is_dir()]
    return sorted(found, key=lambda p: (len(p.name), p.name))  # by step, padded with zeros or not


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _size_and_crc(path: Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            crc = zlib.crc32(chunk, crc)
    return [path.stat().st_size, crc]
