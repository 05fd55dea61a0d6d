"""What setup.cfg cannot say: ship kernels/ inside the wheel, and build the library where possible.

It is built when nvcc and torch are both visible, which for torch means `--no-build-isolation`.
Otherwise, and when compiling fails, the installation goes on: the first use on a GPU builds, or
says what is missing.

    HF_FLASHATTN_SKIP_BUILD=1     never build here
    HF_FLASHATTN_FORCE_BUILD=1    build, and fail if that fails
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def load_build_module():
    """hf_flashattn/build.py without its package, which would import torch."""
    spec = importlib.util.spec_from_file_location(
        "_hf_flashattn_build", ROOT / "hf_flashattn" / "build.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build_library():
    """The path of the library in the build cache, or None when it is left to the first use."""
    if os.environ.get("HF_FLASHATTN_SKIP_BUILD") == "1":
        return None
    build = load_build_module()
    force = os.environ.get("HF_FLASHATTN_FORCE_BUILD") == "1"
    needs = {"nvcc": build.find_nvcc(), "torch": build.find_torch()}
    absent = " and no ".join(name for name, found in needs.items() if not found)
    if absent and not force:
        print(f"hf_flashattn: no {absent} visible; the first use on a GPU compiles the kernels")
        return None
    try:
        return build.find_or_build()
    except (build.BuildError, OSError) as error:
        if force:
            raise SystemExit(f"HF_FLASHATTN_FORCE_BUILD=1 is set, and: {error}") from error
        warning = "WARNING: hf_flashattn is installed without its CUDA library."
        print(f"\n{warning}\n{error}\n", file=sys.stderr)
        return None


class BuildPy(build_py):
    """Adds hf_flashattn/_kernels (always) and hf_flashattn/_lib (when built) to the wheel."""

    def run(self):
        super().run()
        library = build_library()
        if self.editable_mode:  # a checkout uses its own kernels/ and the cache
            return
        package = Path(self.build_lib) / "hf_flashattn"
        for name in ("_kernels", "_lib"):
            shutil.rmtree(package / name, ignore_errors=True)
        shutil.copytree(ROOT / "kernels", package / "_kernels")
        if library:
            folder = package / "_lib" / library.parent.name
            folder.mkdir(parents=True)
            shutil.copy(library, folder)


class BdistWheel(bdist_wheel):
    """py3-none-<platform> with the library inside, for it fits every Python; else py3-none-any."""

    def run(self):
        self.run_command("build")
        package = Path(self.get_finalized_command("build_py").build_lib) / "hf_flashattn"
        self.root_is_pure = not (package / "_lib").is_dir()
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
