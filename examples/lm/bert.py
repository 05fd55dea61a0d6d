"""BERT in any size, with a head that runs where there is a label and nowhere else.

At 15 % masked tokens and half of a batch padding, the decoder over the vocabulary has a thirteenth
of the rows that BertForMaskedLM gives it.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from lm.fused_loss import fused_cross_entropy
from lm.model import Size

IGNORED = -100  # a label that the loss leaves out

# Head dim 64 throughout, as in BERT itself.
SIZES = {
    "tiny": Size(2, 64, 1),
    "cpu": Size(4, 256, 4),
    "mini": Size(8, 512, 8),
    "bert-base": Size(12, 768, 12, 30522),
    "bert-large": Size(24, 1024, 16, 30522),
}


def bert_config(
    size: Size, tokenizer_size: int, context: int, dropout: float, pad: int
) -> BertConfig:
    return BertConfig(
        vocab_size=max(size.vocab, tokenizer_size),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=context,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=pad,
    )


def make_bert(config: BertConfig, liger: bool = False) -> BertForMaskedLM:
    """With `liger`, a training step has no logits either."""
    model = BertForMaskedLM(config)
    model.forward = types.MethodType(_forward_where_labelled, model)
    model.fused_loss = liger
    return model


def _forward_where_labelled(
    self: BertForMaskedLM,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    label_positions: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: object,
) -> MaskedLMOutput:
    """The mean loss over the labels, and, except in a training step, their logits (N, V).

    input_ids, labels: int64 (B, S). label_positions: int64 (N,), where labels.flatten() is not
    IGNORED; it saves a read of the device. num_items_in_batch: labels of the whole optimizer step,
    of which this may be a part. Without labels: the logits of all tokens (B, S, V).
    """
    hidden = self.bert(
        input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
    ).last_hidden_state  # (B, S, H)
    if labels is None:
        return MaskedLMOutput(logits=self.cls(hidden))
    labels = labels.flatten()
    if label_positions is None:
        label_positions = (labels != IGNORED).nonzero().squeeze(1)
    labels = labels[label_positions]  # (N,)
    hidden = hidden.flatten(0, 1).index_select(0, label_positions)  # (N, H)
    logits = None
    if self.fused_loss and self.training:
        head = self.cls.predictions
        transformed = head.transform(hidden)
        loss = fused_cross_entropy(transformed, head.decoder.weight, labels, head.decoder.bias)
    else:
        logits = self.cls(hidden)
        loss = F.cross_entropy(logits.float(), labels)
    if num_items_in_batch is not None:
        loss = loss * (len(labels) / num_items_in_batch)
    return MaskedLMOutput(loss=loss, logits=None if self.training else logits)


@torch.no_grad()
def score_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """fp32 (B, 3) from the logits (N, V) of the labelled tokens of labels (B, S): for every row
    summed negative log-likelihood in nats, correct predictions, labels."""
    row, column = (labels != IGNORED).nonzero(as_tuple=True)
    wanted = labels[row, column]
    nll = F.cross_entropy(logits.float(), wanted, reduction="none")
    correct = (logits.argmax(-1) == wanted).float()
    each = torch.stack([nll, correct, torch.ones_like(nll)], 1)  # (N, 3)
    return each.new_zeros(len(labels), 3).index_add_(0, row, each)
