"""Run by torchrun: the steps of examples/train_gpt2.py on a model that FSDP2 has cut up.

    torchrun --nproc_per_node 2 tests/cpu/fsdp_training.py LOSSES.json

Accelerate shards on GPUs alone; on CPUs torch's fully_shard is called here as it would there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import numpy as np
import torch
from accelerate import Accelerator
from lm.gpt2 import SIZES, gpt2_config, make_gpt2
from lm.model import random_model, with_attention
from lm.packing import BlockBatches
from lm.training import Recipe, Trainee, train_step
from torch.distributed.fsdp import fully_shard

ROWS = 4  # of a step, over all processes


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    mine = ROWS // accelerator.num_processes
    recipe = Recipe(5, mine, 1, lr=1e-3, warmup=0.1, weight_decay=0.1, clip=1.0, seed=0)
    config = gpt2_config(SIZES["tiny"], 100, 16, 0.0)
    model = random_model(make_gpt2, config, "hf_flashattn", seed=0)
    report = with_attention(model, "hf_flashattn", strict=True)
    if accelerator.num_processes > 1:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (accelerator.num_processes,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    trainee = Trainee("hf_flashattn", model, optimizer, accelerator, report)
    blocks = np.random.default_rng(0).integers(100, size=(12, 16))
    batches = BlockBatches(blocks, mine, 1, 0, accelerator.process_index, accelerator.num_processes)
    losses = [
        train_step(trainee, batches.step(step).microbatches, recipe, (step + 1) / 5).item()
        for step in range(5)
    ]
    if accelerator.is_main_process:
        found = {"losses": losses, "runs": [row.runs for row in report.rows]}
        Path(sys.argv[1]).write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    # Threads that gloo leaves behind abort a process that ends in the usual way, once in some ten
    # runs ("terminate called without an active exception"). All that counts is written.
    os._exit(0)


if __name__ == "__main__":
    main()
