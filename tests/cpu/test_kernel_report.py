"""tools/kernel_report.py: what it reads from ptxas, and each limit."""

import shutil

import kernel_report
import pytest

SYMBOL = "_Z12twice_kernelPf"
OUTPUT = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SYMBOL}' for 'sm_90a'
ptxas info    : Function properties for {SYMBOL}
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 24 bytes cumulative stack size, 1024 bytes smem
"""
SERIALIZED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to insufficient register resources for the wgmma pipeline\n"
)


def unit(output=OUTPUT, cpu_seconds=1.0, peak_bytes=2**28):
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt: it comes with the C++ compiler that kernels need")
    report = {"cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes, "output": output}
    return kernel_report.parse_unit("sm90/inst/twice.cu", report)


def test_numbers_of_a_kernel():
    (kernel,) = unit().kernels
    assert (kernel.symbol, kernel.name, kernel.arch) == (SYMBOL, "twice_kernel(float*)", "sm_90a")
    assert (kernel.registers, kernel.spill_bytes, kernel.stack_bytes) == (168, 36, 24)
    assert kernel.static_shared_bytes == 1024
    row = next(line for line in kernel_report.table([unit()]).splitlines() if "twice_k" in line)
    assert row.split() == ["168", "36", "0", "1024", "twice_kernel"]


def test_within_every_limit():
    assert kernel_report.failures([unit()]) == []


def test_limits():
    (slow,) = kernel_report.failures([unit(cpu_seconds=60.5)])
    assert "60.5 CPU s, expected <= 60" in slow
    (large,) = kernel_report.failures([unit(peak_bytes=int(1.6 * 2**30))])
    assert "1.60 GB to compile, expected <= 1.5" in large
    (long,) = kernel_report.failures([unit(cpu_seconds=59)] * 11)
    assert "on two cores, expected <= 300" in long


def test_a_spill_in_a_hot_loop_fails():
    spilling = unit()
    spilling.kernels[0].hot_spills = 1
    assert "1 spills in the hot loop of twice_kernel" in kernel_report.failures([spilling])[0]


def test_serialised_wgmma_fails_and_a_warning_is_shown():
    (complaint,) = kernel_report.failures([unit(OUTPUT + SERIALIZED)])
    assert "serialized" in complaint
    warned = unit(OUTPUT + "twice.cu(3): warning #177-D: variable was declared but never used\n")
    assert kernel_report.failures([warned]) == []
    assert "warning #177-D" in kernel_report.table([warned])
