"""The functions and ops inside PyTorch: autograd, compile, CUDA graphs, checkpointing, errors."""

import threading

import pytest
import torch
from judge import WRONG_OFFSETS, run_wrong_offsets
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

from hf_flashattn import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    key_bits_of,
    masks,
    ops,
)
from hf_flashattn.attention import attention_forward
from hf_flashattn.reference import attention_reference


def tensors(batch=2, seqlen=200, heads=4, dim=64, dtype=torch.bfloat16, count=3):
    shape = (batch, seqlen, heads, dim)
    return [
        torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(count)
    ]


def gradients(function, inputs):
    out = function(*inputs)
    return out, torch.autograd.grad(out.float().square().sum(), inputs)


def assert_same(got, want):
    """Equal but for dQ, which is summed in the order of arrival."""
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1][0], want[1][0], rtol=2e-2, atol=2e-2)
    for a, b in zip(got[1][1:], want[1][1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compile_without_a_break(p):
    inputs = tensors()

    def attend(q, k, v):
        return flash_attn_func(q * 1.0, k, v, dropout_p=p, causal=True) * 2.0

    compiled = torch.compile(attend, fullgraph=True)
    if p == 0.0:
        assert_same(gradients(compiled, inputs), gradients(attend, inputs))
        return
    out, grads = gradients(compiled, inputs)
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    assert not torch.equal(compiled(*inputs), compiled(*inputs)), "the mask must change"


def test_packed_projection_compiles():
    qkv = torch.randn(2, 100, 3, 4, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    compiled = torch.compile(flash_attn_qkvpacked_func, fullgraph=True)
    assert torch.equal(compiled(qkv, causal=True), flash_attn_qkvpacked_func(qkv, causal=True))


def test_varlen_is_dense_by_sequence():
    lengths = [5, 130, 64]
    offsets = torch.tensor([0, 5, 135, 199], device="cuda", dtype=torch.int32)
    q, k, v = (torch.randn(199, 4, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    out = flash_attn_varlen_func(q, k, v, offsets, offsets, 130, 130, causal=True)
    start = 0
    for n in lengths:
        one = slice(start, start + n)
        dense = flash_attn_func(q[None, one], k[None, one], v[None, one], causal=True)
        assert torch.equal(out[one], dense[0])
        start += n


def test_cuda_graph_draws_a_new_mask_each_replay():
    q, k, v = tensors()

    def step():
        out = flash_attn_func(q, k, v, dropout_p=0.5)
        return out, torch.autograd.grad(out.float().sum(), (q, k, v))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = step()
    graph.replay()
    first = [x.clone() for x in (out, *grads)]
    graph.replay()
    for a, b in zip(first, (out, *grads), strict=True):
        assert torch.isfinite(a).all()
        assert not torch.equal(a, b)


def test_checkpointing_replays_dropout():
    q, k, v = tensors()

    def attend(q, k, v):
        return flash_attn_func(q, k, v, dropout_p=0.3, deterministic=True)

    torch.manual_seed(5)
    plain = gradients(attend, (q, k, v))
    torch.manual_seed(5)
    again = gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), (q, k, v))
    assert torch.equal(plain[0], again[0])
    for a, b in zip(plain[1], again[1], strict=True):
        assert torch.equal(a, b)


def test_seed_decides_the_mask():
    q, k, v = tensors()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(flash_attn_func(q, k, v, dropout_p=0.2))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_opcheck(p):
    q, k, v = tensors(seqlen=33)
    rng_state = torch.tensor([3, 4], device="cuda") if p else None
    for keys in ((None,) * 3, key_bits_of(torch.rand(q.shape[0], 33, device="cuda") < 0.5)):
        arguments = (q, k, v, None, None, *keys, rng_state, 0, 0, p, 0.125, True, True)
        torch.library.opcheck(torch.ops.hf_flashattn.forward.default, arguments)


def test_autocast():
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = flash_attn_func(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    want, _ = attention_reference(q, k, v, causal=True)
    torch.testing.assert_close(out.float(), want, rtol=2e-2, atol=2e-2)


def test_first_use_in_a_new_thread():
    """No context is current in a thread until it uses the device through the runtime."""
    q, k, v = (x.detach() for x in tensors(seqlen=72))
    want = flash_attn_func(q, k, v)
    torch.cuda.synchronize()
    got = []
    thread = threading.Thread(target=lambda: got.append(flash_attn_func(q, k, v)))
    thread.start()
    thread.join()
    assert torch.equal(got[0], want)


def test_other_stream_and_freed_inputs():
    """Results do not depend on the stream, nor on inputs that die before the kernel has run."""
    want = None
    for _ in range(2):
        torch.manual_seed(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            out = flash_attn_func(*tensors(seqlen=2000))
            torch.randn(2, 2000, 4, 64, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        want = out if want is None else want
        assert torch.equal(out, want)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"dtype": torch.float32}, (TypeError, NotImplementedError, ValueError), "float16"),
        ({"dim": 84}, (NotImplementedError, ValueError), "head_dim 84"),
        ({"dim": 264}, (NotImplementedError, ValueError), "head_dim 264"),
    ],
)
def test_errors_before_any_launch(change, error, words):
    q, k, v = tensors(**change)
    with pytest.raises(error, match=words):
        flash_attn_func(q, k, v)


def test_errors_of_direct_op_calls():
    """The ops themselves guard memory: nothing is launched on what does not fit together."""
    q, k, v = (x.detach() for x in tensors())
    with pytest.raises(RuntimeError, match="k and v"):
        ops.forward(q, k, v[:, :-1], softmax_scale=0.1)
    with pytest.raises(RuntimeError, match="multiple"):
        ops.forward(q[:, :, :3], k[:, :, :2], v[:, :, :2], softmax_scale=0.1)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.forward(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3), softmax_scale=0.1)
    with pytest.raises(RuntimeError, match="int32"):
        offsets = torch.tensor([0, 200], device="cuda")
        ops.forward(q[0], k[0], v[0], softmax_scale=0.1, cu_seqlens_q=offsets, cu_seqlens_k=offsets,
                    max_seqlen_q=200, max_seqlen_k=200)  # fmt: skip
    with pytest.raises(RuntimeError, match="softmax_scale"):
        ops.forward(q, k, v, softmax_scale=-1.0)


@pytest.mark.parametrize("offsets", WRONG_OFFSETS)
def test_wrong_offsets_do_not_break_the_context(offsets):
    """Small overruns stay inside torch's pool and unseen here: sanitizer_cases.py finds those."""
    run_wrong_offsets(offsets)


def test_tokens_of_no_sequence_give_zeros():
    """A packed buffer of fixed size: what lies outside the offsets is 0, and LSE -inf."""
    q, k, v, dout = (torch.randn(100, 2, 64, device="cuda", dtype=torch.float16) for _ in range(4))
    cu = torch.tensor([7, 30, 60], device="cuda", dtype=torch.int32)
    options = {"softmax_scale": 0.125, "cu_seqlens_q": cu, "cu_seqlens_k": cu,
               "max_seqlen_q": 30, "max_seqlen_k": 30}  # fmt: skip
    for tensor in (q, k, v, dout):
        tensor[60:] = float("nan")
    out, lse = ops.forward(q, k, v, **options)
    grads = ops.backward(dout, q, k, v, out, lse, **options)
    for result in (out, *grads):
        assert torch.isfinite(result).all()
        assert not result[:7].any() and not result[60:].any()
        assert result[7:60].any(dim=-1).all()
    assert (lse[:, :7] == -float("inf")).all() and (lse[:, 60:] == -float("inf")).all()


def test_empty_problems():
    for sq, sk in ((0, 5), (5, 0), (0, 0)):
        q = torch.randn(2, sq, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        k = torch.randn(2, sk, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        out = flash_attn_func(q, k, k)
        assert out.shape == q.shape and not out.any()
        grads = torch.autograd.grad(out.sum(), (q, k))
        assert not grads[0].any() and not grads[1].any()


# ---- a layer's call: heads first, by the short way ---------------------------------------------


class Layer(torch.nn.Module):
    """An attention module as Transformers has them."""

    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


def layers_gradients(layer, inputs, mask=None):
    """(out, gradients) of the attention function for q, k, v (B, H, S, D)."""
    return gradients(lambda q, k, v: attention_forward(layer, q, k, v, mask)[0], inputs)


def heads_first(inputs):
    return [x.detach().transpose(1, 2).requires_grad_() for x in inputs]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("first", [False, True])
def test_opcheck_dense(p, first):
    q, k, v = tensors(seqlen=33)
    q, k, v = heads_first((q, k, v)) if first else (q, k, v)
    rng_state = torch.tensor([3, 4], device="cuda") if p else None
    length = torch.tensor([33, 20], device="cuda", dtype=torch.int32)
    arguments = (q, k, v, 0.125, True, first, None, length, p, rng_state)
    torch.library.opcheck(torch.ops.hf_flashattn.dense_forward.default, arguments)


def test_packed_calls_in_graphs_of_torch_compile():
    """mode="reduce-overhead": what the first runs allocate belongs to a pool that is checked."""
    q, k, v = (x[0].detach() for x in tensors(batch=1, seqlen=500))
    offsets = torch.tensor([0, 200, 201, 500], dtype=torch.int32, device="cuda")
    torch.compiler.reset()
    for causal in (False, True):  # a graph each

        def attend(q, k, v, offsets, causal=causal):
            return flash_attn_varlen_func(q, k, v, offsets, offsets, 300, 300, causal=causal)

        compiled = torch.compile(attend, mode="reduce-overhead", fullgraph=True)
        with torch.no_grad():
            want = attend(q, k, v, offsets)
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                assert torch.equal(compiled(q, k, v, offsets), want)
                assert torch.equal(attend(q, k, v, offsets), want)


def test_inference_is_forward_without_its_lse():
    """Shapes that need more room for what nobody reads, and less; on two streams; in a graph."""
    op = torch.ops.hf_flashattn.dense_inference.default
    torch.library.opcheck(op, (*(x.detach() for x in tensors(seqlen=33)), 0.125, True))
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for seqlen, batch in ((40, 2), (1000, 9), (1, 1), (200, 40)):
        q, k, v = (x.detach() for x in tensors(batch=batch, seqlen=seqlen))
        length = torch.arange(batch, device="cuda", dtype=torch.int32) % (seqlen + 1)
        for ranges in ({}, {"key_len": length}):
            want = ops.forward(q, k, v, softmax_scale=0.125, causal=True, **ranges)[0]
            streams[1].wait_stream(streams[0])
            for stream in streams:
                with torch.cuda.stream(stream):
                    got = [flash_attn_func(q, k, v, causal=True, **ranges) for _ in range(3)]
                stream.synchronize()
                assert all(torch.equal(x, want) for x in got)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                held = flash_attn_func(q, k, v, causal=True, **ranges)
            graph.replay()
            assert torch.equal(held, want)
    empty = flash_attn_func(q, k[:, :0], v[:, :0])
    assert not empty.any() and empty.shape == q.shape


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen", [1, 128, 200])
def test_a_layers_call_is_flash_attn_func(causal, seqlen, deterministic):
    inputs = tensors(seqlen=seqlen)
    want = gradients(lambda *x: flash_attn_func(*x, causal=causal), inputs)
    got = layers_gradients(Layer(causal), heads_first(inputs))
    assert torch.equal(got[0], want[0]) and got[0].is_contiguous()
    for a, b in zip(got[1], want[1], strict=True):
        assert torch.equal(a.transpose(1, 2), b) and a.transpose(1, 2).is_contiguous()
    with torch.no_grad():
        alone = attention_forward(Layer(causal), *heads_first(inputs), None)[0]
    assert torch.equal(alone, want[0])


def test_a_layers_tensors_of_any_strides(deterministic):
    """What TMA cannot load is copied: unaligned data, odd strides. Heads in blocks are not."""
    inputs = [x.detach() for x in tensors(seqlen=130)]
    want = layers_gradients(Layer(True), heads_first(inputs))
    unaligned = torch.empty(inputs[0].numel() + 1, device="cuda", dtype=torch.bfloat16)[1:]
    unaligned = unaligned.view_as(inputs[0]).copy_(inputs[0])
    odd = torch.empty(*inputs[1].shape[:-1], 65, device="cuda", dtype=torch.bfloat16)[..., :64]
    odd.copy_(inputs[1])
    blocks = inputs[2].transpose(1, 2).contiguous().transpose(1, 2)
    got = layers_gradients(Layer(True), heads_first((unaligned, odd, blocks)))
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_becomes_bits_in_a_graph(causal):
    """In a capture the mask function reads nothing; a replay has the mask of its own time."""
    inputs = [x.detach() for x in heads_first(tensors(seqlen=96))]
    kept = torch.ones(2, 96, device="cuda", dtype=torch.bool)
    kept[1, 50:60] = False
    layer = Layer(causal)
    function = (
        masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    )

    def attend():
        mask = masks.attention_mask(2, 96, 96, mask_function=function, attention_mask=kept)
        return attention_forward(layer, *inputs, mask)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    kept[0, 70:] = kept[1, 3:9] = False
    graph.replay()
    q, k, v = (x.transpose(1, 2) for x in inputs)
    keys = dict(zip(("key_start", "key_len", "key_bits"), key_bits_of(kept), strict=True))
    assert torch.equal(out, flash_attn_func(q, k, v, causal=causal, **keys))
    want, _ = attention_reference(q, k, v, causal=causal, **keys)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_a_layers_call_in_a_graph_reads_its_mask_anew():
    """A padded batch: what is written to the carrier between replays counts."""
    q, k, v = (x.detach() for x in heads_first(tensors(seqlen=96)))
    kept = torch.ones(2, 96, device="cuda", dtype=torch.bool)
    kept[1, 50:] = False
    mask = masks.padded(kept, 96, causal=False)
    layer, static = Layer(False), mask.clone()
    attention_forward(layer, q, k, v, static)
    kept[0, 70:] = False
    other = masks.padded(kept, 96, causal=False)
    want = attention_forward(layer, q, k, v, other)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        static.copy_(mask)
        attention_forward(layer, q, k, v, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Written to in the graph: the ranges are read from the carrier by every replay.
        static.copy_(other)
        out = attention_forward(layer, q, k, v, static)[0]
    graph.replay()
    assert torch.equal(out, want)
