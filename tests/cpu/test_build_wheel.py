"""setup.py through the hooks that pip calls: what a wheel holds, and what never stops one."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from build_helpers import REPO, load_build, make_checkout, require_nvcc

# Runs one hook of the build backend. "hidden" stands for a build environment without torch: a name
# that the path finder does not find is not installed.
HOOK = """
import sys
from importlib.machinery import PathFinder
hook, hidden = sys.argv[1], sys.argv[2].split()
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None:
        None if name.partition(".")[0] in hidden else find(name, path, target)
)
from setuptools import build_meta
print("WHEEL", getattr(build_meta, hook)("out"))
print("IMPORTED", sorted({"torch", "transformers"} & set(sys.modules)))
"""
EVERYTHING = "torch transformers accelerate numpy ninja"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what the wheel is made of, with the tiny kernels/."""
    folder = make_checkout(tmp_path, monkeypatch)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (REPO / name).is_file():
            shutil.copy(REPO / name, folder)
    package = REPO / "hf_flashattn"
    for path in package.rglob("*.py"):
        copy = folder / "hf_flashattn" / path.relative_to(package)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    return folder


def run_hook(project, hook="build_wheel", hidden="", **environment):
    return subprocess.run(
        [sys.executable, "-c", HOOK, hook, hidden],
        cwd=project,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def built_wheel(project, done):
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (project / "out").glob("*.whl")
    return wheel, zipfile.ZipFile(wheel).namelist()


def test_without_torch_the_wheel_carries_the_sources(project):
    done = run_hook(project, hidden=EVERYTHING)
    wheel, names = built_wheel(project, done)
    assert wheel.name.endswith("-py3-none-any.whl")
    for name in ("params.h", "sm90/twice.cu", "torch_binding.cpp"):
        assert f"hf_flashattn/_kernels/{name}" in names
    modules = {str(path.relative_to(REPO)) for path in (REPO / "hf_flashattn").rglob("*.py")}
    assert modules <= set(names), "a package that setup.cfg does not name"
    assert not any(name.endswith(".so") for name in names)
    assert "no torch visible; the first use on a GPU compiles the kernels" in done.stdout
    assert "IMPORTED []" in done.stdout


def test_the_build_environment_needs_setuptools_alone(project):
    done = subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta as b; "
         "print(b.get_requires_for_build_wheel() + b.get_requires_for_build_editable())"],
        cwd=project, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
    text = (REPO / "pyproject.toml").read_text()
    assert 'requires = ["setuptools>=70.1"]' in text


def test_skip_build(project):
    done = run_hook(project, HF_FLASHATTN_SKIP_BUILD="1")
    wheel, _ = built_wheel(project, done)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not (project / "cache").exists()


def test_with_nvcc_and_torch_the_wheel_carries_the_library(project, tmp_path, monkeypatch):
    require_nvcc(load_build(project / "hf_flashattn"))
    wheel, names = built_wheel(project, run_hook(project))
    assert "-py3-none-linux_" in wheel.name
    (library,) = (name for name in names if name.endswith(".so"))
    assert library.startswith("hf_flashattn/_lib/")
    assert not any(".data/" in name for name in names)

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    monkeypatch.setenv("HF_FLASHATTN_CACHE", str(tmp_path / "no-cache"))
    installed = load_build(site / "hf_flashattn")
    assert installed.library_path() == site / library
    (site / "hf_flashattn" / "_kernels" / "params.h").write_text("// edited\n")
    assert installed.library_path() is None


def test_a_failing_compilation_leaves_a_wheel_without_library(project):
    require_nvcc(load_build(project / "hf_flashattn"))
    (project / "kernels" / "sm90" / "twice.cu").write_text("int broken(;\n")
    done = run_hook(project)
    wheel, _ = built_wheel(project, done)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WARNING: hf_flashattn is installed without its CUDA library" in done.stderr
    assert "twice.cu" in done.stderr

    done = run_hook(project, HF_FLASHATTN_FORCE_BUILD="1")
    assert done.returncode != 0
    assert "HF_FLASHATTN_FORCE_BUILD=1 is set" in done.stderr


def test_force_names_what_is_missing(project):
    done = run_hook(project, hidden="torch", HF_FLASHATTN_FORCE_BUILD="1")
    assert done.returncode != 0
    assert "torch: expected 2.11 or later, found none" in done.stderr


def test_an_editable_install_builds_into_the_cache(project):
    require_nvcc(load_build(project / "hf_flashattn"))
    _, names = built_wheel(project, run_hook(project, "build_editable"))
    assert not any("_kernels" in name or name.endswith(".so") for name in names)
    assert load_build(project / "hf_flashattn").library_path().is_relative_to(project / "cache")


def test_pip_wheel_of_this_checkout_ships_every_kernel_source(tmp_path):
    """The real tree, copied (pip builds in place) and through pip itself."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(REPO, copy, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q"]
    environment = {**os.environ, "HF_FLASHATTN_SKIP_BUILD": "1"}
    subprocess.run([*command, "-w", "out"], cwd=copy, env=environment, check=True)
    (wheel,) = (copy / "out").glob("hf_flashattn-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [p for p in (REPO / "kernels").rglob("*") if p.is_file()]
    expected = {f"hf_flashattn/_kernels/{p.relative_to(REPO / 'kernels')}" for p in sources}
    expected |= {f"hf_flashattn/{p.name}" for p in (REPO / "hf_flashattn").glob("*.py")}
    assert expected <= names, sorted(expected - names)
    assert any(name.endswith("entry_points.txt") for name in names)
