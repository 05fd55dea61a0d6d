"""The ops: schemas, CPU implementations, tracing, the library."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from hf_flashattn import flash_attn_func, flash_attn_varlen_func, key_bits_of, ops
from hf_flashattn.reference import attention_reference

ROOT = Path(__file__).resolve().parents[2]
RNG = torch.tensor([2**60 + 1, 17])
HOLES = torch.tensor(
    [[1, 1, 0, 0, 0, 1] * 2, [0] * 12, [0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0]]
).bool()
FORWARD = torch.ops.hf_flashattn.forward.default
BACKWARD = torch.ops.hf_flashattn.backward.default
DENSE = torch.ops.hf_flashattn.dense_forward.default
DENSE_INFERENCE = torch.ops.hf_flashattn.dense_inference.default
DENSE_BACKWARD = torch.ops.hf_flashattn.dense_backward.default


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def problem(kind, dtype=torch.float32):
    """(q, k, v, the keywords of ops.forward) of a small problem."""
    options = {"softmax_scale": 0.2, "causal": "causal" in kind}
    if "dropout" in kind:
        options |= {"dropout_p": 0.3, "rng_state": RNG}
    if "packed" in kind:
        q, k = torch.randn(14, 4, 16), torch.randn(17, 2, 16)
        options |= {
            "cu_seqlens_q": int32(0, 5, 5, 14), "cu_seqlens_k": int32(0, 8, 10, 17),
            "max_seqlen_q": 9, "max_seqlen_k": 8,
        }  # fmt: skip
    else:
        q, k = torch.randn(3, 9, 4, 16), torch.randn(3, 12, 2, 16)
    if "range" in kind:
        options |= {"key_start": int32(0, 3, 5), "key_len": int32(12, 0, 4)}
    if "holes" in kind:
        options |= dict(zip(("key_start", "key_len", "key_bits"), key_bits_of(HOLES), strict=True))
    v = torch.randn_like(k)
    return *(x.to(dtype).requires_grad_() for x in (q, k, v)), options


FLAGS = ("causal", "dropout")
KINDS = [
    "-".join((layout, *chosen))
    for layout in ("dense", "range", "holes", "packed")
    for n in range(3)
    for chosen in itertools.combinations(FLAGS, n)
]


def arguments(q, k, v, options):
    """The op's positional arguments."""
    tensors = ("cu_seqlens_q", "cu_seqlens_k", "key_start", "key_len", "key_bits", "rng_state")
    numbers = ("max_seqlen_q", "max_seqlen_k", "dropout_p")
    flags = (options["softmax_scale"], options["causal"], False)
    return q, k, v, *map(options.get, tensors), *(options.get(x, 0) for x in numbers), *flags


def reference(q, k, v, options, **more):
    options = {x: y for x, y in options.items() if not x.startswith("max_")}
    return attention_reference(q, k, v, **options, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_cpu_matches_the_reference(kind):
    q, k, v, options = problem(kind, torch.float64)
    out, lse = ops.forward(q, k, v, **options)
    expected, expected_lse = reference(q, k, v, options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert out.is_contiguous() and lse.is_contiguous() and not lse.requires_grad
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for got, want in zip(grads, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["dense", "range-causal", "holes-causal", "packed-causal", "dense-dropout"]
)
def test_cpu_low_precision(kind, dtype):
    """Error at most 2x (gradients 3x) that of the same PyTorch math in the low precision."""
    q, k, v, options = problem(kind, dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    results = []
    dout = torch.randn_like(q)
    for inputs, out in (
        (exact, reference(*exact, options)[0]),
        ((q, k, v), reference(q, k, v, options, math_dtype=dtype)[0]),
        ((q, k, v), ops.forward(q, k, v, **options)[0]),
    ):
        results.append((out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))))
    for i, (truth, yardstick, got) in enumerate(zip(*results, strict=True)):
        allowed = (yardstick.double() - truth).abs().max() * (2 if i == 0 else 3)
        assert (got.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    q, k, v, options = problem(kind)
    args = arguments(q, k, v, options)
    opcheck(FORWARD, args)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, lse = FORWARD(*plain)
    opcheck(BACKWARD, (torch.randn_like(out), *plain[:3], out, lse, *plain[3:]))


DENSE_KINDS = [kind for kind in KINDS if "packed" not in kind and "holes" not in kind]


def dense_arguments(q, k, v, options, heads_first):
    """The dense op's positional arguments, heads first in shape alone if at all."""
    if heads_first:
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
    ranges = (options.get("key_start"), options.get("key_len"))
    dropout = (options.get("dropout_p", 0.0), options.get("rng_state"))
    return q, k, v, options["softmax_scale"], options["causal"], heads_first, *ranges, *dropout


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_opcheck_dense(kind, heads_first):
    args = dense_arguments(*problem(kind), heads_first)
    opcheck(DENSE, args)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, lse = DENSE(*plain)
    opcheck(DENSE_BACKWARD, (torch.randn_like(out), *plain[:3], out, lse, *plain[3:]))


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_dense_is_forward_with_fewer_words(kind, heads_first):
    """The op, and the call that draws its own dropout: output, gradients and their memory."""
    *inputs, options = problem(kind)
    want, lse = ops.forward(*inputs, **options)
    dout = torch.randn_like(want)
    wanted = torch.autograd.grad(want, inputs, dout)
    args = dense_arguments(*inputs, options, heads_first)
    out, got_lse = DENSE(*args)
    assert torch.equal(out, want) and torch.equal(got_lse, lse) and out.is_contiguous()
    with torch.no_grad():
        assert torch.equal(DENSE(*args)[0], want)
    recorded = []
    if "dropout" not in kind:
        recorded.append(ops.call_dense(*args[:9], deterministic=False))
    for result in (out, *recorded):
        grads = torch.autograd.grad(result, args[:3], dout)
        for got, exact in zip(grads, wanted, strict=True):
            got = got.transpose(1, 2) if heads_first else got
            assert torch.equal(got, exact) and got.is_contiguous()


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in DENSE_KINDS if "dropout" not in kind])
def test_inference_is_forward_without_its_lse(kind, heads_first):
    """The op, and the call where no gradient is asked for."""
    *inputs, options = problem(kind)
    want = ops.forward(*inputs, **options)[0]
    args = dense_arguments(*inputs, options, heads_first)[:8]
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    opcheck(DENSE_INFERENCE, tuple(plain))
    with torch.no_grad():
        called = ops.call_dense(*args, 0.0, False)
    for out in (called, DENSE_INFERENCE(*args), ops.call_dense(*plain, 0.0, False)):
        assert torch.equal(out, want) and out.is_contiguous() and not out.requires_grad


def test_a_recorded_dense_call_has_the_dropout_of_its_state(monkeypatch):
    *inputs, options = problem("range-causal-dropout")
    monkeypatch.setattr(ops, "new_rng_state", lambda device: RNG)
    args = dense_arguments(*inputs, options, False)
    out = ops.call_dense(*args[:9], deterministic=False)
    want = ops.forward(*inputs, **options)[0]
    dout = torch.randn_like(out)
    assert torch.equal(out, want)
    for got, exact in zip(
        torch.autograd.grad(out, inputs, dout),
        torch.autograd.grad(want, inputs, dout),
        strict=True,
    ):
        assert torch.equal(got, exact)


@pytest.mark.parametrize(
    "shape_q, shape_k",
    [((2, 0, 2, 8), (2, 3, 2, 8)), ((2, 3, 2, 8), (2, 0, 2, 8)), ((0, 3, 2, 8), (0, 3, 2, 8))],
)
def test_empty_problems(shape_q, shape_k):
    q, k = torch.randn(shape_q, requires_grad=True), torch.randn(shape_k, requires_grad=True)
    out, lse = ops.forward(q, k, k, softmax_scale=1.0)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == (q.shape[0], 2, q.shape[1]) and torch.isneginf(lse).all()
    out.sum().backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["range", "holes", "holes-dropout"])
def test_padding_is_never_read(kind, poison):
    q, k, v, options = problem(kind)
    clean = ops.forward(q, k, v, **options)
    dout = torch.randn_like(q)
    grads = torch.autograd.grad(clean[0], (q, k, v), dout)
    with torch.no_grad():
        for x in (k, v):
            if "holes" in kind:
                x[~HOLES] = poison
            else:
                x[1] = x[2, :5] = x[2, 9:] = poison
        q[1] = poison
    dout[1] = poison
    out, lse = ops.forward(q, k, v, **options)
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])
    for got, want in zip(torch.autograd.grad(out, (q, k, v), dout), grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["holes", "holes-causal", "holes-causal-dropout"])
def test_keys_in_holes_get_no_gradient(kind):
    q, k, v, options = problem(kind)
    out, lse = ops.forward(q, k, v, **options)
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert not dk[~HOLES].any() and not dv[~HOLES].any() and not dq[1].any()
    assert dk[HOLES].any() and dv[HOLES].any()


def test_operands_of_strange_strides():
    """Channels before tokens, as a convolution leaves them: the last dimension has a stride."""
    tensors = problem("dense", torch.float64)
    *plain, options = tensors
    expected = ops.forward(*plain, **options)[0]
    dout = torch.randn_like(expected)
    want = torch.autograd.grad(expected, plain, dout)
    strange = [x.detach().mT.contiguous().mT.requires_grad_() for x in plain]
    out = ops.forward(*strange, **options)[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, strange, dout), want)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_strange_strides(causal):
    q, k, v, options = problem("dense-causal" if causal else "dense", torch.float64)
    out, _ = ops.forward(q, k, v, **options)
    for dout in (
        torch.ones((), dtype=torch.float64).expand_as(out),
        torch.randn(*out.shape[:2], 16, 4, dtype=torch.float64).transpose(2, 3),
    ):
        got = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        want = torch.autograd.grad(out, (q, k, v), dout.contiguous(), retain_graph=True)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "kind", ["dense-causal", "range", "holes-causal", "packed-causal", "dense-dropout"]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(kind, dynamic):
    torch._dynamo.reset()
    q, k, v, options = problem(kind)
    dropout_p = options.get("dropout_p", 0.0)

    def call(q, k, v):
        if "packed" in kind:
            out = flash_attn_varlen_func(
                q, k, v, options["cu_seqlens_q"], options["cu_seqlens_k"], 9, 8, causal=True
            )
        else:
            out = flash_attn_func(
                q * 1.0, k, v, dropout_p, causal=options["causal"],
                key_start=options.get("key_start"), key_len=options.get("key_len"),
                key_bits=options.get("key_bits"),
            )  # fmt: skip
        return out * 2.0

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for function in (call, compiled):
        torch.manual_seed(4)
        out = function(q, k, v)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivative_is_an_error():
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(flash_attn_func(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"gradient of a gradient.*Next step"):
        grad.sum().backward()


def test_only_some_inputs_need_gradients():
    q, k, v, options = problem("dense")
    k = k.detach()
    out, _ = ops.forward(q, k, v, **options)
    out.sum().backward()
    assert q.grad is not None and v.grad is not None
    with torch.no_grad():
        assert not ops.forward(q, k, v, **options)[0].requires_grad


def test_new_rng_state_comes_from_torchs_generator():
    torch.manual_seed(2)
    a, b = (ops.new_rng_state(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(2)
    assert torch.equal(ops.new_rng_state(torch.device("cpu")), a) and not torch.equal(a, b)
    assert a.shape == (2,) and a.dtype == torch.int64


# ------------------------------------------------------------------------- the way of a call


def autograd_kernels(call):
    """How often the dispatcher enters Python's autograd kernels during call()."""
    kernels = {ops._forward_autograd.__code__, ops._backward_autograd.__code__}
    entered = []

    def watch(frame, event, _):
        if event == "call" and frame.f_code in kernels:
            entered.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(entered)


@pytest.mark.parametrize("kind", ["dense", "packed-causal"])
def test_no_call_of_ours_passes_the_autograd_kernel(kind):
    q, k, v, options = problem(kind)
    plain = [x.detach() for x in (q, k, v)]
    # The dispatcher's own way, to see that this test sees something.
    assert autograd_kernels(lambda: FORWARD(*arguments(*plain, options))) == 1
    assert autograd_kernels(lambda: ops.forward(*plain, **options)) == 0
    assert autograd_kernels(lambda: ops.forward(q, k, v, **options)) == 0
    with torch.no_grad():
        assert autograd_kernels(lambda: ops.forward(q, k, v, **options)) == 0
    out, lse = ops.forward(q, k, v, **options)
    assert autograd_kernels(lambda: torch.autograd.grad(out.sum(), (q, k, v))) == 0
    del options["causal"]
    with torch.no_grad():
        gradients = lambda: ops.backward(out, q, k, v, out, lse, **options)  # noqa: E731
        assert autograd_kernels(gradients) == 0


def test_the_short_way_is_for_ordinary_tensors_alone():
    """A subclass meets the dispatcher, which knows what to do; no transform loses a gradient."""
    q = torch.randn(3, 1, 3, 2, 8)
    parameter = torch.nn.Parameter(q[0])
    assert autograd_kernels(lambda: ops.forward(parameter, *q[1:], softmax_scale=1.0)) == 1

    def total(q):
        return torch.vmap(lambda x: ops.forward(x, x, x, softmax_scale=1.0)[0])(q).sum()

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(total)(q)  # not without a gradient


def test_export_keeps_the_op():
    class Model(torch.nn.Module):
        def forward(self, q):
            return flash_attn_func(q, q, q, causal=True)

    q = torch.randn(1, 3, 2, 8)
    for strict in (False, True):
        program = torch.export.export(Model(), (q,), strict=strict)
        assert FORWARD in [node.target for node in program.graph.nodes]
        torch.testing.assert_close(program.module()(q), flash_attn_func(q, q, q, causal=True))


# ------------------------------------------------------------------------------- the library


STUB = """
#include "params.h"
namespace hf_flashattn {
Status launch_forward(ForwardParams const&, int32_t*) { return {"stub"}; }
Status launch_backward(BackwardParams const&) { return {"stub"}; }
bool forward_claims_tiles(Problem const&) { return false; }
int32_t* tile_counter(int32_t) { return nullptr; }
size_t backward_workspace_bytes(BackwardParams const&) { return 0; }
Status check_supported(Problem const&) { return {""}; }
}  // namespace hf_flashattn
"""


@pytest.fixture(scope="module")
def stub_library(tmp_path_factory):
    """The real binding on launchers that do nothing."""
    from hf_flashattn import build

    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc and the CUDA headers to compile kernels/torch_binding.cpp")
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.cpp").write_text(STUB)
    torch_home = Path(torch.__file__).parent
    library = folder / "libhf_flashattn.so"
    command = [nvcc, "-std=c++20", "-Xcompiler", "-fPIC", *build.BINDING_FLAGS.split()]
    command += ["-I", ROOT / "kernels", "-I", torch_home / "include", "-L", torch_home / "lib"]
    command += [ROOT / "kernels" / "torch_binding.cpp", folder / "stub.cpp", "-o", library]
    subprocess.run([*map(str, command), *build.LINK_FLAGS.split()], check=True)
    return library


def python(code, cache, **environment):
    """Run code in a fresh process that finds no library; returns its standard output."""
    env = {**os.environ, "HF_FLASHATTN_CACHE": str(cache), **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SHOW_SCHEMAS = """
import torch
from hf_flashattn import ops
print(ops._schemas_in_python)
for name in ("forward", "backward", "dense_forward", "dense_backward", "dense_inference"):
    print(getattr(torch.ops.hf_flashattn, name).default._schema)
"""

LATE = """
import os, torch
from hf_flashattn import flash_attn_func, ops
early = torch.ops.hf_flashattn.forward.default
assert not ops.load_library(build_if_missing=False).loaded
has = lambda: torch._C._dispatch_has_kernel_for_dispatch_key("hf_flashattn::forward", "CUDA")
assert not has()
os.environ["HF_FLASHATTN_LIBRARY"] = os.environ["LATE_LIBRARY"]
def first_use(x):
    ops._library_for_cuda()  # what a CUDA call does first, here while it is traced
    return x + 1
torch.compile(first_use, fullgraph=True, backend="eager")(torch.zeros(1))
assert has() and ops.library_status().loaded, ops.library_status().reason
assert early is torch.ops.hf_flashattn.forward.default
q = torch.randn(1, 3, 2, 8, requires_grad=True)
flash_attn_func(q, q, q).sum().backward()
assert "HF_FLASHATTN_SCHEMAS_DEFINED_BY" not in os.environ
"""


def test_schemas_of_library_and_python_are_the_same(stub_library, tmp_path):
    from_library = python(SHOW_SCHEMAS, tmp_path, HF_FLASHATTN_LIBRARY=str(stub_library))
    from_python = python(SHOW_SCHEMAS, tmp_path, HF_FLASHATTN_LIBRARY=str(tmp_path / "none"))
    assert from_library.splitlines()[0] == "False" and from_python.splitlines()[0] == "True"
    assert from_library.splitlines()[1:] == from_python.splitlines()[1:]


def test_a_library_that_comes_later_joins_the_same_ops(stub_library, tmp_path):
    python(LATE, tmp_path, LATE_LIBRARY=str(stub_library), HF_FLASHATTN_LIBRARY=str(tmp_path / "x"))


def test_a_plain_load_defines_the_schemas(stub_library, tmp_path):
    code = f"import torch; torch.ops.load_library({str(stub_library)!r}); "
    code += "print(torch.ops.hf_flashattn.forward.default._schema.name)"
    # A parent's note about its own schemas must not reach a child.
    out = python(code, tmp_path, HF_FLASHATTN_SCHEMAS_DEFINED_BY=str(os.getpid()))
    assert "hf_flashattn::forward" in out


def test_a_wrong_library_path_says_so(tmp_path):
    code = (
        "from hf_flashattn import ops; s = ops.load_library(); print(s.loaded, s.failed, s.reason)"
    )
    out = python(code, tmp_path, HF_FLASHATTN_LIBRARY="/nowhere/lib.so")
    assert "False True" in out and "/nowhere/lib.so" in out and "Next step" in out


def test_a_broken_library_says_so(tmp_path):
    (tmp_path / "bad.so").write_bytes(b"not a library")
    code = "from hf_flashattn import ops; print(ops.load_library().reason)"
    out = python(code, tmp_path, HF_FLASHATTN_LIBRARY=str(tmp_path / "bad.so"))
    assert "does not load into torch" in out and "Next step" in out
