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
from lm.packing import (  # noqa: E402
    BatchOrder,
    PartOrder,
    block_starts,
    fill_blocks,
    pack_corpus,
    tokenise,
)
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


@pytest.mark.parametrize("whole", [False, True])
def test_blocks_begin_where_their_first_token_is(whole: bool):
    lengths = [3, 10, 0, 7, 4, 1, 9]
    ends = np.cumsum(lengths)
    rows = [list(range(end - n, end)) for n, end in zip(lengths, ends, strict=True)]
    blocks = fill_blocks(rows, context=4, whole=whole)
    assert block_starts(lengths, 4, whole).tolist() == blocks[:, 0].tolist()
    assert len(block_starts([1, 1], 4, whole)) == 0


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


def test_parts_of_the_text_do_not_overlap_whatever_the_context():
    """A run on the first 160 tokens of 240 and one on the rest; then one that reads on."""
    lengths = np.array([40, 7, 5, 64, 9, 30, 3, 42, 8, 32])
    tokens = np.arange(240)
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    seen = {}
    for context, part in ((8, (0, 160)), (4, (160, 80)), (16, (160, 80)), (16, (160, 160))):
        blocks = fill_blocks(rows, context, whole=True)
        starts = block_starts(lengths, context, whole=True)
        first, count = part[0] // context, part[1] // context
        order = PartOrder(starts, first, count, per_step=count // 5, seed=0)
        numbers = np.concatenate([order.step(step) for step in range(5)])
        assert len(numbers) == count and numbers.tolist() != sorted(numbers)
        seen[context, part] = blocks[numbers].flatten().tolist()
    before = set(seen[8, (0, 160)])
    for key in ((4, (160, 80)), (16, (160, 80))):
        assert len(set(seen[key])) == 80 and len(before.intersection(seen[key])) <= 16, key
    assert seen[16, (160, 160)][:80] == seen[16, (160, 80)]  # the rest of a pass comes first
    assert len(before.intersection(seen[16, (160, 160)][80:])) >= 64


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


@pytest.mark.parametrize("decay", [0, 0.25, 1])
def test_the_learning_rate_is_constant_and_then_falls_to_zero(decay: float):
    given = {"lr": 1.0, "warmup": 0.1, "weight_decay": 0, "clip": 1, "seed": 0}
    recipe = Recipe(100, 1, 1, **given, schedule="wsd", decay=decay)
    rates = [recipe.learning_rate(done / 100) for done in range(101)]
    constant = 100 - round(100 * min(decay, 0.9))
    assert rates[5] == pytest.approx(0.5) and rates[10 : constant + 1] == [1] * (constant - 9)
    if decay:
        assert np.diff(rates[constant:]) == pytest.approx(-1 / (100 - constant))
        assert rates[100] == recipe.learning_rate(1.2) == 0


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
