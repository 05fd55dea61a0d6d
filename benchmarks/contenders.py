"""The models that the benchmarks train, their batches, and the interleaved measurement of steps.

Protocol and models: see training_step.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

ATTENTIONS = ("eager", "sdpa", "hf_flashattn")
# Only when asked for, in padded rows.
UNPADDED, FLAT, GRAPHS = "hf_flashattn_unpad", "hf_flashattn_flat", "hf_flashattn_flat_graphs"
FILLED_TO = 512  # tokens: a flat batch for graphs is a multiple of this
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
        if self.name not in (FLAT, GRAPHS):
            return batch
        return flattened(batch, FILLED_TO if self.name == GRAPHS else 1)

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
    own = attention in ("hf_flashattn", UNPADDED, FLAT, GRAPHS)
    model = make_model(name, shape, "sdpa" if own else attention, seed).to(device).train()
    report = None
    if own:
        import hf_flashattn

        report = hf_flashattn.patch_model(model, unpad=attention == UNPADDED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=device.type == "cuda")
    if compiled:
        # All share code objects: what one has seen of other shapes must not be known to the next.
        dynamic = None if attention in (FLAT, GRAPHS) else False
        model.compile(dynamic=dynamic, mode="reduce-overhead" if attention == GRAPHS else None)
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


def flattened(batch: Batch, multiple: int = 1) -> Batch:
    """The rows of a padded batch one after the other, without padding: tokens (1, total).

    The longest row is said to be as long as the padded batch, so that a graph holds for any batch.
    multiple: what the total is filled up to, by sequences of their own without labels: so few
    totals that each can have a CUDA graph.
    """
    real = batch["attention_mask"].bool()  # (B, S)
    longest = real.shape[1]
    filler = -int(real.sum()) % multiple
    most = -(-(multiple - 1) // longest)  # fillers of a batch, some of them empty
    fillers = [min(max(filler - i * longest, 0), longest) for i in range(most)]
    lengths = torch.cat([real.sum(1), torch.tensor(fillers, dtype=torch.long)])
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    positions = torch.arange(longest).expand_as(real)
    flat = {
        "input_ids": F.pad(batch["input_ids"][real], (0, filler)),
        "labels": F.pad(batch["labels"][real], (0, filler), value=IGNORED),
        "position_ids": torch.cat([positions[real], *(torch.arange(n) for n in fillers)]),
    }
    flat = {name: tokens[None] for name, tokens in flat.items()}
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
    """Runs the protocol of training_step.py; returns the mean number of real tokens a step."""
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
