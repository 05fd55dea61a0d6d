"""What the tests of the training scripts share: a small text, their results, their refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SENTENCE = "the kernel reads one block of keys and writes no matrix of scores to memory"
WORDS = SENTENCE.split()


def write_documents(folder: Path) -> Path:
    """24 documents, a few hundred words each."""
    for number in range(24):
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(200 + 20 * number)]
        (folder / f"document{number:02}.txt").write_text(" ".join(words))
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The message of an error exit, which must have its three parts and no traceback."""
    message = capsys.readouterr().err
    assert code == 2
    assert message.startswith("error: expected") or "\nerror: expected" in message
    assert "got: " in message and "next step: " in message and "Traceback" not in message
    return message
