"""hf_flashattn/reference.py: against torch's attention, its definition, its gradient."""

import pytest
import torch
import torch.nn.functional as F

from hf_flashattn import reference
from hf_flashattn.key_bits import key_bits_of
from hf_flashattn.reference import (
    attention_backward_reference,
    attention_reference,
    visible_keys,
)

RNG = torch.tensor([2**61 + 3, 5])


def make(batch, sq, sk, heads, heads_k, dim, dtype=torch.float64):
    q = torch.randn(batch, sq, heads, dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(batch, sk, heads_k, dim, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, v


def torch_attention(q, k, v, mask=None, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sq, sk", [(1, 1), (7, 7), (5, 17), (17, 17), (1, 33)])
@pytest.mark.parametrize("heads, heads_k", [(2, 2), (4, 2), (3, 1)])
def test_matches_torch(sq, sk, heads, heads_k, causal):
    q, k, v = make(2, sq, sk, heads, heads_k, 8)
    mask = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq) if causal else None
    out, lse = attention_reference(q, k, v, causal=causal, softmax_scale=0.3)
    torch.testing.assert_close(out, torch_attention(q, k, v, mask, 0.3))
    assert out.shape == q.shape and lse.shape == (2, heads, sq) and lse.dtype == torch.float64


def test_default_scale_and_lse():
    q, k, v = make(1, 4, 6, 2, 2, 16)
    _, lse = attention_reference(q, k, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_causal_is_bottom_right_aligned():
    q, k, v = make(1, 5, 3, 1, 1, 8)
    out, lse = attention_reference(q, k, v, causal=True)
    assert (out[:, :2] == 0).all() and torch.isneginf(lse[..., :2]).all()  # two rows see nothing
    torch.testing.assert_close(out[:, 2], v[:, 0])  # the third sees the first key only
    assert lse[..., 2:].isfinite().all()


def test_key_ranges_are_slices():
    q, k, v = make(3, 6, 10, 2, 1, 8)
    start, length = torch.tensor([0, 2, 7]), torch.tensor([10, 5, 3])
    out, lse = attention_reference(q, k, v, key_start=start, key_len=length)
    for b in range(3):
        keys = slice(start[b], start[b] + length[b])
        one, one_lse = attention_reference(q[b : b + 1], k[b : b + 1, keys], v[b : b + 1, keys])
        torch.testing.assert_close(out[b : b + 1], one)
        torch.testing.assert_close(lse[b : b + 1], one_lse)


@pytest.mark.parametrize("causal", [False, True])
def test_key_bits_hide_keys_inside_the_range(causal):
    """The same keys gathered, where nothing is causal; the mask, where it is."""
    q, k, v = make(2, 6, 40, 2, 1, 8)
    kept = torch.rand(2, 40) < 0.4
    kept[:, 34:] = True
    start, length, bits = key_bits_of(kept)
    options = {"key_start": start, "key_len": length, "key_bits": bits, "causal": causal}
    visible = visible_keys(6, 40, **options)
    expected = kept[:, None, None].expand(2, 1, 6, 40)
    assert torch.equal(visible, expected.tril(34) if causal else expected)
    out, lse = attention_reference(q, k, v, **options)
    if not causal:
        for b in range(2):
            one, one_lse = attention_reference(
                q[b : b + 1], k[b : b + 1, kept[b]], v[b : b + 1, kept[b]]
            )
            torch.testing.assert_close(out[b : b + 1], one)
            torch.testing.assert_close(lse[b : b + 1], one_lse)


def test_causal_offset_ignores_key_len():
    q, k, v = make(1, 6, 6, 1, 1, 8)
    out, _ = attention_reference(q, k, v, causal=True, key_len=torch.tensor([4]))
    plain, _ = attention_reference(q, k, v, causal=True)
    torch.testing.assert_close(out[:, :4], plain[:, :4])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_dense(causal, dropout_p):
    lengths_q, lengths_k = [3, 0, 5, 2], [4, 2, 5, 0]
    cu_q, cu_k = (F.pad(torch.tensor(x).cumsum(0), (1, 0)).int() for x in (lengths_q, lengths_k))
    q = torch.randn(sum(lengths_q), 2, 8)
    k, v = (torch.randn(sum(lengths_k), 2, 8) for _ in range(2))
    options = {"causal": causal, "dropout_p": dropout_p, "rng_state": RNG if dropout_p else None}
    out, lse = attention_reference(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    assert lse.shape == (2, sum(lengths_q))
    # The dense batch, padded at the end; only without causality does padding not move the diagonal.
    if causal:
        return
    dense_q = torch.zeros(4, 5, 2, 8)
    dense_k, dense_v = torch.zeros(4, 5, 2, 8), torch.zeros(4, 5, 2, 8)
    for b in range(4):
        dense_q[b, : lengths_q[b]] = q[cu_q[b] : cu_q[b + 1]]
        dense_k[b, : lengths_k[b]] = k[cu_k[b] : cu_k[b + 1]]
        dense_v[b, : lengths_k[b]] = v[cu_k[b] : cu_k[b + 1]]
    dense, dense_lse = attention_reference(
        dense_q, dense_k, dense_v, key_len=torch.tensor(lengths_k), **options
    )
    for b in range(4):
        rows = slice(cu_q[b], cu_q[b + 1])
        torch.testing.assert_close(out[rows], dense[b, : lengths_q[b]])
        torch.testing.assert_close(lse[:, rows], dense_lse[b, :, : lengths_q[b]])


def test_packed_causal_is_per_sequence():
    q, k, v = torch.randn(7, 2, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    out, _ = attention_reference(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
    for part in (slice(0, 3), slice(3, 7)):
        one, _ = attention_reference(q[None, part], k[None, part], v[None, part], causal=True)
        torch.testing.assert_close(out[part], one[0])


def test_rows_that_see_nothing_give_zero_and_no_gradient():
    q, k, v = make(2, 4, 6, 2, 2, 8)
    out, lse = attention_reference(q, k, v, key_len=torch.tensor([0, 6]))
    assert (out[0] == 0).all() and torch.isneginf(lse[0]).all() and lse[1].isfinite().all()
    for grad in torch.autograd.grad(out, (q, k, v), torch.randn_like(out)):
        assert (grad[0] == 0).all() and grad[1].isfinite().all() and grad[1].abs().sum() > 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_nobody_sees_is_never_read(poison):
    start, length = torch.tensor([2, 0]), torch.tensor([3, 0])
    q, k, v = make(2, 4, 6, 2, 1, 8)
    clean = attention_reference(q, k, v, key_start=start, key_len=length)
    dout = torch.randn_like(q)
    clean_grads = torch.autograd.grad(clean[0], (q, k, v), dout)
    with torch.no_grad():
        for x in (k, v):
            x[0, :2] = x[0, 5:] = x[1] = poison
        q[1] = poison  # a row that sees nothing is not a reason for NaN either
    dout[1] = poison
    out, lse = attention_reference(q, k, v, key_start=start, key_len=length)
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])
    grads = torch.autograd.grad(out, (q, k, v), dout)
    explicit = attention_backward_reference(
        dout, *(x.detach() for x in (q, k, v, out, lse)), key_start=start, key_len=length
    )
    for grad, other, expected in zip(grads, explicit, clean_grads, strict=True):
        assert torch.equal(grad, expected)
        torch.testing.assert_close(other, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(causal, dropout_p):
    q, k, v = make(1, 3, 5, 2, 1, 4)

    def call(q, k, v):
        return attention_reference(
            q, k, v, causal=causal, dropout_p=dropout_p, rng_state=RNG if dropout_p else None,
            key_start=torch.tensor([1]), key_len=torch.tensor([3]),
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_gradient_through_the_lse():
    q, k, v = make(1, 3, 5, 2, 2, 4)
    assert torch.autograd.gradcheck(lambda q, k: attention_reference(q, k, v)[1], (q, k))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("packed", [False, True])
def test_explicit_backward_is_the_gradient(packed, dropout_p):
    q, k, v = make(3, 7, 9, 4, 2, 8)
    options = {"causal": True, "dropout_p": dropout_p, "rng_state": RNG if dropout_p else None}
    if packed:
        q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v))
        options |= {
            "cu_seqlens_q": torch.tensor([0, 4, 4, 21]),
            "cu_seqlens_k": torch.tensor([0, 9, 15, 27]),
        }
    out, lse = attention_reference(q, k, v, **options)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    got = attention_backward_reference(dout, *(x.detach() for x in (q, k, v, out, lse)), **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_chunks_of_heads_change_nothing(monkeypatch):
    q, k, v = make(2, 9, 11, 6, 3, 8)
    options = {"causal": True, "dropout_p": 0.2, "rng_state": RNG}
    whole = attention_reference(q, k, v, **options)
    dout = torch.randn_like(q)
    grads = attention_backward_reference(dout, q, k, v, *whole, **options)
    monkeypatch.setattr(reference, "_MAX_SCORES", 2 * 9 * 11 * 2)
    torch.testing.assert_close(attention_reference(q, k, v, **options), whole)
    chunked = attention_backward_reference(dout, q, k, v, *whole, **options)
    torch.testing.assert_close(chunked, grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_math_is_a_yardstick(dtype):
    q, k, v = (x.detach() for x in make(1, 64, 64, 2, 2, 32, torch.float32))
    q, k, v = (x.to(dtype).float() for x in (q, k, v))
    exact, _ = attention_reference(q, k, v)
    low = (x.to(dtype) for x in (q, k, v))
    rough, lse = attention_reference(*low, math_dtype=dtype)
    assert rough.dtype == dtype and lse.dtype == torch.float32
    error = (rough.float() - exact).abs().max()
    assert 0 < error < 0.05


@pytest.mark.parametrize("sq, sk, batch", [(0, 5, 2), (5, 0, 2), (0, 0, 1), (3, 3, 0)])
def test_empty(sq, sk, batch):
    q, k, v = make(batch, sq, sk, 2, 2, 8)
    out, lse = attention_reference(q, k, v)
    assert out.shape == q.shape and (out == 0).all() if sk == 0 else out.numel() == 0
    assert lse.shape == (batch, 2, sq) and (sk or torch.isneginf(lse).all())
    out.sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v))


def test_autocast_does_not_touch_the_judge():
    q, k, v = (x.detach() for x in make(1, 8, 8, 2, 2, 8, torch.float32))
    plain, _ = attention_reference(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_reference(q, k, v)[0], plain)


def test_key_ranges_beyond_the_keys_mean_the_keys_that_exist():
    """key_start + key_len may exceed 2^31; what is before key 0 counts towards the length."""
    start = torch.tensor([1, -3, 2], dtype=torch.int32)
    length = torch.tensor([2**31 - 1, 5, -1], dtype=torch.int32)
    visible = visible_keys(1, 6, key_start=start, key_len=length)[:, 0, 0]
    want = [[0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0] * 6]
    assert visible.long().tolist() == want
