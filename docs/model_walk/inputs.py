"""Batches that a model may run on: text, images, sound, and what else it asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .configs import FIRST_SPECIAL, IMAGE, NotBuilt

LENGTHS = (12, 9)  # of the two rows of a batch; a window is 8 wide
SHORT = 7  # tokens of a batch within it
SAMPLES = (2400, 1600)  # of the two sounds of a batch
FRAMES = 32  # of a spectrum
BINS = ("num_mel_bins", "feature_projection_input_dim", "feature_size", "input_dim", "n_mels")
GRID = [[1, 4, 4], [1, 4, 8]]  # patches of two images: time, height, width

# By their kind. Values are tensors, or functions of the model that make what one run uses up.
Batches = dict[str, dict[str, Any]]


def make_batches(model: nn.Module) -> Iterator[Batches]:
    """What the model may run on, the likeliest first: batches by their kind."""
    takes, main = inspect.signature(model.forward).parameters, model.main_input_name
    kinds = {
        "input_ids": _texts,
        "pixel_values": _images,
        "input_values": _sounds,
        "input_features": _spectra,
        "pixel_values_videos": _videos,
    }
    if isinstance(main, str) and main in kinds:
        yield from kinds[main](model, takes)
    yield from _by_name(model, takes)


def make_batch(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """Rows of LENGTHS tokens, padded "right" or "left"; "short": within a window, no padding.

    A decoder that stands apart has padding too, always right.
    """
    takes = inspect.signature(model.forward).parameters
    ids = _tokens()
    positions = torch.arange(max(LENGTHS))
    right = (positions < torch.tensor(LENGTHS)[:, None]).long()
    mask = right.flip(1) if kind == "left" else right
    batch = {"input_ids": ids, "attention_mask": mask}
    if "decoder_input_ids" in takes:
        batch |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": right}
    return {name: x[:, :SHORT] for name, x in batch.items()} if kind == "short" else batch


def _tokens() -> Tensor:
    shape = (len(LENGTHS), max(LENGTHS))
    return torch.randint(10, FIRST_SPECIAL, shape, generator=draw(1))


def frames_mask() -> Tensor:
    """int64 (2, FRAMES): the second row is padded right."""
    return (torch.arange(FRAMES) < torch.tensor([FRAMES, 24])[:, None]).long()


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- by what a model mainly takes ----------------------------------------------------------------


def _texts(model: nn.Module, takes: Any) -> Iterator[Batches]:
    text = {kind: make_batch(model, kind) for kind in ("right", "left", "short")}
    yield text
    if "pixel_values" in takes:  # two towers
        image = _image(model)
        yield {kind: _ended(model, b) | {"pixel_values": image} for kind, b in text.items()}
    books = getattr(model.config, "num_codebooks", None)
    if isinstance(books, int):  # of sound, each a row of its own, or a column
        ids = torch.randint(10, FIRST_SPECIAL, (2 * books, SHORT), generator=draw(1))
        yield {"short": {"input_ids": ids}}
        yield {"short": {"input_ids": ids.view(2, books, SHORT).mT}}
        ids = torch.randint(10, FIRST_SPECIAL, (2, SHORT, books + 1), generator=draw(1))
        yield {"short": {"input_ids": ids}}


def _ended(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the last token of each row what a text tower pools: its end-of-text token."""
    config = getattr(model.config, "text_config", None) or model.config
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
    last = (mask * torch.arange(mask.shape[1])).argmax(-1)
    end = getattr(config, "eos_token_id", None)
    ids[torch.arange(len(ids)), last] = end if isinstance(end, int) else FIRST_SPECIAL
    return batch | {"input_ids": ids}


def _images(model: nn.Module, takes: Any) -> Iterator[Batches]:
    image = _image(model)
    yield {"images": {"pixel_values": image}}
    if "input_ids" in takes:
        yield {"right": {"pixel_values": image, **make_batch(model, "right")}}
        yield {"right": {"pixel_values": image, **_ended(model, make_batch(model, "right"))}}
    frames = getattr(model.config, "num_frames", None) or 4
    yield {"images": {"pixel_values": image[:, None].repeat(1, frames, 1, 1, 1)}}


def _image(model: nn.Module) -> Tensor:
    """fp32 (2, channels, height, width)."""
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    return torch.randn(2, channels, height, width, generator=draw(1))


def _videos(model: nn.Module, takes: Any) -> Iterator[Batches]:
    config = model.config
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", IMAGE)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 4)
    yield {"short": {"pixel_values_videos": torch.randn(1, frames, 3, size, size)}}


def _sounds(model: nn.Module, takes: Any) -> Iterator[Batches]:
    main = "input_values"
    sound = torch.randn(2, max(SAMPLES), generator=draw(1))
    lengths = torch.tensor(SAMPLES)[:, None]
    mask = (torch.arange(max(SAMPLES)) < lengths).long()
    if "decoder_input_ids" in takes:
        yield {"short": {main: sound, "decoder_input_ids": _tokens()[:, :SHORT]}}
    if "attention_mask" in takes:
        yield {"right": {main: sound, "attention_mask": mask}, "short": {main: sound}}
    yield {"short": {main: sound}}
    yield {"short": {main: sound[:, None]}}  # one channel
    bins = getattr(model.config, "num_mel_bins", 16)
    frames = getattr(model.config, "max_length", FRAMES)
    spectrum = torch.randn(2, frames, bins, generator=draw(1))
    yield {"short": {main: spectrum}}
    if "decoder_input_values" in takes:  # of a body without what makes its inputs
        width = model.config.hidden_size
        frames = torch.randn(2, FRAMES, width, generator=draw(1))
        mask = frames_mask()
        more = {"attention_mask": mask, "decoder_input_values": frames[:, :SHORT]}
        yield {"right": {main: frames, **more}}


def _spectra(model: nn.Module, takes: Any) -> Iterator[Batches]:
    """Frames of a spectrogram, either way round, of as many bins as the config or habit says."""
    for bins in dict.fromkeys((_bins(model), 128, 320, 560)):
        yield from _spectra_of(model, takes, bins)


def _spectra_of(model: nn.Module, takes: Any, bins: int) -> Iterator[Batches]:
    main = "input_features"
    frames = 2 * getattr(model.config, "max_source_positions", FRAMES // 2)
    spectrum = torch.randn(2, FRAMES, bins, generator=draw(1))
    mask = frames_mask()
    more = {}
    if "decoder_input_ids" in takes:
        more = {"decoder_input_ids": torch.randint(10, FIRST_SPECIAL, (2, SHORT))}
    if "attention_mask" in takes:
        masked = {main: spectrum, "attention_mask": mask, **more}
        yield {"right": masked, "short": {main: spectrum, **more}}
    yield {"short": {main: spectrum, **more}}
    yield {"short": {main: torch.randn(2, bins, frames), **more}}
    if "input_features_mask" in takes:
        yield {"short": {main: spectrum, "input_features_mask": mask, **more}}
        for count in (frames, 100):
            long = torch.randn(2, bins, count, generator=draw(1))
            seen = torch.ones(2, count, dtype=torch.long)
            yield {"short": {main: long, "input_features_mask": seen, **more}}


def _bins(model: nn.Module) -> int:
    config = getattr(model.config, "audio_config", None) or model.config
    sizes = (getattr(config, name, None) for name in BINS)
    return next((size for size in sizes if isinstance(size, int)), 80)


# ---- by the names of what it asks for ------------------------------------------------------------

# What some models cannot do without, though their signature says they could.
ASKED: dict[str, tuple[str, ...]] = {
    "bros": ("input_ids", "attention_mask", "bbox"),
    "layoutlmv3": ("input_ids", "attention_mask", "bbox"),
    "lilt": ("input_ids", "attention_mask", "bbox"),
    "lxmert": ("input_ids", "attention_mask", "visual_feats", "visual_pos"),
    "perceiver": ("inputs", "attention_mask"),
    "udop": ("input_ids", "attention_mask", "bbox", "decoder_input_ids"),
    "instructblip": ("pixel_values", "input_ids", "qformer_input_ids"),
    "siglip2": ("input_ids", "pixel_values", "pixel_attention_mask", "spatial_shapes"),
    "xclip": ("input_ids", "attention_mask", "pixel_values"),
    "oneformer": ("pixel_values", "task_inputs"),
    "idefics": ("input_ids", "attention_mask", "pixel_values", "image_attention_mask"),
    "blip_2_qformer": ("query_embeds", "encoder_hidden_states"),
    "decision_transformer": ("states", "actions", "returns_to_go", "timesteps"),
    "videoprism": ("input_ids", "attention_mask", "pixel_values_videos"),
    **dict.fromkeys(
        ("time_series_transformer", "informer", "autoformer"),
        (
            "past_values",
            "past_time_features",
            "past_observed_mask",
            "future_values",
            "future_time_features",
        ),
    ),
}


def _by_name(model: nn.Module, takes: Any) -> Iterator[Batches]:
    """A batch of what the signature has no default for, and of what ASKED says."""
    required = [
        name
        for name, x in takes.items()
        if x.default is inspect.Parameter.empty
        and x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    main = model.main_input_name
    first = [main] if isinstance(main, str) and main in takes else []
    wanted = list(dict.fromkeys((*ASKED.get(model.config.model_type, ()), *required, *first)))
    grid = any("grid" in name for name in wanted)
    kinds = (
        ("right", "left", "short") if {"input_ids", "attention_mask"} <= {*wanted} else ("short",)
    )
    for form in range(3 if grid else 1):
        yield {kind: _named(model, kind, wanted, grid, form) for kind in kinds}


def _named(
    model: nn.Module, kind: str, wanted: list[str], grid: bool, form: int
) -> dict[str, Tensor]:
    text, made = make_batch(model, kind), {}
    flat = "spatial_shapes" in wanted
    for name in wanted:
        if name in text:
            made[name] = text[name]
        elif grid and name in ("hidden_states", "pixel_values"):
            made[name] = _patches(model, form)
        elif flat and name == "pixel_values":
            made[name] = _flat_patches(model, text["input_ids"])
        elif name in NAMED:
            made[name] = NAMED[name](model, text["input_ids"])
        else:
            raise NotBuilt(f"asks for {name}")
    return made


VIDEOS = ("xclip", "idefics")  # their pixel_values have frames


def _patches(model: nn.Module, form: int) -> Tensor:
    """fp32 (patches of GRID, pixels of one), of two frames, or (patches, channels, height, width).

    form: which of these.
    """
    config = model.config
    patch = getattr(config, "patch_size", 14)
    time = getattr(config, "temporal_patch_size", None) or 1
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3
    count = sum(t * h * w for t, h, w in GRID)
    shapes = (
        (channels * time * patch * patch,),
        (channels * 2 * patch * patch,),
        (channels, patch, patch),
    )
    return torch.randn(count, *shapes[form], generator=draw(1))


def _boxes(model: nn.Module, ids: Tensor) -> Tensor:
    """int64 (B, S, 4): left, top, right, bottom, below 64; of UDOP fp32, below 1."""
    corner = torch.randint(0, 30, (*ids.shape, 2), generator=draw(2))
    size = torch.randint(1, 30, (*ids.shape, 2), generator=draw(3))
    boxes = torch.cat([corner, corner + size], dim=-1)
    return boxes / 64 if model.config.model_type == "udop" else boxes


def _normal(*sizes: int | str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Random numbers of these sizes, attributes of the config where they are named."""

    def make(model: nn.Module, ids: Tensor) -> Tensor:
        shape = [getattr(model.config, x) if isinstance(x, str) else x for x in sizes]
        return torch.randn(shape, generator=draw(1))

    return make


def _history(*more: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """(2, what a forecaster looks back on, more)"""

    def make(model: nn.Module, ids: Tensor) -> Tensor:
        config = model.config
        length = config.context_length + max(config.lags_sequence)
        return torch.randn(2, length, *more, generator=draw(1))

    return make


def _past_values(model: nn.Module, ids: Tensor) -> Tensor:
    if hasattr(model.config, "lags_sequence"):
        return _history()(model, ids)
    channels = getattr(model.config, "num_input_channels", None)
    shape = (2, model.config.context_length, *([channels] if channels else []))
    return torch.randn(shape, generator=draw(1))


def _pixels(model: nn.Module, ids: Tensor) -> Tensor:
    image = _image(model)
    if model.config.model_type not in VIDEOS:
        return image
    frames = 1 if model.config.model_type == "idefics" else _frames(model)
    return image[:, None].repeat(1, frames, 1, 1, 1)


def _frames(model: nn.Module) -> int:
    vision = getattr(model.config, "vision_config", None) or model.config
    return getattr(vision, "num_frames", None) or 4


def _flat_patches(model: nn.Module, ids: Tensor) -> Tensor:
    config = getattr(model.config, "vision_config", None) or model.config
    return torch.randn(2, 16, config.num_channels * config.patch_size**2, generator=draw(1))


NAMED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "inputs": lambda model, ids: ids,
    "bbox": _boxes,
    "grid_thw": lambda model, ids: torch.tensor(GRID),
    "image_grid_thw": lambda model, ids: torch.tensor(GRID),
    "merge_sizes": lambda model, ids: torch.ones(len(GRID), dtype=torch.long),
    "visual_feats": _normal(2, 3, "visual_feat_dim"),
    "visual_pos": _normal(2, 3, "visual_pos_dim"),
    "qformer_input_ids": lambda model, ids: ids,
    "query_embeds": _normal(2, 5, "hidden_size"),
    "pixel_attention_mask": lambda model, ids: torch.ones(2, 16, dtype=torch.long),
    "spatial_shapes": lambda model, ids: torch.tensor([[4, 4], [2, 8]]),
    "input_features": lambda model, ids: torch.randn(2, FRAMES, _bins(model), generator=draw(1)),
    "input_features_mask": lambda model, ids: torch.ones(2, FRAMES, dtype=torch.long),
    "past_values": _past_values,
    "states": _normal(2, 5, "state_dim"),
    "actions": _normal(2, 5, "act_dim"),
    "returns_to_go": _normal(2, 5, 1),
    "timesteps": lambda model, ids: torch.arange(5).expand(2, -1),
    "pixel_values": _pixels,
    "pixel_values_videos": lambda model, ids: _image(model)[:, None].repeat(1, 4, 1, 1, 1),
    "input_values": lambda model, ids: torch.randn(2, 1, max(SAMPLES), generator=draw(1)),
    "task_inputs": lambda model, ids: torch.randint(
        1, 50, (2, model.config.task_seq_len), generator=draw(1)
    ),
    "image_attention_mask": lambda model, ids: torch.ones(*ids.shape, 1, dtype=torch.long),
    "encoder_hidden_states": _normal(2, 6, "encoder_hidden_size"),
    "past_time_features": _history(1),
    "past_observed_mask": lambda model, ids: torch.ones(_history()(model, ids).shape),
    "future_values": _normal(2, "prediction_length"),
    "future_time_features": _normal(2, "prediction_length", 1),
}
