"""What lies beside a problem's rows, keys and columns, or is hidden, is not read: NaN, Inf."""

from dataclasses import replace

import pytest
import torch
from judge import (
    HEAD_DIMS,
    Case,
    make_problem,
    parametrize,
    poison,
    run_kernel,
    variants,
)


@pytest.mark.parametrize("length", [150, 600])
@parametrize(variants(Case(deterministic=True), dim=HEAD_DIMS))
def test_what_lies_beyond_the_head_dim_is_not_read(case, length):
    """Heads in slices of wider rows, as in (B, S, H, 2 D), of which the rest is NaN."""
    problem = make_problem(replace(case, sq=length, sk=length))
    expected = run_kernel(problem)
    for name in ("q", "k", "v", "dout"):
        tensor = getattr(problem, name)
        wide = tensor.new_full((*tensor.shape[:-1], 2 * case.dim), float("nan"))
        setattr(problem, name, wide[..., : case.dim].copy_(tensor))
    for name, result in run_kernel(problem).items():
        assert torch.equal(result, expected[name]), name


@parametrize(
    variants(Case(batch=3, sq=300), sk=(300, 600), dim=(64, 128, 200), causal=(False, True))
)
def test_poison_beyond_key_ranges(case):
    ranges = ((0, 77), (150, 150), (100, 40))
    problem = make_problem(Case(**{**case.__dict__, "key_ranges": ranges}))
    clean = run_kernel(problem)
    for row, (start, length) in enumerate(ranges):
        for tensor in (problem.k, problem.v):
            poison(tensor[row], slice(0, start))
            poison(tensor[row], slice(start + length, None))
    for name, result in run_kernel(problem).items():
        torch.testing.assert_close(result, clean[name], rtol=0, atol=0 if name != "dq" else 1e-3)


@pytest.mark.parametrize("last", [200, 1100])
@parametrize(variants(Case(), dim=(64, 128, 200), causal=(False, True), deterministic=(True,)))
def test_poison_between_packed_sequences(case, last):
    """One sequence's results do not change when its neighbours become NaN and Inf."""
    lengths = ((77, 90), (50, 60), (last, last + 1))
    problem = make_problem(Case(**{**case.__dict__, "lengths": lengths}))
    clean = run_kernel(problem)
    rows, keys = slice(77, 127), slice(90, 150)
    for tensor, own in (
        (problem.q, rows),
        (problem.dout, rows),
        (problem.k, keys),
        (problem.v, keys),
    ):
        poison(tensor, slice(0, own.start))
        poison(tensor, slice(own.stop, None))
    results = run_kernel(problem)
    for name, own in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
        assert torch.equal(results[name][own], clean[name][own]), name


@pytest.mark.parametrize("sk", [200, 600])
@parametrize(variants(Case(causal=True), dim=(64, 128, 200)))
def test_poison_in_rows_that_see_nothing(case, sk):
    """Rows before the diagonal: 0 whatever Q, dO and the keys they do not see hold."""
    problem = make_problem(replace(case, sq=sk + 100, sk=sk))
    poison(problem.q, (slice(None), slice(0, 100)))
    poison(problem.dout, (slice(None), slice(0, 100)))
    results = run_kernel(problem)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.isfinite(results[name]).all(), name
    assert not results["out"][:, :100].any() and not results["dq"][:, :100].any()
    poison(problem.v, (slice(None), slice(0, 1)))
    assert not run_kernel(problem)["out"][:, :100].any()
