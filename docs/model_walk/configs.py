"""Config classes' defaults made tiny, by rules for the names of their attributes; and the model."""

from __future__ import annotations

import copy
import importlib
import re
import textwrap
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .recipes import CONFIGS, FORWARDS, IMAGE, STARTS
from .tasks import TASKS

VOCABULARY, FIRST_SPECIAL = 160, 120  # tokens of a batch lie below the special ones
LARGEST = 125_000_000  # parameters of a model that counts as tiny


WHY_WIDTH = 110  # characters of one reason
MISSING = ", which is not installed"


def shortened(text: str) -> str:
    return textwrap.shorten(text, WHY_WIDTH, placeholder=" ...")


def line_of(error: Exception) -> str:
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"needs {error.name}{MISSING}"
    if missing := re.search(r"requires the (\w+) library", text):
        return f"needs {missing[1]}{MISSING}"
    if "validator" in text:  # Hugging Face's dataclasses wrap what their checks raise
        return shortened(re.sub(r"^.*?Error: ", "", text, flags=re.DOTALL))
    return shortened(f"{type(error).__name__}: {text}")


class NotBuilt(Exception):
    """There is no tiny model of this type that runs on what make_batches makes; says why."""


# The first pattern that fits the whole name of an attribute gives its value. Only numbers that are
# larger are replaced, so that what is switched off (0, None) stays off.
RULES: tuple[tuple[str, float], ...] = (
    (r".*vocab_size.*|n_vocab", VOCABULARY),
    (r"(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len)", 64),
    (r"num_(object_)?queries", 8),
    (r"num_pos_feats", 32),
    (r"upsample_groups|output_channels|fpn_hidden_size", 64),
    (r"(num_)?(key_value|kv)_heads|num_key_value_heads|n_head_kv|linear_num_key_heads", 2),
    (r"(num|n|encoder|decoder|linear_num_value)_?(attention_)?heads?", 4),
    (r"n_heads?|num_attention_heads|mamba_num_heads|num_encoder_attention_heads", 4),
    (r"mamba_n_heads", 8),
    (r"mamba_(d_head|head_dim)|ssm_head_dim", 16),
    (r"(global_)?head_dim|v_head_dim|qk_nope_head_dim|d_kv|linear_(key|value)_head_dim", 16),
    (r"attention_head_size|kv_channels|qk_head_dim|(key|value)_length", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"(hidden|embedding|input_embedding)_size|d_model|n_embd|dim|emb_dim|embed_dim", 64),
    (r"(word_embed_proj|decoder_hidden|encoder_hidden|attention_hidden)_(dim|size)", 64),
    (r"moe_k", 2),
    (r".*(intermediate|ffn|mlp)_(size|hidden_size|dim)|d_ff|n_inner|(ffn|hidden)_dim", 64),
    (r"(num|n|encoder|decoder)_?(hidden_|encoder_|decoder_)?layers?", 2),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"(num_)?experts?_(per_tok|top_k)|num_experts_per_tok(en)?|moe_top_?k|top_k_experts", 2),
    (
        r"n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace",
        1,
    ),
    (r"q_lora_rank|kv_lora_rank|.*lora_rank.*", 16),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)|mamba_n_groups|chunk_size", 8),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention|window_size", 8),
    (r"num_(nextn_predict|mtp|kv_shared)_layers|mtp_num_layers", 0),
    (r"image_size|input_size", IMAGE),
    (r"(out|text|audio)_hidden_size|condition_dim|codebook_dim", 64),
)
# Raised, to make attention far from uniform: with 0.02 every key would weigh the same.
SPREAD = {"initializer_range": 0.15, "init_std": 0.15}
# Types whose rotary positions are of time, height and width; the sizes of these are in the code.
SECTIONS = (
    (r"glm4v_moe|hy_v4_vl", [1, 1, 2]),  # of a quarter of a head
    (r"ernie4_5_vl", [3, 3, 2]),
    (r"_vl|glm4v|glm46v|glm_ocr|glm_image|omni|paddleocr|cosmos3|qwen3_5|qwen4", [2, 3, 3]),
)
# What some classes leave to be worked out later, and never do.
IF_NONE = {"head_dim": 16, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
# Where the rules fail: attributes given outright.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esmc": {"num_key_value_heads": 4, "vocab_size": VOCABULARY},
    "esm": {"pad_token_id": 1, "mask_token_id": 119},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longformer": {"attention_window": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8},
    "xmod": {"default_language": "en_XX"},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16},
}
for _name in ("swin", "swinv2", "swin2sr", "donut-swin", "maskformer-swin"):
    OVERRIDES[_name] = {"embed_dim": 48, "window_size": 2}
for _name in ("detr", "conditional_detr", "table-transformer", "dab-detr", "deformable_detr"):
    OVERRIDES[_name] = {
        "use_timm_backbone": False,
        "backbone": None,
        "backbone_config": {"model_type": "resnet", "hidden_sizes": [64] * 4, "depths": [1] * 4},
    }
OVERRIDES["led"] = OVERRIDES["longformer"]
HIERA = {
    "hidden_size": 32,
    "num_attention_heads": 1,
    "blocks_per_stage": [1, 2, 1, 1],
    "global_attention_blocks": [2],  # no first block of a stage
    "embed_dim_per_stage": [32, 64, 128, 256],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 4, 4],
    "image_size": [IMAGE, IMAGE],
}
OVERRIDES |= {
    "sam2_hiera_det_model": HIERA,
    "sam2_vision_model": {"backbone_channel_list": [256, 128, 64, 32]},
    "blt_local_decoder": {"hidden_size_global": 64},
    "granite_speech5_encoder": {"context_size": 8},
    "glm5_next_text": {"num_key_value_heads": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": OVERRIDES["reformer"]
    | {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "eos_token_id": 120}
    | {"lsh_attention_probs_dropout_prob": 0.0, "num_hashes": 1, "num_buckets": 2},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "timesfm": {"context_length": 32, "horizon_length": 8},
    "patchtst": {"context_length": 32},
    "patchtsmixer": {"context_length": 32},
    "maskformer-swin": OVERRIDES["maskformer-swin"] | {"hidden_size": 48},
    "layoutlmv3": {"input_size": IMAGE, "coordinate_size": 8, "shape_size": 16},
    "perceiver": {
        "d_latents": 64,
        "d_model": 64,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
    },
    "lilt": {"hidden_size": 48},
    # Its convolutions of random weights grow with depth, to scores of 1e17.
    "hgnet_v2": {"stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1]},
    "vits": {"vocab_size": VOCABULARY},
    "fastspeech2_conformer": {"vocab_size": VOCABULARY},
    "efficientnet": {"hidden_dim": 2560},
    "tvp": {"max_img_size": IMAGE, "visual_prompt_size": 8},
    "qwen2_5_vl_vision": {"window_size": 56, "fullatt_block_indexes": [1]},
    "exaone4_5_vision": {"window_size": 56, "fullatt_block_indexes": [1]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "blip-2": {"image_token_index": 121, "image_token_id": 121},
    "instructblip": {"image_token_index": 121, "image_token_id": 121},
    "instructblipvideo": {"video_token_index": 121, "video_token_id": 121},
    "seggpt": {
        "image_size": [IMAGE, IMAGE // 2],
        "intermediate_hidden_state_indices": [0, 1],
        "merge_index": 0,
    },
    "sam_prompt_encoder_config": {"hidden_size": 32},
}
for _name in ("time_series_transformer", "informer", "autoformer"):
    OVERRIDES[_name] = {
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
    }
for _name in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4"):
    OVERRIDES[_name] = {"decoder_in_channels": [64, 64, 64]}
for _name in ("", "_encoder", "_decoder"):
    OVERRIDES[f"vibevoice_acoustic_tokenizer{_name}"] = {
        "num_filters": 4,
        "depths": [1, 1, 1],
        "downsampling_ratios": [4, 4],
    }
# Their backward pass draws what it needs only in training; without dropout it is the same.
TRAINS = ("reformer",)


def tiny_config(model_type: str, task: str) -> PreTrainedConfig:
    """The config class's defaults, made small by RULES."""
    cls = CONFIG_MAPPING[model_type]
    start = cls(**copy.deepcopy(STARTS.get(model_type, {})))
    given = _shrunk(start)
    given.update(OVERRIDES.get(model_type, {}))
    _lay_over(given, CONFIGS.get(model_type, {}))
    if task == "causal" and not getattr(start, "is_encoder_decoder", False):
        given["is_decoder"] = True
    return cls(**given)


def _lay_over(given: dict[str, Any], more: dict[str, Any]) -> None:
    """Updates given, and the configs of parts inside it."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            _lay_over(given[name], value)
        else:
            given[name] = copy.deepcopy(value)


def _special(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config inside another one has other than the defaults of its class."""
    plain = vars(type(config)())
    given = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (int, float, str, list)) and name in plain and value != plain[name]
    }
    if "_out_features" in plain and "num_hidden_layers" not in plain:
        # The stages of a backbone that are looked at; of one by layers, most are gone.
        given["out_features"] = config.out_features
    return given


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The arguments for the config's class that differ from its defaults."""
    given: dict[str, Any] = {}
    specials = 0
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = {"model_type": value.model_type, **_special(value), **_shrunk(value)}
            given[name] |= OVERRIDES.get(value.model_type, {})
        elif name in SPREAD and isinstance(value, float):
            given[name] = SPREAD[name]
        elif (
            re.fullmatch(r".*_token_(id|index)", name)
            and isinstance(value, int)
            and value >= FIRST_SPECIAL
        ):
            given[name] = FIRST_SPECIAL + specials  # may double as another's: none is in a batch
            specials += 1
        elif re.fullmatch(r".*_token_id", name) and isinstance(value, list):
            given[name] = FIRST_SPECIAL + specials
            specials += 1
        elif name == "rope_parameters" and (sections := _sections(config.model_type)):
            given[name] = (value or {}) | {"mrope_section": sections}
        elif value is None and name in IF_NONE:
            given[name] = IF_NONE[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            small = next((x for pattern, x in RULES if re.fullmatch(pattern, name)), None)
            if small is not None and value > small:
                given[name] = small
    if "qk_rope_head_dim" in given:  # latent attention: as many keys as queries, rotary head_dim
        given |= {"num_key_value_heads": 4, "head_dim": given["qk_rope_head_dim"]}
        given.pop("qk_head_dim", None)
    which = next((x for x in ("layer_types", "layers_block_type") if vars(config).get(x)), "")
    if kinds := vars(config).get(which):  # one layer of each kind, two at least
        chosen = list(dict.fromkeys(kinds))
        chosen = chosen * 2 if len(chosen) == 1 else chosen
        given[which] = chosen
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in vars(config):
                given[name] = len(chosen)
    return given


def _sections(model_type: str) -> list[int] | None:
    return next((x for pattern, x in SECTIONS if re.search(pattern, model_type)), None)


def _model_class(model_type: str, name: str) -> type[PreTrainedModel]:
    """The class of this name, which Transformers may keep in the module beside the config."""
    home = CONFIG_MAPPING[model_type].__module__.replace(".configuration_", ".modeling_")
    cls = getattr(transformers, name, None) or getattr(importlib.import_module(home), name, None)
    if cls is None:
        raise NotBuilt(f"transformers has no {name}")
    return cls


def build(model_type: str, task: str) -> nn.Module:
    """The model of this type on eager, fp32, in eval mode. Raises NotBuilt."""
    cls = _model_class(model_type, TASKS[task][model_type])
    if model_type in FORWARDS:
        named = {"forward": FORWARDS[model_type], "__module__": cls.__module__}
        cls = type(cls.__name__, (cls,), named)
    takes = getattr(cls, "main_input_name", "input_ids")
    if takes not in ("input_ids", "inputs") and task != "base":
        raise NotBuilt(f"takes {takes}, not text")
    try:
        config = tiny_config(model_type, task)
        if not isinstance(config, cls.config_class):
            text = config.get_text_config(decoder=True)
            config = text if isinstance(text, cls.config_class) else config
        config._attn_implementation = "eager"
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise NotBuilt(f"{size / 1e6:.0f} million parameters after shrinking")
        torch.manual_seed(0)
        return cls(config).float().train(model_type in TRAINS)
    except NotBuilt:
        raise
    except Exception as error:  # configs and models run code of their own
        raise NotBuilt(line_of(error)) from error
