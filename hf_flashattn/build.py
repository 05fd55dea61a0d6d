"""Compiles kernels/ into libhf_flashattn.so: one ninja graph for setup.py, first use and CLI.

    path = find_or_build()      # the library that belongs to these sources, built if need be

The library is independent of Python and, through torch's stable ABI, of the torch it was built
against (2.11 and later). It is looked for in the installed package (`_lib/`), then in the cache:

    $HF_FLASHATTN_CACHE, else $XDG_CACHE_HOME/hf_flashattn, else ~/.cache/hf_flashattn
        <source hash>-<archs>-<machine>/libhf_flashattn.so   published by one atomic rename
        objects/<tree, archs, compiler>/                     ninja's: an edit rebuilds its units

The source hash covers every file of kernels/ and the flags below: an edit never meets an old
library. Environment: HF_FLASHATTN_CUDA_ARCHS ("90a", several with ";"), HF_FLASHATTN_CACHE,
CUDA_HOME, NVCC_CCBIN, MAX_JOBS.

Only the standard library is imported, and torch never is: setup.py loads this file by its path, in
environments that have neither torch nor the package.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARY_NAME = "libhf_flashattn.so"
DEFAULT_ARCHS = ("90a",)
MIN_NVCC = (12, 4)
MIN_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"  # MIN_TORCH as the stable ABI spells it
BINDING = "torch_binding.cpp"  # the only unit that sees torch's headers

COMPILE_FLAGS = (
    "-std=c++20 -O3 -DNDEBUG -lineinfo --expt-relaxed-constexpr -Xptxas -v "
    "-Xcompiler -fPIC -Xcompiler -fvisibility=hidden"
)
BINDING_FLAGS = f"-DUSE_CUDA -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
LINK_FLAGS = (  # a missing instantiation is an error here, not when the library is loaded
    "-shared -cudart static -Xlinker --no-undefined -Xlinker --no-as-needed "
    "-ltorch -ltorch_cpu -lc10"
)

UNIT_SUFFIXES = {".cu", ".cpp"}
SOURCE_SUFFIXES = UNIT_SUFFIXES | {".cuh", ".h", ".hpp"}
GET_NVCC = "A toolkit from pip: pip install 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.*'"
MEMORY_PER_JOB = 1.5 * 2**30  # bytes; what `make kernels` allows one unit

_PACKAGE = Path(__file__).resolve().parent
_USUAL_CUDA_HOMES = ("/usr/local/cuda", "/opt/cuda")


class BuildError(RuntimeError):
    """The library cannot be built here. The message says what is missing and what to do."""


# ---------------------------------------------------------------- sources and their key


def source_root() -> Path:
    """kernels/: the copy in an installed package, else the one beside the package in a checkout."""
    shipped, checkout = _PACKAGE / "_kernels", _PACKAGE.parent / "kernels"
    root = shipped if shipped.is_dir() else checkout
    if not (root / BINDING).is_file():
        raise BuildError(
            f"The CUDA sources are not there. Expected {BINDING} in {shipped} (installed) "
            f"or in {checkout} (a checkout), found neither. "
            "Next step: reinstall hf_flashattn, or restore kernels/ in the checkout."
        )
    return root


def source_files(root: Path) -> list[Path]:
    """Every file that the library is made of, in a fixed order."""
    return sorted(p for p in root.rglob("*") if p.suffix in SOURCE_SUFFIXES)


def compile_units(root: Path) -> list[Path]:
    """The translation units: every .cu and .cpp below `root`."""
    return [p for p in source_files(root) if p.suffix in UNIT_SUFFIXES]


def source_hash(root: Path) -> str:
    """16 hex digits of all that the library is made of: flags, paths and contents."""
    digest = hashlib.sha256("\0".join((COMPILE_FLAGS, BINDING_FLAGS, LINK_FLAGS)).encode())
    for path in source_files(root):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def cuda_archs() -> tuple[str, ...]:
    """The architectures to compile for, such as ("90a",): HF_FLASHATTN_CUDA_ARCHS or default."""
    text = os.environ.get("HF_FLASHATTN_CUDA_ARCHS", "")
    archs = tuple(sorted(set(filter(None, re.split(r"[;,\s]+", text))))) or DEFAULT_ARCHS
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise BuildError(
                "HF_FLASHATTN_CUDA_ARCHS: expected names such as 90a, separated by ';'; "
                f"got {arch!r} in {text!r}. Nearest supported: {';'.join(DEFAULT_ARCHS)}. "
                "Next step: unset the variable, or correct it."
            )
    return archs


def library_key(root: Path, archs: tuple[str, ...]) -> str:
    """The name of the folder that holds the library of these sources."""
    return f"{source_hash(root)}-sm{'_'.join(archs)}-{platform.machine()}"


def cache_root() -> Path:
    """The folder of built libraries and ninja's objects; see above for who chooses it."""
    if chosen := os.environ.get("HF_FLASHATTN_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hf_flashattn"


# ---------------------------------------------------------------- what the machine has


@dataclass(frozen=True)
class Toolchain:
    """What a build runs: found by find_toolchain, complete and new enough."""

    nvcc: Path
    nvcc_version: str
    ninja: tuple[str, ...]
    torch: Path  # the folder of the installed package


def find_nvcc() -> Path | None:
    """nvcc as named by CUDA_HOME, on PATH, in the usual places, or installed by pip."""
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    on_path = shutil.which("nvcc")
    candidates = [Path(home, "bin", "nvcc") for home in homes]
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path(home, "bin", "nvcc") for home in _USUAL_CUDA_HOMES]
    nvidia = importlib.util.find_spec("nvidia")  # a namespace: cuda-toolkit[nvcc] puts it there
    for folder in (nvidia.submodule_search_locations or ()) if nvidia else ():
        candidates += sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)
    return next((path for path in candidates if path.is_file()), None)


def find_ninja() -> tuple[str, ...] | None:
    """The Python package first: ninjas of two versions in one folder forget each other's work."""
    if importlib.util.find_spec("ninja"):
        return (sys.executable, "-m", "ninja")
    on_path = shutil.which("ninja")
    return (on_path,) if on_path else None


def find_torch() -> Path | None:
    """The folder of the torch package that `import torch` would load, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def find_toolchain() -> Toolchain:
    """Everything a build needs; raises one BuildError that names all that is missing."""
    nvcc, ninja, torch = find_nvcc(), find_ninja(), find_torch()
    cxx = os.environ.get("NVCC_CCBIN") or "g++"  # nvcc reads the variable itself
    version = _nvcc_version(nvcc) if nvcc else ""
    least_nvcc, least_torch = _dotted(MIN_NVCC), _dotted(MIN_TORCH)

    missing = []
    if nvcc is None:
        missing.append(
            f"nvcc: expected CUDA {least_nvcc} or later in CUDA_HOME, on PATH, in "
            f"{' or '.join(_USUAL_CUDA_HOMES)} or as a Python package; found none. {GET_NVCC}"
        )
    elif _numbers(version) < MIN_NVCC:
        missing.append(
            f"nvcc: expected CUDA {least_nvcc} or later, got {version or 'none'} from {nvcc}. "
            f"Set CUDA_HOME to a newer toolkit. {GET_NVCC}"
        )
    if shutil.which(cxx) is None:
        missing.append(f"C++ compiler: expected {cxx} on PATH, found none. Install g++.")
    if ninja is None:
        missing.append("ninja: expected it on PATH or as a Python package. pip install ninja")
    if torch is None:
        missing.append(f"torch: expected {least_torch} or later, found none. pip install torch")
    elif _numbers(got := _torch_version(torch)) < MIN_TORCH:
        missing.append(f"torch: expected {least_torch} or later, got {got}. Upgrade torch.")
    elif not (torch / "include/torch/csrc/stable/library.h").is_file():
        missing.append(f"torch headers: expected torch/csrc/stable in {torch}/include, found none.")
    if missing:
        raise BuildError(
            "The CUDA kernels of hf_flashattn cannot be built here. Missing:\n  - "
            + "\n  - ".join(missing)
            + "\nNext step: add what is missing, then `hf-flashattn build`."
        )
    return Toolchain(nvcc, version, ninja, torch)


def _nvcc_version(nvcc: Path) -> str:
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    found = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return found.group(1) if found else ""


def _torch_version(torch: Path) -> str:
    try:
        text = (torch / "version.py").read_text()
    except OSError:
        return ""
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    return found.group(1) if found else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def default_jobs() -> int:
    """As many compilers at once as cores and free memory allow; MAX_JOBS overrides."""
    if limit := os.environ.get("MAX_JOBS"):
        return max(1, int(limit))
    cores = len(os.sched_getaffinity(0))
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    by_memory = int(int(available.group(1)) * 1024 / MEMORY_PER_JOB) if available else cores
    return max(1, min(cores, by_memory))


# ---------------------------------------------------------------- the graph


def unit_flags(root: Path, archs: tuple[str, ...]) -> list[str]:
    """What every unit is compiled with."""
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*COMPILE_FLAGS.split(), *gencode, "-I", str(root)]


def write_graph(build_dir: Path, root: Path, archs: tuple[str, ...], tools: Toolchain) -> None:
    """Writes build.ninja: an edge for every unit, each of them measured, and the link."""
    nvcc, python = _quoted(tools.nvcc), _quoted(sys.executable)
    # A toolkit from pip keeps cudart in lib/, where its nvcc does not look.
    libraries = " ".join(f"-L {_quoted(p / 'lib')}" for p in (tools.torch, tools.nvcc.parents[1]))
    flags = " ".join(map(_quoted, unit_flags(root, archs)))
    measured = f"{python} -I -S {_quoted(_PACKAGE / '_measured.py')} $out.json"
    lines = [
        "rule compile",
        f"  command = {measured} {nvcc} {flags} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {measured} {nvcc} $in {libraries} {LINK_FLAGS} -o $out",
        "  description = $out",
    ]
    objects = []
    for unit in compile_units(root):
        objects.append(_escaped(f"{unit.relative_to(root)}.o"))
        lines.append(f"build {objects[-1]}: compile {_escaped(unit)}")
        if unit.name == BINDING:
            lines.append(f"  extra = {BINDING_FLAGS} -I {_quoted(tools.torch / 'include')}")
    lines += [f"build {LIBRARY_NAME}: link {' '.join(objects)}", ""]
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text("\n".join(lines))


def _escaped(path: object) -> str:
    """For ninja's list of paths."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _quoted(path: object) -> str:
    """For a command, which first ninja and then the shell read."""
    return shlex.quote(str(path)).replace("$", "$$")


def unit_reports(build_dir: Path, root: Path) -> dict[str, dict]:
    """What every unit cost when last compiled, by its name; the fields are _measured.py's."""
    names = [unit.relative_to(root).as_posix() for unit in compile_units(root)]
    return _reports({name: build_dir / f"{name}.o.json" for name in names})


def _reports(files: dict[str, Path]) -> dict[str, dict]:
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def run_graph(build_dir: Path, root: Path, tools: Toolchain, *, verbose: bool) -> Path:
    """Brings the library in `build_dir` up to date; BuildError carries the compiler's words."""
    command = [*tools.ninja, "-j", str(default_jobs())]
    env = {"NINJA_STATUS": "hf_flashattn: compiling its CUDA kernels [%f/%t, %es] ", **os.environ}
    sink = {"stdout": 2} if verbose else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=build_dir, env=env, text=True, check=False, **sink)
    if done.returncode:
        reports = unit_reports(build_dir, root)
        reports |= _reports({"the link": build_dir / f"{LIBRARY_NAME}.json"})
        failed = {name: report for name, report in reports.items() if report["returncode"]}
        words = "\n".join(f"--- {n}\n{r['output'][-3000:]}" for n, r in failed.items())
        raise BuildError(
            f"Compiling the kernels of hf_flashattn failed (ninja's status {done.returncode}).\n"
            f"{words or done.stdout or ''}\nThe compiler was {tools.nvcc} {tools.nvcc_version}; "
            f"the commands are in {build_dir}/build.ninja. "
            "Next step: mend the above, then `hf-flashattn build`."
        )
    return build_dir / LIBRARY_NAME


# ---------------------------------------------------------------- the library


def library_path() -> Path | None:
    """The library of exactly these sources, shipped or cached; None if it has to be built."""
    root = source_root()
    key = library_key(root, cuda_archs())
    places = [_PACKAGE / "_lib" / key, cache_root() / key]
    if "HF_FLASHATTN_CUDA_ARCHS" not in os.environ:  # then the wheel's builder has chosen them
        places += (_PACKAGE / "_lib").glob(f"{source_hash(root)}-sm*-{platform.machine()}")
    return next((p / LIBRARY_NAME for p in places if (p / LIBRARY_NAME).is_file()), None)


def build_directory(root: Path, archs: tuple[str, ...], tools: Toolchain) -> Path:
    """ninja's directory: one for each source tree, choice of architectures and compiler."""
    identity = f"{root}\0{archs}\0{tools.nvcc}\0{tools.nvcc_version}"
    return cache_root() / "objects" / hashlib.sha256(identity.encode()).hexdigest()[:16]


def find_or_build(*, rebuild: bool = False, refresh: bool = False, verbose: bool = True) -> Path:
    """The path of the library, built first when there is none for these sources.

    Any number of processes may call this at once: one builds, the others wait.

    Args:
        rebuild: compile every unit anew.
        refresh: ask ninja even when there is a library.
        verbose: progress on stderr.

    Raises:
        BuildError: something is missing, or does not compile.
    """
    anyway = rebuild or refresh
    if not anyway and (found := library_path()):
        return found
    root, archs, tools = source_root(), cuda_archs(), find_toolchain()
    build_dir = build_directory(root, archs, tools)
    with _locked(build_dir.with_suffix(".lock"), verbose):
        if not anyway and (found := library_path()):
            return found
        if rebuild:
            shutil.rmtree(build_dir, ignore_errors=True)
        key = library_key(root, archs)
        write_graph(build_dir, root, archs, tools)
        library = run_graph(build_dir, root, tools, verbose=verbose)
        if library_key(root, archs) != key:
            raise BuildError(f"{root} was edited while it was compiled. Next step: build it again.")
        return _published(library, cache_root() / key)


def _published(library: Path, folder: Path) -> Path:
    """Copies the library into its folder in one step: a reader sees all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".{LIBRARY_NAME}.{os.getpid()}"
    try:
        shutil.copyfile(library, staged)
        os.replace(staged, folder / LIBRARY_NAME)
    finally:
        staged.unlink(missing_ok=True)
    return folder / LIBRARY_NAME


@contextlib.contextmanager
def _locked(path: Path, verbose: bool) -> Iterator[None]:
    """Holds the file lock `path`; the system releases it when the process ends, however it ends."""
    import fcntl  # not on every platform; only builders come here

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    except OSError as error:
        raise BuildError(
            f"The cache {cache_root()} cannot be written ({error}). Expected a writable folder. "
            "Next step: set HF_FLASHATTN_CACHE to one."
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if verbose:
                print(
                    "hf_flashattn: waiting: another process compiles the kernels", file=sys.stderr
                )
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
