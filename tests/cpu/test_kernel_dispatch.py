"""Which kernel dispatch.cpp takes for a head dim, and what it says where there is none."""

from __future__ import annotations

import subprocess

import pytest
from build_helpers import compile_host_program

from hf_flashattn import support

HOPPER = 90


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """(direction, head_dim, compute capability) of many requests -> their answers."""
    program = compile_host_program("dispatch_dump.cpp", tmp_path_factory.mktemp("dispatch"))

    def run(requests):
        lines = "\n".join(" ".join(map(str, request)) for request in requests)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_support_and_dispatch_agree(ask, direction):
    """The Python side promises exactly what the table holds."""
    head_dims = range(1, 300)
    answers = ask([(direction, d, HOPPER) for d in head_dims])
    for head_dim, answer in zip(head_dims, answers, strict=True):
        kernel = min((d for d in support.KERNEL_HEAD_DIMS if d >= head_dim), default=None)
        says = f"{direction} d{kernel} 110 "  # bf16, causal, no dropout
        there = head_dim in support.CUDA_HEAD_DIMS
        assert answer.startswith(says) == there, answer
        assert answer.endswith(f"(workspace {kernel if there else 0})"), answer


def test_a_miss_says_what_is_nearest(ask):
    odd, large, other_gpu = ask(
        [("forward", 90, HOPPER), ("backward", 264, HOPPER), ("forward", 64, 80)]
    )
    assert "got 90; nearest 96. Next step: pad" in odd
    assert "up to 256, got 264; nearest 256. Next step: use" in large
    assert "9.0 (Hopper), got 8.0" in other_gpu
