"""Tiny encoders of the families that can run without padding, and padded batches for them."""

from __future__ import annotations

import pytest
import transformers
from model_helpers import HIDDEN, VOCAB, build, padding, tokens
from torch import nn

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
DISTIL = {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0}
# a window of 4 tokens to each side, in every second layer
MODERN = {"local_attention": 8, "global_attn_every_n_layers": 2, "mask_token_id": 3}

ROC = {"pronunciation_vocab_size": 9, "shape_vocab_size": 9}
ENCODERS = {  # what: (class, options of its config)
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForTokenClassification", {}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {}),
    "xlm-roberta-xl": ("XLMRobertaXLModel", {}),
    "camembert": ("CamembertModel", {}),
    "electra": ("ElectraForMaskedLM", {"embedding_size": 16}),
    "albert": ("AlbertForMaskedLM", {"embedding_size": 16}),
    "ernie": ("ErnieModel", {}),
    "data2vec": ("Data2VecTextModel", {}),
    "rocbert": ("RoCBertModel", ROC),
    "roberta-prelayernorm": ("RobertaPreLayerNormModel", {}),
    "esm": ("EsmModel", {"position_embedding_type": "rotary", "mask_token_id": 3}),
    "distilbert": ("DistilBertModel", DISTIL),
    "modernbert": ("ModernBertForMaskedLM", {"mask_token_id": 3}),
    "modernbert-window": ("ModernBertModel", MODERN),
    "eurobert": ("EuroBertModel", {"mask_token_id": 3}),
    "bart-encoder": ("BartModel", BART),
}


def make(what: str, **changes) -> nn.Module:
    """One of ENCODERS, evaluating; skips if this Transformers lacks it."""
    name, options = ENCODERS[what]
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"this Transformers has no {name}")
    sizes = {} if options in (BART, DISTIL) else SIZES
    known = {"vocab_size": VOCAB, "pad_token_id": 0} | sizes | options | changes
    model = build(cls, cls.config_class(**known))
    for parameter in model.parameters():  # large enough that a wrong token shows
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.base_model.encoder if what == "bart-encoder" else model


def batch(kind: str) -> dict:
    """Token ids that are padding where the mask says so, and the mask."""
    ids, mask = tokens().clamp_min(4), padding(kind)
    return {"input_ids": ids if mask is None else ids * mask, "attention_mask": mask}
