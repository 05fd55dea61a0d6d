"""The text of the example: what is held out, how blocks are filled, what perplexity means."""

from __future__ import annotations

import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("datasets")
evaluate = pytest.importorskip("evaluate")

import numpy as np  # noqa: E402
from lm import packing  # noqa: E402
from lm.cache import made_once  # noqa: E402
from lm.corpus import local_files, split_documents, unit_hash  # noqa: E402
from lm.packing import BatchOrder, fill_blocks, pack_corpus, tokenise  # noqa: E402
from lm.tokenizer import get_tokenizer  # noqa: E402
from lm.training import UNLIMITED, Recipe  # noqa: E402


def documents(names: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"name": names, "text": [f"text of {n}" for n in names]})


def test_the_split_depends_on_names_alone():
    names = [f"folder/file{i}.py" for i in range(400)]
    corpus = split_documents(documents(names), "test", 0.1)
    held = set(corpus.held_out["name"])
    assert held == {name for name in names if unit_hash(name) < 0.1}
    assert held.isdisjoint(corpus.train["name"])
    assert len(held) + len(corpus.train) == 400 and 20 < len(held) < 60
    later = split_documents(documents([*names[::-1][:300], "new.py"]), "test", 0.1)
    assert held.intersection(names[100:]) == set(later.held_out["name"]) - {"new.py"}


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_both_sides_get_a_document(share: float):
    corpus = split_documents(documents(["a", "b", "c"]), "test", share)
    assert len(corpus.train) >= 1 and len(corpus.held_out) >= 1


def test_the_tail_of_a_single_document_is_held_out():
    one = datasets.Dataset.from_dict({"name": ["book.txt"], "text": ["x" * 90 + "y" * 10]})
    corpus = split_documents(one, "book.txt", 0.1)
    assert corpus.train[0]["text"] == "x" * 90 and corpus.held_out[0]["text"] == "y" * 10
    assert "10%" in corpus.note


def test_local_files_leave_out_binaries_and_sample_by_name(tmp_path: Path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 100)
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0")
    everything, _ = local_files([str(tmp_path)])
    assert len(everything) == 20
    sample, _ = local_files([str(tmp_path)], max_bytes=1000)
    assert 3 <= len(sample) <= 6
    assert sample["name"][:] == local_files([str(tmp_path)], max_bytes=1000)[0]["name"][:]


def test_chained_blocks_hold_all_tokens_in_order():
    rows = [list(range(0, 7)), list(range(7, 9)), list(range(9, 30))]
    blocks = fill_blocks(rows, context=4, whole=False)
    assert {len(block) for block in blocks} == {4}
    assert np.concatenate(blocks).tolist() == list(range(28))


def test_whole_documents_start_their_own_blocks():
    rows = [list(range(100, 103)), list(range(0, 10)), list(range(200, 207))]
    blocks = [block.tolist() for block in fill_blocks(rows, context=4, whole=True)]
    assert blocks[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [200, 201, 202, 203]]
    assert blocks[3:] == [[100, 101, 102, 8], [9, 204, 205, 206]]


def test_packing_ends_documents_and_keeps_held_out_text_out(tmp_path: Path):
    texts = [f"document {i} " + f"word{i} " * 60 for i in range(40)]
    source = datasets.Dataset.from_dict({"name": [str(i) for i in range(40)], "text": texts})
    corpus = split_documents(source, "test", 0.3)
    tokenizer = get_tokenizer("corpus", corpus, 300, tmp_path)
    blocks = pack_corpus(corpus, tokenizer, 16, "chain", 0, tmp_path)
    for side, packed in ((corpus.train, blocks.train), (corpus.held_out, blocks.held_out)):
        assert packed.shape[1] == 16 and packed.dtype == np.uint16
        pieces = tokenizer.decode(packed.flatten()).split("<|endoftext|>")
        assert set(pieces[:-1]) <= set(side["text"])  # the last one is cut by the last block
        assert len(pieces) >= len(side)
    again = pack_corpus(corpus, tokenizer, 16, "chain", 0, tmp_path)
    assert blocks.train.tolist() == again.train.tolist()


def test_tokens_are_the_same_however_many_processes_make_them(tmp_path: Path, monkeypatch):
    texts = [f"document {i} " + f"word{i} " * (i % 7) for i in range(50)]
    source = datasets.Dataset.from_dict({"name": [str(i) for i in range(50)], "text": texts})
    corpus = split_documents(source, "test", 0.3)
    tokenizer = get_tokenizer("corpus", corpus, 300, tmp_path)
    monkeypatch.setattr(packing, "DOCUMENTS_A_WORKER", 10**6)
    alone = tokenise(corpus, "train", tokenizer, tmp_path / "alone")
    monkeypatch.setattr(packing, "DOCUMENTS_A_WORKER", 5)
    monkeypatch.setattr(packing.os, "sched_getaffinity", lambda process: {0, 1, 2})
    shared = tokenise(corpus, "train", tokenizer, tmp_path / "shared")
    assert shared.ids.tolist() == alone.ids.tolist()
    assert shared.ends.tolist() == alone.ends.tolist()
    decoded = [tokenizer.decode(ids[:-1]) for ids in shared.documents()]
    assert decoded == corpus.train["text"][:]
    assert shared.text_bytes == sum(map(len, decoded))


def test_batches_visit_every_block_once_an_epoch():
    order = BatchOrder(blocks=10, per_step=4, seed=1)
    seen = np.concatenate([order.step(i) for i in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert BatchOrder(10, 4, 1).step(3).tolist() == order.step(3).tolist()
    assert BatchOrder(10, 4, 2).step(3).tolist() != order.step(3).tolist()
    assert BatchOrder(3, 8, 0).step(0).shape == (8,)


def test_perplexity_is_that_of_the_probabilities():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    chosen = logits.softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    nll = -chosen.log().double()
    metric = evaluate.load(str(EXAMPLES / "metrics" / "perplexity"), keep_in_memory=True)
    # Rows of different lengths: the mean is over tokens, not over rows.
    lengths = [7, 3, 1]
    sums = [nll[row, :n].sum().item() for row, n in enumerate(lengths)]
    score = metric.compute(predictions=sums, references=lengths)
    product = math.prod(chosen[row, i].item() for row, n in enumerate(lengths) for i in range(n))
    assert score["perplexity"] == pytest.approx(product ** (-1 / 11), rel=1e-5)
    assert score["tokens"] == 11


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    recipe = Recipe(UNLIMITED, 1, 1, lr=1.0, warmup=0.1, weight_decay=0, clip=1, seed=0)
    rates = [recipe.learning_rate(done / 100) for done in range(101)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and max(rates) == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == recipe.learning_rate(1.2) == pytest.approx(0.1)


def test_a_cached_folder_is_complete_or_not_there(tmp_path: Path):
    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        made_once(tmp_path / "made", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["made.lock"]
    calls = []
    for _ in range(2):
        made_once(tmp_path / "made", lambda folder: calls.append((folder / "all").touch()))
    assert len(calls) == 1 and (tmp_path / "made" / "all").exists()


def test_the_second_waits_for_the_first_to_make_a_folder(tmp_path: Path):
    calls = []

    def slow(folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)
        (folder / "all").touch()

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: made_once(tmp_path / "made", slow), range(4)))
    assert len(calls) == 1 and {(path / "all").exists() for path in found} == {True}
