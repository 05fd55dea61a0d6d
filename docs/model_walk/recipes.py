"""Models that are one of a kind: what the rules of configs.py cannot know.

CONFIGS is laid over the tiny config, a dict over the config of the part that it names.
STARTS is what a class needs before it has any defaults to make small.
FORWARDS is of classes that have none. The batches are in recipe_batches.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE = 64  # the sides of an image, unless the config insists on others

CONFIGS: dict[str, dict[str, Any]] = {}
STARTS: dict[str, dict[str, Any]] = {}


def _bark(self: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
    """Its three models, which generate one after the other, side by side: (B, S, vocabularies)."""
    given = {"attention_mask": attention_mask}
    books = input_ids[..., None].repeat(1, 1, self.config.fine_acoustics_config.n_codes_total)
    logits = (
        self.semantic(input_ids=input_ids, **given).logits,
        self.coarse_acoustics(input_ids=input_ids, **given).logits,
        self.fine_acoustics(codebook_idx=2, input_ids=books, **given).logits,
    )
    return (torch.cat(logits, dim=-1),)


def _glm_image_vqmodel(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor]:
    return (self.encode(hidden_states).quantized_last_hidden_state,)


FORWARDS = {"bark": _bark, "glm_image_vqmodel": _glm_image_vqmodel}
# Eager takes the mask, 0 where a key is seen, for one that is true there: only SDPA is right.
AGAINST_SDPA = ("nemotron_asr_streaming", "nemotron_asr_streaming_encoder", "nemotron3_5_asr")

# ---- text ----------------------------------------------------------------------------------------

CONFIGS |= {
    # Codes of images and sound have places in the vocabulary.
    "apertus1p5": {
        "image_token_offset": 130,
        "vision_config": {
            "codebook_size": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
        "audio_token_offset": 138,
        "audio_config": {"codebook_size": 8},
    },
    # Their code reads what the defaults lack.
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2}},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "dots3_note": {
        "vision_config": {
            "pyramid_num_routed": [-1, 4],
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "gemma4_assistant": {"backbone_hidden_size": 64},
    "gemma4_unified_assistant": {"backbone_hidden_size": 64},
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
}
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
STARTS["gemma4_assistant"] = {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}}

# ---- images --------------------------------------------------------------------------------------

_SAM_LEVELS = [[16, 16], [8, 8], [4, 4]]


def _sam(width: int) -> dict[str, Any]:
    return {
        "vision_config": {"backbone_feature_sizes": _SAM_LEVELS, "fpn_hidden_size": width},
        "prompt_encoder_config": {"image_size": IMAGE, "hidden_size": width},
        "mask_decoder_config": {"hidden_size": width},
    }


# Memories of earlier frames are 64 wide in the code, and pointers to objects are cut to that.
_SAM_VIDEO = _sam(128) | {
    "memory_attention_hidden_size": 128,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 128,
    "mask_downsampler_embed_dim": 128,
    "memory_fuser_embed_dim": 128,
}
CONFIGS |= {
    "chameleon": {
        # "IMGIMG", the digits of a code as letters, "Z"
        "vocabulary_map": {"<image>": 120} | {f"IMGIMG{chr(65 + i)}Z": 121 + i for i in range(8)},
        "vq_config": {
            "num_embeddings": 8,
            "base_channels": 32,
            "resolution": IMAGE,
            "channel_multiplier": [1, 1],
            "latent_channels": 32,
        },
    },
    "depth_pro": {
        "patch_size": 32,
        "image_model_config": {"image_size": 32},
        "patch_model_config": {"image_size": 32},
        "fov_model_config": {"image_size": 32},
        "intermediate_hook_ids": [1, 0],
    },
    "efficientloftr": {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_attention_layers": 2,
    },
    "instructblipvideo": {"text_config": {"max_position_embeddings": 128}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    # No layer is left out for being sure enough, and every match counts.
    "lightglue": {"depth_confidence": -1.0, "width_confidence": -1.0, "filter_threshold": 0.0},
    "lw_detr": {
        "backbone_config": {
            "num_hidden_layers": 2,
            "window_block_indices": [0],
            "out_indices": [0, 1],
        },
        "projector_scale_factors": [1.0],
    },
    "omdet-turbo": {
        "use_timm_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "swin",
            "image_size": IMAGE,
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 8],
            "window_size": 2,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "encoder_in_channels": [32, 64, 128],
        "vision_features_channels": [32, 32, 32],
        "text_projection_out_dim": 64,
        "class_embed_dim": 64,
        "d_model": 32,
        "decoder_hidden_dim": 32,
        "apply_layernorm_after_vision_backbone": False,
        "text_projection_in_dim": 64,
        "image_size": IMAGE,
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "pp_ocrv6_small_det": {"layer_list_out_channels": [64, 128, 256, 512]},
    "pp_ocrv6_medium_det": {
        "neck_out_channels": 64,
        "scale_factor_list": [1, 2, 4, 8],
        "intraclass_block_config": {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
        | {
            f"{way}_{size}ratio": [[a, b], [1, 1], [a // 2, b // 2]]
            for size, n in (("long", 7), ("mid", 5), ("short", 3))
            for way, a, b in (
                ("vertical_long_to_small_conv", n, 1),
                ("horizontal_small_to_long_conv", 1, n),
                ("symmetric_conv_long", n, n),
            )
        },
    },
    "pi0": {"vlm_config": {"projection_dim": 64}},
    "sam2": _sam(64),
    "sam2_video": _SAM_VIDEO,
    "edgetam_video": _SAM_VIDEO
    | {
        "memory_attention_rope_k_sizes": [2, 2],
        "perceiver_resampler_num_latents": 4,
        "perceiver_resampler_num_latents_2d": 4,
    },
    "sam3_tracker_video": _SAM_VIDEO | {"image_size": 56},
    "sam3_tracker": _sam(64),
    "sam3_video": {
        "detector_config": {
            "image_size": 56,
            "vision_config": {"fpn_hidden_size": 128},
        }
        | {
            f"{part}_config": {"hidden_size": 128}
            for part in ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
        },
        "tracker_config": _SAM_VIDEO | {"image_size": 56},
        "low_res_mask_size": 16,
        "score_threshold_detection": 0.0,
        "new_det_thresh": 0.0,
        "det_nms_thresh": 0.0,
    },
    "tvp": {"num_frames": 4},
    "uvdoc": {"backbone_config": {"out_features": [f"stage{i}" for i in range(1, 7)]}},
    "videoprism": {"vision_config": {"num_frames": 4}},
}

_STAGES = [f"stage{i}" for i in range(1, 6)]
STARTS |= {
    "pp_ocrv6_small_det": {
        "backbone_config": {"model_type": "pp_lcnet_v3", "out_features": _STAGES[1:]}
    },
    "pp_ocrv6_medium_det": {
        "backbone_config": {"model_type": "hgnet_v2", "out_features": _STAGES[:-1]}
    },
}

# ---- sound and what else is measured over time ---------------------------------------------------

CONFIGS |= {
    "autoformer": {"label_length": 4},
    "clap": {
        "audio_config": {
            "patch_embeds_hidden_size": 24,
            "hidden_size": 192,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 8],
        }
    },
    # Its positions rotate 32 numbers of a head at least.
    "clvp": {
        part: {"hidden_size": 128, "projection_dim": 128}
        for part in ("text_config", "speech_config", "decoder_config")
    },
    "dia": {
        "decoder_config": {
            "cross_hidden_size": 64,
            "cross_num_attention_heads": 4,
            "cross_num_key_value_heads": 4,
        }
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "mimi": {"codebook_dim": 16, "vector_quantization_hidden_dimension": 16},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_spark_audio": {
        "patch_sizes": [16, 5],
        "hidden_sizes": [32, 64],
        "depths": [1, 1],
        "num_hidden_layers": 2,
    },
    "xcodec": {"codebook_dim": None},
    "higgs_audio_v2_tokenizer": {
        "acoustic_model_config": {
            "downsampling_ratios": [8, 5, 4, 2, 3],
            "upsampling_ratios": [8, 5, 4, 2, 3],
        },
    },
    "neucodec": {"quantization_dim": 128, "num_key_value_heads": 4},
    "xcodec2": {"quantization_dim": 128, "num_key_value_heads": 4},
    "nemotron3_5_transcribe_audio": {
        "asr_config": {"num_key_value_heads": 4},
        "diarization_config": {"audio_config": {"num_key_value_heads": 4}},
    },
}
CONFIGS["muse_spark"] = {"audio_config": CONFIGS["muse_spark_audio"]}
# Values have as many heads as queries there, whatever the keys have.
for _name in (
    "nemotron3_5_transcribe_asr_audio",
    "nemotron3_5_transcribe_word_timestamp",
    "nemotron3_diarization_audio",
    "granite_speech5_encoder",
):
    CONFIGS[_name] = {"num_key_value_heads": 4}
CONFIGS["granite_speech5_ctc"] = {"encoder_config": {"num_key_value_heads": 4}}
CONFIGS["nemotron3_diarization"] = {"audio_config": {"num_key_value_heads": 4}}
# What a frame hears: a window and the frames to come, which a shorter window has to hold.
_HEARD = {"sliding_window": 9, "default_num_lookahead_tokens": 3}
CONFIGS["nemotron_asr_streaming_encoder"] = _HEARD
for _name in ("nemotron_asr_streaming", "nemotron3_5_asr"):
    CONFIGS[_name] = {"encoder_config": _HEARD}

# ---- with a part of timm's -----------------------------------------------------------------------

_TIMM = {"model_type": "timm_wrapper", "architecture": "test_vit"}
_RESNET = {
    "model_type": "timm_wrapper",
    "architecture": "test_resnet",
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
    "num_classes": 10,
}
_EDGE = {
    "backbone_feature_sizes": _SAM_LEVELS,
    "backbone_config": _RESNET,
    "backbone_channel_list": [96, 192, 48, 32],
}
CONFIGS |= {
    "edgetam": _sam(64) | {"vision_config": _EDGE},
    "edgetam_vision_model": _EDGE,
    "fast_vlm": {"vision_config": _TIMM},
    "gemma3n": {"vision_config": {"architecture": "test_vit"}},
    "gemma3n_vision": {"architecture": "test_vit"},
    "pe_video_encoder": {"vision_config": _TIMM},
    "pe_video": {"video_config": {"vision_config": _TIMM}},
    "pe_audio_video_encoder": {"video_config": {"vision_config": _TIMM}},
    "pe_audio_video": {"audio_video_config": {"video_config": {"vision_config": _TIMM}}},
    "perception_lm": {"vision_config": _TIMM | {"model_args": {"embed_dim": 64}}},
    "timm_backbone": {"backbone": "test_resnet"},
    "timm_wrapper": {"architecture": "test_vit"},
}
