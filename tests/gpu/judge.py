"""The judge of every kernel test: errors against fp32, as multiples of what PyTorch makes.

The yardstick is the reference run in the kernel's own 16-bit type: the kernel's error against the
fp32 reference may be twice the yardstick's, a gradient's three times.

With dropout alone, gradients have a second yardstick and the larger counts: the kernels' formula in
fp32 on the rounded output. It takes rowsum(dO * O) from O, which dropout's factor 1 / keep makes
inexact in 16 bits even for a row with a single key, where PyTorch's own math is exactly 0. By the
first yardstick alone such rows fail: dK of one key seen by 300 rows was off by 3.7 times PyTorch's.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hf_flashattn import key_bits_of, ops
from hf_flashattn.reference import attention_backward_reference, attention_reference

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = tuple(ROUNDING)
HEAD_DIMS = (8, 32, 40, 72, 80, 96, 104, 136, 160, 192, 200, 256)
# Up to how many keys a sequence dQ has a kernel of its own and no sums, of full and of causal
# attention (kSplitUpToKeys in sm90/policy.cuh); a kernel serves the head dims below its own too.
SPLIT_UP_TO = {32: (0, 0), 64: (256, 384), 96: (384, 512), 128: (384, 512)}
# The mean of packed sequences, in eighths of that (kSplitPackedEighths).
SPLIT_PACKED_EIGHTHS = {32: (0, 0), 64: (7, 10), 96: (10, 10), 128: (10, 10)}
# Of 300 keys: (start, length), a row of the batch each.
RANGES = ((0, 300), (0, 77), (150, 150), (299, 1), (0, 0), (120, 30), (0, 128), (128, 128))
# Lengths of packed sequences, pairs (rows, keys).
PACKED = ((100, 100), (1, 1), (0, 0), (513, 513), (64, 64), (0, 7), (5, 0), (130, 129))


@dataclass(frozen=True)
class Case:
    """One problem. lengths: packed sequences, pairs (rows, keys); else dense (batch, sq, sk).

    holes: the share of keys that are hidden at random, each by its bit. In every third row of the
    batch from the second on the middle third is hidden too, in every third from the third on half
    of the keys of every 32, and the last row of more than three sees nothing.
    """

    batch: int = 2
    sq: int = 256
    sk: int = 256
    heads_q: int = 2
    heads_k: int = 2
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    dropout_p: float = 0.0
    softmax_scale: float | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
    key_ranges: tuple[tuple[int, int], ...] | None = None  # (start, length) per row of the batch
    holes: float | None = None
    deterministic: bool = False

    def __str__(self) -> str:
        size = f"lengths={self.lengths}" if self.lengths else f"{self.batch}x{self.sq}x{self.sk}"
        parts = [size, f"h{self.heads_q}:{self.heads_k}", f"d{self.dim}", str(self.dtype)[6:]]
        parts += ["causal"] * self.causal + ["dropout"] * (self.dropout_p > 0)
        parts += ["deterministic"] * self.deterministic
        parts += [f"keys={self.key_ranges}"] * (self.key_ranges is not None)
        parts += [f"holes={self.holes}"] * (self.holes is not None)
        return "-".join(parts)


@dataclass
class Problem:
    """The tensors of a case on the GPU."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    options: dict  # what ops.forward, ops.backward and the reference take alike
    sizes: dict  # max_seqlen_*, for the ops alone


def kept_keys(case: Case) -> Tensor:
    """bool (B, Sk) on the GPU: the keys of a case with holes that rows may see."""
    generator = torch.Generator().manual_seed(case.sk)
    kept = torch.rand(case.batch, case.sk, generator=generator) >= case.holes
    kept[1::3, case.sk // 3 : 2 * case.sk // 3] = False
    kept[2::3] &= torch.arange(case.sk) % 32 < 16
    if case.batch > 3:
        kept[-1] = False
    for row, (start, length) in zip(kept, case.key_ranges or (), strict=False):
        row[:start] = row[start + length :] = False
    return kept.cuda()


def make_problem(case: Case, *, seed: int = 0) -> Problem:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(case.dtype)

    def int32(values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    scale = case.softmax_scale if case.softmax_scale is not None else case.dim**-0.5
    options: dict = {"softmax_scale": scale, "causal": case.causal, "dropout_p": case.dropout_p}
    sizes: dict = {}
    if case.dropout_p > 0:
        options["rng_state"] = torch.tensor([0x1234567890ABCDEF, 987654321987], device=device)
    if case.lengths is not None:
        rows, keys = zip(*case.lengths, strict=True)
        leading_q, leading_k = (sum(rows),), (sum(keys),)
        options["cu_seqlens_q"] = int32([0, *torch.tensor(rows).cumsum(0).tolist()])
        options["cu_seqlens_k"] = int32([0, *torch.tensor(keys).cumsum(0).tolist()])
        sizes = {"max_seqlen_q": max(rows), "max_seqlen_k": max(keys)}
    else:
        leading_q, leading_k = (case.batch, case.sq), (case.batch, case.sk)
    if case.holes is not None:
        names = ("key_start", "key_len", "key_bits")
        options |= zip(names, key_bits_of(kept_keys(case)), strict=True)
    elif case.key_ranges is not None:
        options["key_start"] = int32([start for start, _ in case.key_ranges])
        options["key_len"] = int32([length for _, length in case.key_ranges])
    q = normal(*leading_q, case.heads_q, case.dim)
    k = normal(*leading_k, case.heads_k, case.dim)
    v = normal(*leading_k, case.heads_k, case.dim)
    dout = normal(*leading_q, case.heads_q, case.dim)
    return Problem(case, q, k, v, dout, options, sizes)


Results = dict[str, Tensor]  # out, lse, dq, dk, dv


def run_kernel(problem: Problem) -> Results:
    case = problem.case
    options = {**problem.options, **problem.sizes, "deterministic": case.deterministic}
    out, lse = ops.forward(problem.q, problem.k, problem.v, **options)
    dq, dk, dv = ops.backward(problem.dout, problem.q, problem.k, problem.v, out, lse, **options)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def run_reference(problem: Problem, math_dtype: torch.dtype | None) -> Results:
    """In fp32 (None: inputs and results too) or in the given type all along."""
    dtype = math_dtype or torch.float32
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, lse = attention_reference(q, k, v, **problem.options, math_dtype=dtype)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), problem.dout.to(out.dtype))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def run_formula(problem: Problem, results: Results) -> Results:
    """Gradients in fp32 from the kernel's own 16-bit output."""
    inputs = (problem.dout, problem.q, problem.k, problem.v, results["out"])
    dq, dk, dv = attention_backward_reference(
        *(x.float() for x in inputs), results["lse"], **problem.options
    )
    return {"dq": dq, "dk": dk, "dv": dv}


def max_error(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item() if a.numel() else 0.0


def judge(problem: Problem, results: Results | None = None) -> dict[str, float]:
    """Asserts the bounds; returns each result's error over the yardstick's."""
    results = results or run_kernel(problem)
    exact = run_reference(problem, None)
    yardsticks = [run_reference(problem, problem.case.dtype)]
    if problem.case.dropout_p > 0:
        yardsticks.append(run_formula(problem, results))
    ratios, failures = {}, []
    seen = exact["lse"] > -float("inf")
    assert torch.equal(results["lse"] > -float("inf"), seen), f"{problem.case}: wrong empty rows"
    torch.testing.assert_close(results["lse"][seen], exact["lse"][seen], rtol=1e-4, atol=1e-4)
    for name, factor in {"out": 2, "dq": 3, "dk": 3, "dv": 3}.items():
        got, want = results[name], exact[name]
        assert got.shape == want.shape and got.dtype == problem.case.dtype
        assert torch.isfinite(got).all(), f"{problem.case}: {name} is not finite"
        error = max_error(got, want)
        allowed = max(max_error(y[name], want) for y in yardsticks if name in y)
        # What PyTorch happens to get exactly may be off by one rounding of the result, or of the
        # fp32 sums behind it, whose terms are of order 1 even where they cancel (one key).
        largest = want.abs().max().item() if want.numel() else 0.0
        floor = max(ROUNDING[problem.case.dtype] * largest, 1e-5)
        ratios[name] = error / max(allowed, floor)
        if error > factor * max(allowed, floor):
            failures.append(
                f"{name}: error {error:.3g}, yardstick {allowed:.3g}, at most x{factor}"
            )
    assert not failures, f"{problem.case}: " + "; ".join(failures)
    return ratios


# cu_seqlens that lie about 100 tokens: results may be nonsense, accesses must stay inside.
INT_MAX = 2**31 - 1
WRONG_OFFSETS = (
    (0, 300), (0, 3000), (5, 1), (-7, 90), (0, 10), (5, -INT_MAX), (100, -INT_MAX),
    (INT_MAX, INT_MAX),
)  # fmt: skip


def run_wrong_offsets(offsets: tuple[int, int]) -> None:
    """In the kernels for dQ alone and, of more tokens, in those that sum it."""
    cu = torch.tensor([0, *offsets], device="cuda", dtype=torch.int32)
    for dim, causal, tokens in itertools.product((64, 128, 256), (False, True), (100, 1100)):
        q, k, v, dout = (
            torch.randn(tokens, 2, dim, device="cuda", dtype=torch.float16) for _ in range(4)
        )
        options = {"softmax_scale": 0.125, "causal": causal}
        options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
        options |= {"max_seqlen_q": tokens, "max_seqlen_k": tokens}
        out, lse = ops.forward(q, k, v, **options)
        ops.backward(dout, q, k, v, out, lse, **options)
    torch.cuda.synchronize()


def run_wrong_bits(causal: bool, dim: int) -> None:
    """Ranges and bits of chance, in rows of words that are no neighbours: accesses stay inside."""
    problem = make_problem(Case(batch=4, sq=150, sk=170, dim=dim, causal=causal, holes=0.0))
    generator = torch.Generator("cuda").manual_seed(1)
    for name in ("key_start", "key_len", "key_bits"):
        given = problem.options[name]
        wide = torch.randint(
            -(2**31), 2**31 - 1, (*given.shape[:1], 10), generator=generator, device="cuda"
        ).to(torch.int32)
        problem.options[name] = wide[:, 2 : 2 + given.shape[1]] if given.dim() > 1 else wide[:, 0]
    for name in ("key_start", "key_len"):
        problem.options[name] = problem.options[name].remainder(200).to(torch.int32)
    run_kernel(problem)
    torch.cuda.synchronize()


def check_replays(run, inputs: list[Tensor]) -> None:
    """A graph of run(tensor), replayed with each of `inputs` in it, twice in turn, gives what a
    call with that input gives."""
    want = [run(x) for x in inputs]
    held = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(held)
    for x, results in zip((*inputs, *inputs), (*want, *want), strict=True):
        held.copy_(x)
        graph.replay()
        for name, result in results.items():
            assert torch.equal(got[name], result), name


def of_its_kernel(table: dict[int, tuple[int, int]], case: Case) -> int:
    kernel = next(dim for dim in table if case.dim <= dim)
    return table[kernel][case.causal]


def most_split_keys(case: Case) -> int:
    return of_its_kernel(SPLIT_UP_TO, case)


def most_packed_split_keys(case: Case, sequences: int) -> int:
    """Keys of all sequences together."""
    return of_its_kernel(SPLIT_PACKED_EIGHTHS, case) * most_split_keys(case) * sequences // 8


def random_lengths(count, seed=0):
    """Pairs (rows, keys): empty sequences, single tokens, and the edges of row and key blocks."""
    draw = random.Random(seed)
    edges = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300, 385)
    pairs = []
    for _ in range(count):
        rows = draw.choice((draw.choice(edges), draw.randint(0, 500)))
        pairs.append((rows, draw.choice((rows, rows, draw.choice(edges)))))
    return tuple(pairs)


def variants(case: Case, **choices) -> list[Case]:
    """All combinations of the given fields."""
    cases = [case]
    for field, values in choices.items():
        cases = [replace(c, **{field: value}) for c in cases for value in values]
    return cases


def parametrize(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def poison(tensor, rows):
    tensor[rows] = (
        torch.tensor([float("nan"), float("inf")], device="cuda")
        .repeat(tensor.shape[-1] // 2)
        .to(tensor)
    )
