"""hf_flashattn/support.py and checks.py: what runs, and errors that say what to do."""

import pytest
import torch
from torch.nn import functional as F

from hf_flashattn import checks, flash_attn_func, flash_attn_varlen_func, ops, support
from hf_flashattn.support import Request, explain

PARTS = r"[\s\S]*Nearest supported: .+\. Next step: .+"
HOPPER = {
    "device_type": "cuda",
    "compute_capability": (9, 0),
    "dtype": torch.bfloat16,
    "head_dim": 64,
    "heads_q": 8,
    "heads_k": 8,
}


@pytest.fixture
def library_is_there(monkeypatch):
    monkeypatch.setattr(ops, "_status", ops.LibraryStatus("libhf_flashattn.so", ""))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_dim": 128, "dtype": torch.float16, "needs_grad": True},
        {"head_dim": 8, "needs_grad": True},
        {"head_dim": 256, "needs_grad": True},
        {"heads_k": 1, "causal": True, "dropout_p": 0.1, "deterministic": True, "needs_grad": True},
        {"window": (-1, 0)},
        {"window": (-1, 7), "causal": True},
    ],
)
def test_runs_on_the_kernel(change, library_is_there):
    verdict = explain(Request(**{**HOPPER, **change}))
    assert verdict.ok and "sm90" in verdict.kernel and not verdict.reason


@pytest.mark.parametrize(
    "change, reason, nearest",
    [
        ({"dtype": torch.float32}, "dtype float32 on CUDA", "bfloat16, float16"),
        ({"head_dim": 90}, "head_dim 90 is not a multiple of 8", "96"),
        ({"head_dim": 0}, "head_dim 0", "8"),
        ({"head_dim": 264}, "head_dim 264", "256"),
        ({"compute_capability": (8, 0)}, "compute capability 8.0", "9.0"),
        ({"compute_capability": (10, 0)}, "compute capability 10.0", "9.0"),
        ({"window": (128, 0)}, "sliding window", "full attention"),
        ({"softcap": 50.0}, "softcap 50.0", "softcap=0.0"),
        ({"alibi": True}, "ALiBi", "alibi_slopes=None"),
        ({"bias": True}, "additive bias", "key_start"),
        ({"sinks": True}, "attention sinks", "s_aux=None"),
        ({"paged": True}, "block_table", "block_table=None"),
        ({"heads_k": 3}, "8 query heads do not divide into 3", "multiple"),
        ({"heads_k": 0}, "8 query heads", "multiple"),
        ({"dropout_p": 1.0}, "dropout_p 1.0", "0 <= p < 1"),
        ({"device_type": "mps"}, "device type mps", "cuda"),
    ],
)
def test_says_why_not(change, reason, nearest, library_is_there):
    verdict = explain(Request(**{**HOPPER, **change}))
    assert not verdict.ok and verdict.kernel is None
    assert reason in verdict.reason and nearest in verdict.nearest and verdict.next_step
    assert str(verdict) == (
        f"{verdict.reason}. Nearest supported: {verdict.nearest}. Next step: {verdict.next_step}"
    )


@pytest.mark.parametrize(
    "head_dim, kernel",
    [(8, 32), (32, 32), (40, 64), (64, 64), (72, 96), (104, 128), (136, 192), (200, 256)],
)
def test_the_next_larger_kernel_takes_a_head_dim(head_dim, kernel, library_is_there):
    assert explain(Request(**{**HOPPER, "head_dim": head_dim})).kernel == f"sm90 d{kernel}"


def test_other_head_dims_can_be_padded(library_is_there):
    assert "zeros to 24" in explain(Request(**{**HOPPER, "head_dim": 20})).next_step
    assert "zeros" not in explain(Request(**{**HOPPER, "head_dim": 300})).next_step
    q, k, v = torch.randn(3, 2, 5, 4, 20).unbind()
    padded = (F.pad(x, (0, 4)) for x in (q, k, v))
    out = flash_attn_func(*padded, softmax_scale=20**-0.5)[..., :20]
    torch.testing.assert_close(out, flash_attn_func(q, k, v))


def test_a_missing_library_is_a_reason(monkeypatch):
    status = ops.LibraryStatus(None, "nvcc: found none", failed=True)
    monkeypatch.setattr(ops, "_status", status)
    verdict = explain(Request(**HOPPER))
    assert not verdict.ok and "nvcc: found none" in verdict.reason
    monkeypatch.setattr(ops, "_status", ops.LibraryStatus(None, "not built yet"))
    assert explain(Request(**HOPPER)).ok  # the first call builds it


def test_cpu_says_which_implementation():
    cpu = {**HOPPER, "device_type": "cpu", "compute_capability": None, "head_dim": 40}
    assert explain(Request(**cpu)).kernel == "SDPA (CPU)"
    assert explain(Request(**cpu, dropout_p=0.1)).kernel == "reference (CPU)"
    assert not explain(Request(**{**cpu, "dtype": torch.int8})).ok


def test_request_of_tensors():
    q, k = torch.randn(2, 8, 5, 16), torch.randn(2, 4, 7, 16)  # (B, H, S, D)
    request = Request.of(q, k, causal=True)
    expected = Request("cpu", None, torch.float32, head_dim=16, heads_q=8, heads_k=4, causal=True)
    assert request == expected


# ------------------------------------------------------------------------------- tensors


def dense(sq=5, sk=5, heads=4, heads_k=2, dim=16, dtype=torch.float32):
    q = torch.randn(2, sq, heads, dim).to(dtype)
    return q, torch.randn(2, sk, heads_k, dim).to(dtype), torch.randn(2, sk, heads_k, dim).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_good_dense_calls_pass():
    for q, k, v in (dense(), dense(sq=0), dense(sk=9, heads_k=1), dense(dtype=torch.bfloat16)):
        checks.check_tensors(q, k, v, key_start=int32(0, 1), key_len=int32(2, 3), dropout_p=0.5)


@pytest.mark.parametrize(
    "change, error, says",
    [
        (lambda q, k, v: (q[0], k, v), ValueError, r"expected q, k, v of shape \(batch"),
        (lambda q, k, v: (q, k, v[:, :4]), ValueError, "k and v of one shape"),
        (lambda q, k, v: (q, k[..., :8], v[..., :8]), ValueError, "one head_dim"),
        (lambda q, k, v: (q[:1], k, v), ValueError, "one batch size"),
        (lambda q, k, v: (q, k.double(), v), TypeError, "float32, float64, float32"),
        (lambda q, k, v: (q[:, :, :3], k, v), ValueError, "3 query heads do not divide into 2"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), NotImplementedError, "dtype int32"),
        (lambda q, k, v: (q, k.to("meta"), v), ValueError, "one device, got cpu, meta, cpu"),
    ],
)
def test_bad_dense_calls(change, error, says):
    with pytest.raises(error, match=says + PARTS):
        flash_attn_func(*change(*dense()))


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_bad_dropout(p):
    with pytest.raises(ValueError, match=r"dropout_p .*outside \[0, 1\)" + PARTS):
        flash_attn_func(*dense(), dropout_p=p)


@pytest.mark.parametrize(
    "name, value, error, says",
    [
        ("key_len", torch.tensor([1, 2]), TypeError, r"key_len: expected dtype int32, got int64"),
        ("key_start", int32(1, 2, 3), ValueError, r"shape \(2,\), got \(3,\)"),
        ("key_len", int32(1, 2).to("meta"), ValueError, r"expected on the device of q \(cpu\)"),
        ("key_len", int32(1, 0, 2, 0)[::2], ValueError, r"contiguous"),
    ],
)
def test_bad_key_ranges(name, value, error, says):
    with pytest.raises(error, match=says + PARTS):
        flash_attn_func(*dense(), **{name: value})


BITS_OF_A_MASK = r".*Next step: key_start, key_len, key_bits = hf_flashattn\.key_bits_of\(mask\)"


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"key_bits": torch.ones(2, 1, dtype=torch.int64)}, TypeError, "int32, got int64"),
        ({"key_bits": torch.ones(2, 1).bool()}, TypeError, "int32, got bool"),
        ({"key_bits": int32([1], [2], [3])}, ValueError, r"shape \(2, 1\), got \(3, 1\)"),
        ({"key_bits": int32([1, 2], [3, 4])}, ValueError, r"shape \(2, 1\), got \(2, 2\)"),
        ({"key_bits": int32([1], [2]).to("meta")}, ValueError, None),
        ({"key_start": None}, ValueError, "expected key_start and key_len with it"),
        ({"key_len": None}, ValueError, "expected key_start and key_len with it"),
    ],
)
def test_bad_key_bits(change, error, says):
    good = {"key_start": int32(0, 0), "key_len": int32(5, 5), "key_bits": int32([31], [31])}
    flash_attn_func(*dense(), **good)
    says = r"expected on the device of q" + PARTS if says is None else says + BITS_OF_A_MASK
    with pytest.raises(error, match=f"key_bits: .*{says}"):
        flash_attn_func(*dense(), **{**good, **change})


def test_key_bits_are_for_dense_calls():
    q, k, v = (x[0] for x in dense())
    cu = int32(0, 5)
    with pytest.raises(ValueError, match=r"cu_seqlens alone, got .*key_bits with them"):
        checks.check_tensors(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5,
            key_bits=int32([31]),
        )  # fmt: skip


def packed(q_offsets=(0, 3, 7), k_offsets=None, longest=4, total=7):
    x = torch.randn(total, 2, 16)
    cu_q = torch.tensor(q_offsets, dtype=torch.int32)
    cu_k = cu_q if k_offsets is None else torch.tensor(k_offsets, dtype=torch.int32)
    return flash_attn_varlen_func(x, x, x, cu_q, cu_k, longest, longest)


def test_good_packed_calls_pass():
    packed()
    packed(longest=100)
    packed((0, 0, 7, 7), longest=7)
    packed((0, 7), longest=7)
    packed((0,), longest=0, total=0)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            {"q_offsets": (0, 3, 6)},
            "cu_seqlens_q: expected to end at the number of tokens, 7, got 6",
        ),
        ({"q_offsets": (0, 3, 9)}, "number of tokens, 7, got 9"),
        ({"q_offsets": (1, 3, 7)}, r"start at 0 and never fall, got \[1, 3, 7\]"),
        ({"q_offsets": (0, 5, 3, 7)}, "never fall"),
        ({"longest": 3}, "max_seqlen_q: expected the longest length, 4, or more, got 3"),
        ({"k_offsets": (0, 7)}, r"cu_seqlens_k: expected a contiguous tensor of shape \(3,\)"),
        ({"k_offsets": (0, 3, 5)}, "cu_seqlens_k: expected to end"),
    ],
)
def test_bad_offsets(arguments, says):
    with pytest.raises(ValueError, match=says + PARTS):
        packed(**arguments)


def test_bad_offset_tensors():
    x = torch.randn(7, 2, 16)
    good = int32(0, 3, 7)
    with pytest.raises(TypeError, match="cu_seqlens_q: expected dtype int32, got int64" + PARTS):
        flash_attn_varlen_func(x, x, x, good.long(), good, 4, 4)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected on the device of q" + PARTS):
        flash_attn_varlen_func(x, x, x, good, good.to("meta"), 4, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens_q: expected shape \(batch \+ 1,\)" + PARTS):
        flash_attn_varlen_func(x, x, x, good[None], good, 4, 4)
    with pytest.raises(TypeError, match="got Tensor and NoneType" + PARTS):
        flash_attn_varlen_func(x, x, x, good, None, 4, 4)
    with pytest.raises(TypeError, match="got list and Tensor" + PARTS):
        flash_attn_varlen_func(x, x, x, [0, 3, 7], good, 4, 4)
    with pytest.raises(ValueError, match=r"of shape \(total, heads, head_dim\)" + PARTS):
        flash_attn_varlen_func(x[None], x[None], x[None], good, good, 4, 4)


def test_offsets_are_read_once_and_again_when_written(monkeypatch):
    reads = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(1) or real(x))
    x, cu = torch.randn(7, 2, 16), int32(0, 3, 7)
    check = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4}
    for _ in range(3):
        checks.check_tensors(x, x, x, **check)
    assert len(reads) == 1  # one tensor for both sides
    cu[1] = 2
    with pytest.raises(ValueError, match="longest length, 5"):
        checks.check_tensors(x, x, x, **check)
    assert len(reads) == 2
    with pytest.raises(ValueError, match="got 7"):  # what is known is still compared
        checks.check_tensors(x[:6], x[:6], x[:6], **check)
    assert len(reads) == 2


def test_trusted_offsets_are_not_read(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    x, cu = torch.randn(7, 2, 16), support.trust(int32(0, 3, 7), total=7, longest=4)
    checks.check_tensors(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=4, max_seqlen_k=4)


@pytest.mark.parametrize(
    "view, ok",
    [
        (lambda x: x, True),
        (lambda x: x.transpose(1, 2), True),
        (lambda x: x[:, :, ::2], True),
        (lambda x: x[:, :1], True),
        (lambda x: x[:, :, :1].expand(-1, -1, 4, -1), True),
        (lambda x: x.transpose(2, 3), False),
        (lambda x: x[..., 1:], False),
        (lambda x: x[..., :12].as_strided((2, 6, 4, 12), (288, 48, 12, 1)), False),
    ],
)
def test_layouts_that_tma_can_load(view, ok):
    x = view(torch.zeros(2, 6, 4, 64, dtype=torch.bfloat16))
    if ok:
        checks.check_strides("k", x)
    else:
        message = r"k: expected head_dim contiguous.*strides.*Next step: k = k.contiguous\(\)"
        with pytest.raises(ValueError, match=message):
            checks.check_strides("k", x)


def test_strides_are_checked_in_a_trace():
    def call(x):
        checks.check_strides("q", x)
        return x * 1

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    compiled(torch.zeros(2, 6, 4, 64).transpose(1, 2))
    with pytest.raises(Exception, match="expected head_dim contiguous"):
        compiled(torch.zeros(2, 6, 64, 4).transpose(2, 3))
