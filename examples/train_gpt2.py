"""Train GPT-2 of any size on any text, with any attention.

    python examples/train_gpt2.py --demo                      # two minutes, on a CPU or a GPU
    python examples/train_gpt2.py --text ~/project --glob '**/*.c' --context 4096
    python examples/train_gpt2.py --dataset wikitext --dataset-config wikitext-103-raw-v1
    python examples/train_gpt2.py --compare eager,sdpa,hf_flashattn --steps 300
    python examples/train_gpt2.py --init-from runs/1k/model --context 8192 --output runs/8k
    accelerate launch --num_processes 4 --mixed_precision bf16 examples/train_gpt2.py --size gpt2

Without options it trains on the standard library of the running Python: real text with long
documents, on every machine, nothing downloaded. What hf_flashattn changes is one line in
lm/model.py; all else is what any training script has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

try:
    import datasets
    import evaluate  # noqa: F401  (a clear message here instead of a traceback later)
    import torch
    from accelerate import Accelerator
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    sys.exit(
        f"error: expected torch, transformers, accelerate, datasets and evaluate\n"
        f"  got:       {error}\n  next step: pip install '.[examples]' in the repository"
    )

from lm import checkpoints, command, comparison, corpus, results
from lm.failures import UsageError
from lm.fused_loss import require_liger
from lm.gpt2 import gpt2_config, make_gpt2
from lm.gpt2_options import parse, recipe_of, size_of
from lm.initial import initial_weights, saved_config
from lm.model import parameter_count, random_model, with_attention
from lm.packing import BlockBatches, Blocks, PartOrder, held_out_windows, pack_corpus
from lm.perplexity import held_out_perplexity
from lm.tokenizer import get_tokenizer, tokenizer_fingerprint
from lm.training import Progress, Recipe, Trainee, make_trainee, train

COMPARED_STEPS_OF_THE_DEMO = 25


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for an error the user can put right, 130 after Ctrl-C."""
    return command.exit_code(lambda: Run(parse(argv)).go())


class Run:
    """One call of the command line: text, model, training or comparison, results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        checkpoint = command.checked_output(args)
        size = size_of(args)
        if args.liger:
            require_liger()
        begins_from = None if checkpoint else args.init_from  # a checkpoint has all weights
        if begins_from:
            saved_config(begins_from)  # its errors before minutes of tokenising
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
        self.say: Callable[[str], None] = self.accelerator.print
        datasets.disable_progress_bars()
        disable_progress_bar()  # those of Transformers, one for each file; training keeps its own
        with self.accelerator.main_process_first():
            self.corpus, self.tokenizer, self.blocks = self._prepare_text()
        self.config = gpt2_config(size, len(self.tokenizer), args.positions, args.dropout)
        self.weights: dict[str, torch.Tensor] | None = None
        if begins_from:
            self.weights = initial_weights(begins_from, self.config, self.tokenizer)
        self.settings = self._settings()
        self.checkpoint = checkpoint
        self.record = checkpoints.verify(checkpoint, self.settings) if checkpoint else None

    def go(self) -> None:
        args = self.args
        self.accelerator.wait_for_everyone()  # --init-from may be in --output: all have read it
        if args.overwrite and self.accelerator.is_main_process:
            command.remove_earlier_run(args.output)
        self.accelerator.wait_for_everyone()
        outcome: dict[str, Any] = {
            **results.environment(self.accelerator.device),
            "settings": self.settings
            | {
                "mixed_precision": self.accelerator.mixed_precision,
                "compile": args.compile,
                "liger": args.liger,
                "init_from": args.init_from and str(args.init_from),
                "schedule": args.schedule,
            },
            "corpus": self.corpus.describe() | self.blocks.statistics,
        }
        if args.compare:
            outcome |= self._compare(args.attentions, args.steps)
        else:
            outcome |= self._train(args.attention)
            if args.demo and args.on_gpu:
                order = ["hf_flashattn", "sdpa", "eager"]
                compared = self._compare(order, COMPARED_STEPS_OF_THE_DEMO)
                outcome["comparison"] = {"runs": compared["runs"], "ratios": compared["ratios"]}
        if self.accelerator.is_main_process:
            command.write_results(args, outcome, self.say)
        self.accelerator.end_training()

    def _prepare_text(self) -> tuple[corpus.Corpus, Any, Blocks]:
        args = self.args
        text = command.read_corpus(args, self.say)
        tokenizer = get_tokenizer(args.tokenizer, text, args.vocab_size, args.cache_dir)
        blocks = pack_corpus(text, tokenizer, args.context, args.packing, args.seed, args.cache_dir)
        self.held_out = blocks.held_out
        if args.eval_window:
            self.held_out = held_out_windows(
                text, tokenizer, args.eval_window, args.eval_blocks, args.cache_dir
            )
        self.say(
            f"tokens     {blocks.statistics['train_tokens']:,} + "
            f"{blocks.statistics['held_out_tokens']:,} held out, vocabulary"
            f" {len(tokenizer):,}, {len(blocks.train):,} blocks of {args.context}"
        )
        return text, tokenizer, blocks

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the model, and which batch comes when."""
        args, config = self.args, self.config
        return {
            "layers": config.n_layer,
            "hidden": config.n_embd,
            "heads": config.n_head,
            "vocabulary": config.vocab_size,
            "context": args.context,
            "dropout": args.dropout,
            "corpus": self.corpus.fingerprint,
            "packing": args.packing,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "seed": args.seed,
            "batch_size": args.batch_size,
            "accumulate": args.accumulate,
            "eval_window": args.eval_window,
            "positions": None if args.positions == args.context else args.positions,
            "part": None if args.first_token is None else [args.first_token, args.tokens],
            "processes": self.accelerator.num_processes,
        }

    def _trainee(self, attention: str, recipe: Recipe) -> Trainee:
        args, accelerator = self.args, self.accelerator
        model = random_model(
            lambda config: make_gpt2(config, args.liger, args.positions > args.context),
            self.config,
            attention,
            args.seed,
        ).to(accelerator.device)
        if self.weights is not None:
            model.load_state_dict(self.weights)
        report = with_attention(model, attention, args.strict)
        return make_trainee(attention, model, report, recipe, accelerator, args.compile)

    def _batches(self, recipe: Recipe) -> BlockBatches:
        args, order = self.args, None
        if args.first_token is not None:
            per_step = recipe.per_step(self.accelerator.num_processes)
            first = -(-args.first_token // args.context)
            order = PartOrder(
                self.blocks.starts, first, recipe.steps * per_step, per_step, recipe.seed
            )
        return BlockBatches(
            self.blocks.train,
            recipe.batch_size,
            recipe.accumulate,
            recipe.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.accelerator.device,
            order,
        )

    def _evaluate(self, trainee: Trainee) -> dict[str, Any]:
        args = self.args
        return held_out_perplexity(
            trainee, self.held_out, args.eval_blocks, args.batch_size, args.context
        )

    def _train(self, attention: str) -> dict[str, Any]:
        args, accelerator = self.args, self.accelerator
        recipe = recipe_of(args)
        trainee = self._trainee(attention, recipe)
        self.say(
            f"model      GPT-2 with {parameter_count(trainee.model) / 1e6:.1f} M parameters,"
            f" {self.config.n_layer} layers, on {accelerator.device}"
            f" ({accelerator.num_processes} process(es), mixed precision"
            f" {accelerator.mixed_precision})"
        )

        def evaluate_now(progress: Progress) -> None:
            progress.perplexities.append({"step": progress.step, **self._evaluate(trainee)})

        def after_step(progress: Progress) -> None:
            if args.eval_every and progress.step % args.eval_every == 0:
                evaluate_now(progress)
            if args.save_every and progress.step % args.save_every == 0:
                checkpoints.save(args.output, accelerator, progress, self.settings)

        torch.manual_seed(args.seed + 1 + accelerator.process_index)
        if self.checkpoint:
            progress = checkpoints.load(self.checkpoint, accelerator, self.record)
            if progress.step >= recipe.steps:
                raise UsageError(
                    f"steps left to train up to --steps {recipe.steps}",
                    f"a checkpoint at step {progress.step}",
                    "a larger --steps",
                )
            self.say(f"resumed    {self.checkpoint.name}, step {progress.step}")
        else:
            progress = Progress()
            evaluate_now(progress)
        resumed_at = progress.step
        train(trainee, self._batches(recipe), recipe, progress, after_step)
        if progress.step == resumed_at:
            raise UsageError(
                "time for at least one step",
                f"--max-seconds {recipe.max_seconds}, which are over",
                "a larger --max-seconds",
            )
        if progress.perplexities[-1]["step"] != progress.step:
            evaluate_now(progress)

        seconds = progress.seconds_per_step()
        per_step = recipe.per_step(accelerator.num_processes) * args.context
        run = {
            "steps": progress.step,
            "resumed_at": resumed_at,
            "losses": progress.losses,
            "perplexities": progress.perplexities,
            "training_seconds": progress.seconds,
            "seconds_per_step": seconds,
            "tokens_per_second": per_step / seconds,
            "peak_memory_gib": command.peak_gib(accelerator.device),
            "attention_report": results.report_record(trainee.report),
        }
        if trainee.report is not None:
            self.say(f"\n{trainee.report}")
        ran = results.attention_that_ran(attention, trainee.report)
        stopped = (
            f"the time limit of {recipe.max_seconds:g} s"
            if progress.step < recipe.steps
            else "all of them"
        )
        self.say("\n" + "\n".join(results.training_lines(run, ran, stopped)))
        weights = accelerator.get_state_dict(trainee.model)  # of all processes, if it is cut up
        if accelerator.is_main_process:
            model = accelerator.unwrap_model(trainee.model, keep_torch_compile=False)
            model.save_pretrained(args.output / command.MODEL, state_dict=weights)
            self.tokenizer.save_pretrained(args.output / command.MODEL)
        accelerator.free_memory()
        return {"kind": "training", "runs": {attention: run}}

    def _compare(self, attentions: list[str], steps: int) -> dict[str, Any]:
        recipe = recipe_of(self.args, steps)
        trainees = [self._trainee(attention, recipe) for attention in attentions]
        timed = comparison.compare(trainees, self._batches(recipe), recipe)
        runs = {}
        for trainee in trainees:
            runs[trainee.name] = timed[trainee.name].summary() | {
                "perplexities": [{"step": steps, **self._evaluate(trainee)}],
                "attention_report": results.report_record(trainee.report),
            }
            if trainee.report is not None:
                self.say(f"\n{trainee.report}")
        self.say("\n" + "\n".join(results.comparison_lines(runs)))
        return {"kind": "comparison", "runs": runs, "ratios": results.speed_ratios(runs)}


if __name__ == "__main__":
    sys.exit(main())
