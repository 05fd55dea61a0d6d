"""Weights to begin with: of a saved GPT-2, with as many positions as the run's context has."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from lm.failures import UsageError
from lm.tokenizer import Tokenizer, get_saved_tokenizer, tokenizer_fingerprint

NEXT = "name the folder `model` in the --output of an earlier run"
POSITIONS = "transformer.wpe.weight"
COMPARED = {"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "vocabulary": "vocab_size"}
COMPARED |= {
    name: name
    for name in (
        "n_inner",
        "activation_function",
        "layer_norm_epsilon",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "tie_word_embeddings",
    )
}


def saved_config(folder: Path) -> GPT2Config:
    """Raises UsageError where the folder holds no GPT-2."""
    expected = f"a saved GPT-2 in {folder} for --init-from"
    if not folder.is_dir():
        raise UsageError(expected, "no such folder", NEXT)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(
            expected, f"{type(error).__name__}: {error}".splitlines()[0], NEXT
        ) from error
    if not isinstance(config, GPT2Config):
        raise UsageError(expected, f"a model of type {config.model_type}", NEXT)
    return config


def initial_weights(
    folder: Path, config: GPT2Config, tokenizer: Tokenizer
) -> dict[str, torch.Tensor]:
    """The folder's weights in fp32, for a model of this config.

    Raises:
        UsageError: another model or tokenizer than the run's, or weights are missing or damaged.
    """
    saved = saved_config(folder)
    its, ours = ({name: getattr(c, key) for name, key in COMPARED.items()} for c in (saved, config))
    different = [name for name in COMPARED if its[name] != ours[name]]
    if different:
        raise UsageError(
            f"the model of {folder}: " + ", ".join(f"{name}={its[name]}" for name in different),
            ", ".join(f"{name}={ours[name]}" for name in different),
            "--size, --layers, --hidden, --heads and --tokenizer of the run that saved it",
        )
    own = get_saved_tokenizer(folder)
    if own is not None and tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        raise UsageError(
            f"the tokenizer saved in {folder}",
            "another one, with as many entries",
            f"--tokenizer {folder}",
        )
    weights = _weights(folder)
    weights[POSITIONS] = more_positions(weights[POSITIONS], config.n_positions)
    return weights


def more_positions(positions: torch.Tensor, count: int) -> torch.Tensor:
    """(count, H) of (n, H): row i is row i mod n (Beltagy et al. 2020, Longformer, section 5)."""
    return positions[torch.arange(count) % len(positions)]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    try:
        model, found = GPT2LMHeadModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # OSError, SafetensorError, pickle's: all mean the same here
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"the weights of a GPT-2 in {folder}", reason, NEXT) from error
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise UsageError(f"the weights of a GPT-2 in {folder}", f"none for {missing}", NEXT)
    return model.state_dict()
