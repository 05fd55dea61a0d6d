"""Packed sequences: empty ones, many, tokens of none, wrong and overlapping offsets, graphs,
streams side by side."""

import random
from dataclasses import replace

import pytest
import torch
from judge import (
    PACKED,
    WRONG_OFFSETS,
    Case,
    check_replays,
    judge,
    make_problem,
    parametrize,
    random_lengths,
    run_kernel,
    run_wrong_offsets,
    variants,
)


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


@parametrize(
    variants(
        Case(lengths=((900, 900), (129, 700), (700, 130), (64, 64), (65, 1)), heads_q=4),
        dim=(32, 64),
        causal=(False, True),
        heads_k=(2, 4),
        dropout_p=(0.0, 0.1),
        deterministic=(False, True),
    )
)
def test_packed_last_row_blocks_of_64_rows(case):
    """Long enough that dQ is summed: the writers leave half a block out. Sums of so few streams are
    not recycled; what rounding warps leave out test_recycled_sums sees."""
    judge(make_problem(case))


@parametrize(variants(Case(lengths=((1, 1),)), dim=(64, 128), causal=(False, True)))
def test_one_packed_token(case):
    judge(make_problem(case))


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
    before, after = 700, 300  # the first more than warps clear at a time
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
    """Sequences that overlap have more row blocks than all tokens have."""
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

    check_replays(run, plans)


@parametrize(variants(Case(heads_q=8, heads_k=8), causal=(False, True)))
def test_packed_on_streams_side_by_side(case):
    """Each stream, and each graph wherever it is replayed, counts its tiles for itself."""
    problem = make_problem(replace(case, lengths=random_lengths(60), deterministic=True))
    want = run_kernel(problem)
    graphs = []  # captured on one stream, both
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run_kernel(problem)
        graphs.append((graph, results))
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    seen = []
    for _ in range(20):
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                seen.append(run_kernel(problem))
        for stream, (graph, results) in zip(streams[2:], graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                seen.append({name: result.clone() for name, result in results.items()})
    torch.cuda.synchronize()
    for results in seen:
        for name, result in want.items():
            assert torch.equal(results[name], result), name
