"""Tiny models of the families that compute their attention themselves, two layers, fp32."""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf
from model_helpers import HIDDEN, VOCAB, build
from transformers import PreTrainedModel

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    **NO_DROPOUT,
}
GPT = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": HIDDEN,
    "vocab_size": VOCAB,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FALCON = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BLOOM = {
    "n_layer": 2,
    "n_head": 4,
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
XGLM = {
    "num_layers": 2,
    "attention_heads": 4,
    "d_model": HIDDEN,
    "ffn_dim": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BART = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": HIDDEN,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "dropout": 0.0,
}
NEO = {
    "num_layers": 2,
    "num_heads": 4,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 32,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
XLM = {
    "n_layers": 2,
    "n_heads": 4,
    "emb_dim": HIDDEN,
    "vocab_size": VOCAB,
    "n_words": VOCAB,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "embed_init_std": 0.3,
    "init_std": 0.3,
    "n_langs": 1,
    "use_lang_emb": False,
}

# class, config class, options, whether it takes a causal cache
DECODERS: dict[str, tuple[str, str, dict]] = {
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", GPT | {"rotary_dim": 4}),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", NEO),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        "GPTNeoXJapaneseConfig",
        {name: x for name, x in BERT.items() if name not in NO_DROPOUT}
        | {"attention_dropout": 0.0, "hidden_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "falcon_mqa": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | {"alibi": False, "multi_query": True, "new_decoder_architecture": False},
    ),
    "falcon_mha": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | {"alibi": False, "multi_query": False, "new_decoder_architecture": False},
    ),
    "falcon_gqa": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", XGLM),
    "imagegpt": (
        "ImageGPTForCausalImageModeling",
        "ImageGPTConfig",
        GPT | {"vocab_size": VOCAB + 1, "tie_word_embeddings": False},
    ),
    "imagegpt_upcast": (
        "ImageGPTForCausalImageModeling",
        "ImageGPTConfig",
        GPT
        | {"vocab_size": VOCAB + 1, "tie_word_embeddings": False}
        | {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ),
    "big_bird": (
        "BigBirdForCausalLM",
        "BigBirdConfig",
        BERT | {"attention_type": "original_full", "is_decoder": True, "hidden_act": "gelu"},
    ),
    "trocr": (
        "TrOCRForCausalLM",
        "TrOCRConfig",
        {name: x for name, x in BART.items() if "encoder" not in name}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "megatron_bert": ("MegatronBertForCausalLM", "MegatronBertConfig", BERT | {"is_decoder": True}),
    "rembert": (
        "RemBertForCausalLM",
        "RemBertConfig",
        BERT
        | {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 16}
        | {"bos_token_id": 0, "eos_token_id": 0, "classifier_dropout_prob": 0.0},
    ),
    "roformer": (
        "RoFormerForCausalLM",
        "RoFormerConfig",
        BERT | {"is_decoder": True, "bos_token_id": 0, "eos_token_id": 0},
    ),
}
BIASED_DECODERS: dict[str, tuple[str, str, dict]] = {
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM),
    "falcon_alibi": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"n_layers": 2, "n_heads": 4, "d_model": HIDDEN, "vocab_size": VOCAB, "max_seq_len": 64}
        | {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0},
    ),
}
ENCODERS: dict[str, tuple[str, str, dict]] = {
    "megatron_bert": ("MegatronBertModel", "MegatronBertConfig", BERT),
    "rembert": ("RemBertModel", "RemBertConfig", BERT | {"input_embedding_size": 16}),
    "roformer": ("RoFormerModel", "RoFormerConfig", BERT | {"embedding_size": HIDDEN}),
    "roformer_rotary_value": (
        "RoFormerModel",
        "RoFormerConfig",
        BERT | {"embedding_size": HIDDEN, "rotary_value": True},
    ),
    "tapas": ("TapasModel", "TapasConfig", BERT | {"type_vocab_sizes": [3, 9, 9, 2, 9, 9, 9]}),
    "luke": (
        "LukeModel",
        "LukeConfig",
        BERT | {"entity_vocab_size": 20, "entity_emb_size": 16},
    ),
    "ibert": ("IBertModel", "IBertConfig", BERT),
    "squeezebert": (
        "SqueezeBertModel",
        "SqueezeBertConfig",
        BERT | {"embedding_size": HIDDEN, "intermediate_size": 64},
    ),
    "convbert": (
        "ConvBertModel",
        "ConvBertConfig",
        BERT | {"embedding_size": HIDDEN, "head_ratio": 2, "conv_kernel_size": 3},
    ),
    "big_bird": ("BigBirdModel", "BigBirdConfig", BERT | {"attention_type": "original_full"}),
    "flava": ("FlavaTextModel", "FlavaTextConfig", BERT),
    "groupvit": (
        "GroupViTTextModel",
        "GroupViTTextConfig",
        {name: x for name, x in BERT.items() if name not in NO_DROPOUT}
        | {"eos_token_id": VOCAB - 1, "initializer_factor": 3.0, "dropout": 0.0},
    ),
    "blip_text": ("BlipTextModel", "BlipTextConfig", BERT | {"is_decoder": False}),
    "visual_bert": ("VisualBertModel", "VisualBertConfig", BERT | {"visual_embedding_dim": 8}),
    "openai": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT | {"afn": "gelu"}),
    "xlm": ("XLMWithLMHeadModel", "XLMConfig", XLM),
    "xlm_causal": ("XLMWithLMHeadModel", "XLMConfig", XLM | {"causal": True}),
    "flaubert": ("FlaubertWithLMHeadModel", "FlaubertConfig", XLM),
}
BIASED_ENCODERS: dict[str, tuple[str, str, dict]] = {
    "mpnet": ("MPNetModel", "MPNetConfig", BERT),
}
SEQ2SEQ: dict[str, tuple[str, str, dict]] = {
    "mvp": ("MvpForConditionalGeneration", "MvpConfig", BART),
    "fsmt": (
        "FSMTForConditionalGeneration",
        "FSMTConfig",
        {name: x for name, x in BART.items() if name != "vocab_size"}
        | {"langs": ["de", "en"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB},
    ),
}


def make(entry: tuple[str, str, dict], **changes) -> PreTrainedModel:
    model, config, options = entry
    return build(getattr(tf, model), getattr(tf, config)(**(options | changes)))


Make = Callable[..., PreTrainedModel]
