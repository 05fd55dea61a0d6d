"""Rates of packed and of key-padded batches against dense ones, in one run on one GPU.

    python benchmarks/packed.py --json benchmarks/results/packed.json
    python benchmarks/packed.py --dropout 0.1 --json benchmarks/results/packed_dropout.json
    python benchmarks/packed.py --head-dims 64 --directions forward --repeats 20

Protocol: lengths drawn uniformly with a fixed seed, hidden 1024 (16 heads of 64 or 8 of 128),
random normal data, problems interleaved, the L2 flushed before every timing, CUDA events, medians.
Useful FLOPs are those of pairs that exist: 4 H D sum L^2 for sequences of lengths L, half when
causal, backward 2.5x; for key-padded batches, whose rows all count, 4 H D S sum L.

`same_work` is a dense batch of sequences of length sum L^2 / sum L, at which a token has as many
FLOPs as the mean token of the packed batch, with about as many tokens. `longest` is a dense batch
of the greatest length that may be drawn, again with about as many tokens. Ratios are over these.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from outcome import save

from hf_flashattn import ops
from hf_flashattn.bench import DTYPES, Timed, library_sha256, medians

HIDDEN = 1024
# name: shortest, longest, sequences, whether key-padded batches are timed too
DRAWS = {"128..512": (128, 512, 32, True), "256..4096": (256, 4096, 16, False)}


@dataclass
class Problem:
    """A batch, and the FLOPs of it that count."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    options: dict
    flops: float

    def timed(self, direction: str) -> Timed:
        if direction == "forward":
            return lambda: ops.forward(self.q, self.k, self.v, **self.options)
        out, lse = ops.forward(self.q, self.k, self.v, **self.options)
        return lambda: ops.backward(self.dout, self.q, self.k, self.v, out, lse, **self.options)


def random_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4)]


def options(dim: int, causal: bool, dropout: float, **others) -> dict:
    chosen = {"softmax_scale": dim**-0.5, "causal": causal, **others}
    if dropout > 0:
        chosen |= {"dropout_p": dropout, "rng_state": torch.tensor([1, 2], device="cuda")}
    return chosen


def packed(
    lengths: list[int], dim: int, causal: bool, dropout: float, dtype: torch.dtype
) -> Problem:
    total = sum(lengths)
    offsets = [0, *itertools.accumulate(lengths)]
    cu = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    sizes = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    flops = 4.0 * HIDDEN * sum(n * n for n in lengths) * (0.5 if causal else 1.0)
    tensors = random_tensors((total, HIDDEN // dim, dim), dtype)
    chosen = options(dim, causal, dropout, cu_seqlens_q=cu, cu_seqlens_k=cu, **sizes)
    return Problem(*tensors, chosen, flops)


def padded(
    lengths: list[int], longest: int, dim: int, dropout: float, dtype: torch.dtype
) -> Problem:
    key_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    tensors = random_tensors((len(lengths), longest, HIDDEN // dim, dim), dtype)
    flops = 4.0 * HIDDEN * longest * sum(lengths)
    return Problem(*tensors, options(dim, False, dropout, key_len=key_len), flops)


def dense(
    seqlen: int, tokens: int, dim: int, causal: bool, dropout: float, dtype: torch.dtype
) -> Problem:
    batch = max(1, round(tokens / seqlen))
    tensors = random_tensors((batch, seqlen, HIDDEN // dim, dim), dtype)
    flops = 4.0 * HIDDEN * batch * seqlen * seqlen * (0.5 if causal else 1.0)
    return Problem(*tensors, options(dim, causal, dropout), flops)


def measure(draw: str, dim: int, causal: bool, args, flush: torch.Tensor) -> list[dict]:
    low, high, count, with_padding = DRAWS[draw]
    random_lengths = random.Random(args.seed)
    lengths = [random_lengths.randint(low, high) for _ in range(count)]
    same = round(sum(n * n for n in lengths) / sum(lengths))
    dtype = DTYPES[args.dtype]
    problems = {
        "packed": packed(lengths, dim, causal, args.dropout, dtype),
        "same_work": dense(same, sum(lengths), dim, causal, args.dropout, dtype),
        "longest": dense(high, sum(lengths), dim, causal, args.dropout, dtype),
    }
    if with_padding and not causal:
        problems["padded"] = padded(lengths, high, dim, args.dropout, dtype)
    rows = []
    for direction in args.directions:
        timed = {name: problem.timed(direction) for name, problem in problems.items()}
        ms = medians(timed, args.repeats, flush)
        factor = 2.5 if direction == "backward" else 1.0
        rate = {n: factor * p.flops / (ms[n] * 1e-3) / 1e12 for n, p in problems.items()}
        ratios = {
            f"{name}/{over}": rate[name] / rate[over]
            for name in ("packed", "padded")
            for over in ("same_work", "longest")
            if name in rate
        }
        row = {"lengths": draw, "head_dim": dim, "causal": causal, "direction": direction}
        row |= {"sequences": count, "tokens": sum(lengths), "same_work_seqlen": same}
        rows.append({**row, "ms": ms, "tflops": rate, "ratios": ratios})
    return rows


def print_row(row: dict) -> None:
    kind = "causal" if row["causal"] else "full"
    title = f"{row['lengths']} d{row['head_dim']} {kind} {row['direction']}"
    rates = "".join(f"  {name} {rate:.0f}" for name, rate in row["tflops"].items())
    ratios = "".join(f"  {name} {ratio:.2f}" for name, ratio in row["ratios"].items())
    print(f"{title:32} S {row['same_work_seqlen']:<5}{rates}  |{ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", nargs="+", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--causal", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    parser.add_argument("--directions", nargs="+", default=["forward", "backward"])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows = []
    for draw, dim, causal in itertools.product(args.lengths, args.head_dims, args.causal):
        for row in measure(draw, dim, bool(causal), args, flush):
            print_row(row)
            rows.append(row)
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "library_sha256": library_sha256(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "protocol": __doc__,
        "dtype": args.dtype,
        "dropout": args.dropout,
        "repeats": args.repeats,
        "seed": args.seed,
        "rows": rows,
    }
    save(args.json, facts)


if __name__ == "__main__":
    main()
