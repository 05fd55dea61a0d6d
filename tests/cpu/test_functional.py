"""hf_flashattn/functional.py: flash-attn's signatures, packed forms, autocast, refusals."""

import inspect
from pathlib import Path

import pytest
import torch

import hf_flashattn as hfa
from hf_flashattn import flash_attn_func, flash_attn_varlen_func
from hf_flashattn.key_bits import kept_keys
from hf_flashattn.reference import attention_reference

# The parameters and defaults of flash-attn 2.8.
COMMON = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
VARLEN = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], COMMON),
    "flash_attn_kvpacked_func": (["q", "kv"], COMMON),
    "flash_attn_qkvpacked_func": (["qkv"], COMMON),
    "flash_attn_varlen_func": (["q", "k", "v", *VARLEN], {**COMMON, "block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *VARLEN], COMMON),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], COMMON),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flash_attns(name):
    required, defaults = SIGNATURES[name]
    parameters = inspect.signature(getattr(hfa, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [*required, *defaults]
    assert {p.name: p.default for p in positional[len(required) :]} == defaults
    extra = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    keys = dict.fromkeys(("key_start", "key_len", "key_bits"))
    ours = {
        "flash_attn_func": {**keys, "s_aux": None, "attn_bias": None},
        "flash_attn_varlen_func": {"s_aux": None},
    }
    dense = {} if "varlen" in name else keys
    assert extra == ours.get(name, dense)


def packed_offsets():
    return torch.tensor([0, 4, 4, 11], dtype=torch.int32)


def test_returns_what_flash_attn_returns():
    q, k, v = (torch.randn(2, 5, 4, 16) for _ in range(3))
    out, lse, probs = flash_attn_func(q, k, v, return_attn_probs=True)
    expected, expected_lse = attention_reference(q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert probs is None and isinstance(flash_attn_func(q, k, v), torch.Tensor)
    cu = packed_offsets()
    x = torch.randn(11, 4, 16)
    out, lse, probs = flash_attn_varlen_func(x, x, x, cu, cu, 7, 7, return_attn_probs=True)
    assert out.shape == x.shape and lse.shape == (4, 11) and probs is None


def test_defaults_and_options_reach_the_op():
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    start, length = (torch.tensor(x, dtype=torch.int32) for x in ([1, 0], [4, 7]))
    out = flash_attn_func(q, k, v, softmax_scale=0.7, causal=True, key_start=start, key_len=length)
    expected, _ = attention_reference(
        q, k, v, softmax_scale=0.7, causal=True, key_start=start, key_len=length
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("seqlen", [1, 31, 32, 33, 100])
def test_key_bits_of_a_mask(seqlen):
    """And what flash_attn_func makes of them: the mask."""
    kept = torch.rand(5, seqlen) < 0.5
    kept[0], kept[1] = True, False
    start, length, bits = hfa.key_bits_of(kept)
    assert {x.dtype for x in (start, length, bits)} == {torch.int32}
    assert bits.shape == (5, -(-seqlen // 32))
    for b, row in enumerate(kept):
        seen = row.nonzero().flatten().tolist() or [0, -1]
        assert (start[b], length[b]) == (seen[0], seen[-1] - seen[0] + 1)
        words = [sum(2**i for i, x in enumerate(word) if x) for word in row.split(32)]
        assert [x % 2**32 for x in bits[b].tolist()] == words
    assert torch.equal(kept_keys(bits, seqlen), kept)

    q, k, v = (torch.randn(5, seqlen, 2, 8) for _ in range(3))
    out, lse, _ = flash_attn_func(
        q, k, v, key_start=start, key_len=length, key_bits=bits, return_attn_probs=True
    )
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=kept[:, None, None]
    )
    torch.testing.assert_close(out[[0, 2, 3, 4]], exact.transpose(1, 2)[[0, 2, 3, 4]].nan_to_num())
    assert not out[1].any() and torch.isneginf(lse[1]).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_key_bits_are_made_inside_a_graph(dynamic):
    torch._dynamo.reset()
    make = torch.compile(hfa.key_bits_of, fullgraph=True, dynamic=dynamic)
    for seqlen in (40, 64, 70):
        kept = torch.rand(3, seqlen) < 0.5
        for got, want in zip(make(kept), hfa.key_bits_of(kept), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("form", ["flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"])
def test_packed_forms_take_key_bits(form):
    kept = torch.rand(2, 40) < 0.5
    keys = dict(zip(("key_start", "key_len", "key_bits"), hfa.key_bits_of(kept), strict=True))
    q, k, v = x = [torch.randn(2, 40, 2, 8) for _ in range(3)]
    given = (torch.stack(x, 2),) if "qkv" in form else (q, torch.stack((k, v), 2))
    torch.testing.assert_close(
        getattr(hfa, form)(*given, causal=True, **keys),
        flash_attn_func(q, k, v, causal=True, **keys),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_packed_forms(causal):
    qkv = torch.randn(2, 6, 3, 4, 16, requires_grad=True)
    q, k, v = qkv.unbind(2)
    plain = flash_attn_func(q, k, v, causal=causal)
    (expected,) = torch.autograd.grad(plain.sin().sum(), qkv)
    for out in (
        hfa.flash_attn_qkvpacked_func(qkv, causal=causal),
        hfa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=causal),
    ):
        assert torch.equal(out, plain)
        torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), qkv)[0], expected)

    cu = packed_offsets()
    qkv = torch.randn(11, 3, 4, 16)
    plain = flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 7, 7, causal=causal)
    packed = hfa.flash_attn_varlen_qkvpacked_func(qkv, cu, 7, causal=causal)
    half = hfa.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu, 7, 7, causal=causal)
    assert torch.equal(packed, plain) and torch.equal(half, plain)


def test_packed_forms_refuse_other_layouts():
    with pytest.raises(ValueError, match=r"qkv: expected shape .*got \(2, 6, 4, 3, 16\)"):
        hfa.flash_attn_qkvpacked_func(torch.randn(2, 6, 4, 3, 16))
    with pytest.raises(ValueError, match=r"kv: expected shape"):
        hfa.flash_attn_kvpacked_func(torch.randn(2, 6, 4, 16), torch.randn(2, 6, 4, 16))


def test_varlen_equals_the_sequences_one_by_one():
    cu_q, cu_k = packed_offsets(), torch.tensor([0, 5, 8, 15], dtype=torch.int32)
    q, k, v = torch.randn(11, 4, 16), torch.randn(15, 2, 16), torch.randn(15, 2, 16)
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 7, causal=True)
    for i in (0, 2):
        qs, ks = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        one = flash_attn_func(q[None, qs], k[None, ks], v[None, ks], causal=True)
        torch.testing.assert_close(out[qs], one[0])


@pytest.mark.parametrize("window, causal", [((-1, 0), False), ((-1, 5), True), ([-1, -1], True)])
def test_windows_that_are_causal_attention(window, causal):
    q = torch.randn(1, 9, 2, 16)
    expected = flash_attn_func(q, q, q, causal=True)
    assert torch.equal(flash_attn_func(q, q, q, causal=causal, window_size=window), expected)


@pytest.mark.parametrize(
    "option, says",
    [
        ({"window_size": (4, 4)}, r"sliding window \(4, 4\) is not there yet"),
        ({"window_size": (4, 0), "causal": True}, "sliding window"),
        ({"window_size": (-1, 3)}, "sliding window"),
        ({"softcap": 30.0}, "softcap 30.0 is not there yet"),
        ({"alibi_slopes": torch.ones(2)}, "ALiBi slopes are not there yet"),
        ({"s_aux": torch.ones(2)}, r"attention sinks \(s_aux\) are not there yet"),
    ],
)
def test_what_is_to_come_says_so(option, says):
    q = torch.randn(1, 9, 2, 16)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    for call in (
        lambda: flash_attn_func(q, q, q, **option),
        lambda: flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 9, 9, **option),
    ):
        with pytest.raises(NotImplementedError, match=rf"{says}.*Nearest supported: .*Next step: "):
            call()


def test_a_paged_cache_is_to_come():
    q = torch.randn(9, 2, 16)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn_varlen_func(q, q, q, cu, cu, 9, 9, block_table=torch.zeros(1, 1).int())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_autocast_casts_as_for_a_matrix_product(dropout_p):
    q = torch.randn(1, 9, 2, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_func(q, q, q, dropout_p)
        exact = flash_attn_func(q.double(), q.double(), q.double(), dropout_p)
    assert out.dtype == torch.bfloat16 and exact.dtype == torch.float64
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_lse_has_no_gradient():
    q = torch.randn(1, 9, 2, 16, requires_grad=True)
    out, lse, _ = flash_attn_func(q, q, q, return_attn_probs=True)
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_deterministic_is_passed_on(monkeypatch, dropout_p):
    """To the backward, whose last argument it is where it is given."""
    seen = []
    real = hfa.ops._call_backward

    def call(args, op):
        seen.append(args[-1] if len(args) > 9 else False)
        return real(args, op)

    monkeypatch.setattr(hfa.ops, "_call_backward", call)
    q = torch.randn(1, 3, 1, 8, requires_grad=True)
    flash_attn_func(q, q, q, dropout_p).sum().backward()
    flash_attn_func(q, q, q, dropout_p, deterministic=True).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        flash_attn_func(q, q, q, dropout_p).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True, True]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors that say they are on a GPU, an op that refuses them; returns how often checks ran."""
    checked = []
    real = hfa.checks.check_tensors

    def check_tensors(*args, **options):
        checked.append(args)
        real(*args, **options)

    def refuse(*args):
        raise RuntimeError("the library's words")

    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(hfa.checks, "check_tensors", check_tensors)
    monkeypatch.setattr(hfa.ops, "call_dense", refuse)
    loaded = hfa.ops.LibraryStatus(Path("libhf_flashattn.so"), "")
    monkeypatch.setattr(hfa.ops, "_status", loaded)
    return checked


def test_the_checks_say_better_what_the_library_refuses(on_a_gpu):
    q = torch.randn(1, 3, 2, 8)
    for bad, error in (
        ((q, q[:, :, :1], q), ValueError),
        ((q, q.double(), q), TypeError),
        ((q[0], q, q), ValueError),
        ((q[..., :0], q, q), ValueError),
        ((q[0, 0, 0, 0], q, q), ValueError),
    ):
        with pytest.raises(error, match="Nearest supported"):
            flash_attn_func(*bad)
    with pytest.raises(ValueError, match="dropout_p"):
        flash_attn_func(q, q, q, 1.5)
    with pytest.raises(RuntimeError, match="the library's words"):
        flash_attn_func(q, q, q)


def test_a_dense_call_on_a_gpu_is_checked_by_the_library_alone(on_a_gpu, monkeypatch):
    monkeypatch.setattr(hfa.ops, "call_forward", lambda args: args[:2])
    monkeypatch.setattr(hfa.ops, "call_dense", lambda *args: args[0])
    q = torch.randn(1, 3, 2, 8)
    flash_attn_func(q, q, q, key_len=torch.tensor([2], dtype=torch.int32))
    assert not on_a_gpu
    # No library sees what offsets say, and a subclass may be anything.
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    flash_attn_varlen_func(q[0], q[0], q[0], offsets, offsets, 3, 3)
    assert len(on_a_gpu) == 1
    parameter = torch.nn.Parameter(q)
    flash_attn_func(parameter, q, q)
    assert len(on_a_gpu) == 2


def test_nothing_is_built_for_a_call_that_cannot_run(on_a_gpu, monkeypatch):
    monkeypatch.setattr(hfa.ops, "_status", hfa.ops.LibraryStatus(None, "not yet"))
    monkeypatch.setattr(hfa.ops, "call_dense", lambda *args: pytest.fail("reached the library"))
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(TypeError, match="Nearest supported"):
        flash_attn_func(q, q.double(), q)
    assert len(on_a_gpu) == 1
