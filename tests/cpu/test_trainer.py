"""The Trainer's flag and its callback: parsing, every way of training, wrappers, checkpoints."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from model_helpers import bert, calls, gpt2, output, padding, tokens
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import BertForMaskedLM, GPT2LMHeadModel, HfArgumentParser
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import hf_flashattn
from hf_flashattn.patching import PatchError
from hf_flashattn.report import Calls, Row
from hf_flashattn.trainer import (
    FlashAttentionArguments,
    FlashAttentionCallback,
    Trainer,
    TrainingArguments,
    logger,
)

STEPS, ROWS, LAYERS = 3, 3, 2
# New releases of Transformers prefer another name; this one works until 6, which is not supported.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

masked_lm = functools.partial(bert, BertForMaskedLM)


def batches() -> list[dict]:
    """Enough padded rows for STEPS steps in one process.

    No loss at padding, nor at what GPT-2 would predict from padding: such rows are not compared.
    """
    kept = torch.cat([padding(kind) for kind in ("right", "ones", "both")])
    ids = tokens(len(kept))
    from_padding = (kept == 0) | (kept.roll(1, dims=1) == 0)
    labels = ids.masked_fill(from_padding, -100)
    names = ("input_ids", "attention_mask", "labels")
    return [dict(zip(names, row, strict=True)) for row in zip(ids, kept, labels, strict=True)]


def arguments(folder: Path, cls: type = transformers.TrainingArguments, **options):
    defaults = {
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return cls(str(folder), **(defaults | options))


def losses(trainer: transformers.Trainer, **options) -> list[float]:
    """Trains; the loss of every step."""
    trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_both(make, folder: Path, **options) -> FlashAttentionCallback:
    """The stock Trainer with the callback follows the one without it. Returns the callback."""
    args = arguments(folder, **options)
    expected = losses(transformers.Trainer(make(), args, train_dataset=batches()))
    callback = FlashAttentionCallback()
    trainer = transformers.Trainer(make(), args, train_dataset=batches(), callbacks=[callback])
    got = losses(trainer)
    assert got == pytest.approx(expected, rel=1e-3) and len(got) == STEPS
    return callback


@pytest.fixture(autouse=True)
def _a_fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments may set it for good
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def lines():
    """What the callback logged: (level, text) each."""
    seen, level = [], logger.level
    handler = logging.Handler()
    handler.emit = lambda record: seen.append((record.levelname, record.getMessage()))
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield seen
    logger.removeHandler(handler)
    logger.setLevel(level)


# ---- the flag ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], "off"),
        (["--flash_attention"], "on"),
        (["--flash-attention", "strict"], "strict"),
        (["--flash_attention", "True"], "on"),
        (["--flash_attention", "off"], "off"),
    ],
)
def test_the_command_line(tmp_path, given, kept):
    command = ["--output_dir", str(tmp_path), "--use_cpu", *given, "--max_steps", "7"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(command)
    assert (args.flash_attention, args.flash_attention_fallback) == (kept, "sdpa")
    assert args.max_steps == 7 and args.use_cpu
    assert args.to_dict()["flash_attention"] == kept
    assert json.loads(args.to_json_string())["flash_attention"] == kept


@pytest.mark.parametrize(("given", "kept"), [(True, "on"), (False, "off"), ("strict", "strict")])
def test_dict_json_and_yaml(tmp_path, given, kept):
    options = {"output_dir": str(tmp_path), "flash_attention": given, "use_cpu": True}
    options["flash_attention_fallback"] = "eager"
    parser = HfArgumentParser(TrainingArguments)
    path = tmp_path / "args.json"
    path.write_text(json.dumps(options))
    word = {True: "on", False: "off"}.get(given, given)  # which YAML reads as a boolean
    (tmp_path / "args.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nflash_attention: {word}\n"
        "flash_attention_fallback: eager\n"
    )
    for (args,) in (
        parser.parse_dict(options),
        parser.parse_json_file(str(path)),
        parser.parse_yaml_file(str(tmp_path / "args.yaml")),
    ):
        assert (args.flash_attention, args.flash_attention_fallback) == (kept, "eager")
        again = TrainingArguments(**{k: v for k, v in args.to_dict().items() if k in options})
        assert again.flash_attention == kept


def test_what_the_fields_ask_for(tmp_path):
    def options(**fields) -> list[dict]:
        args = arguments(tmp_path, TrainingArguments, **fields)
        return [callback.options for callback in args.flash_attention_callbacks()]

    assert options() == []
    assert [(o["strict"], o["fallback"]) for o in options(flash_attention="on")] == [
        (False, "sdpa")
    ]
    strict = options(flash_attention="strict", flash_attention_fallback="eager")
    assert [(o["strict"], o["fallback"]) for o in strict] == [(True, "eager")]
    for unpad in (False, True):
        (asked,) = options(flash_attention="on", flash_attention_unpad=unpad)
        assert asked["unpad"] is unpad


@pytest.mark.parametrize("field", ["flash_attention", "flash_attention_fallback"])
def test_unknown_words_are_refused(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field}: expected one of .*, got 'flex'"):
        arguments(tmp_path, TrainingArguments, **{field: "flex"})


def test_the_mixin_alone():
    assert FlashAttentionArguments(flash_attention="ON").flash_attention == "on"


# ---- Trainer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, masked_lm], ids=["gpt2", "bert"])
def test_the_flag_trains_on_our_path(tmp_path, make):
    runs = {}
    for flag in ("off", "strict"):
        args = arguments(tmp_path, TrainingArguments, flash_attention=flag)
        trainer = Trainer(model=make(), args=args, train_dataset=batches())
        runs[flag] = losses(trainer)
        report = hf_flashattn.attention_report(trainer.model)
        assert calls(report, "cpu") == (LAYERS * STEPS if flag == "strict" else 0)
    assert runs["strict"] == pytest.approx(runs["off"], rel=1e-3)
    report.assert_all_on_kernel(allow_cpu=True)


def test_strict_refuses_before_training(tmp_path):
    args = arguments(tmp_path, TrainingArguments, flash_attention="strict")
    with pytest.raises(PatchError, match="expected attention modules in Linear"):
        Trainer(torch.nn.Linear(2, 2), args, train_dataset=batches())


def test_arguments_without_the_flag_are_refused(tmp_path):
    with pytest.raises(TypeError, match="got TrainingArguments"):
        Trainer(gpt2(), arguments(tmp_path))


def test_a_callback_that_was_passed_is_the_only_one(tmp_path):
    callback = FlashAttentionCallback(exclude="*.h.1.*")
    args = arguments(tmp_path, TrainingArguments, flash_attention="on")
    trainer = Trainer(gpt2(), args, train_dataset=batches(), callbacks=[callback])
    losses(trainer)
    assert [row.runs for row in callback.report.rows] == ["cpu implementation", "fallback"]
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, FlashAttentionCallback)]
    assert found == [callback]


# ---- the callback alone --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, masked_lm], ids=["gpt2", "bert"])
def test_the_stock_trainer(tmp_path, make, lines):
    callback = train_both(make, tmp_path)
    assert calls(callback.report, "cpu") == LAYERS * STEPS
    callback.report.assert_all_on_kernel(allow_cpu=True)
    (_, begin), (_, end) = lines
    assert "2 attention modules: 2 cpu implementation (SDPA (CPU))" in begin
    assert "0 on the kernel, 6 on the CPU implementation, 0 fell back" in end


def test_encoders_without_padding(tmp_path, lines):
    """The flag's Trainer follows the stock one, its layers without padding in every step."""
    args = arguments(tmp_path)
    expected = losses(transformers.Trainer(bert(BertForMaskedLM), args, train_dataset=batches()))
    asked = {"flash_attention": "on", "flash_attention_unpad": True}
    args = arguments(tmp_path, TrainingArguments, **asked)
    trainer = Trainer(bert(BertForMaskedLM), args, train_dataset=batches())
    assert losses(trainer) == pytest.approx(expected, rel=1e-3)
    (_, begin), (_, end) = lines
    assert begin.endswith("unpadding: bert: yes (expected)")
    assert "unpadding: bert: " in end and "forwards without padding" in end


def test_evaluation_needs_no_training_and_unpatch_ends_it(tmp_path):
    model, callback = gpt2(), FlashAttentionCallback()
    args = arguments(tmp_path, per_device_eval_batch_size=ROWS)
    assert callback.unpatch() is False
    trainer = transformers.Trainer(model, args, eval_dataset=batches(), callbacks=[callback])
    got = trainer.evaluate()["eval_loss"]
    assert calls(callback.report, "cpu") == LAYERS * STEPS
    assert callback.unpatch() and model.config._attn_implementation == "eager"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(got, rel=1e-4)
    assert calls(callback.report, "cpu") == LAYERS * STEPS
    assert callback.unpatch() is False


def test_model_init(tmp_path):
    made, callback = [], FlashAttentionCallback()

    def make():
        made.append(gpt2())
        return made[-1]

    trainer = transformers.Trainer(
        model_init=make,
        args=arguments(tmp_path),
        train_dataset=batches(),
        callbacks=[callback],
    )
    losses(trainer)
    assert len(made) == 2 and trainer.model is made[1]
    assert calls(callback.report, "cpu") == LAYERS * STEPS
    assert calls(hf_flashattn.attention_report(made[1]), "cpu") == LAYERS * STEPS


def test_gradient_checkpointing(tmp_path):
    callback = train_both(gpt2, tmp_path, gradient_checkpointing=True)
    assert calls(callback.report, "cpu") == 2 * LAYERS * STEPS
    assert calls(callback.report, "fallback") == 0


def test_autocast_to_bf16(tmp_path):
    make = functools.partial(gpt2, initializer_range=0.1)
    args = arguments(tmp_path, bf16=True)
    expected = losses(transformers.Trainer(make(), args, train_dataset=batches()))
    callback = FlashAttentionCallback(strict=True)
    trainer = transformers.Trainer(make(), args, train_dataset=batches(), callbacks=[callback])
    assert losses(trainer) == pytest.approx(expected, rel=2e-2)
    assert calls(callback.report, "cpu") == LAYERS * STEPS


def test_torch_compile(tmp_path):
    torch._dynamo.reset()
    callback = FlashAttentionCallback(strict=True)
    expected = losses(transformers.Trainer(gpt2(), arguments(tmp_path), train_dataset=batches()))
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    trainer = transformers.Trainer(gpt2(), args, train_dataset=batches(), callbacks=[callback])
    assert losses(trainer) == pytest.approx(expected, rel=1e-3)
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    for row in callback.report.rows:
        assert row.runs == "cpu implementation" and row.calls.traced, callback.report


def test_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

    def make():
        config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        torch.manual_seed(0)
        return peft.get_peft_model(gpt2(), config)

    assert calls(train_both(make, tmp_path).report, "cpu") == LAYERS * STEPS
    callback, model = FlashAttentionCallback(), make()
    trainer = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=batches(), callbacks=[callback]
    )
    losses(trainer)
    trainer.save_model(str(tmp_path / "adapter"))
    assert "flashattn" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter").eval()
    inputs = {"input_ids": tokens()}
    assert (output(loaded, inputs) - output(model.eval(), inputs)).abs().max() < 1e-4


# ---- what is logged ------------------------------------------------------------------------------


def test_fallbacks_are_logged_with_their_reason(tmp_path, lines):
    callback = FlashAttentionCallback(exclude="*.h.1.*")
    args = arguments(tmp_path)
    trainer = transformers.Trainer(gpt2(), args, train_dataset=batches(), callbacks=[callback])
    losses(trainer)
    (level, begin), (_, end) = lines
    assert level == "WARNING" and "1 fallback (excluded by '*.h.1.*')" in begin
    assert "3 on the CPU implementation, 3 fell back; 1 fallback (excluded by" in end
    lines.clear()
    losses(trainer)  # counted anew
    assert "3 on the CPU implementation, 3 fell back" in lines[-1][1]


def test_all_on_the_kernel_is_no_warning(tmp_path, lines, monkeypatch):
    """As on a GPU: what is forecast and counted there, told to the report."""
    model, callback = gpt2(), FlashAttentionCallback()
    trainer = transformers.Trainer(model, arguments(tmp_path), callbacks=[callback])
    ran = Row("attn", "GPT2Attention", "kernel", "sm90 d64", Calls(kernel=4))
    monkeypatch.setattr(hf_flashattn.Report, "rows", [ran])
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert lines == [
        (
            "INFO",
            "hf_flashattn: GPT2LMHeadModel, 1 attention modules: 1 kernel (sm90 d64)",
        )
    ]


# ---- wrappers ------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_ddp(tmp_path, process_group):
    """One process, but the real wrapper, handed out at the second event."""
    model, callback = gpt2(), FlashAttentionCallback(strict=True)
    inputs = {"input_ids": tokens()}
    expected = output(model, inputs)
    events = arguments(tmp_path), transformers.TrainerState(), transformers.TrainerControl()
    callback.on_init_end(*events, model=model)
    wrapper = torch.nn.parallel.DistributedDataParallel(model)
    callback.on_train_begin(*events, model=wrapper)
    got = output(wrapper, inputs)
    assert (got - expected).abs().max() < 1e-5
    got.square().mean().backward()
    assert calls(callback.report, "cpu") == LAYERS
    assert callback.unpatch() and model.config._attn_implementation == "eager"


def fsdp1(model):
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={GPT2Block})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )


def fsdp2(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
@pytest.mark.parametrize("first", [True, False], ids=["patched-before", "patched-after"])
@pytest.mark.parametrize("wrap", [fsdp1, fsdp2])
def test_fsdp(tmp_path, process_group, wrap, first):
    """The two events, with what the Trainer hands out at each: the model, then its FSDP wrapper."""
    model = gpt2()
    inputs = {"input_ids": tokens()}
    expected = output(model, inputs)
    args, state = arguments(tmp_path), transformers.TrainerState()
    callback = FlashAttentionCallback(exclude="transformer.h.1.attn")
    if first:
        callback.on_init_end(args, state, transformers.TrainerControl(), model=model)
    wrapper = wrap(model)
    callback.on_train_begin(args, state, transformers.TrainerControl(), model=wrapper)
    got = output(wrapper, inputs)
    assert (got - expected).abs().max() < 1e-5
    got.square().mean().backward()
    assert [(row.module, row.runs) for row in callback.report.rows] == [
        ("transformer.h.0.attn", "cpu implementation"),
        ("transformer.h.1.attn", "fallback"),
    ]
    assert callback.unpatch() and model.config._attn_implementation == "eager"


# ---- checkpoints ---------------------------------------------------------------------------------


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "hf_flashattn" not in sys.modules
assert model.config._attn_implementation == "sdpa", model.config._attn_implementation
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_what_is_saved_loads_without_this_package(tmp_path):
    args = arguments(
        tmp_path, TrainingArguments, flash_attention="on", save_strategy="steps", save_steps=STEPS
    )
    trainer = Trainer(gpt2(), args, train_dataset=batches())
    losses(trainer)
    trainer.save_model(str(tmp_path / "model"))
    files = tmp_path / "ids.pt", tmp_path / "logits.pt"
    torch.save(tokens(), files[0])
    expected = output(trainer.model.eval(), {"input_ids": tokens()})
    for saved in (tmp_path / "model", tmp_path / f"checkpoint-{STEPS}"):
        for text in saved.glob("*.json"):
            assert "flash" not in text.read_text(), text
        subprocess.run([sys.executable, "-c", RELOAD, saved, *files], check=True, cwd=tmp_path)
        assert (torch.load(files[1]) - expected).abs().max() < 1e-5
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "model", attn_implementation="hf_flashattn")
    assert (output(loaded.eval(), {"input_ids": tokens()}) - expected).abs().max() < 1e-5


def test_resuming_follows_the_run_that_was_not_stopped(tmp_path):
    def trainer(**options):
        args = arguments(tmp_path, TrainingArguments, flash_attention="on", **options)
        return Trainer(gpt2(), args, train_dataset=batches())

    whole = losses(trainer(save_strategy="steps", save_steps=2))
    resumed = trainer()
    assert losses(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == whole
    assert calls(hf_flashattn.attention_report(resumed.model), "cpu") == LAYERS * (STEPS - 2)
