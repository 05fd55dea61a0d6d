"""The tokenizer: from the hub, a folder, or a byte-level BPE trained on the corpus and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm.cache import made_once
from lm.corpus import Corpus
from lm.failures import UsageError

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 32 * 2**20  # merges hardly change with more text; the time does


def get_tokenizer(
    name: str, corpus: Corpus, vocab_size: int, cache: Path
) -> PreTrainedTokenizerFast:
    """`name` is "corpus" for one trained on the corpus, else a hub name or a folder.

    Raises:
        UsageError: it can not be loaded, is empty, or has no end-of-text token.
    """
    if name == "corpus":
        tokenizer = _trained_on(corpus, vocab_size, cache)
    else:
        tokenizer = _load(name)
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "a tokenizer with an end-of-text token",
            f"{name}, whose eos_token is None",
            "set eos_token in its tokenizer_config.json, or leave --tokenizer at 'corpus'",
        )
    tokenizer.model_max_length = 2**31  # documents are cut after tokenising, not before
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    content = repr(sorted(tokenizer.get_vocab().items())) + str(tokenizer.eos_token_id)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _load(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError, hub errors: all mean the same here
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"a tokenizer at {name!r} (hub name or local folder)",
            reason,
            "check the name, or leave --tokenizer at 'corpus' to train one on the text",
        ) from error
    if len(tokenizer) < 256:
        raise UsageError(
            f"a vocabulary in {name!r}",
            f"{len(tokenizer)} entries",
            "check that the folder has tokenizer.json, or vocab.json and merges.txt",
        )
    return tokenizer


def _trained_on(corpus: Corpus, vocab_size: int, cache: Path) -> PreTrainedTokenizerFast:
    def make(folder: Path) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_texts(corpus), trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
        ).save_pretrained(folder)

    key = f"{corpus.fingerprint}-{vocab_size}"
    return PreTrainedTokenizerFast.from_pretrained(made_once(cache / f"tokenizer-{key}", make))


def _texts(corpus: Corpus) -> Iterator[str]:
    size = 0
    for row in corpus.train:
        if size >= TRAINING_BYTES:
            return
        size += len(row["text"])
        yield row["text"]
