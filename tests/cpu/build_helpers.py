"""A checkout with the real build.py and a kernels/ that compiles in a second."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
_VARIABLES = ("CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "MAX_JOBS")


def load_build(package: Path):
    """build.py of `package`, by its path, as setup.py loads it."""
    name = f"_build_{abs(hash(package))}"
    spec = importlib.util.spec_from_file_location(name, package / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def write_kernels(root: Path) -> None:
    """One kernel, and a binding that includes one of torch's headers."""
    (root / "sm90").mkdir(parents=True)
    (root / "params.h").write_text("#pragma once\nint twice(float* x);\n")
    (root / "sm90" / "twice.cu").write_text(
        '#include "params.h"\n'
        "__global__ void twice_kernel(float* x) { x[threadIdx.x] *= 2; }\n"
        "int twice(float* x) { twice_kernel<<<1, 32>>>(x); return 0; }\n"
    )
    (root / "torch_binding.cpp").write_text(
        '#include <torch/headeronly/version.h>\n#include "params.h"\n'
        'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
    )


def make_checkout(folder: Path, monkeypatch) -> Path:
    """Fills `folder` with the checkout and points the environment at a cache of its own."""
    for name in [*_VARIABLES, *(v for v in os.environ if v.startswith("HF_FLASHATTN_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_FLASHATTN_CACHE", str(folder / "cache"))
    (folder / "hf_flashattn").mkdir()
    for name in ("build.py", "_measured.py"):
        shutil.copy(REPO / "hf_flashattn" / name, folder / "hf_flashattn")
    write_kernels(folder / "kernels")
    return folder


def require_nvcc(build) -> None:
    """Skips where there is no nvcc, except in CI, which has one."""
    if build.find_nvcc() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI has nvcc; found none in CUDA_HOME, on PATH or in the usual places")
        pytest.skip("no nvcc on this machine")


def compile_host_program(source: str, folder: Path) -> Path:
    """A program of this folder that includes the kernels' own headers, for the host. May skip."""
    build = load_build(REPO / "hf_flashattn")
    require_nvcc(build)
    program = folder / Path(source).stem
    flags = build.unit_flags(build.source_root(), build.cuda_archs())
    command = [build.find_nvcc(), *flags, Path(__file__).with_name(source), "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    return program
