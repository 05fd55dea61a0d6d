"""dQ in a kernel of its own: at about as many keys as that is done, hidden, packed; wide heads."""

from dataclasses import replace

import pytest
import torch
from judge import (
    DTYPES,
    RANGES,
    Case,
    judge,
    make_problem,
    most_packed_split_keys,
    most_split_keys,
    parametrize,
    random_lengths,
    run_kernel,
    variants,
)

# Short sequences have a kernel for dQ, longer ones sums.
SPLIT = variants(Case(), dim=(64, 72, 96, 104, 128), causal=(False, True))


@pytest.mark.parametrize(
    "sq,over",
    [(1, 0), (65, -1), (129, 1), (511, 0), (700, -130), (1500, 0), (512, 128), (513, 1)],
)
@parametrize([c for case in SPLIT for c in variants(replace(case, heads_q=4), heads_k=(1, 4))])
def test_backward_of_about_as_many_keys_as_are_split(case, sq, over):
    judge(make_problem(replace(case, sq=sq, sk=most_split_keys(case) + over)))


@parametrize(
    [
        c
        for case in SPLIT
        for c in variants(
            replace(case, sq=330), dtype=DTYPES, dropout_p=(0.0, 0.1), sk=(1, 64, 199)
        )
    ]
)
def test_backward_of_short_sequences(case):
    judge(make_problem(case))


@pytest.mark.parametrize("over", [-60, 60])
@parametrize(
    [
        c
        for case in SPLIT
        if case.dim % 32 == 0
        for key_ranges, holes in ((None, None), (RANGES, None), (RANGES, 0.1), (None, 0.3))
        for c in variants(
            replace(case, batch=8, sq=500, heads_q=8, key_ranges=key_ranges, holes=holes),
            heads_k=(2, 8),
            dropout_p=(0.0, 0.1),
            deterministic=(False, True),
        )
    ]
)
def test_hidden_keys_of_short_and_long_sequences(case, over):
    judge(make_problem(replace(case, sk=most_split_keys(case) + over)))


def packed_about_the_limit(case):
    """Batches that are split: many, of as many keys on average as the limit is, one of twice the
    limit of a dense sequence; and that are not: a longer one, more on average."""
    most = most_split_keys(case)
    short = ((100, 90), (1, 1), (0, 0), (64, 64), (0, 7), (5, 0), (130, 129))
    return {
        "many": random_lengths(50, seed=4),
        "at the limit": ((most, most_packed_split_keys(case, 9) // 9),) * 9,
        "one long": (*short, (700, 2 * most), *short),
        "one too long": (*short, (2000, 2 * most + 1), *short),
        "long": ((700, 700), (0, 0), (513, 600), (1, 1), (1300, 1290)),
    }


@pytest.mark.parametrize("lengths", packed_about_the_limit(SPLIT[0]))
@parametrize(
    [
        c
        for case in SPLIT
        if case.dim % 32 == 0
        for c in variants(
            replace(case, heads_q=8),
            heads_k=(2, 8),
            dropout_p=(0.0, 0.1),
            deterministic=(False, True),
        )
    ]
)
def test_packed_short_and_long_sequences(case, lengths):
    judge(make_problem(replace(case, lengths=packed_about_the_limit(case)[lengths])))


@parametrize(
    [
        c
        for case in SPLIT
        if case.dim % 32 == 0
        for c in (
            *variants(
                replace(case, heads_q=16, heads_k=4, sq=500, sk=most_split_keys(case)),
                batch=(1, 20),
                dropout_p=(0.0, 0.1),
            ),
            replace(case, heads_q=8, heads_k=2, lengths=random_lengths(40, seed=5)),
        )
    ]
)
def test_short_sequences_repeat_bitwise(case):
    """Nothing is summed across tiles, whether that is asked for or not."""
    problem = make_problem(case)
    first = run_kernel(problem)
    for deterministic in (False, True) * 50:
        problem.case = replace(case, deterministic=deterministic)
        for name, result in run_kernel(problem).items():
            assert torch.equal(first[name], result), name


# The kernel for wide heads takes row blocks of 64 in pairs, over all heads that share a key head.
@pytest.mark.parametrize("sq", [64, 128, 192, 239])
@parametrize(
    variants(Case(sk=176, heads_k=1), dim=(136, 192, 256), causal=(False, True), heads_q=(1, 3))
)
def test_wide_heads_with_odd_and_even_row_blocks(case, sq):
    judge(make_problem(replace(case, sq=sq)))
