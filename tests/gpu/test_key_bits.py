"""Keys hidden anywhere, by a bit for each: against the reference, poisoned, in graphs."""

from dataclasses import replace

import pytest
import torch
from judge import (
    DTYPES,
    HEAD_DIMS,
    RANGES,
    Case,
    check_replays,
    judge,
    kept_keys,
    make_problem,
    parametrize,
    poison,
    run_kernel,
    run_wrong_bits,
    variants,
)

from hf_flashattn import key_bits_of

HOLES = Case(batch=4, sq=300, sk=300, holes=0.3)


@parametrize(
    variants(
        HOLES,
        dim=HEAD_DIMS,
        causal=(False, True),
        heads_q=(2, 8),
        dropout_p=(0.0, 0.1),
        deterministic=(False, True),
    )
)
def test_holes(case):
    judge(make_problem(case))


@pytest.mark.parametrize("holes", [0.0, 0.003, 0.9])
@pytest.mark.parametrize(
    "sq,sk",
    [(1, 1), (1, 300), (33, 31), (113, 203), (203, 113), (64, 1000), (257, 96), (512, 512)],
)
@parametrize(variants(HOLES, dim=(64, 96, 128, 192, 256), causal=(False, True), dtype=DTYPES))
def test_holes_of_shapes(case, sq, sk, holes):
    """Few, many, none; the tails of blocks and words; a row whose last words are all hidden."""
    judge(make_problem(replace(case, sq=sq, sk=sk, holes=holes)))


@parametrize(
    variants(
        Case(batch=8, sq=300, sk=300, heads_q=8, key_ranges=RANGES, holes=0.1),
        dim=(64, 128, 40, 96, 160, 256),
        causal=(False, True),
        dropout_p=(0.0, 0.1),
    )
)
def test_holes_in_key_ranges(case):
    judge(make_problem(case))


@pytest.mark.parametrize("sk", [300, 600])
@parametrize(
    variants(
        HOLES,
        dim=HEAD_DIMS,
        causal=(False, True),
        dropout_p=(0.0, 0.1),
        dtype=DTYPES,
        deterministic=(True,),
    )
)
def test_poison_in_holes(case, sk):
    """Hidden K and V are neither read nor given a gradient, inside the blocks that are."""
    case = replace(case, sk=sk)
    problem = make_problem(case)
    clean, hidden = run_kernel(problem), ~kept_keys(case)
    for name in ("dk", "dv"):
        assert not clean[name][hidden].any(), name
    for tensor in (problem.k, problem.v):
        poison(tensor, hidden)
    for name, result in run_kernel(problem).items():
        assert torch.equal(result, clean[name]), name


@parametrize(variants(Case(batch=3, sq=150, causal=True), sk=(200, 600), dim=(64, 128, 192, 256)))
def test_bits_of_a_range_are_the_range(case):
    """Every result, bit by bit, whichever kernel runs."""
    ranges = ((0, 200), (70, 100), (199, 1))
    with_bits = make_problem(replace(case, key_ranges=ranges, holes=0.0, deterministic=True))
    plain = make_problem(replace(case, key_ranges=ranges, deterministic=True))
    keys = torch.arange(case.sk, device="cuda")
    start, length = (plain.options[name][:, None] for name in ("key_start", "key_len"))
    bits = key_bits_of((keys >= start) & (keys < start + length))
    with_bits.options |= zip(("key_start", "key_len", "key_bits"), bits, strict=True)
    got, want = run_kernel(with_bits), run_kernel(plain)
    for name, result in want.items():
        assert torch.equal(got[name], result), name


@parametrize(variants(replace(HOLES, heads_q=8, heads_k=8), sk=(300, 600), dim=(64, 128, 256)))
def test_holes_in_a_graph_with_other_masks(case):
    """A replay reads the mask as it is then; what is made of it is made in the graph."""
    problem = make_problem(replace(case, causal=True, deterministic=True))
    masks = [kept_keys(replace(case, holes=holes)) for holes in (0.5, 0.0, 0.05)]
    names = ("key_start", "key_len", "key_bits")

    def run(kept):
        problem.options |= zip(names, key_bits_of(kept), strict=True)
        return run_kernel(problem)

    check_replays(run, masks)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_wrong_bits_stay_inside(dim, causal):
    run_wrong_bits(causal, dim)
