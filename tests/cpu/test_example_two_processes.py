"""Two gloo processes give the losses of one at the same global batch.

DDP as `accelerate launch` and the Trainer have it, FSDP2 as torch shards it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("torch")
pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("accelerate")

import yaml  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from example_helpers import results, write_documents  # noqa: E402

LIMIT = 240  # seconds; a run takes 10


def launch(*command: object, **environment: str) -> str:
    """Runs it in a process group of its own, which is killed at the limit; its output."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"hangs for {LIMIT} s:\n{output[-4000:]}")
    assert process.returncode == 0, output[-4000:]
    return output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accelerate(config: str) -> list[object]:
    path = EXAMPLES / "accelerate" / config
    return [
        *("-m", "accelerate.commands.launch", "--config_file", path),
        *("--mixed_precision", "no", "--main_process_port", free_port()),
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("script", ["train_gpt2", "train_bert"])
def test_ddp_trains_as_one_process_does(script: str, text: Path, tmp_path: Path):
    """Every process takes its part of a step's rows; an odd number of held-out rows is no trap."""
    options = (
        f"--cpu --text {text} --size tiny --context 32 --vocab-size 300 --steps 6 --held-out 0.2"
        f" --eval-blocks 5 --accumulate 2 --eval-every 3 --attention hf_flashattn"
        f" --cache-dir {tmp_path / 'cache'}"
    ).split()
    AcceleratorState._reset_state(reset_partial_state=True)
    one = [*options, "--batch-size", "4", "--output", str(tmp_path / "one")]
    assert importlib.import_module(script).main(one) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    two = (*options, "--batch-size", 2, "--output", tmp_path / "two", "--save-every", 3)
    launch(*accelerate("ddp.yaml"), EXAMPLES / f"{script}.py", *two)
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    one, two = (result["runs"]["hf_flashattn"] for result in (one, two))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for expected, got in zip(one["perplexities"], two["perplexities"], strict=True):
        assert got["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
        assert got["tokens"] == expected["tokens"]
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


def test_the_trainer_by_ddp_trains_as_one_process_does(tmp_path: Path):
    script = Path(__file__).with_name("trainer_training.py")
    for processes in (1, 2):
        torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", processes)
        where = (tmp_path / f"{processes}.json", tmp_path)
        launch(
            *torchrun, "--master_port", free_port(), script, "ddp", *where, CUDA_VISIBLE_DEVICES=""
        )
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5) and len(two["losses"]) == 4
    assert two["wrapper"] == "DistributedDataParallel"
    assert two["runs"] == ["cpu implementation"] * 2 and two["calls"] == [4, 4]


def test_fsdp2_trains_as_one_process_does(tmp_path: Path):
    script = Path(__file__).with_name("fsdp_training.py")
    launch(script, tmp_path / "one.json")  # a process of its own: no state is left in this one
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port())
    launch(*torchrun, script, tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["losses"][-1] < two["losses"][0]
    assert set(two["runs"]) == {"cpu implementation"}


def test_fsdp_on_a_cpu_is_refused_not_ignored(text: Path, tmp_path: Path):
    command = [sys.executable, EXAMPLES / "train_gpt2.py", "--cpu", "--output", tmp_path / "out"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_FSDP": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=LIMIT)
    assert done.returncode == 2 and "GPUs for FSDP" in done.stderr


def test_the_launch_files_are_for_two_gpus():
    for name, kind in (("ddp.yaml", "MULTI_GPU"), ("fsdp.yaml", "FSDP")):
        config = yaml.safe_load((EXAMPLES / "accelerate" / name).read_text())
        assert config["distributed_type"] == kind and config["num_processes"] == 2
        assert config["mixed_precision"] == "bf16"
