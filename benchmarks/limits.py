"""Limits of the kernels: grouped heads against full ones, extra memory, and how much fits.

    python benchmarks/limits.py --json benchmarks/results/limits.json

Grouped: 32 query heads over 8 key heads at head dim 128 against 32 over 32, causal, 16k tokens, the
same FLOPs, interleaved, L2 flushed, medians. Memory: one causal sequence with ours, cuDNN and FA2
(by PyTorch's SDPA), bytes of torch's allocator for a token and head: `kept` for the backward beside
q, k, v and out, and the backward's `peak` over these and the gradients. Long: one sequence of 256k
tokens, 12 heads of 64, causal, forward and backward once after a short warm-up: milliseconds,
TFLOP/s, and the peak of torch's allocator over what q, k, v, their gradients, dout and out take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from outcome import save
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_flashattn import flash_attn_func
from hf_flashattn.bench import PEERS, TOKENS, library_sha256, medians, ours


def grouped(seqlen: int, repeats: int, flush: torch.Tensor) -> dict:
    batch, heads, dim = TOKENS // seqlen, 32, 128
    shape = (batch, seqlen, heads, dim)
    q, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    runs = {}
    for name, heads_k in (("full", heads), ("grouped", 8)):
        k, v = (
            torch.randn((batch, seqlen, heads_k, dim), device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        )
        for direction, call in ours(q, k, v, dout, True, 0.0).items():
            runs[f"{direction}_{name}"] = call
    ms = medians(runs, repeats, flush)
    ratio = {d: ms[f"{d}_full"] / ms[f"{d}_grouped"] for d in ("forward", "backward")}
    return {"seqlen": seqlen, "ms": ms, "grouped_over_full_rate": ratio}


def extra_memory(seqlen: int, dim: int) -> dict:
    """Of each provider: see above."""
    heads = 12
    shape = (1, seqlen, heads, dim)

    def of(attend: Callable[..., torch.Tensor], heads_first: bool) -> dict[str, float]:
        q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        leaves = [x.transpose(1, 2) if heads_first else x for x in (q, k, v)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        gradient = dout.transpose(1, 2) if heads_first else dout
        size = dout.numel() * dout.element_size()
        before = torch.cuda.memory_allocated()
        out = attend(*leaves)
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before - size
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(out, leaves, gradient)
        peak = torch.cuda.max_memory_allocated() - before - 4 * size  # out, dq, dk, dv
        return {"kept": kept / seqlen / heads, "peak": peak / seqlen / heads}

    def by(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def attend(*leaves: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*leaves, is_causal=True)

        return attend

    def own(*leaves: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(*leaves, causal=True)

    providers: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {"ours": (own, False)}
    providers |= {name: (by(backend), True) for name, backend in PEERS.items()}
    for call in providers.values():
        of(*call)  # what is allocated once for all calls
    return {
        "seqlen": seqlen,
        "head_dim": dim,
        "extra_bytes_per_token_and_head": {name: of(*call) for name, call in providers.items()},
    }


def long_sequence(seqlen: int) -> dict:
    heads, dim = 12, 64

    def step(length: int) -> float:
        leaves = [
            torch.randn(
                (1, length, heads, dim), device="cuda", dtype=torch.bfloat16
            ).requires_grad_()
            for _ in range(3)
        ]
        dout = torch.randn_like(leaves[0])
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        flash_attn_func(*leaves, causal=True).backward(dout)
        end.record()
        torch.cuda.synchronize()
        finite = all(bool(x.grad.isfinite().all()) for x in leaves)
        if not finite:
            raise SystemExit(f"limits: gradients of {length} tokens are not finite")
        return start.elapsed_time(end)

    step(1024)
    torch.cuda.reset_peak_memory_stats()
    ms = step(seqlen)
    tensors = 8 * seqlen * heads * dim * 2  # q, k, v, out, dout, dq, dk, dv
    peak = torch.cuda.max_memory_allocated()
    work = 4.0 * seqlen**2 * heads * dim / 2 * 3.5  # causal; backward 2.5x
    return {
        "seqlen": seqlen,
        "ms": ms,
        "tflops": work / ms / 1e9,
        "peak_bytes": peak,
        "tensor_bytes": tensors,
        "extra_bytes_per_token_and_head": (peak - tensors) / seqlen / heads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--long", type=int, default=1 << 18, help="tokens of the long sequence")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    outcome = {
        "command": " ".join(["python", *sys.argv]),
        "library_sha256": library_sha256(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "protocol": __doc__,
        "grouped": [grouped(s, args.repeats, flush) for s in (1024, 4096, 16384)],
    }
    del flush
    outcome["memory"] = [extra_memory(s, d) for d in (64, 128, 256) for s in (4096, 16384)]
    outcome["long"] = long_sequence(args.long)
    for row in outcome["grouped"]:
        print(f"S {row['seqlen']:6} grouped over full", row["grouped_over_full_rate"])
    for row in outcome["memory"]:
        print(f"d{row['head_dim']} S {row['seqlen']:6}", row["extra_bytes_per_token_and_head"])
    print("long", outcome["long"])
    save(args.json, outcome)


if __name__ == "__main__":
    main()
