"""Batches of models that are one of a kind, by model type."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .configs import FIRST_SPECIAL
from .inputs import FRAMES, SHORT, Batches, draw, frames_mask, make_batch

Recipe = Callable[[nn.Module], Batches]
RECIPES: dict[str, Recipe] = {}


def recipe(*model_types: str) -> Callable[[Recipe], Recipe]:
    """Registers what makes the batches of these models."""

    def register(make: Recipe) -> Recipe:
        RECIPES.update(dict.fromkeys(model_types, make))
        return make

    return register


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=draw(1))


def tokens(*shape: int) -> Tensor:
    return torch.randint(10, FIRST_SPECIAL, shape, generator=draw(1))


def texts(model: nn.Module, **more: Tensor) -> Batches:
    """Padded right, padded left and short, all beside the same images or sound."""
    return {kind: make_batch(model, kind) | more for kind in ("right", "left", "short")}


# ---- text ----------------------------------------------------------------------------------------


@recipe("gemma4_assistant", "gemma4_unified_assistant")
def _assistants(model: nn.Module) -> Batches:
    """One token to guess, and the keys and values of the model that it assists."""
    config = model.config.text_config
    mask, states = make_batch(model, "right")["attention_mask"], {}
    for layer in model.model.layers:
        heads = config.num_attention_heads // layer.self_attn.num_key_value_groups
        shape = (2, heads, mask.shape[1], layer.self_attn.head_dim)
        states[layer.self_attn.layer_type] = normal(*shape), normal(*shape)
    batch = {
        "inputs_embeds": normal(2, 1, 2 * model.config.backbone_hidden_size),
        "position_ids": torch.full((2, 1), mask.shape[1]),
        "shared_kv_states": states,
    }
    return {"short": batch, "right": batch | {"attention_mask": mask}}


@recipe("voxtral_realtime_text")
def _voxtral_realtime_text(model: nn.Module) -> Batches:
    """Text beside how late it may be, as a state."""
    return texts(model, t_cond=normal(1, 1, model.config.hidden_size))


# ---- images --------------------------------------------------------------------------------------


@recipe("efficientloftr", "lightglue")
def _pairs(model: nn.Module) -> Batches:
    return {"images": {"pixel_values": normal(2, 2, 3, 64, 64)}}


@recipe("gemma4_vision")
def _gemma4_vision(model: nn.Module) -> Batches:
    """Patches of two images, the second with padding."""
    side = 2 * model.config.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).repeat(2, 1, 1)
    places[1, side * side // 2 :] = -1
    patches = normal(2, side * side, 3 * model.config.patch_size**2)
    return {"images": {"pixel_values": patches, "pixel_position_ids": places}}


@recipe("kosmos-2")
def _kosmos2(model: nn.Module) -> Batches:
    """The first tokens of the text stand for the image."""
    count = model.config.latent_query_num
    size = model.config.vision_config.image_size
    mask = torch.ones(2, count + SHORT, dtype=torch.long)
    mask[1, -3:] = 0
    places = torch.zeros_like(mask)
    places[:, :count] = 1
    batch = {
        "pixel_values": normal(2, 3, size, size),
        "input_ids": tokens(2, count + SHORT),
        "image_embeds_position_mask": places,
    }
    return {"short": batch, "right": batch | {"attention_mask": mask}}


@recipe("seggpt")
def _seggpt(model: nn.Module) -> Batches:
    """An image, and a prompt with its mask; each is half of what the model sees."""
    height, width = model.config.image_size
    half = (2, 3, height // 2, width)
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {"images": {name: normal(*half) for name in names}}


@recipe("tvp")
def _tvp(model: nn.Module) -> Batches:
    """A batch of one: its positions have no place for more."""
    size = model.config.max_img_size
    video = normal(1, model.config.num_frames, 3, size, size)
    ids = tokens(1, SHORT)
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    batch = {"input_ids": ids, "pixel_values": video}
    return {
        "short": batch | {"attention_mask": torch.ones_like(ids)},
        "right": batch | {"attention_mask": mask},
    }


@recipe("pp_ocrv5_mobile_rec")
def _lines_of_text(model: nn.Module) -> Batches:
    return {"images": {"pixel_values": normal(2, 3, 96, 160)}}


@recipe("minicpm_ocr_vision", "minicpmv4_7_vision")
def _image_in_a_row(model: nn.Module) -> Batches:
    """Patches of an image beside each other, and how many there were each way."""
    patch = model.config.patch_size
    batch = {
        "pixel_values": normal(1, 3, patch, 2 * 16 * patch),
        "target_sizes": torch.tensor([[4, 4], [4, 4]]),
    }
    return {"images": batch}


@recipe("depth_pro")
def _depth_pro(model: nn.Module) -> Batches:
    side = int(model.config.patch_size / min(model.config.scaled_images_ratios))
    return {"images": {"pixel_values": normal(1, 3, side, side)}}


@recipe("instructblipvideo")
def _instructblipvideo(model: nn.Module) -> Batches:
    """Frames of a video, and a text that begins with their tokens."""
    config = model.config
    size, frames = config.vision_config.image_size, 2
    count = frames * config.num_query_tokens
    held = torch.full((2, count), config.video_token_id)
    batches = {}
    for kind in ("right", "left", "short"):
        text = make_batch(model, kind)
        ones = torch.ones_like(held)
        for name in ("decoder_input_ids", "decoder_attention_mask"):
            text.pop(name)  # its language model is no encoder and decoder
        text["qformer_input_ids"] = text["input_ids"]
        text["qformer_attention_mask"] = text["attention_mask"]
        text["input_ids"] = torch.cat([held, text["input_ids"]], dim=1)
        text["attention_mask"] = torch.cat([ones, text["attention_mask"]], dim=1)
        batches[kind] = text | {"pixel_values": normal(2, frames, 3, size, size)}
    return batches


@recipe("sam2_video", "edgetam_video", "sam3_tracker_video")
def _tracked(model: nn.Module) -> Batches:
    """The second frame of a video, after an object was pointed at in the first."""
    size = model.config.image_size
    home = importlib.import_module(type(model).__module__)
    session_class = getattr(home, type(model).__name__.removesuffix("Model") + "InferenceSession")
    video = normal(2, 3, size, size)

    def after_first_frame(model: nn.Module) -> Any:
        session = session_class(video, size, size, dtype=torch.float32)
        point = {
            "point_coords": torch.full((1, 1, 1, 2), size / 2),
            "point_labels": torch.ones(1, 1, 1, dtype=torch.int32),
        }
        session.add_point_inputs(session.obj_id_to_idx(1), 0, point)
        session.obj_with_new_inputs = [1]
        model(inference_session=session, frame_idx=0)
        return session

    return {"video": {"inference_session": after_first_frame, "frame_idx": 1}}


@recipe("sam3_video")
def _sam3_video(model: nn.Module) -> Batches:
    """The second frame of a video in which everything looks like what is asked for."""
    size = model.config.image_size
    home = importlib.import_module(type(model).__module__)
    video = normal(2, 3, size, size)

    def after_first_frame(model: nn.Module) -> Any:
        session = home.Sam3VideoInferenceSession(video, size, size, dtype=torch.float32)
        prompt = session.add_prompt("all")
        session.prompt_input_ids[prompt] = tokens(1, SHORT)
        session.prompt_attention_masks[prompt] = torch.ones(1, SHORT, dtype=torch.long)
        model(inference_session=session, frame_idx=0)
        return session

    return {"video": {"inference_session": after_first_frame, "frame_idx": 1}}


@recipe("inkling2_vision")
def _inkling2_vision(model: nn.Module) -> Batches:
    """Squares of patches of two images, and how many each has either way."""
    side = model.config.spatial_merge_size * model.config.patch_size
    grid = torch.tensor([[1, 2, 2], [1, 2, 4]])
    return {"images": {"pixel_values": normal(12, side, side, 3), "image_grid_thw": grid}}


@recipe("glm_image_vqmodel")
def _glm_image_vqmodel(model: nn.Module) -> Batches:
    return {"images": {"hidden_states": normal(2, model.config.latent_channels, 4, 4)}}


@recipe("omdet-turbo")
def _omdet(model: nn.Module) -> Batches:
    """Two images, of three classes and one, and what to do with each."""
    return {
        "images": {
            "pixel_values": normal(2, 3, 64, 64),
            "classes_input_ids": tokens(4, SHORT),
            "classes_attention_mask": torch.ones(4, SHORT, dtype=torch.long),
            "tasks_input_ids": tokens(2, SHORT),
            "tasks_attention_mask": torch.ones(2, SHORT, dtype=torch.long),
            "classes_structure": torch.tensor([3, 1]),
        }
    }


@recipe("pe_video", "pe_video_encoder")
def _pe_video(model: nn.Module) -> Batches:
    """Four frames of two videos, of the second only two."""
    videos = {
        "pixel_values_videos": normal(2, 4, 3, 160, 160),
        "padding_mask_videos": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    if model.main_input_name == "input_ids":
        return texts(model, **videos)
    return {"videos": videos}


@recipe("pe_audio_video", "pe_audio_video_encoder")
def _pe_audio_video(model: nn.Module) -> Batches:
    """Two videos with their sound, the second of half the length."""
    sound = normal(2, 1, 9600)
    heard = torch.ones(2, 9600, dtype=torch.long)
    heard[1, 4800:] = 0
    videos = {
        "input_values": sound,
        "padding_mask": heard,
        "pixel_values_videos": normal(2, 4, 3, 160, 160),
        "padding_mask_videos": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    if model.main_input_name == "input_ids":
        return texts(model, **videos)
    return {"videos": videos}


@recipe("pi0")
def _pi0(model: nn.Module) -> Batches:
    """Two cameras, a text that holds their tokens, and the actions to come."""
    vlm = model.config.vlm_config
    size, patch = vlm.vision_config.image_size, vlm.vision_config.patch_size
    count = (size // patch) ** 2
    ids = torch.cat([torch.full((2, 2 * count), vlm.image_token_id), tokens(2, SHORT)], dim=1)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    batch = {
        "action_embeds": normal(2, 5, model.config.dit_config.hidden_size),
        "input_ids": ids,
        "pixel_values": normal(2, 2, 3, size, size),
        "pixel_attention_mask": torch.ones(2, 2, dtype=torch.bool),
    }
    return {
        "short": batch | {"attention_mask": torch.ones_like(ids)},
        "right": batch | {"attention_mask": mask},
    }


# ---- sound and what else is measured over time ---------------------------------------------------


@recipe("clap")
def _clap(model: nn.Module) -> Batches:
    """Spectra of one channel."""
    return texts(model, input_features=normal(2, 1, 128, model.config.audio_config.num_mel_bins))


@recipe("clvp")
def _clvp(model: nn.Module) -> Batches:
    bins = model.config.decoder_config.feature_size
    return texts(model, input_features=normal(2, bins, FRAMES))


@recipe("dia")
def _dia(model: nn.Module) -> Batches:
    """Text, and as many codes a step as there are channels."""
    codes = tokens(2, SHORT, model.config.decoder_config.num_channels)
    batches = {}
    for kind in ("right", "left", "short"):
        text = make_batch(model, kind)
        batches[kind] = {name: text[name] for name in ("input_ids", "attention_mask")}
        batches[kind]["decoder_input_ids"] = codes
    return batches


@recipe("gemma3n_audio")
def _gemma3n_audio(model: nn.Module) -> Batches:
    """Its mask says what is padding."""
    spectrum = normal(2, FRAMES, model.config.input_feat_size)
    return {"short": {"audio_mel": spectrum, "audio_mel_mask": frames_mask() == 0}}


@recipe("granite_speech5_ctc", "granite_speech5_encoder")
def _granite_speech5(model: nn.Module) -> Batches:
    """Four frames of 80 numbers at once."""
    spectrum = normal(2, FRAMES, 320)
    return {
        "right": {"input_features": spectrum, "attention_mask": frames_mask()},
        "short": {"input_features": spectrum},
    }


@recipe(
    "higgs_audio_v2_tokenizer",
    "mimi",
    "mimi_encoder",
    "pocket_tts_audio_tokenizer",
    "pocket_tts_audio_tokenizer_encoder",
)
def _mono(model: nn.Module) -> Batches:
    """Sound of one channel, longer than a window."""
    return {"short": {"input_values": normal(2, 1, 9600)}}


@recipe("neucodec", "xcodec2")
def _sound_and_spectrum(model: nn.Module) -> Batches:
    """Samples, and a frame of the spectrum for each hop of them."""
    bins = model.config.semantic_model_config.feature_projection_input_dim
    sound = normal(2, 1, FRAMES * model.config.hop_length)
    return {"short": {"input_values": sound, "input_features": normal(2, FRAMES, bins)}}


@recipe("nemotron3_5_transcribe_audio")
def _spectrum_of_asr(model: nn.Module) -> Batches:
    spectrum = normal(2, FRAMES, model.config.asr_config.num_mel_bins)
    return {"short": {"input_features": spectrum, "input_features_mask": frames_mask()}}


@recipe("mimi_decoder", "pocket_tts_audio_tokenizer_decoder")
def _latents(model: nn.Module) -> Batches:
    return {"short": {"latents": normal(2, model.config.hidden_size, SHORT)}}


@recipe("vibevoice_acoustic_tokenizer_encoder")
def _samples(model: nn.Module) -> Batches:
    return {"short": {"hidden_states": normal(2, 1, 1600)}}


@recipe("vibevoice_acoustic_tokenizer_decoder")
def _latents_of_vibevoice(model: nn.Module) -> Batches:
    return {"short": {"hidden_states": normal(2, model.config.hidden_size, SHORT)}}


@recipe("nemotron3_5_transcribe_word_timestamp")
def _states_of_frames(model: nn.Module) -> Batches:
    states = normal(2, FRAMES, model.config.hidden_size)
    return {
        "right": {"inputs_embeds": states, "attention_mask": frames_mask()},
        "short": {"inputs_embeds": states},
    }


@recipe("muse_glimmer_assistant")
def _muse_glimmer_assistant(model: nn.Module) -> Batches:
    """A block to fill in, after hidden states of the model that it assists: within a window.

    Without a cache its eager attention does not know how far back the context reaches.
    """
    width = model.encoder.fc.in_features
    return {
        "short": {
            "noise_embeds": normal(2, 3, model.config.hidden_size),
            "context_hidden_states": normal(2, 4, width),
        }
    }


@recipe("timesfm")
def _timesfm(model: nn.Module) -> Batches:
    """Two histories of four patches, the second begins with padding; 0 says how often."""
    length = 4 * model.config.patch_length
    padding = torch.zeros(2, length)
    padding[1, : length // 2] = 1.0
    return {
        "short": {
            "past_values": normal(2, length),
            "past_values_padding": padding,
            "freq": torch.zeros(2, 1, dtype=torch.long),
        }
    }


@recipe("voxtral_realtime")
def _voxtral_realtime(model: nn.Module) -> Batches:
    """As much sound as text."""
    bins = model.config.audio_config.num_mel_bins
    spectrum = normal(2, bins, 8 * SHORT)
    return {"short": {"input_ids": tokens(2, SHORT), "input_features": spectrum}}
