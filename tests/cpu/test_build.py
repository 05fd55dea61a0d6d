"""hf_flashattn/build.py: keys, messages, and the build of a tiny stand-in for kernels/."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_helpers import load_build, make_checkout, require_nvcc, write_kernels


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    return make_checkout(tmp_path, monkeypatch)


@pytest.fixture
def build(checkout):
    return load_build(checkout / "hf_flashattn")


# ---------------------------------------------------------------- keys


def test_key_follows_content_names_and_flags(build, checkout, monkeypatch):
    root = build.source_root()
    assert root == checkout / "kernels"
    keys = [build.source_hash(root)]
    (root / "params.h").write_text("#pragma once\nint twice(float* x);  // edited\n")
    keys.append(build.source_hash(root))
    (root / "params.h").rename(root / "parameters.h")
    keys.append(build.source_hash(root))
    monkeypatch.setattr(build, "COMPILE_FLAGS", build.COMPILE_FLAGS + " -G")
    keys.append(build.source_hash(root))
    assert len(set(keys)) == 4


def test_key_ignores_what_is_no_source(build):
    root = build.source_root()
    before = build.source_hash(root)
    (root / "notes.md").write_text("not compiled")
    assert build.source_hash(root) == before


def test_installed_sources_come_before_a_neighbour_called_kernels(build, checkout):
    write_kernels(checkout / "hf_flashattn" / "_kernels")  # site-packages/kernels may be another's
    assert build.source_root() == checkout / "hf_flashattn" / "_kernels"


def test_missing_sources_are_named(build, checkout):
    shutil.rmtree(checkout / "kernels")
    with pytest.raises(build.BuildError, match=r"torch_binding\.cpp.*reinstall"):
        build.source_root()


def test_archs(build, monkeypatch):
    assert build.cuda_archs() == ("90a",)
    monkeypatch.setenv("HF_FLASHATTN_CUDA_ARCHS", "90a; 80,90a")
    assert build.cuda_archs() == ("80", "90a")
    monkeypatch.setenv("HF_FLASHATTN_CUDA_ARCHS", "sm_90")
    with pytest.raises(build.BuildError, match=r"expected names such as 90a.*got 'sm_90'"):
        build.cuda_archs()


# ---------------------------------------------------------------- what is missing


def test_everything_missing_is_named_at_once(build, checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    monkeypatch.setattr(build, "_USUAL_CUDA_HOMES", (str(checkout / "nowhere"),))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError) as caught:
        build.find_or_build()
    message = str(caught.value)
    for part in ("nvcc: expected CUDA 12.4", "C++ compiler: expected g++", "ninja:", "torch:"):
        assert part in message
    assert "hf-flashattn build" in message


def test_old_compiler_and_old_torch_are_told_apart(build, checkout, monkeypatch):
    nvcc = checkout / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    torch = checkout / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("__version__ = '2.9.1+cu128'\n")
    monkeypatch.setenv("CUDA_HOME", str(checkout))
    monkeypatch.setattr(build, "find_torch", lambda: torch)
    with pytest.raises(build.BuildError) as caught:
        build.find_toolchain()
    assert "expected CUDA 12.4 or later, got 11.8.89" in str(caught.value)
    assert "torch: expected 2.11 or later, got 2.9.1+cu128" in str(caught.value)


def test_unwritable_cache_is_named(build, checkout, monkeypatch):
    (checkout / "file").write_text("")
    monkeypatch.setenv("HF_FLASHATTN_CACHE", str(checkout / "file" / "cache"))
    monkeypatch.setattr(
        build, "find_toolchain", lambda: build.Toolchain(Path("nvcc"), "13.0", ("ninja",), checkout)
    )
    with pytest.raises(build.BuildError, match=r"cannot be written.*HF_FLASHATTN_CACHE"):
        build.find_or_build()


# ---------------------------------------------------------------- building


def test_build_edit_and_failure(build, checkout, capfd):
    """The first build makes the library, a header's edit another one, an error leaves none."""
    require_nvcc(build)
    root = build.source_root()
    assert build.library_path() is None
    first = build.find_or_build()
    progress = capfd.readouterr()
    assert "compiling its CUDA kernels [3/3" in progress.err and not progress.out
    assert build.library_path() == first == build.find_or_build()
    assert sorted(p.name for p in first.parent.iterdir()) == [build.LIBRARY_NAME]

    tools = build.find_toolchain()
    build_dir = build.build_directory(root, build.cuda_archs(), tools)
    reports = build.unit_reports(build_dir, root)
    assert sorted(reports) == ["sm90/twice.cu", "torch_binding.cpp"]
    assert reports["sm90/twice.cu"]["cpu_seconds"] > 0
    assert reports["sm90/twice.cu"]["peak_bytes"] > 2**20
    assert "Compiling entry function" in reports["sm90/twice.cu"]["output"]

    unit = root / "sm90" / "twice.cu"
    unit.write_text(unit.read_text().replace("*= 2", "*= 3"))
    second = build.find_or_build(verbose=True)
    assert second != first and first.is_file()
    assert "[2/2" in capfd.readouterr().err  # the other unit was not compiled again

    unit.write_text("int broken(;\n")
    with pytest.raises(build.BuildError) as caught:
        build.find_or_build(verbose=False)
    assert "twice.cu" in str(caught.value) and "expected" in str(caught.value)
    assert build.library_path() is None
    assert not capfd.readouterr().out


def test_a_missing_definition_fails_at_the_link(build, checkout):
    require_nvcc(build)
    unit = build.source_root() / "sm90" / "twice.cu"
    unit.write_text('#include "params.h"\nint thrice(float* x) { return twice(x); }\n')
    with pytest.raises(build.BuildError, match=r"the link(.|\n)*undefined reference.*twice"):
        build.find_or_build(verbose=False)


def test_two_processes_build_once(build, checkout):
    """Both get the same path; one of them compiles and the other waits."""
    require_nvcc(build)
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('b', sys.argv[1])\n"
        "sys.modules['b'] = b = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(b)\n"
        "print(b.find_or_build())\n"
    )
    command = [sys.executable, "-c", script, str(checkout / "hf_flashattn" / "build.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert results[0][0] == results[1][0] == f"{build.library_path()}\n"
    progress = [err.count("compiling its CUDA kernels") for _, err in results]
    assert sorted(progress) == [0, 3]
    leftovers = [p.name for p in build.library_path().parent.iterdir()]
    assert leftovers == [build.LIBRARY_NAME]
