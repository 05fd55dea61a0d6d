"""What a call costs the host, without a GPU: Python, the dispatcher and the binding alone.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/host_cpu.py --json host_cpu.json

The binding is the real one, compiled with launchers that do nothing (tools/host_binding.py), on CPU
tensors that pass for CUDA's. So allocations are the CPU's, and launches, TMA descriptors and the
driver cost nothing: numbers to compare two versions with on one machine, not what a GPU's host
needs (benchmarks/host_overhead.py).

Protocol: 64 tokens, 8 heads of 64, bf16. All cases take turns in blocks of --calls calls; a number
is the median over --repeats such blocks, in time of this process's on the CPU: others that want the
CPU too are not counted. `attention function` is what Transformers calls in a layer
of a patched model, with the arguments that the model gave it. `sdpa` is Transformers' own function
for it, with an SDPA that only allocates, so that both leave out what attention itself takes. The
last rows are whole forwards of 12 layers of 4 heads of 16, where caches are cold.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from host_overhead import Identity, Row, no_grad, processor
from outcome import save
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_flashattn import build, flash_attn_func, flash_attn_varlen_func, patch_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import host_binding

TOKENS, HEADS, HEAD_DIM = 64, 8, 64
LAYERS = 12
Cases = dict[str, Callable[[], Any]]


# ---- calls ---------------------------------------------------------------------------------------


def calls() -> Cases:
    """The functions by flash-attn's names."""
    q, k, v, dout = (
        torch.randn(1, TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(4)
    )
    learnt = [x.clone().requires_grad_() for x in (q, k, v)]
    offsets = torch.tensor([0, TOKENS], dtype=torch.int32)
    packed = [x[0] for x in (q, k, v)]

    def both(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*learnt), learnt, dout)

    return {
        "flash_attn_func": no_grad(lambda: flash_attn_func(q, k, v)),
        "flash_attn_func, dropout": no_grad(lambda: flash_attn_func(q, k, v, 0.1)),
        "flash_attn_varlen_func": no_grad(
            lambda: flash_attn_varlen_func(*packed, offsets, offsets, TOKENS, TOKENS)
        ),
        "flash_attn_func, recorded": lambda: flash_attn_func(*learnt),
        "flash_attn_func, forward and backward": both(flash_attn_func),
        "identity, forward and backward": both(Identity.apply),
    }


# ---- a layer's call ------------------------------------------------------------------------------


def bert(layers: int, heads: int, head_dim: int, attention: str) -> nn.Module:
    """A small BERT."""
    config = BertConfig(
        vocab_size=99, hidden_size=heads * head_dim, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=64, attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config).to(torch.bfloat16).eval()


def gpt2(layers: int, heads: int, head_dim: int, attention: str) -> nn.Module:
    """A small GPT-2."""
    config = GPT2Config(
        vocab_size=99, n_embd=heads * head_dim, n_layer=layers, n_head=heads, n_inner=64,
        attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(torch.bfloat16).eval()


def patched(model: nn.Module) -> nn.Module:
    patch_model(model, strict=True)
    return model


def padding() -> Tensor:
    """Two rows, one with its last quarter padding."""
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 3 * TOKENS // 4 :] = 0
    return mask


def a_layers_call(model: nn.Module, run: Callable[[nn.Module], Any]) -> Callable[[], Any]:
    """The last call of the model's attention function during run(model), to be made again."""
    name = model.config._attn_implementation
    real, seen = ALL_ATTENTION_FUNCTIONS[name], []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen[:] = [args, kwargs]
        return real(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, record)
    run(model)
    ALL_ATTENTION_FUNCTIONS.register(name, real)
    args, kwargs = seen
    return lambda: real(*args, **kwargs)


def encode(model: nn.Module) -> None:
    tokens = torch.randint(0, 99, (2, TOKENS))
    model(input_ids=tokens)


def encode_padded(model: nn.Module) -> None:
    tokens, mask = torch.randint(0, 99, (2, TOKENS)), padding()
    KEPT.append(mask)
    model(input_ids=tokens, attention_mask=mask)


def decode(model: nn.Module) -> None:
    tokens, cache = torch.randint(0, 99, (1, TOKENS)), DynamicCache()
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)


def train(model: nn.Module) -> None:
    model.train()
    encode(model)


KEPT: list[Tensor] = []  # a mask is forgotten with its tensor


def layers() -> Cases:
    """The attention function as Transformers calls it."""
    shape = (2, HEADS, HEAD_DIM)
    cases: Cases = {}
    for name, make, run, guard in (
        ("BERT", bert, encode, True),
        ("BERT, padded", bert, encode_padded, True),
        ("GPT-2", gpt2, encode, True),
        ("GPT-2, a token behind cached ones", gpt2, decode, True),
        ("BERT, recorded with dropout", bert, train, False),
    ):
        for kind in ("sdpa", "ours"):
            model = make(*shape, "sdpa")
            model = patched(model) if kind == "ours" else model
            with torch.no_grad() if guard else nullcontext():
                call = a_layers_call(model, run)
            cases[f"attention function: {name}, {kind}"] = no_grad(call) if guard else call
    return cases


def forwards() -> Cases:
    """Whole forwards."""
    tokens, mask = torch.randint(0, 99, (1, TOKENS)), padding()
    cases: Cases = {}
    for kind in ("sdpa", "ours"):
        models = [make(LAYERS, 4, 16, "sdpa") for make in (bert, gpt2)]
        encoder, decoder = map(patched, models) if kind == "ours" else models
        cases[f"{LAYERS} layers of BERT, {kind}"] = no_grad(lambda m=encoder: m(input_ids=tokens))
        cases[f"{LAYERS} layers of BERT, padded, {kind}"] = no_grad(
            lambda m=encoder: m(input_ids=tokens.expand(2, -1), attention_mask=mask)
        )
        cases[f"{LAYERS} layers of GPT-2, {kind}"] = no_grad(
            lambda m=decoder: m(input_ids=tokens[:, :8])
        )
    return cases


# ---- timing --------------------------------------------------------------------------------------


def only_allocates(query: Tensor, *_: Any, **__: Any) -> Tensor:
    """In the place of SDPA."""
    return torch.empty_like(query)


def time_cases(cases: Cases, count: int, repeats: int) -> list[Row]:
    """Microseconds a call."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-1, repeats):  # the first warms up
        for name, call in cases.items():
            with getattr(call, "guard", nullcontext)():
                start = time.process_time()
                for _ in range(count):
                    call()
                passed = time.process_time() - start
            if repeat >= 0:
                times[name].append(1e6 * passed / count)
    return [Row(name, "us", statistics.median(x), min(x)) for name, x in times.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=500, help="calls in a block")
    parser.add_argument("--repeats", type=int, default=15, help="blocks")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    outcome: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/host_cpu.py", *(argv or sys.argv[1:])]),
        "cpu": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = host_binding.compile(Path(folder))
        except build.BuildError as error:
            print(f"host_cpu: {error}", file=sys.stderr)
            return 1
        print(", ".join(str(x) for x in list(outcome.values())[1:]))
        print(f"{'':<58} {'median':>9} {'best':>9}")
        with (
            host_binding.as_gpu(library),
            mock.patch.object(nn.functional, "scaled_dot_product_attention", only_allocates),
        ):
            rows = time_cases(calls() | layers(), args.calls, args.repeats)
            rows += time_cases(forwards(), max(1, args.calls // 25), args.repeats)
    print(*rows, sep="\n")
    outcome["rows"] = [asdict(row) for row in rows]
    save(args.json, outcome)
    if args.json:
        print(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
