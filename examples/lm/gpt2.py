"""GPT-2 in any size."""

from __future__ import annotations

import types

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from lm.fused_loss import fused_cross_entropy
from lm.model import Size

# Head dim 64 throughout, as in GPT-2 itself.
SIZES = {
    "tiny": Size(2, 64, 1),
    "cpu": Size(4, 256, 4),
    "mini": Size(8, 512, 8),
    "gpt2": Size(12, 768, 12, 50257),
    "gpt2-medium": Size(24, 1024, 16, 50257),
    "gpt2-large": Size(36, 1280, 20, 50257),
}


def gpt2_config(size: Size, tokenizer_size: int, context: int, dropout: float) -> GPT2Config:
    return GPT2Config(
        vocab_size=max(size.vocab, tokenizer_size),
        n_positions=context,
        n_embd=size.hidden,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,  # training has no use for keys and values of earlier calls
        bos_token_id=None,
        eos_token_id=None,
    )


class ShiftedPositions(torch.nn.Embedding):
    """Position embeddings of which every training batch takes others, next to each other, so that
    all are trained though each batch is shorter (SHAPE, Kiyono et al. 2021: others in each row)."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        if self.training:
            length = positions.shape[-1]
            free = self.num_embeddings - length
            # Beyond both ends by half a batch, and back: else the first and last are hardly seen.
            shift = torch.randint(free + length, (), device=positions.device) - length // 2
            positions = positions + shift.clamp(0, free)
        return super().forward(positions)


def make_gpt2(
    config: GPT2Config, liger: bool = False, shift_positions: bool = False
) -> GPT2LMHeadModel:
    """With `liger`, a forward that is given labels returns the loss alone, without logits."""
    model = GPT2LMHeadModel(config)
    if shift_positions:
        own = model.transformer.wpe.weight
        model.transformer.wpe = ShiftedPositions.from_pretrained(own, freeze=False)
    model.loss_type = "ForCausalLM"  # what it falls back to, but with a warning
    if liger:
        model.forward = types.MethodType(_forward_without_logits, model)
    return model


def _forward_without_logits(
    self: GPT2LMHeadModel,
    input_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    **kwargs: object,
) -> CausalLMOutputWithCrossAttentions:
    """input_ids and labels: int64 (B, S); labels are shifted here, as in Transformers."""
    if labels is None:
        return GPT2LMHeadModel.forward(self, input_ids=input_ids, **kwargs)
    hidden = self.transformer(input_ids=input_ids, **kwargs).last_hidden_state  # (B, S, H)
    loss = fused_cross_entropy(
        hidden[:, :-1].flatten(0, 1), self.lm_head.weight, labels[:, 1:].flatten()
    )
    return CausalLMOutputWithCrossAttentions(loss=loss)
