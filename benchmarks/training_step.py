"""Whole training steps of GPT-2 and BERT with eager, sdpa and hf_flashattn, interleaved in one run.

    python benchmarks/training_step.py --json training_step.json
    python benchmarks/training_step.py --models gpt2 --compile both --overlay-steps 300
    python benchmarks/training_step.py --models bert-large-full,bert-large-half --compile both \\
        --attention eager,sdpa,hf_flashattn,hf_flashattn_unpad,hf_flashattn_flat

Protocol: bf16 autocast on fp32 weights, fused AdamW, gradient clipping, dropout 0.1 (attention
included), random weights from one seed. All attentions are built first; then every step runs once
with each of them, in rotating order, on the same batch. A time is the median over the steps after
warm-up, by CUDA events around the whole step (forward, loss, backward, clip, optimizer). Peak
memory is that of one attention alone: its weights and optimizer state plus what its step allocates.

gpt2         GPT-2 small, 16 x 1024 random tokens, next-token loss
gpt2-medium  the same, 24 layers of 1024
bert-large   BERT-large, 32 x 512 with lengths uniform in 128..512, right-padded, masked-token loss
             on 15 % of the real tokens; tokens/s counts real tokens
bert-large-half, bert-large-full
             the same with lengths uniform in 1..512, of which half is padding; and with no
             padding at all, so with no padding mask either

Two more attentions, for padded rows alone:

hf_flashattn_unpad  patch_model(model, unpad=True): all layers run without padding. Not compiled,
                    as a graph can not read the number of tokens and would run padded
hf_flashattn_flat   the batch without padding from the start, as DataCollatorWithFlattening hands it
                    over: tokens (1, total), where rows end in cu_seq_lens. Compiled once, for any
                    total

--contexts 512,1024,2048,4096,8192 measures the GPT-2 models at each of these lengths, at --tokens a
step; an attention that runs out of memory is left out there, and the JSON says so. Parts of a grid
may run apart, each with a --json of its own. After --max-seconds nothing more is begun.

--overlay-steps N trains GPT-2 small for N steps with eager and hf_flashattn, same weights, same
batches: the bytes of the standard library's .py files as tokens, so that nothing but Python is
needed. Their loss curves go into the JSON; `examples/plots.py` draws them.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

ATTENTIONS = ("eager", "sdpa", "hf_flashattn")
UNPADDED, FLAT = "hf_flashattn_unpad", "hf_flashattn_flat"  # only when asked for, in padded rows
OVERLAID = ("eager", "hf_flashattn")
IGNORED = -100  # a label that the loss leaves out
DROPOUT = 0.1

Batch = dict[str, Any]  # tensors, and lengths of a flat batch


@dataclass(frozen=True)
class Shape:
    """What is trained: model sizes and the shape of a batch."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    batch: int
    length: int
    shortest: int  # of a row; equal to length where nothing is padded


SHAPES = {
    "gpt2": Shape(12, 768, 12, 50257, 16, 1024, 1024),
    "gpt2-medium": Shape(24, 1024, 16, 50257, 16, 1024, 1024),
    "bert-large": Shape(24, 1024, 16, 30522, 32, 512, 128),
    "bert-large-half": Shape(24, 1024, 16, 30522, 32, 512, 1),
    "bert-large-full": Shape(24, 1024, 16, 30522, 32, 512, 512),
}
TINY = {  # same code on a CPU within seconds
    "gpt2": Shape(2, 64, 1, 512, 2, 32, 32),
    "gpt2-medium": Shape(3, 64, 1, 512, 2, 32, 32),
    "bert-large": Shape(2, 64, 1, 512, 2, 32, 8),
    "bert-large-half": Shape(2, 64, 1, 512, 4, 32, 1),
    "bert-large-full": Shape(2, 64, 1, 512, 2, 32, 32),
}


@dataclass
class Contender:
    """One attention: a model, its optimizer, and what was measured."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    report: Any
    milliseconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def form(self, batch: Batch) -> Batch:
        """The batch, on the CPU still, as this attention wants it."""
        return flattened(batch) if self.name == FLAT else batch

    def step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; the loss stays on the device."""
        device_type = next(iter(batch.values())).device.type
        with torch.autocast(device_type, torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def resident_bytes(self) -> int:
        tensors = list(self.model.parameters())
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_model(name: str, shape: Shape, attention: str, seed: int) -> torch.nn.Module:
    """Random weights that depend on the seed alone; `attention` is one of Transformers' own."""
    torch.manual_seed(seed)
    if name.startswith("gpt2"):
        config = GPT2Config(
            vocab_size=shape.vocab,
            n_positions=shape.length,
            n_embd=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=DROPOUT,
            embd_pdrop=DROPOUT,
            attn_pdrop=DROPOUT,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=attention,
        )
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"
        return model
    config = BertConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        max_position_embeddings=shape.length,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
        attn_implementation=attention,
    )
    return BertForMaskedLM(config)


def contender(
    name: str,
    shape: Shape,
    attention: str,
    seed: int,
    device: torch.device,
    compiled: bool,
    lr: float = 1e-4,
) -> Contender:
    own = attention in ("hf_flashattn", UNPADDED, FLAT)
    model = make_model(name, shape, "sdpa" if own else attention, seed).to(device).train()
    report = None
    if own:
        import hf_flashattn

        report = hf_flashattn.patch_model(model, unpad=attention == UNPADDED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=device.type == "cuda")
    if compiled:
        # All share code objects: what one has seen of other shapes must not be known to the next.
        model.compile(dynamic=None if attention == FLAT else False)
    return Contender(attention, model, optimizer, report)


def random_batch(name: str, shape: Shape, generator: torch.Generator) -> Batch:
    """Token ids (batch, length), and for BERT the padding mask and the labels, on the CPU."""
    size = (shape.batch, shape.length)
    ids = torch.randint(5, shape.vocab, size, generator=generator)
    if name.startswith("gpt2"):
        return {"input_ids": ids, "labels": ids.clone()}
    lengths = torch.randint(shape.shortest, shape.length + 1, (shape.batch, 1), generator=generator)
    real = torch.arange(shape.length) < lengths  # (batch, length)
    masked = (torch.rand(size, generator=generator) < 0.15) & real
    masked[:, 0] = True  # no row without a label
    labels = torch.where(masked, ids, torch.full_like(ids, IGNORED))
    ids = torch.where(masked, torch.full_like(ids, 4), ids)
    batch = {"input_ids": torch.where(real, ids, torch.zeros_like(ids)), "labels": labels}
    return batch if shape.shortest == shape.length else batch | {"attention_mask": real.long()}


def flattened(batch: Batch) -> Batch:
    """The rows of a padded batch one after the other, without padding: tokens (1, total).

    The longest row is said to be as long as the padded batch, so that a graph holds for any batch.
    """
    real = batch["attention_mask"].bool()  # (B, S)
    lengths = real.sum(1)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)  # (B + 1,)
    positions = torch.arange(real.shape[1]).expand_as(real)
    flat = {name: batch[name][real][None] for name in ("input_ids", "labels")}
    flat["position_ids"] = positions[real][None]
    longest = real.shape[1]
    return flat | {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Its tensors there; for compilers the number of tokens of a flat batch is a symbol."""
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    if "cu_seq_lens_q" in batch:
        for name in ("input_ids", "labels", "position_ids"):
            torch._dynamo.mark_dynamic(moved[name], 1)
    return moved


def real_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def measure(
    contenders: Sequence[Contender],
    batches: Callable[[], Batch],
    warmup: int,
    steps: int,
    device: torch.device,
    seed: int = 0,
) -> float:
    """Runs the protocol of the file's docstring; returns the mean number of real tokens a step."""
    tokens = 0
    for step in range(warmup + steps):
        batch = batches()
        counted = step >= warmup
        tokens += real_tokens(batch) if counted else 0
        formed = {current.name: to_device(current.form(batch), device) for current in contenders}
        turn = step % len(contenders)
        for current in [*contenders[turn:], *contenders[:turn]]:
            torch.manual_seed(seed + step)  # the same dropout outside of attention
            before = _reset_peak(device)
            loss, elapsed = timed(lambda c=current, b=formed[current.name]: c.step(b), device)
            current.losses.append(loss.item())
            if counted:
                current.milliseconds.append(elapsed)
                current.peak_bytes = max(current.peak_bytes, _peak_above(device, before, current))
    return tokens / max(steps, 1)


def timed(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    """The result of `call` and its milliseconds: CUDA events, on a CPU the clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        result = call()
        return result, (time.perf_counter() - started) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end)


def benchmark(
    name: str,
    shape: Shape,
    attentions: Sequence[str],
    compiled: bool,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """All attentions on one model; a run per attention, keyed by its name."""
    contenders = [
        contender(name, shape, attention, args.seed, device, compiled) for attention in attentions
    ]
    generator = torch.Generator().manual_seed(args.seed)
    missing: dict[str, dict[str, Any]] = {}
    if args.contexts and name.startswith("gpt2"):
        contenders, missing = leave_out_what_does_not_fit(
            contenders, random_batch(name, shape, generator), device
        )
    if not contenders:
        return missing
    tokens = measure(
        contenders,
        lambda: random_batch(name, shape, generator),
        args.warmup,
        args.steps,
        device,
        args.seed,
    )
    baseline = statistics.median(contenders[0].milliseconds)
    return {c.name: _summary(c, tokens, shape.batch, baseline) for c in contenders} | missing


def leave_out_what_does_not_fit(
    contenders: list[Contender], batch: Batch, device: torch.device
) -> tuple[list[Contender], dict[str, dict[str, Any]]]:
    """Those that can make a step beside the others, and a record of those that can not."""
    fitting, missing = [], {}
    while contenders:
        current = contenders.pop(0)
        try:
            current.step(to_device(current.form(batch), device))
            fitting.append(current)
        except torch.cuda.OutOfMemoryError as error:
            missing[current.name] = {"out_of_memory": str(error).splitlines()[0]}
        if current.name in missing:  # outside of except: the traceback holds the activations
            del current
            _free(device)
    return fitting, missing


def attentions_for(shape: Shape, compiled: bool, asked: Sequence[str]) -> list[str]:
    """Of those asked for, the ones that make sense: none without padding where there is none."""
    left_out = {UNPADDED} if compiled else set()
    if shape.shortest == shape.length:
        left_out = {UNPADDED, FLAT}
    return [name for name in asked if name not in left_out]


def shapes_of(name: str, args: argparse.Namespace) -> list[Shape]:
    """One, or for GPT-2 one for each of --contexts."""
    shape = (TINY if args.tiny else SHAPES)[name]
    if not args.contexts or not name.startswith("gpt2"):
        return [shape]
    return [
        replace(shape, batch=max(1, args.tokens // context), length=context, shortest=context)
        for context in args.contexts
    ]


def standard_library_bytes(limit: int = 2**25) -> torch.Tensor:
    """The .py files of the standard library as one uint8 tensor, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    content = bytearray()
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts and "dist-packages" not in path.parts:
            content += path.read_bytes() + b"\0"
        if len(content) >= limit:
            break
    return torch.frombuffer(content, dtype=torch.uint8)


def text_batches(text: torch.Tensor, shape: Shape, seed: int) -> Iterator[Batch]:
    """Endless batches of random windows of the text; a token is a byte."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - shape.length, (shape.batch,), generator=generator)
        ids = torch.stack([text[start : start + shape.length] for start in starts]).long()
        yield {"input_ids": ids, "labels": ids}


def overlay(shape: Shape, steps: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Loss curves of eager and hf_flashattn: same weights, same batches.

    The dropout inside attention is not the same random numbers, so the curves agree as two seeds
    do. `eager (other seed)`, on the same batches, shows how far apart that is.
    """
    contenders = [
        contender("gpt2", shape, attention, seed, device, False, lr=6e-4) for attention in OVERLAID
    ]
    batches = text_batches(standard_library_bytes(), shape, seed)
    measure(contenders, lambda: next(batches), steps, 0, device, seed)
    other = contender("gpt2", shape, "eager", seed, device, False, lr=6e-4)
    other.name = "eager (other seed)"
    batches = text_batches(standard_library_bytes(), shape, seed)
    measure([other], lambda: next(batches), steps, 0, device, seed + 10**6)
    reference = contenders[0].losses
    runs: dict[str, Any] = {}
    for current in [*contenders, other]:
        last = max(1, steps // 10)
        gaps = [abs(a - b) for a, b in zip(current.losses, reference, strict=True)]
        runs[current.name] = {
            "losses": current.losses,
            "mean_of_last_tenth": statistics.fmean(current.losses[-last:]),
            "largest_gap_to_eager": max(gaps),
            "mean_gap_to_eager": statistics.fmean(gaps),
        }
    return runs


def environment(device: torch.device) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "hf_flashattn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": " ".join(sys.argv),
        "versions": versions,
        "device": {"type": device.type, "name": name, "cuda": torch.version.cuda},
    }


def table(name: str, shape: Shape, compiled: bool, runs: dict[str, dict[str, Any]]) -> str:
    first = next(iter(runs))
    rows = [
        f"{name}, {shape.batch} x {shape.length}{', torch.compile' if compiled else ''}",
        f"  {'attention':<20}{'ms/step':>9}{'p10':>9}{'p90':>9}{'tokens/s':>12}{'peak GiB':>10}"
        f"{'x ' + first:>10}",
    ]
    for label, run in runs.items():
        if "out_of_memory" in run:
            rows.append(f"  {label:<14}out of memory")
            continue
        times = run["step_ms"]
        rows.append(
            f"  {label:<20}{times['median']:>9.1f}{times['p10']:>9.1f}{times['p90']:>9.1f}"
            f"{run['tokens_per_second']:>12,.0f}{run['peak_memory_gib'] or 0:>10.1f}"
            f"{run['speedup']:>10.2f}"
        )
    rows += [
        f"  {label} ran on {run['ran_on']}" for label, run in runs.items() if run.get("ran_on")
    ]
    return "\n".join(rows)


def ran_on(report: Any) -> str | None:
    """What the attention modules of hf_flashattn ran on; None without a report."""
    if report is None:
        return None
    kinds = Counter(f"{row.runs}, {row.why}" for row in report.rows)
    parts = [f"{count} x {kind}" for kind, count in kinds.items()]
    return "; ".join([*parts, *map(str, report.unpadding)])


def _summary(current: Contender, tokens: float, sequences: int, baseline: float) -> dict[str, Any]:
    times = current.milliseconds
    median = statistics.median(times)
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else [median] * 9
    return {
        "step_ms": {"median": median, "p10": deciles[0], "p90": deciles[-1], "all": times},
        "tokens_per_second": tokens / median * 1e3,
        "sequences_per_second": sequences / median * 1e3,
        "peak_memory_gib": current.peak_bytes / 2**30 or None,
        "speedup": baseline / median,
        "losses": current.losses,
        "ran_on": ran_on(current.report),
        "attention_report": None if current.report is None else str(current.report),
    }


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_above(device: torch.device, before: int, current: Contender) -> int:
    if device.type != "cuda":
        return 0
    return current.resident_bytes() + torch.cuda.max_memory_allocated(device) - before


def _names(given: str, known: Sequence[str], flag: str) -> list[str]:
    names = given.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(
            f"error: expected {flag} out of {', '.join(known)}; got {unknown[0]!r}; "
            f"next step: {flag} {','.join(known)}"
        )
    return names


def _integers(given: str) -> list[int]:
    return [int(part) for part in given.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="gpt2,bert-large")
    parser.add_argument("--attention", default=",".join(ATTENTIONS))
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="no")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument(
        "--contexts", type=_integers, default=[], metavar="N,N,...", help="lengths of GPT-2"
    )
    parser.add_argument("--tokens", type=int, default=2**15, help="of a step, with --contexts")
    parser.add_argument("--overlay-steps", type=int, default=0, metavar="N")
    parser.add_argument(
        "--max-seconds", type=float, default=float("inf"), metavar="S", help="begin nothing after S"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: for tests")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    args.models = _names(args.models, tuple(SHAPES), "--models") if args.models else []
    args.attention = _names(args.attention, (*ATTENTIONS, UNPADDED, FLAT), "--attention")
    unpadded = [name for name in args.attention if name in (UNPADDED, FLAT)]
    padded = [name for name, s in SHAPES.items() if s.shortest < s.length]
    if unpadded and not set(args.models) & set(padded):
        raise SystemExit(
            f"error: expected --models {' or '.join(padded)} with {unpadded[0]}, as nothing else "
            f"is padded; got --models {','.join(args.models)}; next step: --models {padded[0]}"
        )
    if args.compile == "yes" and args.attention == [UNPADDED]:
        raise SystemExit(
            f"error: expected {FLAT} to compile, as {UNPADDED} would run padded; got --compile yes "
            f"--attention {UNPADDED}; next step: --attention {FLAT}"
        )
    if args.steps < 1:
        raise SystemExit(
            f"error: expected --steps of at least 1; got {args.steps}; next step: --steps 30"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    on_gpu = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    outcome: dict[str, Any] = environment(device) | {
        "kind": "training_step",
        "seed": args.seed,
        "dropout": DROPOUT,
        "warmup": args.warmup,
        "timed_steps": args.steps,
        "models": [],
        "runs": {},
    }
    started = time.perf_counter()
    cells = [
        (name, shape, compiled)
        for name in args.models
        for shape in shapes_of(name, args)
        for compiled in {"no": [False], "yes": [True], "both": [False, True]}[args.compile]
    ]
    for name, shape, compiled in cells:
        began = time.perf_counter()
        if began - started > args.max_seconds:
            print(f"no time for {name}, {shape.batch} x {shape.length}, compile {compiled}")
            continue
        attentions = attentions_for(shape, compiled, args.attention)
        runs = benchmark(name, shape, attentions, compiled, args, device)
        print(table(name, shape, compiled, runs), flush=True)
        entry = {"name": name, "shape": asdict(shape), "compile": compiled, "runs": runs}
        outcome["models"].append(entry | {"seconds": time.perf_counter() - began})
        save(args.json, outcome)  # the overlay takes minutes; what is measured is kept
        _free(device)
    if args.overlay_steps and time.perf_counter() - started <= args.max_seconds:
        shape = (TINY if args.tiny else SHAPES)["gpt2"]
        outcome["runs"] = overlay(shape, args.overlay_steps, args.seed, device)
        for label, run in outcome["runs"].items():
            print(
                f"  {label:<20} loss {run['losses'][0]:.3f} -> {run['mean_of_last_tenth']:.4f}"
                f"   gap to eager: mean {run['mean_gap_to_eager']:.4f},"
                f" largest {run['largest_gap_to_eager']:.4f}"
            )
    save(args.json, outcome)
    if args.json:
        print(args.json)
    return 0


def save(path: Path | None, outcome: dict[str, Any]) -> None:
    """The JSON as far as it goes, replacing an earlier one at once; nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(outcome, indent=1) + "\n")
    partial.replace(path)


def in_k(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)


def length_axis(axis: Any, lengths: Sequence[int]) -> None:
    """A logarithmic x axis of a plot, with a tick at each of these lengths."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [in_k(length) for length in lengths])
    axis.minorticks_off()


def _free(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
