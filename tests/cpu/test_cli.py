"""The command hf-flashattn: exit codes, and that its answer alone goes to stdout."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hf_flashattn import build, cli


def test_build_prints_the_path(monkeypatch, capsys):
    asked = {}

    def find_or_build(**options):
        asked.update(options)
        return Path("/cache/key/libhf_flashattn.so")

    monkeypatch.setattr(build, "find_or_build", find_or_build)
    assert cli.main(["build"]) == 0
    assert capsys.readouterr().out == "/cache/key/libhf_flashattn.so\n"
    assert asked == {"rebuild": False, "verbose": True}
    assert cli.main(["build", "--force", "--quiet"]) == 0
    assert asked == {"rebuild": True, "verbose": False}


def test_build_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HF_FLASHATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(build, "_USUAL_CUDA_HOMES", ())
    assert cli.main(["build"]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert "nvcc: expected CUDA 12.4 or later" in printed.err
    assert "Next step" in printed.err


def test_build_needs_no_model_library():
    """Nothing but the standard library and build.py when the module is loaded."""
    tree = ast.parse(Path(cli.__file__).read_text())
    names = {x.name for node in tree.body if isinstance(node, ast.Import) for x in node.names}
    origins = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names |= {node.module for node in origins if node.module != "hf_flashattn"}
    ours = [x.name for node in origins if node.module == "hf_flashattn" for x in node.names]
    assert ours == ["build"]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_reader_that_stops_early_gets_no_traceback():
    script = (
        "import sys; from hf_flashattn import build, cli; "
        "build.find_or_build = lambda **_: 'x' * 2**20; sys.exit(cli.main(['build']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, b"")


def test_the_exit_status_is_documented(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0 fine, 1 something is wrong or cannot run, 2 wrong usage" in text
    assert all(command in text for command in ("build", "doctor", "report", "bench"))


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["build", "--nonsense"],
        ["doctor", "gpt2"],
        ["report"],
        ["report", "gpt2", "--device", "tpu"],
        ["report", "gpt2", "--dtype", "int8"],
        ["bench", "--repeats", "0"],
        ["bench", "--seqlens", "32768"],
        ["bench", "--head-dims", "wide"],
        ["bench", "--dropouts", "1"],
    ],
    ids=" ".join,
)
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage: hf-flashattn" in capsys.readouterr().err
