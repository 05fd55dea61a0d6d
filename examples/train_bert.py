"""Train BERT of any size on any text by masked language modelling, with any attention.

    python examples/train_bert.py                            # minutes on a CPU, BERT-base on a GPU
    python examples/train_bert.py --corpus ~/corpora/linux --size bert-large --batching unpadded
    python examples/train_bert.py --compare eager,sdpa,hf_flashattn --batching padded --steps 50
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_bert.py

Transformers' Trainer trains, with the flag of hf_flashattn.trainer. The head runs where there is a
label and nowhere else; --batching says what becomes of the padding.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

try:
    import datasets
    import transformers
    from accelerate import Accelerator, PartialState
    from accelerate.utils import gather_object
    from transformers import EvalPrediction
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    sys.exit(
        f"error: expected torch, transformers, accelerate and datasets\n"
        f"  got:       {error}\n  next step: pip install '.[examples]' in the repository"
    )

from lm import checkpoints, command, comparison, results
from lm.bert import bert_config, make_bert, score_rows
from lm.bert_options import parse, recipe_of, size_of
from lm.failures import UsageError
from lm.fused_loss import require_liger
from lm.masking import Collator, MaskedBatches, MaskedRows, make_rows, state_packing_in_a_mask
from lm.model import own_package, parameter_count, random_model, with_attention
from lm.packing import BatchOrder
from lm.tokenizer import get_masking_tokenizer, tokenizer_fingerprint
from lm.training import Recipe, Trainee, make_trainee
from lm.watching import Bar, Watch


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for an error the user can put right, 130 after Ctrl-C."""
    return command.exit_code(lambda: Run(parse(argv)).go())


class Run:
    """One call of the command line: text, model, training or comparison, results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.checkpoint = command.checked_output(args)
        self.size, self.recipe = size_of(args), recipe_of(args)
        if args.liger:
            require_liger()
        if "hf_flashattn" in args.attentions:
            own_package()
        state = PartialState(cpu=args.cpu)
        # As plain values: the Trainer's arguments and an Accelerator reset the state.
        self.processes, self.main = state.num_processes, state.is_main_process
        self.say: Callable[[str], None] = print if self.main else lambda text: None
        datasets.disable_progress_bars()
        disable_progress_bar()  # those of Transformers, one for each file; training keeps its own
        with state.main_process_first():
            self.corpus = command.read_corpus(args, self.say)
            self.tokenizer = get_masking_tokenizer(
                args.tokenizer, self.corpus, args.vocab_size, args.cache_dir
            )
            self.rows = make_rows(
                self.corpus,
                self.tokenizer,
                args.context,
                args.shortest,
                args.batching == "packed",
                args.seed,
                args.cache_dir,
            )
        numbers = self.rows.statistics
        self.say(
            f"tokens     {numbers['train_tokens']:,} + {numbers['held_out_tokens']:,} held out,"
            f" vocabulary {len(self.tokenizer):,}, {len(self.rows.train):,} rows of {args.context},"
            f" {numbers['train_padding']:.0%} padding"
        )
        self.config = bert_config(
            self.size, len(self.tokenizer), args.context, args.dropout, self.tokenizer.pad_token_id
        )
        self.settings = self._settings()
        self.resumed_at, self.evaluations = 0, []
        if self.checkpoint:
            record = checkpoints.verify(self.checkpoint, self.settings)
            self.resumed_at = record["progress"]["step"]
            self.evaluations = record["progress"]["evaluations"]
            if self.resumed_at >= self.recipe.steps:
                raise UsageError(
                    f"steps left to train up to --steps {self.recipe.steps}",
                    f"a checkpoint at step {self.resumed_at}",
                    "a larger --steps",
                )

    def go(self) -> None:
        args = self.args
        if args.overwrite and self.main:
            command.remove_earlier_run(args.output)
        more = {key: getattr(args, key) for key in ("mixed_precision", "compile", "liger")}
        outcome: dict[str, Any] = {
            "settings": self.settings | more,
            "corpus": self.corpus.describe() | self.rows.statistics,
            **(self._compare() if args.compare else self._train(args.attention)),
        }
        if self.main:
            command.write_results(args, outcome, self.say)
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the model, and which batch comes when."""
        args, config = self.args, self.config
        return {
            "model": "BERT",
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "vocabulary": config.vocab_size,
            "context": args.context,
            "shortest": args.shortest,
            "batching": args.batching,
            "dropout": args.dropout,
            "corpus": self.corpus.fingerprint,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "seed": args.seed,
            "batch_size": args.batch_size,
            "accumulate": args.accumulate,
            "processes": self.processes,
        }

    def _model(self, attention: str) -> transformers.BertForMaskedLM:
        args = self.args
        return random_model(
            lambda config: make_bert(config, args.liger), self.config, attention, args.seed
        )

    def _training_rows(self) -> MaskedRows:
        per_step = self.recipe.per_step(self.processes)
        seed = self.args.seed
        order = BatchOrder(len(self.rows.train), per_step, seed)
        length = self.recipe.steps * per_step
        return MaskedRows(self.rows.train, self.tokenizer, length, order, seed)

    def _held_out(self) -> MaskedRows:
        count = min(self.args.eval_blocks, len(self.rows.held_out))
        return MaskedRows(self.rows.held_out, self.tokenizer, count, None, seed=0)

    def _collator(self, attention: str | None = None, packed: bool = False) -> Collator:
        """For `attention`; without one, packed batches keep their position_ids alone."""
        other = packed and attention not in (None, "hf_flashattn")
        form = state_packing_in_a_mask if other else None
        return Collator(self.tokenizer.pad_token_id, self.args.context, packed, form)

    # ---- training --------------------------------------------------------------------------------

    def _train(self, attention: str) -> dict[str, Any]:
        args, recipe = self.args, self.recipe
        model = self._model(attention)
        trainer, watch = self._trainer(attention, model)
        trainer.accelerator.wait_for_everyone()  # an earlier run is removed
        self.say(
            f"model      BERT with {parameter_count(model) / 1e6:.1f} M parameters,"
            f" {self.config.num_hidden_layers} layers, on {trainer.args.device}"
            f" ({trainer.args.world_size} process(es), mixed precision"
            f" {args.mixed_precision}, {args.batching})"
        )
        if self.checkpoint:
            self.say(f"resumed    {self.checkpoint.name}, step {self.resumed_at}")
        trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        callbacks = trainer.callback_handler.callbacks
        report = next((c.report for c in callbacks if hasattr(c, "report")), None)
        steps = trainer.state.global_step
        if watch.evaluations[-1]["step"] != steps:
            trainer.evaluate()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        seconds = watch.progress.seconds_per_step()
        rows = recipe.per_step(self.processes)
        per_row = self.rows.statistics["train_tokens"] / self.rows.statistics["train_rows"]
        run = {
            "steps": steps,
            "resumed_at": self.resumed_at,
            "losses": [entry["loss"] for entry in logged],
            "loss_steps": [entry["step"] for entry in logged],
            "perplexities": watch.evaluations,
            "target": {"accuracy": args.target_accuracy, "reached": watch.reached},
            "training_seconds": watch.progress.seconds,
            "seconds_per_step": seconds,
            "tokens_per_second": rows * per_row / seconds,
            "rows_per_second": rows / seconds,
            "peak_memory_gib": command.peak_gib(trainer.args.device),
            "attention_report": results.report_record(report),
        }
        if report is not None:
            self.say(f"\n{report}")
        stopped = "all of them"
        if watch.reached:
            stopped = f"accuracy {args.target_accuracy:g} after {watch.progress.seconds:.0f} s"
        elif steps < recipe.steps:
            stopped = f"the time limit of {recipe.max_seconds:g} s"
        ran = results.attention_that_ran(attention, report)
        self.say("\n" + "\n".join(results.training_lines(run, ran, stopped)))
        if trainer.is_fsdp_enabled:
            trainer.save_model(str(args.output / command.MODEL))
        elif self.main:
            model.save_pretrained(args.output / command.MODEL)
        if self.main:
            self.tokenizer.save_pretrained(args.output / command.MODEL)
        device = trainer.args.device
        return {**results.environment(device), "kind": "training", "runs": {attention: run}}

    def _trainer(
        self, attention: str, model: transformers.BertForMaskedLM
    ) -> tuple[transformers.Trainer, Watch]:
        args, recipe = self.args, self.recipe
        options: dict[str, Any] = {}
        kind, arguments = transformers.Trainer, transformers.TrainingArguments
        if attention == "hf_flashattn":
            from hf_flashattn.trainer import Trainer as kind
            from hf_flashattn.trainer import TrainingArguments as arguments

            options["flash_attention"] = "strict" if args.strict else "on"
            if args.batching == "unpadded":
                options["flash_attention_unpad"] = True
        every = args.eval_every
        packed = args.batching == "packed"
        watch = Watch(self.settings, args.max_seconds, args.target_accuracy, self.evaluations)
        trainer = kind(
            model,
            arguments(
                output_dir=str(args.output),
                max_steps=recipe.steps,
                per_device_train_batch_size=recipe.batch_size,
                per_device_eval_batch_size=recipe.batch_size,
                gradient_accumulation_steps=recipe.accumulate,
                learning_rate=recipe.lr,
                lr_scheduler_type="linear",
                warmup_steps=math.ceil(recipe.warmup * recipe.steps),
                weight_decay=recipe.weight_decay,
                max_grad_norm=recipe.clip,
                adam_beta2=0.98,
                optim="adamw_torch_fused" if args.on_gpu else "adamw_torch",
                bf16=args.mixed_precision == "bf16",
                fp16=args.mixed_precision == "fp16",
                torch_compile=args.compile,
                seed=args.seed,
                train_sampling_strategy="sequential",  # MaskedRows has the order
                remove_unused_columns=False,
                dataloader_num_workers=args.workers,
                logging_steps=args.log_every,
                logging_nan_inf_filter=False,  # Watch stops at such a loss
                eval_strategy="steps" if every else "no",
                eval_steps=every,
                # evaluate() before train() would prepare the model without DDP, and training would
                # leave it so: each process for itself.
                eval_on_start=self.checkpoint is None,
                save_strategy="steps" if args.save_every else "no",
                save_steps=args.save_every or 500,
                save_total_limit=checkpoints.KEEP,
                label_names=["labels"],
                report_to=[],
                use_cpu=args.cpu,
                ddp_find_unused_parameters=False,
                **options,
            ),
            data_collator=self._collator(attention, packed),
            train_dataset=self._training_rows(),
            eval_dataset=self._held_out(),
            compute_metrics=_metrics,
            preprocess_logits_for_metrics=score_rows,
            callbacks=[watch],
        )
        watch.barrier = trainer.accelerator.wait_for_everyone
        watch.slowest = lambda seconds: max(gather_object([seconds]))
        if trainer.pop_callback(transformers.ProgressCallback):
            trainer.add_callback(Bar)
        return trainer, watch

    # ---- comparison ------------------------------------------------------------------------------

    def _compare(self) -> dict[str, Any]:
        args, recipe = self.args, recipe_of(self.args, self.args.steps)
        accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
        packed = args.batching == "packed"
        trainees = [self._trainee(attention, recipe, accelerator) for attention in args.attentions]
        batches = MaskedBatches(
            self._training_rows(),
            self._collator(packed=packed),
            recipe.batch_size,
            recipe.accumulate,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        timed = comparison.compare(trainees, batches, recipe)
        runs = {}
        for trainee in trainees:
            runs[trainee.name] = timed[trainee.name].summary() | {
                "attention_report": results.report_record(trainee.report)
            }
            if trainee.report is not None:
                self.say(f"\n{trainee.report}")
        self.say("\n" + "\n".join(results.comparison_lines(runs)))
        return {
            **results.environment(accelerator.device),
            "kind": "comparison",
            "runs": runs,
            "ratios": results.speed_ratios(runs),
        }

    def _trainee(self, attention: str, recipe: Recipe, accelerator: Accelerator) -> Trainee:
        args = self.args
        model = self._model(attention).to(accelerator.device)
        unpad = args.batching == "unpadded" and attention == "hf_flashattn"
        report = with_attention(model, attention, args.strict, unpad)
        trainee = make_trainee(attention, model, report, recipe, accelerator, args.compile)
        if args.batching == "packed" and attention != "hf_flashattn":
            trainee.form = state_packing_in_a_mask
        return trainee


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Of the (rows, 3) that score_rows made of the logits."""
    nll, correct, tokens = prediction.predictions.astype("float64").sum(0).tolist()
    return {
        "nll_per_token": nll / tokens,
        "perplexity": math.exp(min(nll / tokens, 700)),
        "accuracy": correct / tokens,
        "tokens": int(tokens),
    }


if __name__ == "__main__":
    sys.exit(main())
