"""Fixtures that several tests of the kernels' schedules share."""

import subprocess

import pytest
from build_helpers import compile_host_program


@pytest.fixture(scope="session")
def dump(tmp_path_factory):
    """Runs requests through schedule_dump.cu: one line of answers for each."""
    program = compile_host_program("schedule_dump.cu", tmp_path_factory.mktemp("schedule"))

    def run(requests: list[str]) -> list[list[str]]:
        done = subprocess.run(
            [program], input="\n".join(requests), capture_output=True, text=True, check=True
        )
        answers = [line.split() for line in done.stdout.splitlines()]
        assert len(answers) == len(requests)
        return answers

    return run
