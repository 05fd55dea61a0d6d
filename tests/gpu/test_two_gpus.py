"""The Trainer's flag on two GPUs, by DDP and by both FSDPs: the losses of one GPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "cpu" / "trainer_training.py"
LIMIT = 200  # seconds; a run takes 20


def train(way: str, processes: int, folder: Path) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = folder / f"{way}{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
    command += ["--master_port", port, SCRIPT, way, result, folder]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, env=variables, timeout=LIMIT
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return train("ddp", 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    ("way", "wrapper"),
    [
        ("ddp", "DistributedDataParallel"),
        ("fsdp1", "FullyShardedDataParallel"),
        ("fsdp2", "FSDPGPT2LMHeadModel"),
    ],
)
def test_two_gpus_give_the_losses_of_one(way, wrapper, alone, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    two = train(way, 2, tmp_path)
    assert two["wrapper"] == wrapper
    assert two["losses"] == pytest.approx(alone["losses"], abs=0.02)  # of 4.5, in bf16
    assert two["runs"] == ["kernel"] * 2 and all(n >= 4 for n in two["calls"])
