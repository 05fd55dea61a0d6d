"""Tiny models in the form that Transformers' common tests ask for, one tester a family.

Transformers' source distribution has the common tests and no tests/models: these stand in for the
testers there. In a full checkout its own are used instead; see transformers_tests.py.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
import transformers
from torch import Tensor

BATCH, LENGTH, VOCABULARY = 7, 9, 99

DECODER = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 37,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**DECODER, "num_key_value_heads": 2, "attention_dropout": 0.0}
BERT = {
    **DECODER,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 64,
}
GPT2 = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
VIT = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 37,
    "image_size": 30,
    "patch_size": 6,
}

# family -> (configuration, its arguments, model classes)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "bert": (
        "BertConfig",
        BERT,
        ("BertModel", "BertLMHeadModel", "BertForMaskedLM", "BertForSequenceClassification"),
    ),
    "gpt2": ("GPT2Config", GPT2, ("GPT2Model", "GPT2LMHeadModel")),
    "llama": ("LlamaConfig", GROUPED, ("LlamaModel", "LlamaForCausalLM")),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}, ("Qwen3Model", "Qwen3ForCausalLM")),
    "t5": ("T5Config", T5, ("T5Model", "T5ForConditionalGeneration")),
    "bart": ("BartConfig", BART, ("BartModel", "BartForConditionalGeneration")),
    "mistral": (
        "MistralConfig",
        {**GROUPED, "sliding_window": 5},
        ("MistralModel", "MistralForCausalLM"),
    ),
    "gemma2": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5},
        ("Gemma2Model", "Gemma2ForCausalLM"),
    ),
    "vit": ("ViTConfig", VIT, ("ViTModel", "ViTForImageClassification")),
    "modernbert": (
        "ModernBertConfig",
        {**DECODER, "max_position_embeddings": 64, "local_attention": 6, "num_hidden_layers": 4},
        ("ModernBertModel", "ModernBertForMaskedLM"),
    ),
}


class Tester:
    """What a test class of Transformers calls model_tester: makes configurations and inputs."""

    batch_size, seq_length, is_training = BATCH, LENGTH, True

    def __init__(self, family: str, device: str) -> None:
        self.family, self.device = family, device
        name, self.arguments, _ = FAMILIES[family]
        self.config_class = getattr(transformers, name)
        if family == "vit":
            self.seq_length = (VIT["image_size"] // VIT["patch_size"]) ** 2 + 1
            self.mask_length = self.seq_length - 1  # of bool_masked_pos: patches alone
            self.num_masks = self.mask_length // 2

    def get_config(self) -> transformers.PreTrainedConfig:
        return self.config_class(**self.arguments)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        """A new configuration, and inputs: int64 (BATCH, LENGTH), pixels (BATCH, 3, 30, 30)."""
        config = self.get_config()
        if self.family == "vit":
            size = VIT["image_size"]
            return config, {"pixel_values": torch.rand(BATCH, 3, size, size, device=self.device)}
        inputs = {"input_ids": self._ids(), "attention_mask": self._ones()}
        if config.is_encoder_decoder:
            inputs |= {"decoder_input_ids": self._ids(), "decoder_attention_mask": self._ones()}
        return config, inputs

    def _ids(self) -> Tensor:
        return torch.randint(3, VOCABULARY, (BATCH, LENGTH), device=self.device)

    def _ones(self) -> Tensor:
        return torch.ones(BATCH, LENGTH, dtype=torch.long, device=self.device)


def make_class(family: str, mixin: type, device: str) -> type[unittest.TestCase]:
    """A test class of `family` over Transformers' ModelTesterMixin."""
    classes = tuple(getattr(transformers, name) for name in FAMILIES[family][2])

    def setUp(self) -> None:
        self.model_tester = Tester(family, device)

    body = {
        "all_model_classes": classes,
        "is_encoder_decoder": family in ("t5", "bart"),
        "setUp": setUp,
    }
    return type(f"{family.capitalize()}Test", (mixin, unittest.TestCase), body)
