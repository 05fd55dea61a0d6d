"""The command line of examples/train_bert.py from end to end, its batches, and what it refuses."""

from __future__ import annotations

import inspect
import os
import sys
import types
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("datasets")
hf_flashattn = pytest.importorskip("hf_flashattn")
pytest.importorskip("evaluate")

import numpy as np  # noqa: E402
import train_bert  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from example_helpers import refused, results, write_documents  # noqa: E402
from lm import model as lm_model  # noqa: E402
from lm.bert import IGNORED, SIZES, bert_config, make_bert, score_rows  # noqa: E402
from lm.corpus import local_files, split_documents  # noqa: E402
from lm.failures import UsageError  # noqa: E402
from lm.fused_loss import require_liger  # noqa: E402
from lm.gpt2 import SIZES as GPT2_SIZES  # noqa: E402
from lm.gpt2 import gpt2_config, make_gpt2  # noqa: E402
from lm.masking import (  # noqa: E402
    Collator,
    MaskedRows,
    cut,
    make_rows,
    pack_pieces,
    state_packing_in_a_mask,
)
from lm.packing import BatchOrder  # noqa: E402
from lm.tokenizer import get_masking_tokenizer  # noqa: E402
from transformers import BertForMaskedLM  # noqa: E402

CONTEXT = 32
BATCHINGS = ["padded", "packed"]
if "unpad" in inspect.signature(hf_flashattn.patch_model).parameters:
    BATCHINGS.append("unpadded")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(text: Path, cache: Path):
    corpus = split_documents(*local_files([str(text)]), 0.2)
    return get_masking_tokenizer("corpus", corpus, 200, cache)


@pytest.fixture(scope="module")
def rows(text: Path, cache: Path, tokenizer):
    corpus = split_documents(*local_files([str(text)]), 0.2)
    return {
        packed: make_rows(corpus, tokenizer, CONTEXT, 8, packed, 0, cache)
        for packed in (False, True)
    }


@pytest.fixture
def run(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Calls the command line with a tiny model; later options win over these."""
    monkeypatch.setattr(sys, "argv", ["train_bert.py", "--tiny-test"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(output: Path, *options: object) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        base = (
            f"--cpu --text {text} --size tiny --context {CONTEXT} --vocab-size 200 --batch-size 4"
            f" --steps 6 --eval-blocks 8 --held-out 0.2 --cache-dir {cache} --output {output}"
            " --attention sdpa"
        ).split()
        return train_bert.main([*base, *map(str, options)])

    yield call
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny_bert(tokenizer, attention: str = "eager"):
    config = bert_config(SIZES["tiny"], len(tokenizer), CONTEXT, 0.0, tokenizer.pad_token_id)
    return lm_model.random_model(make_bert, config, attention, seed=0)


def batch_of(rows, tokenizer, packed: bool, count: int = 6):
    masked = MaskedRows(rows[packed].train, tokenizer, count, None, seed=0)
    collator = Collator(tokenizer.pad_token_id, CONTEXT, packed)
    return collator([masked[i] for i in range(count)])


# ---- batches -------------------------------------------------------------------------------------


def test_pieces_have_both_ends_and_lose_no_text_but_a_short_rest():
    lengths = iter([10, 8, 12, 9, 9])
    pieces = cut(list(range(100, 130)), (1, 2), lambda: next(lengths))
    assert [len(piece) for piece in pieces] == [10, 8, 12, 8]
    assert all(piece[0] == 1 and piece[-1] == 2 for piece in pieces)
    assert np.concatenate([piece[1:-1] for piece in pieces]).tolist() == list(range(100, 130))


def test_packs_hold_every_piece_once():
    random = np.random.default_rng(0)
    pieces = [[i] * int(random.integers(8, 33)) for i in range(200)]
    packed = pack_pieces(pieces, 32)
    assert all(len(row) <= 32 for row in packed["input_ids"])
    assert [len(row) for row in packed["input_ids"]] == [sum(row) for row in packed["lengths"]]
    assert sorted(np.concatenate(packed["input_ids"])) == sorted(np.concatenate(pieces))
    # Pieces of 25 to 32 have no companion of 8 or more: a row each is the least there can be.
    alone = sum(len(piece) > 24 for piece in pieces)
    rest = sum(len(piece) for piece in pieces if len(piece) <= 24)
    assert len(packed["input_ids"]) <= 1.06 * (alone + rest / 32)


def test_half_of_a_padded_batch_is_padding_and_little_of_a_packed_one(rows):
    assert 0.3 < rows[False].statistics["train_padding"] < 0.55
    assert rows[True].statistics["train_padding"] < 0.15
    assert rows[True].statistics["train_tokens"] == rows[False].statistics["train_tokens"]


def test_masks_are_those_of_bert_and_depend_on_seed_and_row_alone(rows, tokenizer):
    train = rows[False].train
    order = BatchOrder(len(train), 4, seed=3)
    masked = MaskedRows(train, tokenizer, 400, order, seed=3)
    labels = torch.cat([masked[i]["labels"] for i in range(400)])
    inputs = torch.cat([masked[i]["input_ids"] for i in range(400)])
    chosen = labels != IGNORED
    assert not torch.isin(labels[chosen], torch.tensor(tokenizer.all_special_ids)).any()
    assert 0.1 < chosen.float().mean() < 0.16  # 15 % of what is not special
    as_mask = (inputs[chosen] == tokenizer.mask_token_id).float().mean()
    assert 0.74 < as_mask < 0.86
    again = MaskedRows(train, tokenizer, 400, BatchOrder(len(train), 8, seed=3), seed=3)
    for i in (7, 399):
        assert all(torch.equal(masked[i][key], again[i][key]) for key in masked[i])
    other = MaskedRows(train, tokenizer, 400, order, seed=4)
    assert any(not torch.equal(masked[i]["labels"], other[i]["labels"]) for i in range(5))


def test_packed_pieces_do_not_see_each_other(rows, tokenizer):
    """Logits of a packed batch, by position_ids and by a mask, are those of the pieces alone."""
    batch = batch_of(rows, tokenizer, packed=True)
    model = tiny_bert(tokenizer).eval()
    expected = []
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for piece in torch.tensor_split(ids, starts[1:]):
            expected.append(model(input_ids=piece[None]).logits[0])
    expected = torch.cat(expected)
    keys = ("input_ids", "position_ids", "attention_mask")
    stated = {k: v for k, v in state_packing_in_a_mask(batch).items() if k in keys}
    assert (model(**stated).logits.flatten(0, 1) - expected).abs().max() < 1e-4
    hf_flashattn.patch_model(model, strict=True)
    read = {k: batch[k] for k in keys[:2]}
    assert (model(**read).logits.flatten(0, 1) - expected).abs().max() < 1e-4


def liger_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Its call, by PyTorch, as its kernels need a GPU. Returns the shapes it will have seen."""
    seen = []

    class Loss:
        def __init__(self, accum_dtype):
            assert accum_dtype == torch.float32

        def __call__(self, weight, hidden, labels, bias=None):
            seen.append(tuple(hidden.shape))
            logits = torch.nn.functional.linear(hidden, weight, bias)
            return torch.nn.functional.cross_entropy(logits, labels)

    module = types.ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Loss
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return seen


def test_ligers_loss_is_the_models_own(rows, tokenizer, monkeypatch):
    seen = liger_on_a_cpu(monkeypatch)
    batch = batch_of(rows, tokenizer, packed=False)
    config = gpt2_config(GPT2_SIZES["tiny"], 200, CONTEXT, 0.0)
    ids = batch["input_ids"]
    for make, given, of, tokens in (
        (make_bert, batch, tiny_bert(tokenizer).config, len(batch["label_positions"])),
        (make_gpt2, {"input_ids": ids, "labels": ids}, config, ids[:, 1:].numel()),
    ):
        losses, gradients = [], []
        for liger in (False, True):
            model = lm_model.random_model(lambda c, m=make, f=liger: m(c, f), of, "sdpa", 0).train()
            output = model(**given)
            output.loss.backward()
            losses.append(output.loss.item())
            gradients.append([p.grad for p in model.parameters()])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and output.logits is None
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(*gradients, strict=True))
        assert seen.pop() == (tokens, 64) and not seen
        assert model.eval()(input_ids=ids).logits.shape[:2] == ids.shape


def test_without_liger_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UsageError, match="pip install liger-kernel"):
        require_liger()


@pytest.mark.parametrize("packed", [False, True])
def test_the_head_on_labels_alone_has_berts_own_loss_and_gradients(rows, tokenizer, packed):
    batch = batch_of(rows, tokenizer, packed)
    positions = batch.pop("label_positions")
    if packed:
        batch = state_packing_in_a_mask(batch)
    losses, gradients = [], []
    for forward in ("own", "without positions", "Transformers'"):
        model = tiny_bert(tokenizer)
        given = {"label_positions": positions} if forward == "own" else {}
        if forward == "Transformers'":
            del model.forward
            assert model.forward.__func__ is BertForMaskedLM.forward
        loss = model(**batch, **given).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses == pytest.approx([losses[-1]] * 3, rel=1e-5)
    for name, expected in gradients[-1].items():
        assert (gradients[0][name] - expected).abs().max() < 1e-5, name


def test_scores_are_summed_by_row():
    torch.manual_seed(0)
    labels = torch.tensor([[IGNORED, 3, 1], [IGNORED] * 3, [2, IGNORED, IGNORED]])
    logits = torch.randn(3, 5)
    logits[1, 1] = 9.0  # the second label is predicted right
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 1, 2]), reduction="none")
    right = (logits.argmax(1) == torch.tensor([3, 1, 2])).float()
    expected = torch.tensor(
        [[nll[0] + nll[1], right[0] + right[1], 2], [0, 0, 0], [nll[2], right[2], 1]]
    )
    assert torch.allclose(score_rows(logits, labels), expected)


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_run_learns_and_leaves_its_results(run, tmp_path: Path, batching, capsys):
    options = ("--steps", 60, "--lr", 5e-3, "--eval-every", 30, "--batching", batching)
    assert run(tmp_path / "out", *options, "--attention", "hf_flashattn") == 0
    result = results(tmp_path / "out")
    trained = result["runs"]["hf_flashattn"]
    assert len(trained["losses"]) == trained["steps"] == 60
    assert sum(trained["losses"][-5:]) < 0.9 * sum(trained["losses"][:5])
    assert [p["step"] for p in trained["perplexities"]] == [0, 30, 60]
    before, after = trained["perplexities"][0], trained["perplexities"][-1]
    assert after["perplexity"] < 0.5 * before["perplexity"] and 0 <= after["accuracy"] <= 1
    assert trained["attention_report"]["table"] in capsys.readouterr().out
    assert trained["tokens_per_second"] > 0 and result["settings"]["batching"] == batching
    assert (tmp_path / "out" / "losses.png").stat().st_size > 1000
    model = BertForMaskedLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.architectures == ["BertForMaskedLM"]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_attentions_train_alike(run, tmp_path: Path, batching):
    losses = []
    for attention in ("eager", "hf_flashattn"):
        own = "padded" if (attention, batching) == ("eager", "unpadded") else batching
        options = ("--attention", attention, "--batching", own, "--accumulate", 2)
        assert run(tmp_path / attention, *options) == 0
        losses.append(results(tmp_path / attention)["runs"][attention]["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_resume_reaches_the_same_loss(run, tmp_path: Path, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = ("--accumulate", 2, "--save-every", 3, "--dropout", 0.2, "--eval-every", 3)
    assert run(whole, *options) == 0
    assert run(halves, *options) == 0
    (halves / "checkpoint-6").rename(tmp_path / "lost")
    capsys.readouterr()
    message = refused(capsys, run(halves, *options, "--resume", "--seed", 1))
    assert "seed=0" in message and "seed=1" in message
    assert run(halves, *options, "--resume") == 0
    expected, got = (results(folder)["runs"]["sdpa"] for folder in (whole, halves))
    assert got["resumed_at"] == 3
    assert got["losses"] == expected["losses"]
    assert got["perplexities"] == expected["perplexities"]

    weights = halves / "checkpoint-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-10] ^= 1
    weights.write_bytes(content)
    message = refused(capsys, run(halves, *options, "--resume", "--steps", 9))
    assert "damaged" in message and "checkpoint-3" in message
    (halves / "checkpoint-6" / "checkpoint.json").unlink()
    assert "a complete checkpoint" in refused(capsys, run(halves, *options, "--resume"))


@pytest.mark.parametrize("batching", BATCHINGS)
def test_comparison_writes_ratios_and_a_plot(run, tmp_path: Path, batching):
    options = ("--compare", "eager,sdpa,hf_flashattn", "--batching", batching, "--dropout", 0)
    assert run(tmp_path / "out", *options) == 0
    result = results(tmp_path / "out")
    losses = [entry["losses"] for entry in result["runs"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert result["ratios"]["eager"]["sdpa"] > 0
    assert (tmp_path / "out" / "losses.png").stat().st_size > 1000


def test_training_stops_at_the_target_or_the_time_limit(run, tmp_path: Path, capsys):
    options = ("--steps", 10**5, "--lr", 5e-3, "--eval-every", 10)
    assert run(tmp_path / "target", *options, "--target-accuracy", 0.05) == 0
    reached = results(tmp_path / "target")["runs"]["sdpa"]["target"]["reached"]
    assert reached["accuracy"] >= 0.05 and reached["training_seconds"] > 0
    assert run(tmp_path / "time", *options, "--max-seconds", 0.3) == 0
    assert "the time limit of 0.3 s" in capsys.readouterr().out
    assert 0 < results(tmp_path / "time")["runs"]["sdpa"]["steps"] < 10**5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--text", "no/such/file.txt"), "no/such/file.txt"),
        (("--corpus", "no/such/corpus"), "a prepared corpus in no/such/corpus"),
        (("--shortest", 64), "--shortest"),
        (("--batching", "unpadded"), "which can not unpad"),
        (("--target-accuracy", 0.5), "--eval-every"),
        (("--target-accuracy", 2), "a share between 0 and 1"),
        (("--liger",), "a GPU for --liger"),
        (("--hidden", 100, "--heads", 3), "multiple of the number of heads"),
        (("--tokenizer", "no/such/tokenizer"), "no/such/tokenizer"),
        (("--resume",), "a checkpoint in"),
        (("--attention", "hf_flashatn"), "did you mean 'hf_flashattn'?"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value)),
)
def test_refuses(run, tmp_path: Path, capsys, options, expected):
    if "--text" in options or "--corpus" in options:
        AcceleratorState._reset_state(reset_partial_state=True)
        base = ["--cpu", "--attention", "sdpa", "--output", str(tmp_path / "out")]
        code = train_bert.main([*base, *map(str, options)])
    else:
        code = run(tmp_path / "out", *options)
    assert expected in refused(capsys, code)
    assert not (tmp_path / "out").exists()


def test_refuses_to_unpad_with_a_package_that_can_not(run, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(hf_flashattn, "patch_model", lambda model, *, strict=False: None)
    code = run(tmp_path / "out", "--batching", "unpadded", "--attention", "hf_flashattn")
    assert "has no such argument" in refused(capsys, code)
