"""What the kernels cost to compile, and what the compiler made of them: `make kernels`.

    python tools/kernel_report.py [--json FILE] [--rebuild]

Brings the library up to date and prints for every unit CPU seconds and peak memory of its
compilation, and for every kernel registers, spilled bytes, spill instructions in its hot loops (see
sass.py) and shared memory. Fails when a limit below is passed, when a hot loop spills, or when
ptxas gives up on overlapping wgmma.

The numbers are of each unit's last compilation: nothing is compiled twice to be measured.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sass import demangled, disassemble, hot_spills, load_build_module, short_name

MAX_UNIT_CPU_SECONDS = 60
MAX_UNIT_BYTES = 1.5 * 2**30
MAX_BUILD_SECONDS = 300  # of wall clock on two cores

# Kernels whose hot loop may spill: a pattern of the readable name, how many instructions, and why.
_POLICY = r"(?:\w+::)*ForwardPolicy<(?:\(int\))?"
_BACKWARD = r"(?:\w+::)*BackwardPolicy<(?:\(int\))?"
ALLOWED_SPILLS: dict[str, tuple[int, str]] = {
    rf"ListedPolicy<{_POLICY}64.*false>+": (1, "a reload of a listed tile's coordinates, of 363"),
    rf"ListedPolicy<{_POLICY}64.*true>+": (9, "the same, of 608, with dropout"),
    rf"ListedPolicy<{_POLICY}96": (8, "the same, of 308 or 502"),
    rf"ListedPolicy<{_POLICY}128.*true>+": (1, "the same, of 634, with dropout"),
    r"kernel<(?:\w+::)*QueryGradientPolicy<(?:\(int\))?256.*true>+": (21, "dropout, of 694"),
    rf"HoledPolicy<(?:\w+::)*ListedPolicy<{_POLICY}96": (9, "as listed, of 311 to 533"),
    r"HoledPolicy<(?:\w+::)*QueryGradientPolicy<(?:\(int\))?256.*true>+": (27, "dropout, of 705"),
    rf"kernel<{_BACKWARD}64.*true>+": (6, "dropout's constants, of 1000"),
}

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
STATIC_SHARED = re.compile(r"(\d+) bytes smem")
COMPLAINT = re.compile(r"Potential Performance Loss|wgmma\S* instructions are serialized")
KERNEL_OF_POLICY = re.compile(r"^void ((?:\w+::)*)(\w+)_kernel<([\w:]+Policy<.*>) ?>\(")


@dataclass
class Kernel:
    symbol: str
    arch: str
    name: str = ""  # the symbol in readable form
    registers: int = 0
    spill_bytes: int = 0  # stores and loads, wherever they are
    hot_spills: int = 0  # spill instructions in hot loops
    stack_bytes: int = 0
    static_shared_bytes: int = 0
    dynamic_shared_bytes: int | None = None  # None: the kernel has no plan struct to ask


@dataclass
class Unit:
    name: str
    cpu_seconds: float
    peak_bytes: int
    kernels: list[Kernel] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # warnings and performance complaints


def parse_unit(name: str, report: dict) -> Unit:
    """From the measurements and the `ptxas -v` output that the build kept."""
    unit = Unit(name, report["cpu_seconds"], report["peak_bytes"])
    kernel = Kernel("", "")
    for line in report["output"].splitlines():
        if found := ENTRY.search(line):
            kernel = Kernel(*found.groups())
            unit.kernels.append(kernel)
        elif found := SPILL.search(line):
            kernel.stack_bytes, stores, loads = map(int, found.groups())
            kernel.spill_bytes = stores + loads
        elif found := USED.search(line):
            kernel.registers = int(found.group(1))
            shared = STATIC_SHARED.search(line)
            kernel.static_shared_bytes = int(shared.group(1)) if shared else 0
        elif COMPLAINT.search(line) or "warning" in line:
            unit.remarks.append(line.strip())
    readable = demangled([kernel.symbol for kernel in unit.kernels])
    for kernel in unit.kernels:
        kernel.name = readable[kernel.symbol]
    return unit


def fill_hot_spills(units: list[Unit], library: Path) -> None:
    bodies = disassemble(library) if any(k.spill_bytes for u in units for k in u.kernels) else {}
    for kernel in (k for unit in units for k in unit.kernels if k.spill_bytes):
        kernel.hot_spills = hot_spills(bodies[kernel.symbol])


def fill_dynamic_shared(units: list[Unit], root: Path, nvcc: Path, flags: list[str]) -> None:
    """Asks the compiler for the shared-memory plans: `x_kernel<P>` has its plan in `XSmem<P>`.

    ptxas only knows static shared memory. A host program that includes what the units include and
    prints the sizes of the plans needs no GPU.
    """
    planned = {}
    for unit in units:
        for kernel in unit.kernels:
            if found := KERNEL_OF_POLICY.match(kernel.name):
                namespace, verb, policy = found.groups()
                plan = "".join(part.capitalize() for part in verb.split("_")) + "Smem"
                planned[kernel.name] = f"{namespace}{plan}<{policy}>"
    texts = [
        (root / u.name).read_text() for u in units if any(k.name in planned for k in u.kernels)
    ]
    includes = {line for text in texts for line in re.findall(r'^#include ".*"', text, re.M)}
    plans = sorted(set(planned.values()))
    if not plans:
        return
    prints = "\n".join(f'  std::printf("%zu\\n", sizeof({plan}));' for plan in plans)
    program = "\n".join(["#include <cstdio>", *sorted(includes), f"int main() {{\n{prints}\n}}"])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "plans.cu"
        source.write_text(program)
        run = {"capture_output": True, "text": True, "check": False}
        built = subprocess.run([nvcc, *flags, "-o", f"{folder}/plans", source], **run)
        if built.returncode:
            print(f"shared-memory plans are unknown; the probe failed:\n{built.stderr[-2000:]}")
            return
        sizes = subprocess.run([f"{folder}/plans"], **run).stdout.split()
    bytes_of = dict(zip(plans, map(int, sizes), strict=True))
    for kernel in (k for unit in units for k in unit.kernels):
        kernel.dynamic_shared_bytes = bytes_of.get(planned.get(kernel.name, ""))


def failures(units: list[Unit]) -> list[str]:
    """Every limit that is passed, as a sentence."""
    found = []
    for unit in units:
        if unit.cpu_seconds > MAX_UNIT_CPU_SECONDS:
            found.append(
                f"{unit.name}: {unit.cpu_seconds} CPU s, expected <= {MAX_UNIT_CPU_SECONDS}"
            )
        if unit.peak_bytes > MAX_UNIT_BYTES:
            peak, limit = unit.peak_bytes / 2**30, MAX_UNIT_BYTES / 2**30
            found.append(f"{unit.name}: {peak:.2f} GB to compile, expected <= {limit}")
        for kernel in unit.kernels:
            allowed = [
                n for pattern, (n, _) in ALLOWED_SPILLS.items() if re.search(pattern, kernel.name)
            ]
            if kernel.hot_spills > max(allowed, default=0):
                count, kernel_name = kernel.hot_spills, short_name(kernel.name)
                found.append(f"{unit.name}: {count} spills in the hot loop of {kernel_name}")
        found += [f"{unit.name}: {r}" for r in unit.remarks if COMPLAINT.search(r)]
    if (seconds := two_core_seconds(units)) > MAX_BUILD_SECONDS:
        found.append(f"the build: {seconds:.0f} s on two cores, expected <= {MAX_BUILD_SECONDS}")
    return found


def two_core_seconds(units: list[Unit]) -> float:
    """A lower bound, close for many units, of the build's wall clock on two cores."""
    costs = [unit.cpu_seconds for unit in units]
    return max([sum(costs) / 2, *costs])


def table(units: list[Unit]) -> str:
    heads = ("CPU s", "peak GB", "registers", "spilled B", "hot spills", "shared B")
    lines = ["".join(f"{head:>11}" for head in heads)]
    for unit in units:
        lines.append(f"{unit.cpu_seconds:11.1f}{unit.peak_bytes / 2**30:11.2f}{'':46}{unit.name}")
        for kernel in unit.kernels:
            shared = kernel.static_shared_bytes + (kernel.dynamic_shared_bytes or 0)
            numbers = (kernel.registers, kernel.spill_bytes, kernel.hot_spills, shared)
            row = "".join(f"{number:11}" for number in numbers)
            lines.append(f"{'':22}{row}    {short_name(kernel.name)}")
        lines += [f"{'':22} {remark}" for remark in unit.remarks]
    cpu_seconds = sum(unit.cpu_seconds for unit in units)
    build_seconds = two_core_seconds(units)
    lines.append(f"{len(units)} units: {cpu_seconds:.1f} CPU s, {build_seconds:.0f} s on two cores")
    return "\n".join(lines)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", type=Path, help="write the numbers here as well")
    arguments.add_argument("--rebuild", action="store_true", help="compile every unit anew")
    args = arguments.parse_args()

    build = load_build_module()
    try:
        library = build.find_or_build(rebuild=args.rebuild, refresh=True)
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    root, archs, tools = build.source_root(), build.cuda_archs(), build.find_toolchain()
    reports = build.unit_reports(build.build_directory(root, archs, tools), root)
    units = [parse_unit(name, report) for name, report in reports.items()]
    fill_dynamic_shared(units, root, tools.nvcc, build.unit_flags(root, archs))
    fill_hot_spills(units, library)

    print(table(units))
    print(f"library: {library} ({library.stat().st_size / 2**20:.1f} MB)")
    bad = failures(units)
    if args.json:
        facts = {"nvcc": tools.nvcc_version, "units": [asdict(u) for u in units], "failures": bad}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    for sentence in bad:
        print(f"FAILED {sentence}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
