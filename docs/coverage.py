"""Walks Transformers' models and writes docs/coverage.md: what runs where, model by model.

    python docs/coverage.py --jobs 4                  # all of them
    python docs/coverage.py --models bert,gpt2        # these; the other rows stay as they are

Every model type of Transformers' mappings for causal, masked and sequence-to-sequence language
modelling, and of all others the base model ("base": images, sound, text with either), is built
tiny, on the CPU, in fp32 and with random weights. A copy runs on eager, the other is patched, both
on the same padded batches; what comes out at the tokens, gradients of all weights and a step with a
cache are compared, packed documents with each alone, and the report says what each attention module
ran on. Each model has a process of its own, so that none can hang or end the walk.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import io
import json
import multiprocessing
import re
import resource
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

import hf_flashattn

PAGE = Path(__file__).with_name("coverage.md")
TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
TEXT = set().union(*TASKS.values())
TASKS["base"] = {
    model: name if isinstance(name, str) else name[0]
    for model, name in modeling_auto.MODEL_MAPPING_NAMES.items()
    if model not in TEXT
}
TOLERANCE = 5e-4  # of the largest logit or gradient; MobileBERT is off by half of it under sdpa
LARGEST = 50_000_000  # parameters of a model that counts as tiny
VOCABULARY, FIRST_SPECIAL = 160, 120  # tokens of a batch lie below the special ones
LENGTHS = (12, 9)  # of the two rows of a batch; a window is 8 wide
SHORT = 7  # tokens of a batch within it
DOCUMENTS = (5, 7, 2)  # tokens of those that are packed into a row
SAMPLES = (2400, 1600)  # of the two sounds of a batch
BINS = ("num_mel_bins", "feature_projection_input_dim", "feature_size", "input_dim")
IMAGE = 64  # its sides, unless the config insists on others
WHY_WIDTH = 110

# ---- tiny configs --------------------------------------------------------------------------------

# The first pattern that fits the whole name of an attribute gives its value. Only numbers that are
# larger are replaced, so that what is switched off (0, None) stays off.
RULES: tuple[tuple[str, float], ...] = (
    (r".*vocab_size.*|n_vocab", VOCABULARY),
    (r"(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len)", 64),
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
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
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
SECTIONED = r"_vl|glm4v|glm46v|glm_ocr|glm_image|omni|paddleocr"
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


def tiny_config(model_type: str, task: str) -> PreTrainedConfig:
    """The config class's defaults, made small by RULES."""
    cls = CONFIG_MAPPING[model_type]
    given = _shrunk(cls())
    given.update(OVERRIDES.get(model_type, {}))
    if task == "causal" and not getattr(cls(), "is_encoder_decoder", False):
        given["is_decoder"] = True
    return cls(**given)


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The arguments for the config's class that differ from its defaults."""
    given: dict[str, Any] = {}
    specials = 0
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = {"model_type": value.model_type, **_shrunk(value)}
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
        elif name == "rope_parameters" and re.search(SECTIONED, config.model_type):
            given[name] = (value or {}) | {"mrope_section": [2, 3, 3]}  # of half a head
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


def build(model_type: str, task: str) -> nn.Module:
    """The model of this type on eager, fp32, in eval mode. Raises NotBuilt."""
    cls = getattr(transformers, TASKS[task][model_type], None)
    if cls is None:
        raise NotBuilt(f"transformers has no {TASKS[task][model_type]}")
    takes = getattr(cls, "main_input_name", "input_ids")
    if takes != "input_ids" and task != "base":
        raise NotBuilt(f"takes {takes}, not text")
    try:
        config = tiny_config(model_type, task)
        if not isinstance(config, cls.config_class):
            config = config.get_text_config(decoder=True)
        config._attn_implementation = "eager"
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise NotBuilt(f"{size / 1e6:.0f} million parameters after shrinking")
        torch.manual_seed(0)
        return cls(config).float().eval()
    except NotBuilt:
        raise
    except Exception as error:  # configs and models run code of their own
        raise NotBuilt(_line(error)) from error


class NotBuilt(Exception):
    """There is no tiny model of this type that runs on what make_batches makes; says why."""


# ---- one model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    model: str
    task: str
    outcome: str
    sites: str = ""
    calls: str = ""
    why: str = ""

    def line(self) -> str:
        cells = (self.model, self.task, self.outcome, self.sites, self.calls, self.why)
        return "| " + " | ".join(" ".join(x.replace("|", "/").split()) for x in cells) + " |"


def examine(model_type: str, task: str) -> Result:
    """Builds the model twice, runs both, compares; every way it can go is an outcome."""
    torch.set_num_threads(1)
    try:
        eager = build(model_type, task)
        model = copy.deepcopy(eager)
        batches, expected = _run_first(eager, list(make_batches(eager)))
    except NotBuilt as error:
        return Result(model_type, task, "not built", why=str(error))
    except Exception as error:
        return Result(model_type, task, "not built", why=f"eager fails: {_line(error)}")
    report, findings, notes = None, [], []
    if "left" in batches and task != "base":
        ones = torch.ones_like(batches["left"]["attention_mask"])
        unmasked = batches["left"] | {"attention_mask": ones}
        if not _differences("", _run(eager, unmasked, like=batches["left"]), expected["left"]):
            notes.append("eager does not heed the mask")  # then agreement proves little
    try:
        report = hf_flashattn.patch_model(model)
        for kind, batch in batches.items():
            where = f"padded {kind}" if kind in ("right", "left") else "without padding"
            findings += _differences(where, _run(model, batch), expected[kind])
        if "left" in batches:
            findings += _compare_cache(eager, model, batches["left"])
            found, more = _compare_packed(eager, model)
            findings, notes = findings + found, notes + more
    except Exception as error:
        findings.append(f"raises {_line(error)}")
    result = _judge(model_type, task, report, findings)
    return replace(result, why="; ".join(filter(None, (result.why, *notes))))


Batches = dict[str, dict[str, Tensor]]


def _run_first(model: nn.Module, proposals: list[Batches]) -> tuple[Batches, dict[str, Outputs]]:
    """The first batches that the model runs on, and what it makes of them."""
    errors = []
    for batches in proposals:
        try:
            made = {kind: _run(model, batch) for kind, batch in batches.items()}
            if all(x.logits.isfinite().all() for x in made.values()):
                return batches, made
            raise FloatingPointError("what comes out is not finite")
        except Exception as error:
            errors.append(error)
    raise errors[0]


def make_batches(model: nn.Module) -> Iterator[Batches]:
    """What the model may run on, the likeliest first: batches by their kind."""
    takes, main = inspect.signature(model.forward).parameters, model.main_input_name
    if main == "input_ids":
        text = {kind: make_batch(model, kind) for kind in ("right", "left", "short")}
        yield text
        image = _image(model, "pixel_values")
        if "pixel_values" in takes:  # two towers
            yield {kind: _ended(model, b) | {"pixel_values": image} for kind, b in text.items()}
    elif main == "pixel_values":
        image = _image(model, main)
        yield {"images": {main: image}}
        if "input_ids" in takes:
            yield {"right": {main: image, **make_batch(model, "right")}}
        frames = getattr(model.config, "num_frames", None) or 4
        yield {"images": {main: image[:, None].repeat(1, frames, 1, 1, 1)}}
    elif main == "input_values":
        sound = torch.randn(2, max(SAMPLES), generator=torch.Generator().manual_seed(1))
        lengths = torch.tensor(SAMPLES)[:, None]
        mask = (torch.arange(max(SAMPLES)) < lengths).long()
        if "attention_mask" in takes:
            yield {"right": {main: sound, "attention_mask": mask}, "short": {main: sound}}
        yield {"short": {main: sound}}
        yield {"short": {main: sound[:, None]}}  # one channel
        bins = getattr(model.config, "num_mel_bins", 16)
        frames = getattr(model.config, "max_length", 32)
        yield {"short": {main: torch.randn(2, frames, bins)}}
    else:
        yield from _features(model, main, takes)


def _ended(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the last token of each row what a text tower pools: its end-of-text token."""
    config = getattr(model.config, "text_config", None) or model.config
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
    last = (mask * torch.arange(mask.shape[1])).argmax(-1)
    end = getattr(config, "eos_token_id", None)
    ids[torch.arange(len(ids)), last] = end if isinstance(end, int) else FIRST_SPECIAL
    return batch | {"input_ids": ids}


def _image(model: nn.Module, name: str) -> Tensor:
    """fp32 (2, channels, height, width)."""
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def _features(model: nn.Module, main: str, takes: Any) -> Iterator[Batches]:
    """Frames of a spectrogram, either way round, or frames of a video."""
    config = model.config
    bins = next(
        (getattr(config, name) for name in BINS if isinstance(getattr(config, name, None), int)),
        80,
    )
    if main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 32)
        spectrum = torch.randn(2, 32, bins, generator=torch.Generator().manual_seed(1))
        mask = (torch.arange(32) < torch.tensor([32, 24])[:, None]).long()
        more = {}
        if "decoder_input_ids" in takes:
            more = {"decoder_input_ids": torch.randint(10, FIRST_SPECIAL, (2, SHORT))}
        if "attention_mask" in takes:
            masked = {main: spectrum, "attention_mask": mask, **more}
            yield {"right": masked, "short": {main: spectrum, **more}}
        yield {"short": {main: spectrum, **more}}
        yield {"short": {main: torch.randn(2, bins, frames), **more}}
    elif main == "pixel_values_videos":
        size = getattr(config, "image_size", None) or getattr(config, "crop_size", IMAGE)
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 4)
        yield {"short": {main: torch.randn(1, frames, 3, size, size)}}
    else:
        raise NotBuilt(f"takes {main}: neither text nor images nor sound")


def make_batch(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """Rows of LENGTHS tokens, padded "right" or "left"; "short": within a window, no padding.

    A decoder that stands apart has padding too, always right.
    """
    takes = inspect.signature(model.forward).parameters
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(10, FIRST_SPECIAL, (len(LENGTHS), max(LENGTHS)), generator=draw)
    positions = torch.arange(max(LENGTHS))
    right = (positions < torch.tensor(LENGTHS)[:, None]).long()
    mask = right.flip(1) if kind == "left" else right
    batch = {"input_ids": ids, "attention_mask": mask}
    if "decoder_input_ids" in takes:
        batch |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": right}
    return {name: x[:, :SHORT] for name, x in batch.items()} if kind == "short" else batch


@dataclass(frozen=True)
class Outputs:
    logits: Tensor  # (tokens, vocabulary), of the tokens that are not padding
    gradients: dict[str, Tensor]


def _run(
    model: nn.Module, batch: dict[str, Tensor], like: dict[str, Tensor] | None = None
) -> Outputs:
    """What comes out first, and gradients; like: the batch whose tokens count."""
    torch.manual_seed(2)  # for models that draw numbers in eval mode
    model.zero_grad()
    logits = _logits(model(**batch, **_without_cache(model)))
    counted = like or batch
    kept = counted.get("decoder_attention_mask", counted.get("attention_mask"))
    if kept is not None and "input_ids" in batch and logits.shape[1:2] >= kept.shape[1:2]:
        logits = logits[:, -kept.shape[1] :][kept.bool()]
    elif kept is not None and logits.dim() == 3 and "input_ids" not in batch:
        logits = logits[0]  # frames stand for several samples: the row that has no padding
    logits = logits.float()
    weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)) - 0.5
    (logits * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Outputs(logits.detach(), gradients)


def _without_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0]
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    return logits


def _differences(where: str, got: Outputs, expected: Outputs) -> list[str]:
    found = []
    if (off := _relative([(got.logits, expected.logits)])) is not None:
        found.append(f"{where}: logits by {off}")
    if got.gradients.keys() != expected.gradients.keys():
        found.append(f"{where}: other weights have gradients")
    else:
        pairs = [(got.gradients[name], x) for name, x in expected.gradients.items()]
        if (off := _relative(pairs)) is not None:
            found.append(f"{where}: gradients by {off}")
    return found


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> str | None:
    """The largest difference by the largest value expected; None where that is within TOLERANCE."""
    if not pairs:
        return None
    scale = max(expected.abs().max().item() for _, expected in pairs if expected.numel())
    off = max((got - expected).abs().max().item() for got, expected in pairs if expected.numel())
    bad_values = any(not got.isfinite().all() for got, _ in pairs)
    if bad_values or not off <= TOLERANCE * scale:
        return "nan" if bad_values else f"{off / max(scale, 1e-30):.1e}"
    return None


def _compare_cache(eager: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """All tokens but one into a cache, then the last: only of decoders that keep one."""
    try:
        with torch.no_grad():
            expected = _step(eager, batch)
    except Exception:
        return []  # without a cache, or one that needs more than this: eager cannot either
    with torch.no_grad():
        off = _relative([(_step(model, batch), expected)])
    return [f"with a cache: logits by {off}"] if off else []


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    tokens = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    mask = "decoder_attention_mask" if tokens == "decoder_input_ids" else "attention_mask"
    first = batch | {tokens: batch[tokens][:, :-1], mask: batch[mask][:, :-1]}
    cache = model(**first, use_cache=True).past_key_values
    last = batch | {tokens: batch[tokens][:, -1:]}
    return _logits(model(**last, past_key_values=cache, use_cache=True))[0]  # a row without padding


def _compare_packed(eager: nn.Module, model: nn.Module) -> tuple[list[str], list[str]]:
    """Documents packed into one row against each document alone, on eager: (findings, notes)."""
    takes = inspect.signature(eager.forward).parameters
    if "position_ids" not in takes or "decoder_input_ids" in takes or "attention_mask" not in takes:
        return [], []
    draw = torch.Generator().manual_seed(4)
    documents = [
        {
            "input_ids": torch.randint(10, FIRST_SPECIAL, (1, n), generator=draw),
            "position_ids": torch.arange(n)[None],
        }
        for n in DOCUMENTS
    ]
    row = {name: torch.cat([x[name] for x in documents], dim=1) for name in documents[0]}

    def logits(which: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return _logits(which(**batch, **_without_cache(which)))

    try:
        expected = torch.cat([logits(eager, x) for x in documents], dim=1)
        stock = logits(eager, row)
    except Exception:
        return [], []  # no positions of this form
    if stock.shape != expected.shape:
        return [], []  # pooled
    off = _relative([(logits(model, row), expected)])
    if off is None:
        return [], []
    if _relative([(stock, expected)]) is None:
        return [f"packed: logits by {off}"], []
    if _relative([(logits(model, row), stock)]) is None:
        return [], ["packed documents see each other, on eager too"]
    return [], [f"packed documents see each other (by {off}), on eager too, in another way"]


def _judge(
    model_type: str, task: str, report: hf_flashattn.Report | None, findings: list[str]
) -> Result:
    rows = report.rows if report is not None else []
    reach = [row for row in rows if row.runs != "unsupported"]
    idle = [row.module for row in reach if row.calls.total == 0]
    ran = Counter(row.runs for row in reach if row.calls.total)
    kernel, fallback = (sum(counts) for counts in zip((0, 0), *_calls(reach), strict=True))
    parts = [
        "kernel" if kernel else "",
        "fallback" if fallback else "",
        "unsupported" if len(reach) < len(rows) or not rows else "",
    ]
    outcome = " + ".join(filter(None, parts))
    if len(idle) == len(rows) and rows:
        findings = [*findings, "no module was ever called"]
    told = [row.why for row in rows if row.runs in ("fallback", "mixed", "unsupported")]
    whys = [_short(x) for x in dict.fromkeys(part for why in told for part in why.split("; "))]
    if not rows and report is not None:
        whys = ["no attention module found"]
    if idle:
        whys.append(f"never called: {', '.join(idle[:2])}{' ...' if len(idle) > 2 else ''}")
    ran.update({"unsupported": len(rows) - len(reach), "never called": len(idle)})
    names = {"cpu implementation": "kernel (cpu implementation)"}
    sites = ", ".join(f"{n} {names.get(x, x)}" for x, n in ran.items() if n)
    calls = f"{kernel} + {fallback}" if fallback else str(kernel)
    if findings:
        raised = findings[-1].startswith("raises ")
        outcome = "raises" if raised else "differs"
        whys = [*findings, *whys]
    return Result(model_type, task, outcome, sites, calls, "; ".join(whys))


def _calls(rows: list[Any]) -> Iterator[tuple[int, int]]:
    return ((row.calls.kernel + row.calls.cpu, row.calls.fallback) for row in rows)


def _short(text: str) -> str:
    return textwrap.shorten(text, WHY_WIDTH, placeholder=" ...")


def _line(error: Exception) -> str:
    return _short(f"{type(error).__name__}: {error}")


# ---- the walk ------------------------------------------------------------------------------------


def walk(wanted: Sequence[tuple[str, str]], jobs: int, timeout: float) -> Iterator[Result]:
    """Each in a process of its own, `jobs` at a time."""
    context = multiprocessing.get_context("fork")  # the imports take longer than most models
    waiting, running = list(reversed(wanted)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(*key, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (key, process, time.monotonic() + timeout)
        ready = wait(list(running), timeout=1.0)
        for receiver, (key, process, deadline) in list(running.items()):
            if receiver in ready:
                try:
                    yield receiver.recv()
                except EOFError:
                    process.join()
                    yield Result(*key, "not built", why=f"its process ended: {process.exitcode}")
            elif time.monotonic() > deadline:
                yield Result(*key, "not built", why=f"took longer than {timeout:g} s")
            else:
                continue
            process.kill()
            process.join()
            receiver.close()
            del running[receiver]


def _work(model_type: str, task: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = examine(model_type, task)
    sender.send(result)


def all_models() -> list[tuple[str, str]]:
    return sorted((name, task) for task, names in TASKS.items() for name in names)


# ---- the page ------------------------------------------------------------------------------------


def versions() -> str:
    return f"Transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"


def read_page(page: Path = PAGE) -> list[Result]:
    """The rows of the page; none if it was made with other versions."""
    text = page.read_text() if page.exists() else ""
    if versions() not in text:
        return []
    _, _, table = text.partition(PAGE_HEAD[PAGE_HEAD.index("| model type") :])
    return [Result(*(x.strip() for x in line[1:-1].split("|"))) for line in table.splitlines()]


def write_page(results: Sequence[Result], page: Path = PAGE) -> None:
    counts = Counter(result.outcome for result in results).most_common()
    page.write_text(
        PAGE_HEAD.format(
            versions=versions(),
            total=len(results),
            types=len({result.model for result in results}),
            counts=", ".join(f"{n} {outcome}" for outcome, n in counts),
            tolerance=f"{TOLERANCE:g}",
        )
        + "\n".join(result.line() for result in sorted(results, key=lambda x: (x.model, x.task)))
        + "\n"
    )


PAGE_HEAD = """# Which models run on the kernel

Written by `python docs/coverage.py`; do not edit. {versions}: {total} models of {types} types:
**{counts}**.

Each model is built tiny with random weights and run on the CPU, in fp32 and eval mode: batches
padded right, padded left and short without padding, forward and backward, one step with a cache,
and packed documents where the model takes `position_ids`, which must be those of each document
alone. Eager and patched must agree to {tolerance} of the largest logit and of the largest gradient.
Of types without a language model in their name the base model is tried ("base"), on images,
sound or text.
"Kernel" is here the operator's CPU implementation: the same calls, masks and reasons, but no GPU.
Head dims are made small too, so a size that the kernels don't take can hide;
`hf-flashattn report` tells it for a real config. Sliding windows and chunks are made shorter than
the padded batches: sequences within its window leave a layer on the kernel.

| outcome | |
|---|---|
| kernel, fallback, unsupported | what the attention modules ran on, all agree with eager |
| differs | logits or gradients are off by this much of the largest |
| raises | eager runs, the patched model does not |
| not built | no tiny model, or eager itself does not run on such a batch |

Calls: on the kernel + on the fallback.

| model type | task | outcome | attention modules | calls | why |
|---|---|---|---|---|---|
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="model types, with commas; all unless told")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="a model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows that were run")
    args = parser.parse_args(argv)
    wanted = all_models()
    if args.models:
        names = args.models.split(",")
        if unknown := set(names) - {name for name, _ in wanted}:
            parser.error(f"--models: not in the mappings: {', '.join(sorted(unknown))}")
        wanted = [key for key in wanted if key[0] in names]
    results = []
    for result in walk(wanted, args.jobs, args.timeout):
        results.append(result)
        print(result.line(), flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(x) for x in results], indent=1) + "\n")
    kept = {(x.model, x.task): x for x in read_page()} if args.models else {}
    if kept or not args.models:
        write_page(list((kept | {(x.model, x.task): x for x in results}).values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
