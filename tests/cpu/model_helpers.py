"""Tiny random models and batches: fp32 on the CPU, patched compared with eager."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_flashattn

VOCAB, LENGTH, BATCH, ENCODER_LENGTH, HIDDEN = 60, 13, 3, 9, 32


class Host(Tensor):
    """What tests make of a tensor that was copied to the CPU; what comes of it is there, too."""


def gpt2(**changes) -> GPT2LMHeadModel:
    """Two layers, four heads of 8, no dropout, evaluating."""
    options = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": HIDDEN,
        "vocab_size": VOCAB,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.3,
    }
    return build(GPT2LMHeadModel, GPT2Config(**(options | changes)))


def bert(cls: type[PreTrainedModel] = BertModel, **changes) -> PreTrainedModel:
    """Two layers, four heads of 8, no dropout, evaluating."""
    options = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
    return build(cls, BertConfig(**(options | changes)))


def bert_decoder(**changes) -> PreTrainedModel:
    """A causal BERT with a language modelling head and cross-attention."""
    return bert(BertLMHeadModel, is_decoder=True, add_cross_attention=True, **changes)


def llama(**changes) -> LlamaForCausalLM:
    """Two layers, four heads of 8 that share two key heads, evaluating."""
    options = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "initializer_range": 0.3,
    }
    return build(LlamaForCausalLM, LlamaConfig(**(options | changes)))


def build(
    cls: type[PreTrainedModel], config: PreTrainedConfig, name: str = "eager"
) -> PreTrainedModel:
    """A model with weights large enough that wrong attention shows, in eval mode."""
    torch.manual_seed(0)
    config._attn_implementation = name
    model = cls(config)
    for name_, parameter in model.named_parameters():
        if name_.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> Tensor:
    """int64 (batch, length)."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(kind: str, length: int = LENGTH) -> Tensor | None:
    """A 2-D mask, int64 (BATCH, length): none, ones, right, left, holed, both, empty (one row)."""
    if kind == "none":
        return None
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if kind == "right":
        mask[0, 5:], mask[1, length - 1 :] = 0, 0
    elif kind == "left":
        mask[0, :5], mask[1, :1] = 0, 0
    elif kind == "both":
        mask[0, :3], mask[0, 7:], mask[1, :1] = 0, 0, 0
    elif kind == "holed":
        mask[0, 2:4], mask[0, 6], mask[1, 0], mask[1, 3] = 0, 0, 0, 0
    elif kind == "empty":
        mask[0], mask[1, :4] = 0, 0
    return mask


PADDINGS = ("none", "ones", "right", "left", "both", "holed", "empty")


def encoder_states(seed: int = 2) -> Tensor:
    """fp32 (BATCH, ENCODER_LENGTH, HIDDEN)."""
    return torch.randn(BATCH, ENCODER_LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def output(model: nn.Module, inputs: dict) -> Tensor:
    """Logits or hidden states."""
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def outputs_and_grads(
    model: nn.Module, inputs: dict, weight: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of a loss over the rows where `weight` (B, S) is 1."""
    model.zero_grad()
    out = output(model, inputs)
    rows = out if weight is None else out * weight[..., None]
    (rows * torch.linspace(-1, 1, out.shape[-1]) + rows**2).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


def assert_same(
    model: nn.Module, inputs: dict, weight: Tensor | None = None, tolerance: float = 1e-5, **options
):
    """Patched equals eager at the tokens, forward and backward; afterwards eager is back."""
    expected, expected_grads = outputs_and_grads(model, inputs, weight)
    with hf_flashattn.patched(model, **options) as report:
        got, got_grads = outputs_and_grads(model, inputs, weight)
        text = str(report)
    again, _ = outputs_and_grads(model, inputs, weight)
    rows = torch.ones(expected.shape[:2], dtype=torch.bool) if weight is None else weight.bool()
    error = (got - expected)[rows].abs().max()
    assert error <= tolerance * max(1.0, expected[rows].abs().max()), (
        f"{error} over {tolerance}\n{text}"
    )
    assert torch.isfinite(got).all()
    assert got_grads.keys() == expected_grads.keys()
    scale = max(grad.abs().max().item() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        error = (got_grads[name] - grad).abs().max()
        assert error <= tolerance * scale, f"gradient of {name}: {error} at scale {scale}\n{text}"
    assert torch.equal(again, expected)
    return report


def assert_replays_wish_for_weights(model: nn.Module, inputs: dict, reentrant: bool):
    """Checkpointed layers run again as their forward ran, with and without attention weights.

    Returns: the report, of a patched step with weights and one without. Gradients are those of the
        model without a patch and without checkpointing.
    """

    def gradient(wanted: bool) -> Tensor:
        model.zero_grad()
        torch.manual_seed(0)
        out = model(**inputs, output_attentions=wanted)
        assert (out.attentions is not None) == wanted
        out[0].square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradient(False)
    with hf_flashattn.patched(model) as report:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for wanted in (True, False):
            got = gradient(wanted)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
        model.gradient_checkpointing_disable()
    return report


def state_of(model: nn.Module) -> dict:
    """Everything patch_model may touch, by identity and content."""
    state = {}
    for name, module in model.named_modules():
        state[name] = {key: id(value) for key, value in module.__dict__.items() if key[0] != "_"}
        state[name]["keys"] = list(module.__dict__)
        hooks = (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._forward_pre_hooks_with_kwargs,
        )
        state[name]["hooks"] = [list(held.items()) for held in hooks]
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            state[name]["config"] = (id(config), copy.copy(config.__dict__))
    return state


def calls(report, kind: str) -> int:
    """How many calls of a kind ("kernel", "cpu", "fallback") the report counts in all."""
    return sum(getattr(row.calls, kind) for row in report.rows)


Make = Callable[..., PreTrainedModel]
