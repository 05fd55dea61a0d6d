"""Forward and backward against the reference: shapes, masks, dropout, padding, packing, repeats."""

import math
import random
from dataclasses import replace

import pytest
import torch
from judge import (
    DTYPES,
    HEAD_DIMS,
    RANGES,
    ROUNDING,
    WRONG_OFFSETS,
    Case,
    judge,
    make_problem,
    most_split_keys,
    parametrize,
    poison,
    run_kernel,
    run_wrong_offsets,
    variants,
)

from hf_flashattn import ops
from hf_flashattn.reference import attention_reference

BASE = variants(Case(), dim=(64, 128), causal=(False, True), dtype=DTYPES)
SHAPES = [
    (1, 1), (1, 300), (239, 1), (799, 3), (3, 799), (64, 64), (128, 128), (113, 203), (203, 113),
    (128, 217), (192, 176), (256, 512), (1023, 1024), (1024, 1023), (2048, 2048),
]  # fmt: skip


@pytest.mark.parametrize("sq,sk", SHAPES)
@parametrize(BASE)
def test_shapes(case, sq, sk):
    judge(make_problem(Case(**{**case.__dict__, "sq": sq, "sk": sk})))


@pytest.mark.parametrize("sq,sk", [(1, 1), (113, 203), (512, 512), (300, 1000)])
@parametrize(variants(Case(dropout_p=0.1), dim=(64, 128), causal=(False, True), dtype=DTYPES))
def test_dropout(case, sq, sk):
    judge(make_problem(Case(**{**case.__dict__, "sq": sq, "sk": sk})))


@pytest.mark.parametrize("sq,sk", [(1, 1), (799, 3), (113, 203), (203, 113), (513, 700)])
@parametrize(variants(Case(), dim=HEAD_DIMS, causal=(False, True), dtype=DTYPES))
def test_head_dims(case, sq, sk):
    judge(make_problem(replace(case, sq=sq, sk=sk)))


@parametrize(
    variants(
        Case(sq=300, sk=300, heads_q=8, heads_k=2),
        dim=HEAD_DIMS,
        causal=(False, True),
        dropout_p=(0.0, 0.1),
        deterministic=(False, True),
    )
)
def test_head_dims_grouped(case):
    judge(make_problem(case))


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


@pytest.mark.parametrize("p", [0.001, 0.25, 0.5, 0.75, 0.999])
def test_dropout_probabilities(p):
    judge(make_problem(Case(sq=200, sk=200, dropout_p=p)))


@parametrize(
    variants(
        Case(sq=300, sk=300),
        dim=(64, 128),
        causal=(False, True),
        heads_q=(8,),
        heads_k=(1, 2, 4),
        dropout_p=(0.0, 0.1),
    )
)
def test_grouped_heads(case):
    judge(make_problem(case))


PACKED = ((100, 100), (1, 1), (0, 0), (513, 513), (64, 64), (0, 7), (5, 0), (130, 129))


@parametrize(
    variants(
        Case(lengths=PACKED, heads_q=4),
        dim=(64, 128, 40, 96, 160, 256),
        causal=(False, True),
        heads_k=(2, 4),
        dropout_p=(0.0, 0.1),
        deterministic=(False, True),
    )
)
def test_packed(case):
    judge(make_problem(case))


def random_lengths(count, seed=0):
    """Pairs (rows, keys): empty sequences, single tokens, and the edges of row and key blocks."""
    draw = random.Random(seed)
    edges = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300, 385)
    pairs = []
    for _ in range(count):
        rows = draw.choice((draw.choice(edges), draw.randint(0, 500)))
        pairs.append((rows, draw.choice((rows, rows, draw.choice(edges)))))
    return tuple(pairs)


@parametrize(
    variants(
        Case(heads_q=8),
        dim=(64, 128),
        causal=(False, True),
        heads_k=(2, 8),
        dropout_p=(0.0, 0.1),
    )
)
def test_packed_many_sequences(case):
    """More tiles than SMs, of all lengths: every CTA claims several."""
    judge(make_problem(replace(case, lengths=random_lengths(60))))


@parametrize(variants(Case(lengths=((0, 0), (5, 9), (0, 0))), dim=(64, 128)))
def test_packed_without_a_row(case):
    problem = make_problem(case)
    problem.options["cu_seqlens_q"].zero_()  # five rows are there and belong to nobody
    results = run_kernel(problem)
    assert not results["out"].any() and not results["dq"].any()
    assert (results["lse"] == -float("inf")).all()


def part_of(problem, lengths, first, last):
    """The sequences first .. last - 1 of a packed problem, as a problem of their own."""
    rows = slice(sum(r for r, _ in lengths[:first]), sum(r for r, _ in lengths[:last]))
    keys = slice(sum(k for _, k in lengths[:first]), sum(k for _, k in lengths[:last]))
    part = make_problem(replace(problem.case, lengths=lengths[first:last]))
    part.q, part.dout = problem.q[rows], problem.dout[rows]
    part.k, part.v = problem.k[keys], problem.v[keys]
    return part, rows, keys


@parametrize(variants(Case(heads_q=3, heads_k=3, deterministic=True), causal=(False, True)))
def test_packed_batch_of_2000_sequences(case):
    """Bitwise what its parts give, the last of which the judge sees."""
    lengths = random_lengths(2000, seed=1)
    problem = make_problem(replace(case, lengths=lengths))
    whole = run_kernel(problem)
    for first, last in ((0, 700), (700, 1960), (1960, 2000)):
        part, rows, keys = part_of(problem, lengths, first, last)
        results = run_kernel(part)
        for name, own in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            assert torch.equal(whole[name][own], results[name]), (name, first)
        assert torch.equal(whole["lse"][:, rows], results["lse"])
    judge(part, results)


@parametrize(variants(Case(heads_q=8, heads_k=8), dim=(64, 128), causal=(False, True)))
def test_packed_repeats_are_bitwise_equal(case):
    """Who computes a tile, and when, is another matter each time."""
    problem = make_problem(replace(case, lengths=random_lengths(40, seed=2)))
    first = run_kernel(problem)
    for _ in range(100):
        again = run_kernel(problem)
        for name in ("out", "lse", "dk", "dv"):
            assert torch.equal(first[name], again[name]), name


@parametrize(variants(Case(heads_q=4, heads_k=2), dim=(32, 64, 128), causal=(False, True)))
def test_packed_tokens_of_no_sequence(case):
    """The first and the last tokens of a buffer: zeros. The others: as without them."""
    lengths = random_lengths(20, seed=3)
    exact = make_problem(replace(case, lengths=lengths, deterministic=True))
    want = run_kernel(exact)
    before, after = 7, 300
    around = ((before, before), *lengths, (after, after))
    problem = make_problem(replace(case, lengths=around, deterministic=True))
    own = {"q": exact.q, "k": exact.k, "v": exact.v, "dout": exact.dout}
    for name, tensor in own.items():
        getattr(problem, name)[before:-after] = tensor
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        problem.options[name] = problem.options[name][1:-1].contiguous()
    problem.sizes = exact.sizes
    got = run_kernel(problem)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(got[name][before:-after], want[name]), name
        assert not got[name][:before].any() and not got[name][-after:].any(), name
    assert torch.equal(got["lse"][:, before:-after], want["lse"])
    assert (got["lse"][:, :before] == -float("inf")).all()
    assert (got["lse"][:, -after:] == -float("inf")).all()


@pytest.mark.parametrize("offsets", WRONG_OFFSETS, ids=str)
def test_wrong_offsets_stay_inside(offsets):
    run_wrong_offsets(offsets)


@parametrize(variants(Case(), dim=(64, 128, 256)))
def test_overlapping_offsets_stay_inside(case):
    """Sequences that overlap have more row blocks than there is room for in the list of tiles."""
    problem = make_problem(replace(case, lengths=((2000, 2000),) + ((0, 0),) * 63))
    offsets = torch.tensor([0, 2000] * 32 + [0], dtype=torch.int32, device="cuda")
    problem.options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    run_kernel(problem)
    torch.cuda.synchronize()
    judge(make_problem(replace(case, lengths=((2000, 2000),))))


@parametrize(variants(Case(heads_q=8, heads_k=8), dim=(64, 128, 256), causal=(False, True)))
def test_packed_in_a_graph_with_other_lengths(case):
    """A replay reads what cu_seqlens hold then: the order of tiles is made anew."""
    total, count = 3000, 16
    plans = []
    for seed in range(3):
        cuts = random.Random(seed).choices(range(total + 1), k=count - 1)
        plans.append(torch.tensor([0, *sorted(cuts), total], dtype=torch.int32, device="cuda"))
    problem = make_problem(replace(case, lengths=((total, total),), deterministic=True))
    problem.sizes = {"max_seqlen_q": total, "max_seqlen_k": total}

    def run(offsets):
        problem.options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        return run_kernel(problem)

    want = [run(plan) for plan in plans]
    offsets = plans[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(offsets)
    for plan, results in zip((*plans, *plans), (*want, *want), strict=True):
        offsets.copy_(plan)
        graph.replay()
        for name, result in results.items():
            assert torch.equal(got[name], result), name


@parametrize(
    variants(
        Case(batch=8, sq=300, sk=300, key_ranges=RANGES),
        dim=(64, 128, 40, 96, 160, 256),
        causal=(False, True),
        heads_q=(2, 8),  # 48 and 192 tiles: in static steps, and from a list
        dropout_p=(0.0, 0.1),
        deterministic=(False, True),
    )
)
def test_key_ranges(case):
    judge(make_problem(case))


@parametrize(variants(Case(sq=200, sk=333), causal=(False, True), softmax_scale=(0.01, 0.5, 3.0)))
def test_scale(case):
    judge(make_problem(case))


@parametrize(
    variants(
        Case(sq=777, sk=777, deterministic=True),
        dim=(64, 96, 128),
        causal=(False, True),
        dropout_p=(0.0, 0.1),
    )
)
def test_deterministic_is_right(case):
    judge(make_problem(case))


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
    """Batches that are split: many, at most three quarters of the limit on average, one of twice
    the limit; and that are not: a longer one, more on average."""
    most = most_split_keys(case)
    short = ((100, 90), (1, 1), (0, 0), (64, 64), (0, 7), (5, 0), (130, 129))
    return {
        "many": random_lengths(50, seed=4),
        "at the limit": ((most, 3 * most // 4),) * 9,
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


@parametrize(variants(Case(batch=3, sq=150, sk=150), dim=(64, 128), causal=(False, True)))
def test_extreme_key_ranges(case):
    """Starts and lengths beyond the keys mean the keys that exist."""
    extreme = make_problem(replace(case, key_ranges=((-3, 10), (1, 2**31 - 1), (100, -50))))
    plain = make_problem(replace(case, key_ranges=((0, 7), (1, 149), (0, 0))))
    got, want = run_kernel(extreme), run_kernel(plain)
    for name in ("out", "lse", "dk", "dv"):
        assert torch.equal(got[name], want[name]), name


def test_strides_of_fused_projections():
    """(B, S, 3, H, D) slices and transposed (B, H, S, D) tensors go in without a copy."""
    case = Case(sq=150, sk=150, heads_q=3, heads_k=3)
    problem = make_problem(case)
    fused = torch.stack((problem.q, problem.k, problem.v), dim=2)
    expected = run_kernel(problem)["out"]
    q, k, v = fused.unbind(2)
    out, _ = ops.forward(q, k, v, **problem.options)
    assert torch.equal(out, expected)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    out, _ = ops.forward(q, k, v, **problem.options)
    assert torch.equal(out, expected)


def test_expanded_gradient():
    problem = make_problem(Case())
    q, k, v = (x.requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, _ = ops.forward(q, k, v, **problem.options)
    grads = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    expected = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for got, want in zip(grads[1:], expected[1:], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_large_values(dim, causal):
    problem = make_problem(Case(dim=dim, causal=causal))
    problem.q.mul_(30)
    problem.k.mul_(30)
    judge(problem)


CLIMBS = variants(
    Case(sq=300, sk=900),
    dim=(32, 64, 96, 128, 256),
    causal=(False, True),
    dropout_p=(0.0, 0.1),
)
CLIMBS += variants(Case(sq=300, sk=900), dim=(64, 128), causal=(False, True), dtype=DTYPES[:1])
CLIMBS += variants(
    Case(sq=300, sk=900, key_ranges=((0, 333), (200, 600))),
    dim=(64, 128),
    causal=(False, True),
    dropout_p=(0.0, 0.1),
)
CLIMBS += variants(
    Case(lengths=((300, 500), (64, 900), (1, 130))), dim=(64, 128), causal=(False, True)
)


CLIMBS += variants(
    Case(batch=2, sq=300, sk=900, holes=0.2),
    dim=(32, 64, 96, 128, 192, 256),
    causal=(False, True),
    dropout_p=(0.0, 0.1),
)


@pytest.mark.parametrize("octaves", [3, 9, 14, 60, 99, 110, 130, 300, 2000])
@parametrize(CLIMBS)
def test_scores_that_climb(case, octaves):
    """From one block of keys to the next that is visited, in a third of the rows: probabilities by
    the offset of the block before are small, large, too large for 16 bits, or infinite. In another
    third they fall, in the last they stay."""
    problem = make_problem(case)
    rows, keys = problem.q.shape[-3], problem.k.shape[-3]
    step = octaves * math.log(2.0) / 64 / problem.options["softmax_scale"]  # a key, by q = 1
    kind = torch.arange(rows, device="cuda") % 3
    down = torch.arange(keys, 0, -1, device="cuda") // 64
    problem.q[..., 0] = (8 * (kind - 1)).to(case.dtype)[:, None]
    problem.k[..., 0] = (8 * step * down).to(case.dtype)[:, None]
    options = {**problem.options, **problem.sizes}
    out, lse = ops.forward(problem.q, problem.k, problem.v, **options)
    exact_out, exact_lse = attention_reference(
        *(x.float() for x in (problem.q, problem.k, problem.v)),
        **problem.options,
        math_dtype=torch.float32,
    )
    seen = exact_lse > -float("inf")
    assert torch.equal(lse > -float("inf"), seen)
    torch.testing.assert_close(lse[seen], exact_lse[seen], rtol=1e-5, atol=1e-4)
    # Two roundings, of P and of the result, and what fp32 loses in scores of this size.
    lost = exact_lse[seen].abs().max().item() * 2.0**-21
    tolerance = (3 * ROUNDING[case.dtype] + lost) * problem.v.abs().max().item()
    torch.testing.assert_close(out.float(), exact_out, rtol=0, atol=tolerance)


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
    problem = make_problem(case)
    first = run_kernel(problem)
    for _ in range(250):
        again = run_kernel(problem)
        for name, result in first.items():
            assert torch.equal(result, again[name]), name


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
    first = run_kernel(problem)
    for _ in range(15):
        again = run_kernel(problem)
        for name, result in first.items():
            assert torch.equal(result, again[name]), name
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
