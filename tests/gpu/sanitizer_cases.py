"""A small set of launches that touches every kernel, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/gpu/sanitizer_cases.py

Every tensor is an allocation of its own: inside the pool of torch's caching allocator memcheck
would see no overrun of a tensor into its neighbour.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from judge import (
    WRONG_OFFSETS,
    Case,
    make_problem,
    run_kernel,
    run_wrong_bits,
    run_wrong_offsets,
    variants,
)

from hf_flashattn.support import KERNEL_HEAD_DIMS

PACKED = ((100, 130), (0, 0), (1, 1), (65, 40))
RANGES = ((0, 200), (60, 100), (0, 0))


def cases() -> list[Case]:
    dense = variants(
        Case(batch=1, sq=200, sk=260, heads_q=2, heads_k=1),
        dim=KERNEL_HEAD_DIMS,
        causal=(False, True),
        dropout_p=(0.0, 0.1),
        dtype=(torch.float16, torch.bfloat16),
    )
    # Tiles of 192 rows, and causal ones that begin 128 rows ahead.
    dense += variants(
        Case(batch=1, sq=150, sk=260),
        dim=(32, 64, 96),
        causal=(False, True),
        dropout_p=(0.0, 0.1),
        dtype=(torch.float16, torch.bfloat16),
    )
    dense += variants(
        Case(batch=1, sq=1216, sk=1216, causal=True), dim=(32, 64, 96), dropout_p=(0.0, 0.1)
    )
    partial = variants(Case(batch=1, sq=200, sk=260), dim=(8, 40, 72, 104, 136, 200))
    deterministic = variants(
        Case(batch=1, sq=300, sk=300, deterministic=True),
        dim=KERNEL_HEAD_DIMS,
        causal=(False, True),
    )
    packed = variants(
        Case(lengths=PACKED),
        dim=(32, 40, 64, 96, 128, 192),
        causal=(False, True),
        dropout_p=(0.0, 0.1),
    )
    padded = variants(
        Case(batch=3, sq=200, sk=200, key_ranges=RANGES),
        dim=(32, 64, 72, 128, 256),
        causal=(False, True),
    )
    # More tiles than SMs, and sequences than a warp has lanes.
    many = variants(
        Case(lengths=PACKED * 20, heads_q=4, heads_k=2), dim=(64, 128), causal=(False, True)
    )
    padded += variants(
        Case(batch=9, sq=200, sk=200, heads_q=8, key_ranges=RANGES * 3),
        dim=(64, 128),
        causal=(False, True),
    )
    holes = variants(
        Case(batch=4, sq=200, sk=205, holes=0.2),
        dim=(*KERNEL_HEAD_DIMS, 40),
        causal=(False, True),
        dropout_p=(0.0, 0.1),
        deterministic=(False, True),
    )
    # Of more keys than have a kernel for dQ.
    sums = variants(
        Case(batch=1, sq=530, sk=520, heads_k=1), dim=(64, 96, 128), causal=(False, True)
    )
    long = [
        replace(case, **choice)
        for case in sums
        for choice in ({}, {"dropout_p": 0.1}, {"deterministic": True}, {"holes": 0.2})
    ]
    # And more streams than the backward keeps sums for.
    recycled = variants(
        Case(batch=20, sq=70, sk=520, heads_q=16, heads_k=8),
        dim=(64, 96, 104, 128),
        causal=(False, True),
    )
    recycled += variants(
        Case(lengths=((70, 700), (0, 0), (1, 700)) * 12, heads_q=16, heads_k=8),
        dim=(64, 96, 128),
        causal=(False, True),
    )
    wide = variants(Case(lengths=PACKED, deterministic=True), dim=(136, 200), causal=(False, True))
    return dense + partial + deterministic + packed + many + padded + holes + recycled + long + wide


if __name__ == "__main__":
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first allocation
    for case in cases():
        run_kernel(make_problem(case))
    for offsets in WRONG_OFFSETS:
        run_wrong_offsets(offsets)
    for dim in KERNEL_HEAD_DIMS:
        run_wrong_bits(False, dim)
        run_wrong_bits(True, dim)
    torch.cuda.synchronize()
    print(f"{len(cases())} cases and {len(WRONG_OFFSETS)} wrong offsets launched")
