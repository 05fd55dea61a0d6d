"""Rates of attention forward and backward against PyTorch's peers, in one run on one GPU.

    python benchmarks/attention_grid.py --json benchmarks/results/grid.json
    python benchmarks/attention_grid.py --head-dims 64 --seqlens 1024 4096 --repeats 5

Protocol: 16k tokens in every problem and as many heads as hidden 2048 has room for, random normal
data, providers interleaved, the L2 flushed before every timing, CUDA events, medians. FLOPs = 4 B H
S^2 D, half when causal, backward 2.5x. cudnn and fa2 are torch's scaled_dot_product_attention with
that backend alone.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_flashattn import ops

TOKENS, HIDDEN = 16384, 2048
SEQLENS = [512, 1024, 2048, 4096, 8192, 16384]
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Timed = Callable[[], object]


def flops(seqlen: int, heads: int, dim: int, causal: bool, backward: bool) -> float:
    """Of the heads that are there: 21 of 96 and 10 of 192 leave some of the hidden size over."""
    total = 4.0 * TOKENS * seqlen * heads * dim
    return total * (0.5 if causal else 1.0) * (2.5 if backward else 1.0)


def ours(q, k, v, dout, causal: bool, p: float, deterministic: bool = False) -> dict[str, Timed]:
    options = {
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": causal,
        "dropout_p": p,
        "rng_state": torch.tensor([1, 2], device=q.device) if p > 0 else None,
        "deterministic": deterministic,
    }
    out, lse = ops.forward(q, k, v, **options)
    return {
        "forward": lambda: ops.forward(q, k, v, **options),
        "backward": lambda: ops.backward(dout, q, k, v, out, lse, **options),
    }


def peer(backend: SDPBackend, q, k, v, dout, causal: bool, p: float) -> dict[str, Timed]:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    leaves = [x.detach().requires_grad_() for x in heads_first]

    def attend(tensors):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors, dropout_p=p, is_causal=causal)

    out = attend(leaves)
    gradient = dout.transpose(1, 2)
    return {
        "forward": lambda: attend(heads_first),
        "backward": lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True),
    }


def medians(timed: dict[str, Timed], repeats: int, flush: torch.Tensor) -> dict[str, float]:
    """Milliseconds of each, interleaved."""
    events: dict[str, list] = {name: [] for name in timed}
    for repeat in range(repeats + 2):
        for name, function in timed.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            if repeat >= 2:  # the first two warm up
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        n: statistics.median(s.elapsed_time(e) for s, e in pairs) for n, pairs in events.items()
    }


def measure(dim: int, causal: bool, p: float, seqlen: int, args, flush) -> list[dict]:
    batch, heads = TOKENS // seqlen, HIDDEN // dim
    q, k, v, dout = (
        torch.randn(batch, seqlen, heads, dim, device="cuda", dtype=DTYPES[args.dtype])
        for _ in range(4)
    )
    providers = {"ours": ours(q, k, v, dout, causal, p)}
    if args.deterministic:
        providers["ours_deterministic"] = ours(q, k, v, dout, causal, p, deterministic=True)
    for name, backend in PEERS.items():
        try:
            providers[name] = peer(backend, q, k, v, dout, causal, p)
        except RuntimeError as error:
            print(f"{name} cannot run d{dim} S{seqlen}: {error}", file=sys.stderr)
    rows = []
    for direction in args.directions:
        times = medians({n: f[direction] for n, f in providers.items()}, args.repeats, flush)
        work = flops(seqlen, heads, dim, causal, direction == "backward")
        row = {"head_dim": dim, "causal": causal, "dropout": p, "direction": direction}
        rate = {n: work / (ms * 1e-3) / 1e12 for n, ms in times.items()}
        rows.append({**row, "seqlen": seqlen, "ms": times, "tflops": rate})
    return rows


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def print_table(rows: list[dict]) -> None:
    key = ("head_dim", "causal", "dropout", "direction")
    print(f"{'':34}" + "".join(f"{s:>9}" for s in SEQLENS) + "   / cudnn   / best peer")
    for group, members in itertools.groupby(rows, key=lambda r: tuple(r[k] for k in key)):
        members = list(members)
        dim, causal, p, direction = group
        title = f"d{dim} {'causal' if causal else 'full'} p{p:g} {direction}"
        for name in members[0]["tflops"]:
            cells = {r["seqlen"]: r["tflops"].get(name) for r in members}
            line = "".join(f"{cells.get(s) or float('nan'):9.0f}" for s in SEQLENS)
            ratios = [r["tflops"][name] / r["tflops"].get("cudnn", math.nan) for r in members]
            best = [
                r["tflops"][name] / max(r["tflops"].get(peer, 0.0) for peer in PEERS)
                for r in members
            ]
            print(
                f"{title:26}{name[:8]:8}{line}{geometric_mean(ratios):10.3f}{geometric_mean(best):10.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--causal", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    parser.add_argument("--directions", nargs="+", default=["forward", "backward"])
    parser.add_argument("--deterministic", action="store_true", help="time that backward too")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows = []
    for dim, causal, p in itertools.product(args.head_dims, args.causal, args.dropouts):
        cells = [measure(dim, bool(causal), p, s, args, flush) for s in args.seqlens]
        for per_direction in zip(*cells, strict=True):
            rows += per_direction
    print_table(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "command": " ".join(["python", *sys.argv]),
            "library_sha256": hashlib.sha256(ops.library_status().path.read_bytes()).hexdigest(),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "protocol": __doc__,
            "dtype": args.dtype,
            "repeats": args.repeats,
            "rows": rows,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
