"""Which machine instructions every kernel of a library consists of.

    python tools/sass.py [LIBRARY]        # default: the library of this checkout, built if need be

cuobjdump and nvdisasm come from PATH, a CUDA toolkit, or the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm, which `pip install -e '.[dev]'` brings (6 MB).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

SHOWN = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "MUFU", "STL", "LDL", "BAR")
FUNCTION = re.compile(r"^\s*Function : (\S+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def find_tool(name: str) -> Path | None:
    """A CUDA binary utility: on PATH, in the toolkit, or in an installed nvidia package."""
    if on_path := shutil.which(name):
        return Path(on_path)
    places = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations or () if nvidia else ():
        places += sorted(Path(folder).glob("cu*/bin"), reverse=True)
    return next((p / name for p in places if (p / name).is_file()), None)


def opcode_counts(library: Path) -> dict[str, Counter[str]]:
    """Mangled kernel name -> how often each opcode occurs in it. RuntimeError without the tools."""
    tools = {name: find_tool(name) for name in ("cuobjdump", "nvdisasm")}
    if absent := [name for name, path in tools.items() if path is None]:
        packages = " ".join(f"nvidia-cuda-{name}" for name in absent)
        raise RuntimeError(f"Expected {' and '.join(absent)}, found none: pip install {packages}")
    path = os.pathsep.join([str(tools["nvdisasm"].parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [tools["cuobjdump"], "-sass", library],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"cuobjdump -sass {library} failed: {done.stderr.strip()}")
    kernels: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        if function := FUNCTION.match(line):
            counts = kernels.setdefault(function.group(1), Counter())
        elif instruction := INSTRUCTION.match(line):
            counts[instruction.group(1)] += 1
    return kernels


def demangled(names: list[str]) -> dict[str, str]:
    """Mangled -> readable, through c++filt, which comes with the C++ compiler."""
    if not names:
        return {}
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def short_name(name: str) -> str:
    """`sm90::forward_kernel<ForwardPolicy<64, fp16, true, false>>` of what c++filt says."""
    name = name.replace("(hf_flashattn::DType)0", "fp16").replace("(hf_flashattn::DType)1", "bf16")
    return re.sub(r"hf_flashattn::|^void |\(.*\)$", "", name).replace("> >", ">>")


def main() -> int:
    if len(sys.argv) > 1:
        library = Path(sys.argv[1])
    else:
        library = load_build_module().find_or_build()
    kernels = opcode_counts(library)
    print("".join(f"{name:>9}" for name in ("all", *SHOWN)) + "  kernel")
    for mangled, name in demangled(list(kernels)).items():
        counts = kernels[mangled]
        row = (sum(counts.values()), *(counts[opcode] for opcode in SHOWN))
        print("".join(f"{n:>9}" for n in row) + f"  {short_name(name)}")
    return 0


def load_build_module():
    """hf_flashattn/build.py of this checkout, without importing the package and with it torch."""
    path = Path(__file__).resolve().parents[1] / "hf_flashattn" / "build.py"
    spec = importlib.util.spec_from_file_location("_hf_flashattn_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
