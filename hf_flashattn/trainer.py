"""The Trainer's flag: training on our kernels from a command line, a JSON file or code.

    from hf_flashattn.trainer import Trainer, TrainingArguments

    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    Trainer(model, args, train_dataset=data).train()    # train.py --flash_attention

The callback alone serves every other Trainer, TRL's too:

    callback = FlashAttentionCallback()
    SFTTrainer(model, args, train_dataset=data, callbacks=[callback]).train()
    print(callback.report)

Transformers has no entry point for such a flag, hence subclasses; nothing global is patched.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from hf_flashattn.patching import patch_model, unpatch_model
from hf_flashattn.report import WIDEST_REASON, Report, Row

# Below Transformers' own logger, so that --log_level holds for it.
logger = logging.get_logger("transformers.hf_flashattn")

_MODES = ("off", "on", "strict")
_FALLBACKS = ("sdpa", "eager")


# ---- the flag ------------------------------------------------------------------------------------


@dataclass
class FlashAttentionArguments:
    """The flag's fields, for any TrainingArguments; the mixin comes first:

    @dataclass
    class Arguments(FlashAttentionArguments, trl.SFTConfig): ...
    """

    # A plain string: HfArgumentParser knows no "flag or word", YAML reads a bare `on` as True.
    flash_attention: str = field(
        default="off",
        metadata={
            "help": "Attention on hf_flashattn's kernels: off; on, where what no kernel takes uses "
            "the fallback and says why; or strict, where it is an error. Without a value: on.",
            "nargs": "?",
            "const": "on",
        },
    )
    flash_attention_fallback: str = field(
        default="sdpa",
        metadata={"help": "What runs the calls that no kernel takes: sdpa or eager."},
    )

    flash_attention_unpad: bool = field(
        default=False,
        metadata={"help": "Run all layers of encoders without padding, not their attention alone."},
    )

    def __post_init__(self) -> None:
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        word = str(self.flash_attention).lower()
        self.flash_attention = {"true": "on", "false": "off"}.get(word, word)
        _one_of("flash_attention", self.flash_attention, _MODES)
        _one_of("flash_attention_fallback", self.flash_attention_fallback, _FALLBACKS)

    def flash_attention_callbacks(self) -> list[TrainerCallback]:
        """What the fields ask for, as the `callbacks` of any Trainer: one, or none if "off"."""
        if self.flash_attention == "off":
            return []
        strict = self.flash_attention == "strict"
        return [
            FlashAttentionCallback(
                strict=strict,
                fallback=self.flash_attention_fallback,
                unpad=self.flash_attention_unpad,
            )
        ]


def _one_of(name: str, value: Any, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ValueError(
            f"hf_flashattn: {name}: expected one of {', '.join(words)}, got {value!r}. "
            f"Next step: leave it out for {words[0]!r}"
        )


@dataclass
class TrainingArguments(FlashAttentionArguments, transformers.TrainingArguments):
    """transformers.TrainingArguments with flash_attention, _fallback and _unpad."""


class Trainer(transformers.Trainer):
    """transformers.Trainer that obeys args.flash_attention; all else is unchanged.

    Raises TypeError if its args have no such field: training would silently be without.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, FlashAttentionArguments):
            raise TypeError(
                "hf_flashattn: args: expected hf_flashattn.trainer.TrainingArguments, or others "
                f"with FlashAttentionArguments, got {type(self.args).__name__}. Next step: take "
                "those, or pass FlashAttentionCallback to transformers.Trainer"
            )
        given = self.callback_handler.callbacks
        if any(isinstance(callback, FlashAttentionCallback) for callback in given):
            return
        for callback in self.args.flash_attention_callbacks():
            self.add_callback(callback)
            callback.on_init_end(self.args, self.state, self.control, model=self.model)


# ---- the callback --------------------------------------------------------------------------------


class FlashAttentionCallback(TrainerCallback):
    """Patches the model of any Trainer, and logs what ran.

    The model stays patched after training, as evaluation and generation want it; a checkpoint knows
    nothing of the patch. A line at the beginning and one at the end of training are of level INFO
    if all attention is on the kernels, else WARNING.

    Args: those of patch_model.

    Attributes:
        report: of the model that is patched now, counting; None before there is one.
    """

    def __init__(
        self,
        *,
        strict: bool = False,
        fallback: str = "sdpa",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        unpad: bool = False,
    ) -> None:
        self.options = {
            "strict": strict,
            "fallback": fallback,
            "include": include,
            "exclude": exclude,
            "unpad": unpad,
        }
        self.report: Report | None = None
        self._model: nn.Module | None = None
        self._before = Counter()

    def on_init_end(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Before DDP, FSDP and torch.compile wrap it, and for a Trainer that only evaluates."""
        self._patch(model)

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Again, as `model_init` has made another model since."""
        self._patch(model)
        self._before = _calls(self.report)
        if state.is_world_process_zero:
            _log(_modules_line(self.report), self.report)

    def on_train_end(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.report is not None:
            _log(_calls_line(self.report, _calls(self.report) - self._before), self.report)

    def unpatch(self) -> bool:
        """Puts the model back as it was before. Returns whether it was patched."""
        return self._model is not None and unpatch_model(self._model)

    def _patch(self, model: nn.Module) -> None:
        self._model, self.report = model, patch_model(model, **self.options)


# ---- the lines -----------------------------------------------------------------------------------


def _log(line: str, report: Report) -> None:
    rows = report.rows
    fine = bool(rows) and all(row.runs == "kernel" for row in rows)
    logger.log(logging.INFO if fine else logging.WARNING, line)


def _modules_line(report: Report) -> str:
    rows = report.rows
    line = f"hf_flashattn: {report.model_name}, {len(rows)} attention modules: {_grouped(rows)}"
    return "; ".join([line, *map(str, report.unpadding)])


def _calls_line(report: Report, calls: Counter[str]) -> str:
    """calls: of this training alone. Reasons are of all calls since the model was patched."""
    rows = report.rows
    line = (
        f"hf_flashattn: {report.model_name}, attention calls: {calls['kernel']} on the kernel, "
        f"{calls['cpu']} on the CPU implementation, {calls['fallback']} fell back"
    )
    if any(row.calls.traced for row in rows):
        line += " (traced by torch.compile: each stands for any number of runs)"
    off = [row for row in rows if row.runs in ("fallback", "mixed", "unsupported")]
    parts = [line, _grouped(off)] if off else [line]
    return "; ".join([*parts, *map(str, report.unpadding)])


def _grouped(rows: list[Row]) -> str:
    """ "10 kernel (sm90 d64), 2 fallback (excluded by 'x')"."""
    groups = Counter((row.runs, row.why) for row in rows)
    return ", ".join(
        f"{n} {runs} ({textwrap.shorten(why, WIDEST_REASON, placeholder=' ...')})"
        for (runs, why), n in groups.items()
    )


def _calls(report: Report) -> Counter[str]:
    counts = [row.calls for row in report.rows]
    return Counter({kind: sum(getattr(c, kind) for c in counts) for kind in _KINDS})


_KINDS = ("kernel", "cpu", "fallback")
