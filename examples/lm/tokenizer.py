"""The tokenizer: from the hub, a folder, or one that is trained on the corpus and cached.

GPT-2's kind is a byte-level BPE with an end-of-text token, BERT's a WordPiece with tokens for the
mask, padding and both ends of a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm.cache import made_once
from lm.corpus import Corpus
from lm.failures import UsageError

END_OF_TEXT = "<|endoftext|>"
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
Tokenizer = PreTrainedTokenizerFast
TRAINING_BYTES = 32 * 2**20  # merges hardly change with more text; the time does


def get_tokenizer(name: str, corpus: Corpus, vocab_size: int, cache: Path) -> Tokenizer:
    """GPT-2's kind; `name` is "corpus" for one trained on the corpus, else a hub name or a folder.

    Raises:
        UsageError: it can not be loaded, is empty, or has no end-of-text token.
    """
    return _get(name, corpus, vocab_size, cache, _train_bpe, ("eos",))


def get_masking_tokenizer(name: str, corpus: Corpus, vocab_size: int, cache: Path) -> Tokenizer:
    """BERT's kind, as get_tokenizer otherwise; a trained one keeps upper case."""
    return _get(name, corpus, vocab_size, cache, _train_wordpiece, ("cls", "sep", "pad", "mask"))


def _get(
    name: str,
    corpus: Corpus,
    vocab_size: int,
    cache: Path,
    train: Callable[[Corpus, int], Tokenizer],
    needed: tuple[str, ...],
) -> Tokenizer:
    if name == "corpus":
        key = f"{corpus.fingerprint}-{vocab_size}"
        kind = train.__name__.removeprefix("_train_")
        folder = made_once(
            cache / f"{kind}-{key}", lambda to: train(corpus, vocab_size).save_pretrained(to)
        )
        tokenizer = Tokenizer.from_pretrained(folder)
    else:
        tokenizer = _load(name)
    for role in needed:
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise UsageError(
                f"a tokenizer with a token for {role}",
                f"{name}, whose {role}_token is None",
                f"set {role}_token in its tokenizer_config.json, or leave --tokenizer at 'corpus'",
            )
    tokenizer.model_max_length = 2**31  # documents are cut after tokenising, not before
    return tokenizer


def get_saved_tokenizer(folder: Path) -> Tokenizer | None:
    """That of a folder with a model; None where there is none.

    Raises:
        UsageError: it can not be loaded.
    """
    files = ("tokenizer.json", "vocab.json")
    return _load(str(folder)) if any((folder / name).is_file() for name in files) else None


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    content = repr(sorted(tokenizer.get_vocab().items())) + str(tokenizer.eos_token_id)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _load(name: str) -> Tokenizer:
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


def _train_bpe(corpus: Corpus, vocab_size: int) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    return Tokenizer(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _train_wordpiece(corpus: Corpus, vocab_size: int) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    ends = [(SPECIAL[end], tokenizer.token_to_id(SPECIAL[end])) for end in ("sep", "cls")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return Tokenizer(
        tokenizer_object=tokenizer, **{f"{role}_token": token for role, token in SPECIAL.items()}
    )


def _texts(corpus: Corpus) -> Iterator[str]:
    size = 0
    for row in corpus.train:
        if size >= TRAINING_BYTES:
            return
        size += len(row["text"])
        yield row["text"]
