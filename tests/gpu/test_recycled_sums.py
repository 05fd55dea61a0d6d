"""The backward's sums of dQ where streams share their memory: padded, packed, beside empty ones."""

import random
from dataclasses import replace

import torch
from judge import (
    Case,
    judge,
    make_problem,
    most_packed_split_keys,
    most_split_keys,
    parametrize,
    run_kernel,
    variants,
)

# More streams (sequences x key heads) than the backward keeps sums of dQ for: their memory is
# recycled. Sequences without keys are done at once, and must not disturb those before them.
MANY = Case(batch=40, sq=300, sk=200, heads_q=16, heads_k=8)
EMPTY = (0, 0)


def with_sums(cases):
    """Of so many keys that there are sums."""
    return [replace(case, sk=max(case.sk, most_split_keys(case) + 8)) for case in cases]


def assert_recycled(case):
    assert case.sk > most_split_keys(case)
    key_blocks = -(-case.sk // 128)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert case.batch * case.heads_k > -(-4 * processors // key_blocks) + 1


def assert_same_again(problem, times):
    """Bit by bit, but for dQ, which is summed in any order."""
    first = run_kernel(problem)
    for _ in range(times):
        again = run_kernel(problem)
        for name in ("out", "dk", "dv"):
            assert torch.equal(first[name], again[name]), name
        torch.testing.assert_close(first["dq"], again["dq"], rtol=2e-2, atol=1e-3)


@parametrize(
    with_sums(
        variants(MANY, dim=(32, 40, 64, 96, 104, 128), causal=(False, True), dropout_p=(0.0, 0.1))
    )
)
def test_recycled_sums(case):
    assert_recycled(case)
    judge(make_problem(case))


RANGES_OF_MANY = (
    ((0, 200),) + (EMPTY,) * 39,
    ((0, 200), EMPTY) * 20,
    (EMPTY,) * 20 + ((60, 100),) * 20,
    tuple((i, 200 - 5 * i) for i in range(40)),
)


@parametrize(
    with_sums(variants(MANY, dim=(64, 128), causal=(False, True), key_ranges=RANGES_OF_MANY))
)
def test_recycled_sums_beside_sequences_without_keys(case):
    assert_recycled(case)
    problem = make_problem(case)
    judge(problem)
    assert_same_again(problem, times=20)


def drawn_lengths(count, longest):
    draw = random.Random(0)
    return tuple((n, n) for n in (draw.randrange(1, longest + 1) for _ in range(count)))


def assert_packed_recycled(case):
    rows, keys = zip(*case.lengths, strict=True)
    most = most_packed_split_keys(case, len(keys))
    assert sum(keys) > most or max(keys) > 2 * most_split_keys(case)
    block = 128 if case.dim <= 64 else 64
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    key_blocks = -(-sum(keys) // (128 * len(keys)))
    enough = -(-4 * processors // max(key_blocks, 1)) + 1
    assert len(rows) * case.heads_k > enough
    longest = -(-max(rows) // block) * block
    assert enough * longest < (sum(rows) + len(rows) * block) * case.heads_k
    assert longest * len(rows) <= 4 * (sum(rows) + len(rows) * block)


SHORT = variants(
    Case(heads_q=16, heads_k=8),
    dim=(32, 64, 96, 128),
    causal=(False, True),
    dropout_p=(0.0, 0.1),
    lengths=(
        drawn_lengths(40, 1400),
        ((0, 0), (0, 128), (90, 0)) * 2 + ((850, 850),) * 34,
    ),
)


@parametrize(
    SHORT
    + variants(
        Case(heads_q=16, heads_k=8, dim=32, lengths=((1, 1),) * 90),
        causal=(False, True),
        dropout_p=(0.0, 0.1),
    )
    + variants(
        Case(
            heads_q=16,
            heads_k=8,
            lengths=(*((600, 900), (0, 0), (210, 0), (500, 800), (0, 790)) * 10, (0, 0)),
        ),
        dim=(32, 64),
        causal=(False, True),
        dropout_p=(0.0, 0.1),
    )
)
def test_recycled_sums_of_packed_sequences(case):
    """Memory goes from one stream to a longer one, and past those without rows or keys."""
    assert_packed_recycled(case)
    problem = make_problem(case)
    judge(problem)
    assert_same_again(problem, times=5)


@parametrize(
    variants(replace(MANY, sq=1, sk=1, batch=80), dim=(32,), causal=(False, True))
    + with_sums(variants(replace(MANY, sq=1), dim=(64, 128), causal=(False, True)))
)
def test_recycled_sums_of_one_row(case):
    assert_recycled(case)
    judge(make_problem(case))
