"""The binding without a GPU: real, on launchers that do nothing, for tensors of the CPU.

    library = host_binding.compile(folder)     # seconds; raises build.BuildError without a compiler
    with host_binding.as_gpu(library):         # from here on, CPU tensors count as CUDA's
        flash_attn_func(q, k, v)               # uninitialised results
        print(host_binding.last_launch()["q"].strides)

What Python, the dispatcher and the binding do for a call can so be seen and timed; results cannot.
The library replaces the CPU's implementations for the rest of the process: use one of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from hf_flashattn import build, ops, support

ROOT = Path(__file__).resolve().parents[1]
TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
NUMBERS = ("seqlen_q", "seqlen_k", "heads_q", "heads_k", "batch", "head_dim")
KEYS = ("key_start", "key_len", "key_bits", "key_bits_stride")  # addresses, and a number


@dataclass(frozen=True)
class View:
    """A TensorView of params.h."""

    data: int
    strides: tuple[int, int, int]  # of batch, sequence, head


def compile(folder: Path) -> Path:
    """The library, in `folder`."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise build.BuildError(f"expected a C++ compiler, {compiler}, found none")
    home = Path(torch.__file__).parent
    (folder / "cuda_runtime_api.h").touch()  # what is used of it, host_binding.cpp has
    library = folder / "libhf_flashattn_host.so"
    command = [compiler, "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-shared"]
    command += ["-fvisibility=hidden", *build.BINDING_FLAGS.split()]
    command += ["-I", folder, "-I", ROOT / "kernels", "-I", home / "include"]
    command += [ROOT / "tools" / "host_binding.cpp", "-o", library, "-L", home / "lib"]
    command += ["-Wl,--no-undefined", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise build.BuildError(f"compiling tools/host_binding.cpp failed:\n{done.stderr[-3000:]}")
    return library


@contextmanager
def as_gpu(library: Path) -> Iterator[None]:
    """CPU tensors say that they are CUDA's, and the ops' CPU implementations are the binding's."""
    with mock.patch.dict(os.environ, {ops._DEFINED_BY: str(os.getpid())}):
        torch.ops.load_library(str(library))
    _last.append(ctypes.CDLL(str(library)).hf_flashattn_last_launch)
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True, create=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(support, "compute_capability", lambda device: (9, 0)),
        mock.patch.object(ops, "_status", ops.LibraryStatus(library, "")),
    ):
        yield


_last: list = []


def last_launch() -> dict[str, View | int]:
    """What the last launch got: its tensors' views, sizes, and addresses of key ranges."""
    numbers = (ctypes.c_int64 * 42)()
    _last[-1](numbers)
    views = {
        name: View(numbers[4 * i], tuple(numbers[4 * i + 1 : 4 * i + 4]))
        for i, name in enumerate(TENSORS)
    }
    return views | dict(zip(NUMBERS + KEYS, numbers[32:], strict=True))
