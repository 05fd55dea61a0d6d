"""Documents: the standard library, local files, a hub data set or a prepared corpus; held-out set.

A document has a name and a text. Whether it is held out depends on its name alone, so that the
split survives a new seed, another machine, and documents that are added later.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset

from lm.failures import UsageError

TEXT_GLOBS = (
    "**/*.txt",
    "**/*.md",
    "**/*.rst",
    "**/*.py",
    "**/*.c",
    "**/*.h",
    "**/*.cc",
    "**/*.cpp",
    "**/*.cu",
    "**/*.go",
    "**/*.rs",
    "**/*.js",
    "**/*.ts",
    "**/*.java",
)
MANIFEST, TRAIN_FILE, HELD_OUT_FILE = "manifest.json", "train.jsonl.xz", "held_out.jsonl.xz"
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


@dataclass
class Corpus:
    """Two sets of documents with the columns `name` and `text`."""

    train: Dataset
    held_out: Dataset
    source: str
    fingerprint: str
    note: str = ""

    def describe(self) -> dict[str, object]:
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "train_documents": len(self.train),
            "held_out_documents": len(self.held_out),
            "note": self.note,
        }


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") / 2**56


def standard_library(max_bytes: int | None = None) -> tuple[Dataset, str]:
    """The .py files of the running Python: long documents of real text, nothing to download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not NOT_THE_LIBRARY.intersection(path.relative_to(root).parts)
    ]
    documents = _read({path.relative_to(root).as_posix(): path for path in files}, max_bytes)
    return _require_text(documents, f"no .py file below {root}"), f"standard library at {root}"


def local_files(
    paths: Sequence[str], globs: Sequence[str] | None = None, max_bytes: int | None = None
) -> tuple[Dataset, str]:
    """Files as they are named; folders through `globs`. Binary files are left out.

    Raises:
        UsageError: a path does not exist, or no text was found.
    """
    found: dict[str, Path] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_file():
            found[path.name if path.name not in found else path.as_posix()] = path
        elif path.is_dir():
            for pattern in globs or TEXT_GLOBS:
                for file in sorted(path.glob(pattern)):
                    if file.is_file():
                        name = file.relative_to(path).as_posix()
                        found[name if len(paths) == 1 else f"{path.name}/{name}"] = file
        else:
            raise UsageError(
                "a text file or a folder",
                f"{given}, which does not exist",
                f"correct the path (the current folder is {os.getcwd()})",
            )
    documents = _read(found, max_bytes)
    tried = " ".join(globs or TEXT_GLOBS)
    empty = f"{len(found)} files without text in {', '.join(paths)} (patterns: {tried})"
    return _require_text(documents, empty), ", ".join(paths)


def hub_dataset(
    name: str, config: str | None, split: str, text_column: str, max_bytes: int | None = None
) -> tuple[Dataset, str]:
    """Any data set that `load_dataset` finds; a document is a row, its name the hash of its text.

    Raises:
        UsageError: data set, split or column does not exist, or the hub is out of reach.
    """
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"a data set that load_dataset({name!r}, {config!r}, split={split!r}) can load",
            reason,
            "check name, --dataset-config and --dataset-split, or train on files with --text PATH",
        ) from error
    if text_column not in rows.column_names:
        raise UsageError(
            f"a column {text_column!r} in {name}",
            f"columns {', '.join(rows.column_names)}",
            "name the column that holds the text with --text-column",
        )
    if max_bytes is not None:
        rows = rows.select(range(_rows_within(rows, text_column, max_bytes)))
    rows = rows.select_columns([text_column]).rename_column(text_column, "text")
    rows = rows.filter(lambda row: bool(row["text"] and row["text"].strip()))
    rows = rows.map(lambda row: {"name": hashlib.sha256(row["text"].encode()).hexdigest()})
    return _require_text(rows, f"{name} has no row with text in {text_column!r}"), name


def prepared_corpus(folder: Path, cache: Path, max_bytes: int | None = None) -> Corpus:
    """What `prepare_corpus.py` wrote: both sides as they are there, files checked by SHA-256.

    Raises:
        UsageError: the folder is no such corpus, or a file is damaged.
    """
    next_step = f"make it with python examples/prepare_corpus.py --output {folder}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = {side: manifest[side] for side in ("train", "held_out")}
        for entry in entries.values():
            got = file_sha256(folder / entry["file"])
            if got != entry["sha256"]:
                raise UsageError(
                    f"{folder / entry['file']} with SHA-256 {entry['sha256']}",
                    f"{got}: the file is damaged",
                    f"remove {folder} and {next_step}",
                )
        source = f"{manifest['source']} at {folder}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"a prepared corpus in {folder}", f"{type(error).__name__}: {error}", next_step
        ) from error
    rows = load_dataset(
        "json",
        data_files={side: str(folder / entry["file"]) for side, entry in entries.items()},
        cache_dir=str(cache / "datasets"),
    )
    train = rows["train"].select_columns(["name", "text"])
    if max_bytes is not None:  # of the training side alone: what is held out stays comparable
        names = train["name"][:]
        order = sorted(range(len(train)), key=lambda i: unit_hash("sample:" + names[i]))
        train = train.select(order)
        train = train.select(range(_rows_within(train, "text", max_bytes)))
    digests = "".join(entry["sha256"] for entry in entries.values()) + str(max_bytes or "")
    fingerprint = hashlib.sha256(digests.encode()).hexdigest()[:16]
    return Corpus(train, rows["held_out"].select_columns(["name", "text"]), source, fingerprint)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def split_documents(documents: Dataset, source: str, held_out: float) -> Corpus:
    """Holds out a share `held_out` of the documents, chosen by name.

    At least one document lands on each side. A corpus of a single document has no second one to
    hold out: its tail is taken instead, and the note says so.
    """
    fingerprint = _fingerprint(documents, held_out)
    if len(documents) == 1:
        name, text = documents[0]["name"], documents[0]["text"]
        cut = round(len(text) * (1 - held_out))
        sides = [
            Dataset.from_dict({"name": [name], "text": [part]}) for part in (text[:cut], text[cut:])
        ]
        note = f"one document: its last {held_out:.0%} is held out"
        return Corpus(*sides, source, fingerprint, note)
    hashes = [unit_hash(name) for name in documents["name"]]
    held = [i for i, value in enumerate(hashes) if value < held_out]
    if not held:
        held = [min(range(len(hashes)), key=hashes.__getitem__)]
    if len(held) == len(hashes):
        held.remove(max(held, key=hashes.__getitem__))
    chosen = set(held)
    train = [i for i in range(len(hashes)) if i not in chosen]
    return Corpus(documents.select(train), documents.select(held), source, fingerprint)


def _read(files: dict[str, Path], max_bytes: int | None) -> Dataset:
    """Reads the files; with `max_bytes`, a sample of about that size, chosen by name."""
    names = sorted(files)
    if max_bytes is not None:
        names = _sample(names, files, max_bytes)
    kept: list[str] = []
    texts: list[str] = []
    for name in names:
        try:
            content = files[name].read_bytes()
        except PermissionError as error:
            raise UsageError(
                f"to read {files[name]}", str(error), "change its permissions or leave it out"
            ) from error
        if b"\0" in content:
            continue
        text = content.decode("utf-8", errors="replace")
        if text.strip():
            kept.append(name)
            texts.append(text)
    return Dataset.from_dict({"name": kept, "text": texts})


def _sample(names: Iterable[str], files: dict[str, Path], max_bytes: int) -> list[str]:
    # A second hash: the first decides what is held out, and a sample of its small values
    # would be held out as a whole.
    taken: list[str] = []
    size = 0
    for name in sorted(names, key=lambda name: unit_hash("sample:" + name)):
        if size >= max_bytes:
            break
        taken.append(name)
        size += files[name].stat().st_size
    return sorted(taken)


def _rows_within(rows: Dataset, column: str, max_bytes: int) -> int:
    size = 0
    for count, row in enumerate(rows):
        if size >= max_bytes:
            return count
        size += len((row[column] or "").encode())
    return len(rows)


def _require_text(documents: Dataset, got: str) -> Dataset:
    if len(documents) == 0:
        raise UsageError(
            "a corpus with text",
            got,
            "name other files with --text and --glob, or a data set with --dataset",
        )
    return documents


def _fingerprint(documents: Dataset, held_out: float) -> str:
    digest = hashlib.sha256(f"{held_out}".encode())
    for row in documents:
        digest.update(row["name"].encode() + b"\0")
        digest.update(hashlib.sha256(row["text"].encode()).digest())
    return digest.hexdigest()[:16]
