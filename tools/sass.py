"""Which machine instructions every kernel of a library consists of, and which its hot loops spill.

    python tools/sass.py [LIBRARY]        # default: the library of this checkout, built if need be
    python tools/sass.py --loops LIBRARY  # what once around each hot loop executes, by pipe
    python tools/sass.py --same A B       # which kernels of two libraries differ; exit code 1: some

LIBRARY: anything that cuobjdump reads, also the .o or .cubin of one unit.

A hot loop is an innermost loop that feeds the tensor cores. Registers spilled around it cost
nothing, and little in its rare branches; a spill on the shortest way around it (STL, LDL) is paid
for in every block.

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
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

SHOWN = ("HGMMA", "UTMALDG", "UTMASTG", "MUFU", "STL", "LDL", "BAR")
# Which unit of a Hopper SM executes what. The ALU runs 64 lanes a cycle, FMA 128, MUFU 16. Which
# rate and unit the 16-bit comparisons have is not documented.
_PIPES = {
    "ALU": "LOP3 PLOP3 IADD3 PRMT SHF FMNMX VIMNMX VIADD SEL FSEL ISETP FSETP LEA F2FP VOTE MOV",
    "FMA": "FFMA FMUL FADD",
    "16-bit": "HFMA2 HMUL2 HADD2 HSET2 HSETP2",
    "MUFU": "MUFU",
    "tensor": "HGMMA",
    "memory": "LDS STS STSM LDSM SHFL LDL STL LDG STG LDC SYNCS BAR RED ATOMG",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}
PIPES = (
    "ALU",
    "FMA",
    "16-bit",
    "IMAD",
    "IMAD.WIDE",
    "MUFU",
    "memory",
    "uniform",
    "tensor",
    "other",
)
FUNCTION = re.compile(r"^\s*Function : (\S+)")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@!P0", or nothing
    opcode: str  # with its modifiers: HGMMA.64x128x16.F32
    operands: str

    @property
    def conditional(self) -> bool:
        return bool(self.predicate)

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


def find_tool(name: str) -> Path | None:
    """A CUDA binary utility: on PATH, in the toolkit, or in an installed nvidia package."""
    if on_path := shutil.which(name):
        return Path(on_path)
    places = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations or () if nvidia else ():
        places += sorted(Path(folder).glob("cu*/bin"), reverse=True)
    return next((p / name for p in places if (p / name).is_file()), None)


def disassemble(library: Path) -> dict[str, list[Instruction]]:
    """Mangled kernel name -> its instructions in order. RuntimeError without the tools."""
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
    return parse(done.stdout)


def parse(text: str) -> dict[str, list[Instruction]]:
    kernels: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if function := FUNCTION.match(line):
            body = kernels.setdefault(function.group(1), [])
        elif found := INSTRUCTION.match(line):
            address, condition, opcode, operands = found.groups()
            predicate = (condition or "").strip()
            body.append(Instruction(int(address, 16), predicate, opcode, operands))
    return kernels


def opcode_counts(body: list[Instruction]) -> Counter[str]:
    """Without modifiers: HGMMA.64x128x16.F32 counts as HGMMA."""
    return Counter(instruction.name for instruction in body)


def pipe(instruction: Instruction) -> str:
    """One of PIPES. Uniform instructions take an issue slot, and no lane of a pipe."""
    name = instruction.name
    if name == "IMAD":
        wide = ".WIDE" in instruction.opcode or ".HI" in instruction.opcode
        return "IMAD.WIDE" if wide else "IMAD"
    return PIPE_OF.get(name) or ("uniform" if name[0] == "U" or name == "R2UR" else "other")


def laps(body: list[Instruction]) -> list[list[Instruction]]:
    """The shortest way around every hot loop: rare branches (masks, a raised maximum) not taken."""
    graph, at = flow(body), {i.address: i for i in body}
    products = {i.address for i in body if i.name == "HGMMA"}
    found = []
    for loop in innermost_loops(graph, products):
        start = min(loop & products)
        came_from: dict[int, int] = {}
        queue = deque([start])
        while queue and start not in came_from:
            here = queue.popleft()
            for after in graph[here]:
                if after in loop and after not in came_from:
                    came_from[after] = here
                    queue.append(after)
        path = [came_from[start]]
        while path[-1] != start:
            path.append(came_from[path[-1]])
        found.append([at[address] for address in reversed(path)])
    return found


def hot_spills(body: list[Instruction]) -> int:
    """Spill stores and loads once around the innermost loops that contain HGMMA (see laps)."""
    return sum(i.name in ("STL", "LDL") for lap in laps(body) for i in lap)


def flow(body: list[Instruction]) -> dict[int, list[int]]:
    """Address -> the addresses that may run next. A call counts as coming back."""
    reconverge: dict[str, int] = {}  # barrier register -> where a BSYNC on it continues
    graph: dict[int, list[int]] = {}
    for here, following in zip(body, [*body[1:], None], strict=True):
        after = [following.address] if following else []
        targets = [int(target, 16) for target in TARGET.findall(here.operands)]
        if here.name == "BSSY":
            reconverge[here.operands.split(",")[0].strip()] = targets[-1]
        elif here.name == "BSYNC":
            after = [reconverge[here.operands.strip()]]
        elif here.name == "BRA":
            may_fall_through = here.conditional or "P" in here.operands  # BRA P5, 0x3500
            after = [*(after if may_fall_through else []), targets[-1]]
        elif here.name in ("EXIT", "RET") and not here.conditional:
            after = []
        graph[here.address] = after
    return graph


def innermost_loops(graph: dict[int, list[int]], marked: set[int]) -> list[set[int]]:
    """The loops with a marked address that have no smaller such loop inside."""
    entered_from = {node: set() for node in graph}
    for node, successors in graph.items():
        for successor in successors:
            entered_from[successor].add(node)
    found = []
    pending = cycles(graph, set(graph))
    while pending:
        loop = pending.pop()
        if not loop & marked:
            continue
        header = min((n for n in loop if entered_from[n] - loop), default=min(loop))
        nested = [c for c in cycles(graph, loop - {header}) if c & marked]
        pending += nested
        if not nested:
            found.append(loop)
    return found


def cycles(graph: dict[int, list[int]], nodes: set[int]) -> list[set[int]]:
    """The strongly connected parts of `nodes` in which something repeats (Tarjan, no recursion)."""
    order: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    open_nodes: set[int] = set()
    found = []
    for start in nodes:
        if start in order:
            continue
        path = [(start, iter(graph[start]))]
        while path:
            node, successors = path[-1]
            if node not in order:
                order[node] = lowest[node] = len(order)
                stack.append(node)
                open_nodes.add(node)
            for successor in successors:
                if successor not in nodes:
                    continue
                if successor not in order:
                    path.append((successor, iter(graph[successor])))
                    break
                if successor in open_nodes:
                    lowest[node] = min(lowest[node], order[successor])
            else:
                path.pop()
                if path:
                    parent = path[-1][0]
                    lowest[parent] = min(lowest[parent], lowest[node])
                if lowest[node] == order[node]:
                    part = set()
                    while node not in part:
                        part.add(stack.pop())
                    open_nodes -= part
                    if len(part) > 1 or node in graph[node]:
                        found.append(part)
    return found


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
    return re.sub(r"hf_flashattn::|^void |\(.*\)$|(?<=>) (?=>)", "", name)


def print_loops(kernels: dict[str, list[Instruction]]) -> None:
    print(f"{'all':>6}" + "".join(f"{pipe_name:>11}" for pipe_name in PIPES) + "  kernel")
    for mangled, name in demangled(list(kernels)).items():
        for lap in laps(kernels[mangled]):
            counts = Counter(pipe(instruction) for instruction in lap)
            row = "".join(f"{counts[pipe_name]:>11}" for pipe_name in PIPES)
            print(f"{len(lap):>6}{row}  {short_name(name)}")


def differences(
    before: dict[str, list[Instruction]], after: dict[str, list[Instruction]]
) -> list[tuple[str, str]]:
    """(name, what of it): kernels that are not instruction by instruction the same."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            found.append((name, "only in the first" if name in before else "only in the second"))
        elif before[name] != after[name]:
            lengths = f"{len(before[name])} and {len(after[name])} instructions"
            found.append((name, lengths))
    return found


def by_short_name(kernels: dict[str, list[Instruction]]) -> dict[str, list[Instruction]]:
    """By what a kernel is, for its mangled name changes with the types of its parameters."""
    names = demangled(list(kernels))
    return {short_name(names[mangled]): body for mangled, body in kernels.items()}


def print_differences(first: Path, second: Path) -> int:
    before, after = by_short_name(disassemble(first)), by_short_name(disassemble(second))
    found = differences(before, after)
    print(f"{len(before.keys() | after.keys()) - len(found)} kernels are the same")
    for name, what in found:
        print(f"{what:>32}  {name}")
    return 1 if found else 0


def main() -> int:
    if sys.argv[1:2] == ["--loops"]:
        print_loops(disassemble(Path(sys.argv[2])))
        return 0
    if sys.argv[1:2] == ["--same"]:
        return print_differences(Path(sys.argv[2]), Path(sys.argv[3]))
    if len(sys.argv) > 1:
        library = Path(sys.argv[1])
    else:
        library = load_build_module().find_or_build()
    kernels = disassemble(library)
    print("".join(f"{name:>9}" for name in ("all", *SHOWN, "hot spill")) + "  kernel")
    for mangled, name in demangled(list(kernels)).items():
        counts = opcode_counts(kernels[mangled])
        row = (counts.total(), *(counts[opcode] for opcode in SHOWN), hot_spills(kernels[mangled]))
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
