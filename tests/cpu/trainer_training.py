"""Run by torchrun: GPT-2 in our Trainer with the flag, on as many processes as there are.

    torchrun --nproc_per_node 2 tests/cpu/trainer_training.py ddp|fsdp1|fsdp2 RESULT.json FOLDER

On a CPU by gloo and fp32, which Accelerate can for DDP alone; on GPUs by NCCL and bf16.
RESULT.json: the loss of each step, what every attention module ran on, and the calls.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_flashattn.trainer import Trainer, TrainingArguments

STEPS, ROWS, LENGTH, VOCAB = 4, 4, 32, 100
FSDP = {
    "fsdp1": {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 1, "use_orig_params": True},
    },
    "fsdp2": {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}},
    "ddp": {},
}


def rows() -> list[dict[str, torch.Tensor]]:
    """STEPS batches of ROWS, padded right on every second row."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for n in range(STEPS * ROWS):
        ids = torch.randint(1, VOCAB, (LENGTH,), generator=draw)
        kept = (torch.arange(LENGTH) < (LENGTH - 9 if n % 2 else LENGTH)).long()
        labels = ids.masked_fill(kept == 0, -100)
        made.append({"input_ids": ids, "attention_mask": kept, "labels": labels})
    return made


def main() -> None:
    way, result, folder = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    gpu, processes = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=128,
            n_positions=LENGTH,
            vocab_size=VOCAB,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    args = TrainingArguments(
        folder,
        flash_attention="strict",
        use_cpu=not gpu,
        bf16=gpu,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // processes,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **FSDP[way],
    )
    trainer = Trainer(model, args, train_dataset=rows())
    callback = next(
        x
        for x in trainer.callback_handler.callbacks
        if type(x).__name__ == "FlashAttentionCallback"
    )
    trainer.train()
    if trainer.is_world_process_zero():
        report = callback.report
        found = {
            "losses": [x["loss"] for x in trainer.state.log_history if "loss" in x],
            "runs": [row.runs for row in report.rows],
            "calls": [row.calls.kernel + row.calls.cpu for row in report.rows],
            "wrapper": type(trainer.model_wrapped).__name__,
        }
        result.write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    os._exit(0)  # gloo's threads abort some processes that end in the usual way


if __name__ == "__main__":
    main()
