"""The command hf-flashattn: exit codes, and that its answer alone goes to stdout."""

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


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["build", "--nonsense"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage: hf-flashattn" in capsys.readouterr().err
