"""The short way of a layer's call: taken where it should be, and nothing differs from the long one.

What changes between two calls of a layer is tried one by one, each next to the same call made the
long way: outputs, gradients, what is saved for backward, counts and reasons.
"""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from model_helpers import bert, gpt2, padding, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import hf_flashattn
from hf_flashattn import attention, masks, report
from hf_flashattn.attention import attention_forward
from hf_flashattn.notes import TensorNotes


class Layer(nn.Module):
    """An attention module."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, 1


def qkv(seqlen_q=7, seqlen_k=7, heads_k=4, dtype=torch.float32, **options):
    shapes = ((2, 4, seqlen_q, 8), (2, heads_k, seqlen_k, 8), (2, heads_k, seqlen_k, 8))
    return [torch.randn(shape, dtype=dtype, **options) for shape in shapes]


@pytest.fixture
def short(monkeypatch):
    """For each call since, whether it went the short way; clear() to start anew."""
    taken = []
    real = attention._quick

    def quick(*args):
        out = real(*args)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(attention, "_quick", quick)
    return taken


def the_long_way(call):
    """call() with no short way."""
    quick, attention._quick = attention._quick, lambda *args: None
    try:
        return call()
    finally:
        attention._quick = quick


def counts(module):
    calls = report.calls_of(module)
    return calls.kernel, calls.cpu, calls.fallback, dict(calls.reasons)


def assert_same_both_ways(*args, **kwargs):
    """Output and gradients of a call, short and long; the counts of what it adds are equal too."""
    results = []
    for way in (lambda call: call(), the_long_way):
        layer = Layer(args[0])
        q, k, v = (x.detach().requires_grad_() for x in args[1:4])
        torch.manual_seed(3)
        out = way(lambda a=(layer, q, k, v): attention_forward(*a, *args[4:], **kwargs))[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v)), counts(layer)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want


def ranges(lengths, *, causal, width=7):
    """A carrier of right padding."""
    kept = torch.arange(width) < torch.tensor(lengths)[:, None]
    return masks.padded(kept, width, causal=causal)


# ------------------------------------------------------------------------------- what goes there


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_plain_calls_go_the_short_way(short, causal, dropout, heads_k):
    for sizes in ((7, 7), (1, 7), (3, 7)):
        short.clear()
        assert_same_both_ways(causal, *qkv(*sizes, heads_k=heads_k), None, dropout=dropout)
        assert short == [True]


@pytest.mark.parametrize("causal", [False, True])
def test_padding_goes_the_short_way(short, causal):
    for lengths in ([7, 4], [2, 7]):
        assert_same_both_ways(causal, *qkv(), ranges(lengths, causal=causal))
    assert short == [True, True]


@pytest.mark.parametrize(
    "options",
    [
        {"position_bias": torch.zeros(1, 4, 7, 7)},
        {"s_aux": torch.zeros(4)},
        {"softcap": 20.0},
        {"output_attentions": True},
        {"sliding_window": 3},
        {"cu_seq_lens_q": torch.tensor([0, 7])},
    ],
)
def test_what_decides_goes_the_long_way(short, options):
    plain = {"sliding_window": 7, "softcap": None, "output_attentions": False, "use_cache": True}
    q, k, v = qkv()
    attention_forward(Layer(), q, k, v, None, **plain)
    assert short == [True]
    assert attention._quick(Layer(), q, k, v, None, 0.0, None, None, options) is None


def test_masks_of_a_caller_go_the_long_way(short):
    full = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    for mask in (full, full.tril(), torch.zeros(2, 1, 7, 7)):
        assert_same_both_ways(False, *qkv(), mask)
    assert short == [False] * 3


def test_positions_are_looked_at_first(short):
    layer, (q, k, v) = Layer(), qkv()
    positions = torch.arange(7).expand(2, -1).clone()
    call = lambda: attention_forward(layer, q, k, v, None, position_ids=positions)[0]  # noqa: E731
    plain = call(), call()
    assert short == [False, True] and torch.equal(*plain)
    positions[:, 4:] = torch.arange(3)  # packed now, and the same tensor
    packed = call(), call()
    assert short[2:] == [False, False]
    assert torch.equal(packed[0], the_long_way(call)) and not torch.equal(packed[0], plain[0])
    positions.copy_(torch.arange(7))
    assert torch.equal(call(), plain[0]) and torch.equal(call(), plain[0])
    assert short[4:] == [False, True]
    one = torch.arange(7)[None]  # of one row, for a batch of two
    for _ in range(2):
        attention_forward(layer, q, k, v, None, position_ids=one)
    attention_forward(layer, q[:1], k[:1], v[:1], None, position_ids=one)
    assert short[6:] == [False, True, False]


# ------------------------------------------------------------------------ what changes in between


def test_a_mask_that_is_written_to_says_what_it_says_now(short):
    layer, (q, k, v) = Layer(False), qkv()
    mask, other = ranges([7, 4], causal=False), ranges([7, 2], causal=False)
    call = lambda mask: attention_forward(layer, q, k, v, mask)[0]  # noqa: E731
    before, wanted = call(mask), call(other)
    mask.copy_(other)
    assert torch.equal(call(mask), wanted) and not torch.equal(before, wanted)
    assert torch.equal(call(mask), wanted) and short == [True, True, False, True]
    copied = copy.deepcopy(other)
    copied[1, 0, 0, 1] = 4
    assert torch.equal(call(copied), before)


def test_masks_of_one_shape_do_not_mix(short):
    layer, (q, k, v) = Layer(False), qkv()
    for lengths in ([7, 4], [3, 7], [7, 4]):
        mask = ranges(lengths, causal=False)  # which may get the address of the last one
        out = attention_forward(layer, q, k, v, mask)[0]
        want = the_long_way(lambda m=mask: attention_forward(layer, q, k, v, m)[0])
        assert torch.equal(out, want)
    assert short == [True] * 3


def test_a_mask_of_another_batch_is_an_error(short):
    q, k, v = (x[:1] for x in qkv())
    with pytest.raises(ValueError, match="key_start"):
        attention_forward(Layer(), q, k, v, ranges([7, 4], causal=True))


def test_dtypes_and_autocast(short):
    layer, (q, k, v) = Layer(), qkv()
    assert attention_forward(layer, q, k, v, None)[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_forward(layer, q, k.bfloat16(), v, None)[0]
        assert out.dtype == torch.bfloat16
    assert short == [True, True]
    short.clear()
    with pytest.raises(RuntimeError, match="same dtype"):  # the fallback's words
        attention_forward(layer, q.half(), k, v.half(), None)
    assert short == [False] and "mixed dtypes" in next(iter(report.calls_of(layer).reasons))


def test_settings_and_patches(short):
    model = bert()
    layers = [layer.attention.self for layer in model.encoder.layer]
    batch = {"input_ids": tokens()}
    with torch.no_grad():
        plain = model(**batch)[0]
        hf_flashattn.patch_model(model)
        model(**batch)
        assert short == [True] * len(layers)
        hf_flashattn.patch_model(model, exclude="*layer.0.*")
        short.clear()
        model(**batch)
        assert short == [False] + [True] * (len(layers) - 1)
        assert counts(layers[0])[2] == 1 and counts(layers[1])[:3] == (0, 1, 0)
        weights = model(**batch, output_attentions=True).attentions
        assert counts(layers[1])[:3] == (0, 1, 1) and len(weights) == len(layers)
        hf_flashattn.unpatch_model(model)
        short.clear()
        torch.testing.assert_close(model(**batch)[0], plain)
        assert not short


def test_train_and_eval(short):
    model = bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    hf_flashattn.patch_model(model, strict=True)
    batch = {"input_ids": tokens()}
    runs = []
    for training in (False, True, False):
        torch.manual_seed(0)
        runs.append(model.train(training)(**batch)[0])
    assert torch.equal(runs[0], runs[2]) and not torch.allclose(runs[0], runs[1])
    assert all(short)


def test_a_copied_model_counts_on_its_own():
    model = gpt2()
    hf_flashattn.patch_model(model)
    model(tokens())
    twin = copy.deepcopy(model)
    for _ in range(2):
        twin(tokens())
    assert counts(model.transformer.h[0].attn)[1] == 1
    assert counts(twin.transformer.h[0].attn)[1] == 2


def test_two_threads_and_their_masks():
    model = bert()
    hf_flashattn.patch_model(model)
    batches = [
        {"input_ids": tokens(), "attention_mask": padding(kind)} for kind in ("right", "left")
    ]
    with torch.no_grad():
        wanted = [model(**batch)[0] for batch in batches]
    wrong = []

    def run(batch, want):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(**batch)[0], want):
                    wrong.append(batch)

    threads = [threading.Thread(target=run, args=x) for x in zip(batches, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_checkpoint_may_record_either_way(dropout):
    """The first call looks at positions, its replay knows them: both save the same tensors."""
    layer, positions = Layer(), torch.arange(7).expand(2, -1).clone()
    saved = []

    def pack(x):
        saved[-1].append((x.shape, x.stride(), x.dtype))
        return x

    q, k, v = qkv(requires_grad=True)
    mask = ranges([7, 4], causal=True)
    for mask_, way in ((m, w) for m in (None, mask) for w in (lambda call: call(), the_long_way)):
        saved.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            way(lambda m=mask_: attention_forward(layer, q, k, v, m, dropout=dropout))
    assert saved[0] == saved[1] and saved[2] == saved[3] and saved[0] and saved[2]

    call = lambda q: attention_forward(layer, q, k, v, None, dropout, position_ids=positions)[0]  # noqa: E731
    torch.manual_seed(1)
    out = checkpoint(call, q, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    torch.manual_seed(1)
    out = call(q)
    assert torch.equal(grad, torch.autograd.grad(out.square().sum(), q)[0])


def test_inference_mode(short):
    layer = Layer()
    with torch.inference_mode():
        q, k, v = qkv()
        out = attention_forward(layer, q, k, v, ranges([7, 4], causal=True))[0]
    want = attention_forward(
        layer, q.clone(), k.clone(), v.clone(), ranges([7, 4], causal=True)
    )[0]  # fmt: skip
    assert torch.equal(out, want) and short == [True, True]


# -------------------------------------------------------------------------------------- notes


def test_notes_hold_until_a_tensor_is_written_to_or_gone():
    notes = TensorNotes()
    x = torch.zeros(2)
    assert notes.get(x) is None
    notes[x] = "zeros"
    assert notes.get(x) == "zeros" and notes.get(copy.deepcopy(x)) is None
    assert notes.get(x.view(2)) is None
    x.view(2)[0] = 1  # through a view, which shares the count
    assert notes.get(x) is None
    notes[x] = "ones"
    y, held = torch.zeros(2), [x]
    notes[y] = "others"
    assert notes.get(x) == "ones" and len(notes) == 2
    del x, held
    gc.collect()
    assert len(notes) == 1 and notes.get(y) == "others"


def test_notes_of_a_tensor_that_only_a_graph_holds():
    """Its Python object may go and come back: the note is then right, or gone."""
    notes = TensorNotes()
    x = torch.ones(3, requires_grad=True) * 2
    notes[x] = "mine"
    y = x.exp().sin()
    del x
    gc.collect()
    (saved,) = (t for t in (y.grad_fn.next_functions[0][0]._saved_result,) if t is not None)
    assert notes.get(saved) in (None, "mine")
    assert len(notes) <= 1


def test_notes_do_not_pass_to_the_next_of_an_id():
    notes = TensorNotes()
    for i in range(200):
        x = torch.zeros(1)
        assert notes.get(x) is None
        notes[x] = i
        del x
    assert len(notes) <= 1
