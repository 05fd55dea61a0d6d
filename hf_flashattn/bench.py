"""Rates of attention forward and backward against PyTorch's, in one run on one GPU.

    hf-flashattn bench                                   # this machine's table and plot
    python benchmarks/attention_grid.py --json grid.json # the published grid, by the same protocol

Protocol: 16k tokens in every problem and as many heads as hidden 2048 has room for, random normal
data, providers interleaved, the L2 flushed before every timing, CUDA events, medians. FLOPs = 4 B H
S^2 D, half when causal, backward 2.5x. cudnn and fa2 are torch's scaled_dot_product_attention with
that backend alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_flashattn import ops, support

TOKENS, HIDDEN = 16384, 2048
FLUSH_BYTES = 256 << 20  # several times the L2
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("forward", "backward")

Timed = Callable[[], object]


class BenchError(RuntimeError):
    """Nothing can be timed here. The message says why and what to do."""


# ---- the protocol --------------------------------------------------------------------------------


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


def measure(
    dim: int,
    causal: bool,
    p: float,
    seqlen: int,
    *,
    dtype: str,
    directions: Sequence[str],
    repeats: int,
    flush: torch.Tensor,
    deterministic: bool = False,
) -> list[dict[str, Any]]:
    """One row for each direction."""
    batch, heads = TOKENS // seqlen, HIDDEN // dim
    q, k, v, dout = (
        torch.randn(batch, seqlen, heads, dim, device="cuda", dtype=DTYPES[dtype]) for _ in range(4)
    )
    providers = {"ours": ours(q, k, v, dout, causal, p)}
    if deterministic:
        providers["ours_deterministic"] = ours(q, k, v, dout, causal, p, deterministic=True)
    for name, backend in PEERS.items():
        try:
            providers[name] = peer(backend, q, k, v, dout, causal, p)
        except RuntimeError as error:
            print(f"{name} cannot run d{dim} S{seqlen}: {error}", file=sys.stderr)
    rows = []
    for direction in directions:
        times = medians({n: f[direction] for n, f in providers.items()}, repeats, flush)
        work = flops(seqlen, heads, dim, causal, direction == "backward")
        row = {"head_dim": dim, "causal": causal, "dropout": p, "direction": direction}
        rate = {n: work / (ms * 1e-3) / 1e12 for n, ms in times.items()}
        rows.append({**row, "seqlen": seqlen, "ms": times, "tflops": rate})
    return rows


def run_grid(
    head_dims: Sequence[int],
    masks: Sequence[bool],
    dropouts: Sequence[float],
    seqlens: Sequence[int],
    *,
    dtype: str,
    directions: Sequence[str],
    repeats: int,
    deterministic: bool = False,
) -> list[dict[str, Any]]:
    """The rows of all combinations, lengths innermost. masks: of causal, which to time."""
    torch.manual_seed(0)
    options = {
        "dtype": dtype,
        "directions": directions,
        "repeats": repeats,
        "deterministic": deterministic,
        "flush": torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda"),
    }
    rows = []
    for dim, causal, p in itertools.product(head_dims, masks, dropouts):
        cells = [measure(dim, causal, p, s, **options) for s in seqlens]
        for per_direction in zip(*cells, strict=True):
            rows += per_direction
    return rows


def library_sha256() -> str:
    """Of the loaded library, which must be there."""
    return hashlib.sha256(ops.library_status().path.read_bytes()).hexdigest()


def facts(rows: list[dict[str, Any]], *, command: str, dtype: str, repeats: int) -> dict[str, Any]:
    """The rows with all that it takes to measure them again."""
    return {
        "command": command,
        "library_sha256": library_sha256(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "protocol": __doc__,
        "dtype": dtype,
        "repeats": repeats,
        "rows": rows,
    }


def refuse_without_kernels(head_dims: Sequence[int], dtype: str) -> None:
    """BenchError unless this machine's GPU runs the kernels at these head dims."""
    if not torch.cuda.is_available():
        raise BenchError(
            "bench: expected a Hopper GPU (H100, H200), found no GPU. Next step: run it on one; "
            "what would run there: hf-flashattn report MODEL"
        )
    for dim in head_dims:
        capability = torch.cuda.get_device_capability()
        verdict = support.explain(support.Request("cuda", capability, DTYPES[dtype], dim, 1, 1))
        if not verdict.ok:
            raise BenchError(f"bench: {verdict}")
    if missing := ops.missing_library():
        raise BenchError(f"bench: the CUDA kernels are not available. {missing}")


# ---- what is shown -------------------------------------------------------------------------------


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(rows: list[dict[str, Any]]) -> str:
    """TFLOP/s by length, and the geometric means of the ratios to cuDNN and to the best peer."""
    key = ("head_dim", "causal", "dropout", "direction")
    seqlens = sorted({row["seqlen"] for row in rows})
    head = f"{'TFLOP/s at length':34}" + "".join(f"{s:>9}" for s in seqlens)
    lines = [head + "   / cudnn   / best peer"]
    for group, members in itertools.groupby(rows, key=lambda r: tuple(r[k] for k in key)):
        members = list(members)
        dim, causal, p, direction = group
        title = f"d{dim} {'causal' if causal else 'full'} p{p:g} {direction}"
        for name in members[0]["tflops"]:
            cells = {r["seqlen"]: r["tflops"].get(name) for r in members}
            line = "".join(f"{cells.get(s) or math.nan:9.0f}" for s in seqlens)
            ratios = [_ratio(r["tflops"], name, ("cudnn",)) for r in members]
            best = [_ratio(r["tflops"], name, tuple(PEERS)) for r in members]
            means = f"{geometric_mean(ratios):10.3f}{geometric_mean(best):10.3f}"
            lines.append(f"{title:26}{name[:8]:8}{line}{means}")
    return "\n".join(lines)


def _ratio(rates: dict[str, float], name: str, peers: tuple[str, ...]) -> float:
    """To the fastest of the peers; NaN where none of them ran."""
    return rates.get(name, math.nan) / max(
        (rates[x] for x in peers if x in rates), default=math.nan
    )


NAMES = {"ours": "hf_flashattn", "cudnn": "cuDNN", "fa2": "FlashAttention-2"}
COLOURS = {"ours": "#c1272d", "cudnn": "#4d9221", "fa2": "#4575b4"}
STYLES = {0.0: "-", 0.1: "--"}  # by dropout


def draw(facts: dict[str, Any], target: Path) -> None:
    """Rate against length; a panel for each mask, direction and head dim. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = facts["rows"]
    dims = sorted({r["head_dim"] for r in rows})
    columns = [(d, c) for d in DIRECTIONS for c in (False, True)]
    columns = [x for x in columns if any((r["direction"], r["causal"]) == x for r in rows)]
    figure, axes = plt.subplots(
        len(dims),
        len(columns),
        figsize=(3.5 * len(columns), 3.4 * len(dims)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for i, dim in enumerate(dims):
        for j, (direction, causal) in enumerate(columns):
            panel = axes[i][j]
            chosen = [
                r
                for r in rows
                if (r["head_dim"], r["direction"], r["causal"]) == (dim, direction, causal)
            ]
            for p in sorted({r["dropout"] for r in chosen}):
                for name, label in NAMES.items():
                    points = [
                        (r["seqlen"], r["tflops"].get(name, math.nan))
                        for r in chosen
                        if r["dropout"] == p
                    ]
                    panel.plot(
                        *zip(*points, strict=True),
                        STYLES.get(p, ":"),
                        color=COLOURS[name],
                        marker="o",
                        markersize=3,
                        label=label + (f", dropout {p:g}" if p else ""),
                    )
            panel.set_title(f"{direction}, {'causal' if causal else 'full'}, head dim {dim}")
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
    axes[0][0].set_ylim(0, 1.05 * max(rate for r in rows for rate in r["tflops"].values()))
    seqlens = sorted({r["seqlen"] for r in rows})
    for panel in axes[-1]:
        panel.set_xticks(seqlens, [f"{s // 1024}k" if s >= 1024 else str(s) for s in seqlens])
        panel.set_xlabel("sequence length")
    for line in axes:
        line[0].set_ylabel("TFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    figure.suptitle(f"{facts['device']}, {facts['dtype']}, 16k tokens, hidden 2048")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(target, dpi=110)
    plt.close(figure)
