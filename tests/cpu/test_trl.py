"""FlashAttentionCallback alone with TRL's trainers, against the same trainer without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from model_helpers import VOCAB, build, calls, gpt2
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_flashattn.trainer import FlashAttentionCallback

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

STEPS, LAYERS, ROWS, LONGEST = 3, 2, 3, 16
# New releases of Transformers prefer another name for an argument that TRL sets.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing:FutureWarning")


def llama() -> LlamaForCausalLM:
    """Two layers, four heads of 8 over two of keys and values, no dropout."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=1,
    )
    return build(LlamaForCausalLM, config)


@pytest.fixture(autouse=True)
def _a_fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(n): n for n in range(VOCAB)}, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="0", pad_token="1"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer) -> str:
    """A folder: what TRL calls a model as a string."""
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows() -> datasets.Dataset:
    """Documents of unequal lengths: a batch has padding, a packed one has several."""
    draw = torch.Generator().manual_seed(1)
    lengths = [3, 12, 7, 5, 11, 4, 9, 6, 10, 8, 3, 12]
    ids = [torch.randint(2, VOCAB, (n,), generator=draw).tolist() for n in lengths]
    return datasets.Dataset.from_dict({"input_ids": ids})


def train(model: PreTrainedModel | str, folder: Path, tokenizer, callbacks=(), **options):
    """Trains by SFT. Returns the trainer and the loss of each step."""
    peft_config = options.pop("peft_config", None)
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": LONGEST,
    }
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder), **(defaults | options)),
        train_dataset=rows(),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


WAYS = {
    "padded": {},
    "checkpointing": {"gradient_checkpointing": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True},
    "packing-wrapped": {"packing": True, "packing_strategy": "wrapped"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_sft(tmp_path, tokenizer, make, way):
    _, expected = train(make(), tmp_path, tokenizer, **WAYS[way])
    callback = FlashAttentionCallback(strict=True)
    _, got = train(make(), tmp_path, tokenizer, [callback], **WAYS[way])
    assert got == pytest.approx(expected, rel=1e-3) and len(got) == STEPS
    forwards = STEPS * (2 if way == "checkpointing" else 1)
    assert calls(callback.report, "cpu") == LAYERS * forwards
    callback.report.assert_all_on_kernel(allow_cpu=True)


@pytest.mark.parametrize("name", [None, "eager", "hf_flashattn"])
def test_a_model_as_a_string(tmp_path, tokenizer, saved, name):
    """TRL loads it; the callback finds it whatever attention it was loaded with."""
    options = {} if name is None else {"model_init_kwargs": {"attn_implementation": name}}
    _, expected = train(saved, tmp_path, tokenizer)
    callback = FlashAttentionCallback(strict=True)
    trainer, got = train(saved, tmp_path, tokenizer, [callback], **options)
    assert got == pytest.approx(expected, rel=1e-3) and len(got) == STEPS
    assert calls(callback.report, "cpu") == LAYERS * STEPS
    trainer.save_model(str(tmp_path / "saved"))
    assert "flashattn" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("way", ["padded", "packing"])
def test_peft(tmp_path, tokenizer, saved, way):
    """TRL itself makes the PEFT model, from the string, before the callback sees it."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    options = WAYS[way] | {
        "peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    }
    _, expected = train(saved, tmp_path, tokenizer, **options)
    callback = FlashAttentionCallback(strict=True)
    trainer, got = train(saved, tmp_path, tokenizer, [callback], **options)
    assert isinstance(trainer.model, peft.PeftModel)
    assert got == pytest.approx(expected, rel=1e-3) and len(got) == STEPS
    assert calls(callback.report, "cpu") == LAYERS * STEPS


def test_compiled(tmp_path, tokenizer):
    """Packing under torch.compile: TRL's collator says where documents end."""
    options = WAYS["packing"] | {"torch_compile": True, "torch_compile_backend": "eager"}
    _, expected = train(llama(), tmp_path, tokenizer, **WAYS["packing"])
    callback = FlashAttentionCallback(strict=True)
    _, got = train(llama(), tmp_path, tokenizer, [callback], **options)
    assert got == pytest.approx(expected, rel=1e-3) and len(got) == STEPS
    for row in callback.report.rows:
        assert row.runs == "cpu implementation" and row.calls.traced, callback.report


def test_dpo(tmp_path, tokenizer):
    """Two rows a preference, and a reference model, which is not the callback's."""
    draw = torch.Generator().manual_seed(2)
    names = ("prompt", "chosen", "rejected")
    pairs = [
        {x: " ".join(map(str, torch.randint(2, VOCAB, (n,), generator=draw).tolist()))
         for x, n in zip(names, lengths, strict=True)}
        for lengths in [(3, 5, 2), (6, 2, 4), (2, 8, 3), (5, 3, 6), (4, 4, 1), (7, 2, 2)]
    ]  # fmt: skip

    def losses(callbacks: list) -> list[float]:
        args = trl.DPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        trainer = trl.DPOTrainer(
            llama(),
            ref_model=llama(),
            args=args,
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    callback = FlashAttentionCallback(strict=True)
    expected, got = losses([]), losses([callback])
    assert got == pytest.approx(expected, rel=1e-3) and len(got) == STEPS
    callback.report.assert_all_on_kernel(allow_cpu=True)
