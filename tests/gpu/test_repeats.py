"""Results that are the same again, bit by bit, but for dQ that is summed as it arrives."""

from dataclasses import replace

import torch
from judge import (
    PACKED,
    Case,
    make_problem,
    parametrize,
    run_kernel,
    variants,
)


def repeat(problem, times):
    """The problem's results, seen to be the same in so many runs more."""
    first = run_kernel(problem)
    for _ in range(times):
        again = run_kernel(problem)
        for name, result in first.items():
            assert torch.equal(result, again[name]), name
    return first


@parametrize(
    variants(
        Case(sq=1000, sk=1000, heads_q=4),
        dim=(64, 128, 192, 256),
        causal=(False, True),
        heads_k=(4,),
        dropout_p=(0.0, 0.1),
        deterministic=(True,),
        holes=(None, 0.1),
    )
)
def test_repeats_are_bitwise_equal(case):
    repeat(make_problem(case), 250)


# Where turns matter: several chunks of streams; more key blocks of a stream than SMs; few streams,
# whose key blocks all start together; rows of several heads; a long sequence among short ones.
TURNS = (
    *variants(Case(batch=16, sq=1024, sk=1024, heads_q=32, heads_k=32), causal=(False, True)),
    *variants(Case(batch=8, sq=1100, sk=700, heads_q=16, heads_k=4), dim=(64, 128, 192)),
    *variants(
        Case(batch=1, sq=20_000, sk=20_000, heads_q=1, heads_k=1),
        dim=(64, 128),
        causal=(False, True),
    ),
    *variants(Case(batch=1, sq=2048, sk=2048, heads_q=3, heads_k=1), dim=(64, 96, 256)),
    *variants(
        Case(batch=8, sq=1000, sk=1090, heads_q=8, heads_k=8, dim=256),
        causal=(False, True),
        dropout_p=(0.0, 0.1),
    ),
    *variants(Case(batch=1, sq=9000, sk=9000, heads_q=1, heads_k=1, dim=256), causal=(False, True)),
    *variants(
        Case(heads_q=4, heads_k=2, lengths=(*PACKED, (4000, 4100), *PACKED)),
        dim=(64, 128, 256),
        causal=(False, True),
    ),
)


@parametrize([replace(case, deterministic=True) for case in TURNS])
def test_turns_repeat_bitwise(case):
    """And give what the additions in any order give, but for their rounding."""
    problem = make_problem(case)
    first = repeat(problem, 15)
    problem.case = replace(case, deterministic=False)
    unordered = run_kernel(problem)
    for name in ("out", "lse", "dk", "dv"):
        assert torch.equal(first[name], unordered[name]), name
    error = (first["dq"].float() - unordered["dq"].float()).norm()
    assert error <= 0.01 * unordered["dq"].float().norm()


@parametrize(variants(Case(sq=1000, sk=1000), dim=(64, 128, 256), causal=(False, True)))
def test_repeats_without_determinism(case):
    """Only dQ, which is summed in the order of arrival, may differ."""
    problem = make_problem(case)
    first = run_kernel(problem)
    for _ in range(50):
        again = run_kernel(problem)
        for name in ("out", "lse", "dk", "dv"):
            assert torch.equal(first[name], again[name]), name
