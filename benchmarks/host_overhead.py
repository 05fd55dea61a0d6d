"""What a call costs the host: the op, flash_attn_func, recording and backward, small models.

    python benchmarks/host_overhead.py --json host_overhead.json

Protocol, calls: 64 tokens, 8 heads of 64, bf16. One synchronisation, then 300 calls back to back by
time.perf_counter while the GPU works behind them, then another synchronisation outside the clock. A
number is the median over --repeats such blocks; all cases take turns in each repeat. `identity` is
an autograd function that does nothing: what torch itself takes for a forward and a backward.

Protocol, models: random weights from one seed, bf16, eager mode, no gradients; BERT-base on 1 x 128
tokens with and without a mask of ones, GPT-2 small one token at a time behind 128 cached ones. The
implementations share the weights and take turns; a number is the median wall time of a forward over
blocks of 20 that end with a synchronisation.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from outcome import save
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import BertConfig, BertModel, DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_flashattn import flash_attn_func, flash_attn_varlen_func, ops, patch_model

TOKENS, HEADS, HEAD_DIM = 64, 8, 64
ATTENTIONS = ("eager", "sdpa", "hf_flashattn")
FORWARDS = 20  # of a model, in a block
PREFIX = 128  # cached tokens before the first decoded one


@dataclass
class Row:
    """One line of the table: microseconds a call, or milliseconds a forward."""

    case: str
    unit: str
    median: float
    best: float

    def __str__(self) -> str:
        return f"{self.case:<58} {self.median:9.2f} {self.best:9.2f} {self.unit}"


# ---- calls ---------------------------------------------------------------------------------------


class Identity(torch.autograd.Function):
    """Three tensors in, the first out."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, grad, grad


def no_grad(function: Callable[[], Any]) -> Callable[[], Any]:
    """A case without gradients. The guard is around its blocks: around each call it costs 2 us."""
    function.guard = torch.no_grad
    return function


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed, by name, in the order of the table."""
    q, k, v, dout = (
        torch.randn(1, TOKENS, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    learnt = [x.clone().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    offsets = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
    packed = [x[0] for x in (q, k, v)]
    scale = HEAD_DIM**-0.5

    def forward_backward(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*learnt), learnt, dout)

    def sdpa_here(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return {
        "torch.empty_like, one allocation": no_grad(lambda: torch.empty_like(q)),
        "q.neg(), one allocation and one launch": no_grad(lambda: q.neg()),
        "ops.forward, no_grad": no_grad(lambda: ops.forward(q, k, v, softmax_scale=scale)),
        "flash_attn_func, no_grad": no_grad(lambda: flash_attn_func(q, k, v)),
        "flash_attn_func, nothing requires grad": lambda: flash_attn_func(q, k, v),
        "flash_attn_func with dropout, no_grad": no_grad(lambda: flash_attn_func(q, k, v, 0.1)),
        "flash_attn_varlen_func, no_grad": no_grad(
            lambda: flash_attn_varlen_func(*packed, offsets, offsets, TOKENS, TOKENS)
        ),
        "sdpa, no_grad": no_grad(lambda: sdpa(*heads_first)),
        "flash_attn_func, recorded for backward": lambda: flash_attn_func(*learnt),
        "sdpa, recorded for backward": lambda: sdpa_here(*learnt),
        "flash_attn_func, forward and backward": forward_backward(flash_attn_func),
        "sdpa, forward and backward": forward_backward(sdpa_here),
        "identity, forward and backward": forward_backward(Identity.apply),
    }


def time_calls(count: int, repeats: int) -> list[Row]:
    """Microseconds a call."""
    cases = calls()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-1, repeats):  # the first warms up
        for name, call in cases.items():
            torch.cuda.synchronize()
            with getattr(call, "guard", nullcontext)():
                start = time.perf_counter()
                for _ in range(count):
                    call()
                passed = time.perf_counter() - start
            torch.cuda.synchronize()
            if repeat >= 0:
                times[name].append(1e6 * passed / count)
    return [Row(name, "us", statistics.median(x), min(x)) for name, x in times.items()]


# ---- models --------------------------------------------------------------------------------------


def implementations(make: Callable[[str], nn.Module]) -> dict[str, nn.Module]:
    """The same model with each attention; ours by patch_model, which refuses a fallback."""
    models: dict[str, nn.Module] = {}
    for name in ATTENTIONS:
        torch.manual_seed(0)
        model = make("eager" if name == "eager" else "sdpa")
        models[name] = model.to("cuda", torch.bfloat16).eval()
    patch_model(models["hf_flashattn"], strict=True)
    return models


def bert(attention: str) -> nn.Module:
    """BERT-base."""
    return BertModel(BertConfig(attn_implementation=attention))


def gpt2(attention: str) -> nn.Module:
    """GPT-2 small."""
    return GPT2LMHeadModel(GPT2Config(attn_implementation=attention))


def encode(model: nn.Module, tokens: Tensor, mask: Tensor | None) -> float:
    """Seconds of FORWARDS forwards."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(FORWARDS):
        model(input_ids=tokens, attention_mask=mask)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def decode(model: nn.Module, tokens: Tensor, mask: Tensor | None) -> float:
    """Seconds of FORWARDS forwards of one token each, the prefix not counted."""
    cache = DynamicCache()
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(FORWARDS):
        model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
    torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def time_models(repeats: int) -> list[Row]:
    """Milliseconds a forward."""
    tokens = torch.randint(0, 1000, (1, PREFIX), device="cuda")
    rows = []
    for make, cases in (
        (
            bert,
            {
                f"BERT-base 1 x {PREFIX}": (encode, None),
                f"BERT-base 1 x {PREFIX}, mask of ones": (encode, torch.ones_like(tokens)),
            },
        ),
        (gpt2, {f"GPT-2 small, 1 token after {PREFIX}": (decode, None)}),
    ):
        models = implementations(make)
        for case, (run, mask) in cases.items():
            times: dict[str, list[float]] = {name: [] for name in models}
            for repeat in range(-1, repeats):
                for name, model in models.items():
                    passed = run(model, tokens, mask)
                    if repeat >= 0:
                        times[name].append(1e3 * passed / FORWARDS)
            for name, x in times.items():
                rows.append(Row(f"{case}, {name}", "ms", statistics.median(x), min(x)))
    return rows


# ---- the command line ----------------------------------------------------------------------------


def processor() -> str:
    """The CPU's name: the numbers are as much its as ours."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=300, help="calls in a block")
    parser.add_argument("--repeats", type=int, default=9, help="blocks")
    parser.add_argument("--no-models", action="store_true", help="the calls alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print(
            "host_overhead: expected a Hopper GPU (H100, H200), found none. What the host does is "
            "mostly to hand work to one, so there is nothing to measure without it.",
            file=sys.stderr,
        )
        return 1
    outcome: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/host_overhead.py", *(argv or sys.argv[1:])]),
        "gpu": torch.cuda.get_device_name(),
        "cpu": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(", ".join(str(x) for x in list(outcome.values())[1:]))
    print(f"{'':<58} {'median':>9} {'best':>9}")
    rows = time_calls(args.calls, args.repeats)
    print(*rows, sep="\n")
    if not args.no_models:
        of_models = time_models(args.repeats)
        print(*of_models, sep="\n")
        rows += of_models
    outcome["rows"] = [asdict(row) for row in rows]
    save(args.json, outcome)
    if args.json:
        print(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
